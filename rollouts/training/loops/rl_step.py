"""What is learned from one batch of rollouts: log-probs -> advantages -> mini-batches -> optimizer steps.

Shapes: S samples, n_i learned tokens of sample i, M learned tokens of all samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import anyio.to_thread
import numpy as np
import torch

from rollouts.errors import UserError
from rollouts.training import distributed_utils as ranks
from rollouts.training.algorithms.advantages import AdvantageBatch, AdvantageConfig, Advantages, compute_advantages
from rollouts.training.algorithms.corrections import CorrectionConfig, effective_sample_size, named_correction
from rollouts.training.algorithms.kl import kl_in_reward
from rollouts.training.algorithms.policy_losses import PolicyLossConfig, step_fields
from rollouts.training.backends.protocol import Batch
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.loops.rl_batches import (
    as_arrays,
    collate_rl_step,
    draw_mini_batches,
    is_learnable,
    learned_positions,
    prepare_rl_batch,
)
from rollouts.training.loops.rl_metrics import Stopwatch
from rollouts.training.sft_losses import LossFn, causal_lm_loss
from rollouts.training.types import RLTrainingConfig, RolloutBatch, Sample, TrainFuture
from rollouts.training.weight_sync import Reference

T = TypeVar("T")
Arrays = list[np.ndarray]


class LogProbSource(Protocol):
    """A reference model, or anything else that knows log-probs of tokens.

    One that KL ``full`` is measured against also has ``compute_states(batches)``, see ``FrozenModel``.
    """

    def compute_log_probs(self, batch: Batch | Sequence[Batch], temperature: float = 1.0) -> TrainFuture[list[Any]]: ...


@dataclass(frozen=True)
class ProcessRewards:
    """PRIME's implicit process reward model: its log-ratio to where it started is the reward of a token.

    Args:
        backend: the model, which learns from outcomes; its loss is ``make_prime_loss(beta)``.
        reference: the same model, frozen at its start.
        beta: scale of the log-ratio.
    """

    backend: PyTorchTrainingBackend
    reference: LogProbSource
    beta: float = 0.05


@dataclass(frozen=True)
class RLModels:
    """The models that take part in a step.

    Args:
        policy: learns, with its ``loss_fn``.
        loss: what that was made of, or the function itself if it is the user's own.
        reference: its log-probs bound how far the policy moves; None = no reference.
        critic: learns values (PPO); the policy itself where its model has a value head; None = advantages need none.
        process: learns rewards of tokens (PRIME); None = outcomes are all there is.
    """

    policy: PyTorchTrainingBackend
    loss: PolicyLossConfig | LossFn
    reference: LogProbSource | None = None
    critic: PyTorchTrainingBackend | None = None
    process: ProcessRewards | None = None

    @property
    def has_value_head(self) -> bool:
        """Whether the critic is a head on the policy's trunk."""
        return self.critic is self.policy

    @property
    def companions(self) -> list[PyTorchTrainingBackend]:
        """The models that learn beside the policy."""
        beside = (None if self.has_value_head else self.critic, self.process.backend if self.process else None)
        return [model for model in beside if model is not None]


async def learn_from_rollouts(
    models: RLModels, samples: Sequence[Sample], config: RLTrainingConfig, step: int, watch: Stopwatch
) -> dict[str, float]:
    """Learn from learnable samples: whole groups, judged. Gives each its ``advantages``; returns the step's metrics.

    The gradient of a mini-batch does not depend on how it is packed or divided over ranks.
    """
    if not samples:
        return {"optimizer_steps": 0}
    given, samples = samples, [as_arrays(sample) for sample in samples]
    _require_known_log_probs(samples)
    columns: dict[str, Sequence[np.ndarray]] = {}
    metrics: dict[str, float] = {}
    with watch.phase("log_probs"):
        if needs_old_log_probs(config, models.loss) and models.has_value_head:
            columns["old_log_probs"], columns["values"] = await read_log_probs_and_values(
                models.policy, samples, config
            )
        elif needs_old_log_probs(config, models.loss):
            columns["old_log_probs"] = await read_log_probs(models.policy, models.policy, samples, config)
        elif config.old_log_probs == "rollout":
            columns["old_log_probs"] = _rollout_log_probs(samples)
        if config.advantage == "optimal_token_baseline":
            columns["collision"] = await read_per_token(
                lambda batches: models.policy.compute_collisions(batches, config.temperature),
                models.policy,
                samples,
                config,
            )
        if models.reference is not None and needs_ref_log_probs(config, models.loss):
            columns["ref_log_probs"] = await read_log_probs(models.reference, models.policy, samples, config)
        if models.critic is not None and "values" not in columns:
            columns["values"] = await read_per_token(models.critic.compute_values, models.policy, samples, config)
        if models.process is not None:
            columns["process_rewards"], judged = await learn_process_rewards(models.process, samples, config)
            metrics |= judged

    estimated = estimate_advantages(samples, columns, config)
    set_advantages(samples, _split(estimated.advantages.numpy(), samples))
    for sample, arrays in zip(given, samples, strict=True):
        sample.advantages = arrays.advantages
    if estimated.returns is not None:
        columns["returns"] = _split(estimated.returns.numpy(), samples)

    updates = []
    with watch.phase("train"):
        for epoch in range(config.num_epochs):
            for part in draw_mini_batches(samples, config.mini_batches, (config.seed, step, epoch)):
                fields = dict(columns)
                if isinstance(models.loss, PolicyLossConfig):
                    fields |= select_tokens(models.loss, samples, part, columns, config.seed + step)
                batches, _ = collate_rl_step(
                    samples,
                    part,
                    config.max_tokens_per_micro_batch,
                    fields,
                    models.policy.rank,
                    models.policy.world_size,
                    shares_prompts(models.policy),
                )
                updates.append(await update(models, batches, config, step))
    return {**metrics, **estimated.metrics, **_average(updates), "optimizer_steps": len(updates)}


def prepare_grpo_batch(
    batch: RolloutBatch | Sequence[Sample], rewards: Sequence[float], config: RLTrainingConfig
) -> Batch:
    """One packed batch with the advantages that ``rewards``, one a sample, make by the run's estimator.

    Samples that cannot be learned from (no learned tokens, no reward) are left out.
    """
    given = list(batch.samples if isinstance(batch, RolloutBatch) else batch)
    for sample, reward in zip(given, rewards, strict=True):
        sample.reward = float(reward)
    samples = [sample for sample in given if is_learnable(sample)]
    if samples:
        set_advantages(samples, _split(estimate_advantages(samples, {}, config).advantages.numpy(), samples))
    return prepare_rl_batch(samples)


async def update(models: RLModels, batches: list[Batch], config: RLTrainingConfig, step: int) -> dict[str, float]:
    """One optimizer step of the policy and, where there is one, of the critic."""
    metrics: dict[str, float] = {}
    policy, critic = models.policy, models.critic
    values_alone = critic is not None and step < config.value_steps
    if critic is not None and critic is not policy:
        learned = await perform(lambda: critic.forward_backward(batches), config)
        updated = await perform(critic.optim_step, config)
        metrics = {f"critic/{name}": value for name, value in {**learned, **updated}.items() if name != "step"}
        if values_alone:
            return metrics
    if values_alone:
        batches = [{**batch, "values_alone": True} for batch in batches]
    elif models.reference is not None and measures_full_kl(models.loss):
        reference: Any = models.reference
        states = await perform(lambda: reference.compute_states(batches), config)
        batches = [{**batch, "ref_logits": found} for batch, found in zip(batches, states, strict=True)]
    learned = await perform(lambda: policy.forward_backward(batches), config)
    updated = await perform(lambda: policy.optim_step(lr=config.learning_rate), config)
    return metrics | learned | {name: value for name, value in updated.items() if name != "step"}


async def learn_process_rewards(
    process: ProcessRewards, samples: Sequence[Sample], config: RLTrainingConfig
) -> tuple[Arrays, dict[str, float]]:
    """Rewards [n_i] of each sample's tokens, by the model as it is; then one optimizer step of it on the outcomes."""
    plain = replace(config, temperature=1.0)
    now = await read_log_probs(process.backend, process.backend, samples, plain)
    start = await read_log_probs(process.reference, process.backend, samples, plain)
    rewards = [process.beta * (a - b) for a, b in zip(now, start, strict=True)]
    batches, members = collate_rl_step(
        samples,
        range(len(samples)),
        config.max_tokens_per_micro_batch,
        {"ref_log_probs": start},
        process.backend.rank,
        process.backend.world_size,
        shares_prompts(process.backend),
    )
    outcomes = [min(max(float(s.reward or 0.0), 0.0), 1.0) for s in samples]
    judged = [
        {**batch, "correct": torch.tensor([outcomes[i] for i in indices], dtype=torch.float32)}
        for batch, indices in zip(batches, members, strict=True)
    ]
    learned = await perform(lambda: process.backend.forward_backward(judged), config)
    updated = await perform(process.backend.optim_step, config)
    return rewards, {f"process/{name}": value for name, value in {**learned, **updated}.items() if name != "step"}


async def perform(operation: Callable[[], TrainFuture[T]], config: RLTrainingConfig) -> T:
    """Await a backend's operation; beside the event loop where rollouts go on being generated meanwhile."""
    if config.max_staleness == 0:
        return await operation()
    return await anyio.to_thread.run_sync(lambda: operation().wait())


def own_log_probs(policy: PyTorchTrainingBackend) -> tuple[Reference | None, float]:
    """The policy's own log-probs of given tokens, to check engines by, and how far theirs may be off on average.

    On several ranks there are none: every one of them would have to take part.
    """
    asked = threading.Lock()

    def log_probs(ids: Sequence[int]) -> list[float]:
        sample = Sample(tokens=ids, loss_mask=[1.0] * len(ids))
        with asked:  # engines are checked side by side
            batches, _ = collate_rl_step([sample], [0], len(ids), share_prompts=shares_prompts(policy))
            [values] = policy.compute_log_probs(batches).wait()
        return [0.0, *values.tolist()]

    exact = policy.compute_dtype == torch.float32
    return (log_probs if policy.world_size == 1 else None), (0.05 if exact else 0.25)


# Losses ---------------------------------------------------------------------------------------------------------------


def policy_loss(config: RLTrainingConfig, backend: PyTorchTrainingBackend) -> PolicyLossConfig | LossFn:
    """The loss that the run asks for: a configuration, or a function of the user's own.

    Rollouts that may be stale are corrected (truncated importance sampling) unless the run says otherwise.

    Raises:
        UserError: the loss has another temperature than the run.
    """
    loss = config.loss
    if loss is None:
        loss = {} if backend.loss_fn is causal_lm_loss else backend.loss_fn
    if callable(loss):
        return loss
    if isinstance(loss, Mapping):
        loss = PolicyLossConfig(**loss)
    if loss.temperature not in (1.0, config.temperature):
        raise UserError(
            f"the loss has temperature {loss.temperature} and the run {config.temperature}; the rollouts have one only"
        )
    correction = config.correction
    if correction is None:
        correction = "tis" if config.max_staleness > 0 and not loss.correction.active else loss.correction
    if not isinstance(correction, CorrectionConfig):
        correction = named_correction(correction)
    return replace(loss, temperature=config.temperature, correction=correction)


def needs_old_log_probs(config: RLTrainingConfig, loss: PolicyLossConfig | LossFn) -> bool:
    """Whether the trainer computes log-probs before the first update.

    With one optimizer step they would be those of the loss itself, whose ratio is 1 without them. How old the rollouts
    are does not matter: their correction compares the same log-probs with the sampler's.
    """
    if config.old_log_probs != "auto":
        return config.old_log_probs == "trainer"
    several = config.num_epochs * config.mini_batches > 1
    by_name = isinstance(loss, PolicyLossConfig) and loss.name in ("clip_cov", "kl_cov")
    own_loss = not isinstance(loss, PolicyLossConfig)
    by_advantage = config.kl_in_reward > 0 or config.advantage == "optimal_token_baseline"
    return several or by_name or own_loss or by_advantage


def needs_ref_log_probs(config: RLTrainingConfig, loss: PolicyLossConfig | LossFn) -> bool:
    """Whether the reference's log-probs are asked for: KL ``full`` takes its whole distributions in their place."""
    return config.kl_in_reward > 0 or not isinstance(loss, PolicyLossConfig) or loss.kl != "full"


def measures_full_kl(loss: PolicyLossConfig | LossFn) -> bool:
    """Whether the loss takes the reference's distributions over the vocabulary."""
    return isinstance(loss, PolicyLossConfig) and loss.kl.startswith("full")


def select_tokens(
    loss: PolicyLossConfig, samples: Sequence[Sample], part: Sequence[int], columns: Mapping[str, Any], seed: int
) -> dict[str, Arrays]:
    """``selected`` of all samples' tokens for the losses that choose among the tokens of a whole optimizer step."""
    if loss.name not in ("clip_cov", "kl_cov"):
        return {}
    chosen = [samples[i] for i in part]
    advantages = np.concatenate([np.asarray(s.advantages, np.float32)[learned_positions(s)] for s in chosen])
    old = np.concatenate([columns["old_log_probs"][i] for i in part])
    found = step_fields(loss, torch.from_numpy(advantages), torch.from_numpy(old), seed)["selected"].numpy()
    by_place = dict(zip(part, _split(found, chosen), strict=True))
    return {"selected": [by_place.get(i, np.zeros(s.num_loss_tokens, bool)) for i, s in enumerate(samples)]}


# Advantages -----------------------------------------------------------------------------------------------------------


def estimate_advantages(
    samples: Sequence[Sample], columns: Mapping[str, Sequence[np.ndarray]], config: RLTrainingConfig
) -> Advantages:
    """Advantages [M] of all samples by the run's estimator, groups told by ``group_id``.

    A user's own function is called as ``advantage(AdvantageBatch, **advantage_options)`` and gives ``Advantages``, or a
    tensor [S] or [M]. A ``baseline`` is subtracted from each reward instead.

    Raises:
        UserError: the estimator lacks what it needs, or gives another number of advantages.
    """
    sequence_ids = torch.from_numpy(np.repeat(np.arange(len(samples)), [s.num_loss_tokens for s in samples]))
    rewards = torch.tensor([float(s.reward or 0.0) for s in samples], dtype=torch.float64)
    flat = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in columns.items()}
    token_rewards = None
    if config.kl_in_reward > 0:
        if "ref_log_probs" not in flat:
            raise UserError("kl_in_reward needs a reference model; give reference")
        zeros = torch.zeros(len(sequence_ids), dtype=torch.float32)
        token_rewards = kl_in_reward(zeros, flat["old_log_probs"], flat["ref_log_probs"], config.kl_in_reward)
    name = config.advantage
    if name == "gdpo":
        rewards = torch.tensor([list(s.rewards.values()) for s in samples], dtype=torch.float64)
    batch = AdvantageBatch(
        rewards=rewards,
        group_ids=[s.group_id or f"\0{i}" for i, s in enumerate(samples)],
        sequence_ids=sequence_ids,
        token_rewards=token_rewards,
        values=flat.get("values"),
        log_probs=flat.get("old_log_probs"),
        collision=flat.get("collision"),
        process_rewards=flat.get("process_rewards"),
        greedy_rewards=_greedy_rewards(samples) if name == "remax" else None,
    )
    if config.baseline is not None:
        found: Any = torch.tensor(compute_advantages(rewards.tolist(), config.baseline))
    elif callable(name):
        found = name(batch, **config.advantage_options)
    else:
        found = compute_advantages(AdvantageConfig(name, **config.advantage_options), batch)
    if isinstance(found, Advantages):
        return found
    found = torch.as_tensor(found, dtype=torch.float32)
    per_token = found[sequence_ids] if len(found) == len(samples) else found
    if per_token.shape != sequence_ids.shape:
        raise UserError(
            f"the advantage function gave {list(found.shape)} values for {len(samples)} samples with "
            f"{len(sequence_ids)} learned tokens; give one a sample or one a token"
        )
    return Advantages(per_token, None, {})


def set_advantages(samples: Sequence[Sample], per_token: Arrays) -> None:
    """Write advantages of learned tokens [n_i] into the samples; every other token has 0."""
    for sample, values in zip(samples, per_token, strict=True):
        whole = np.zeros(len(sample.tokens), np.float32)
        whole[learned_positions(sample)] = values
        sample.advantages = whole.tolist()


def _greedy_rewards(samples: Sequence[Sample]) -> torch.Tensor:
    missing = [s.id for s in samples if "greedy_reward" not in s.metadata]
    if missing:
        raise UserError(f"remax needs the reward of a greedy rollout; sample {missing[0]!r} has no greedy_reward")
    return torch.tensor([float(s.metadata["greedy_reward"]) for s in samples], dtype=torch.float64)


# Quantities of tokens -------------------------------------------------------------------------------------------------


async def read_log_probs(
    source: LogProbSource, backend: PyTorchTrainingBackend, samples: Sequence[Sample], config: RLTrainingConfig
) -> Arrays:
    """Log-probs [n_i] of each sample by ``source``, at the run's temperature."""
    return await read_per_token(
        lambda batches: source.compute_log_probs(batches, config.temperature), backend, samples, config
    )


async def read_log_probs_and_values(
    policy: PyTorchTrainingBackend, samples: Sequence[Sample], config: RLTrainingConfig
) -> tuple[Arrays, Arrays]:
    """Both [n_i] of each sample, in one pass over a policy that is its own critic."""
    both = await read_per_token(
        lambda batches: policy.compute_log_probs_and_values(batches, config.temperature), policy, samples, config
    )
    return [x[:, 0] for x in both], [x[:, 1] for x in both]


async def read_per_token(
    compute: Callable[[list[Batch]], TrainFuture[list[torch.Tensor]]],
    backend: PyTorchTrainingBackend,
    samples: Sequence[Sample],
    config: RLTrainingConfig,
) -> Arrays:
    """What ``compute`` finds for the learned tokens of each sample, [n_i, ...] float32; the same on every rank."""
    batches, members = collate_rl_step(
        samples,
        range(len(samples)),
        config.max_tokens_per_micro_batch,
        rank=backend.rank,
        world_size=backend.world_size,
        share_prompts=shares_prompts(backend),
    )
    tensors = await perform(lambda: compute(batches), config)
    found: dict[int, np.ndarray] = {}
    for indices, tensor in zip(members, tensors, strict=True):
        found.update(zip(indices, _split(tensor.float().cpu().numpy(), [samples[i] for i in indices])))
    for part in ranks.all_gather(found) if backend.world_size > 1 else []:
        found |= part
    return [found[i] for i in range(len(samples))]


def shares_prompts(backend: PyTorchTrainingBackend) -> bool:
    """Whether a group's prompt is computed once. A GPU's fast attention knows sequences, but no prefixes."""
    return backend.device.type == "cpu"


def _require_known_log_probs(samples: Sequence[Sample]) -> None:
    for sample in samples:
        known = sample.rollout_log_probs
        if known is not None and not np.isfinite(np.asarray(known, np.float64)[learned_positions(sample)]).all():
            raise UserError(
                f"sample {sample.id!r} has tokens whose log-prob its engine did not tell; use an engine that reports "
                "them, or leave rollout_log_probs None and let the trainer compute them (old_log_probs: trainer)"
            )


def _split(flat: np.ndarray, samples: Sequence[Sample]) -> Arrays:
    """[M] as one array [n_i] a sample."""
    return np.split(flat, np.cumsum([s.num_loss_tokens for s in samples])[:-1]) if samples else []


def _rollout_log_probs(samples: Sequence[Sample]) -> Arrays:
    for sample in samples:
        if sample.rollout_log_probs is None:
            raise UserError(f"sample {sample.id!r} has no rollout_log_probs; let old_log_probs be auto or trainer")
    return [np.asarray(s.rollout_log_probs, np.float32)[learned_positions(s)] for s in samples]


def _average(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several updates, each weighted by its tokens; counts of the last."""
    if not updates:
        return {}
    weights = np.array([u.get("num_tokens", 1.0) for u in updates])
    weights = weights / weights.sum() if weights.sum() else np.full(len(updates), 1.0 / len(updates))
    mean = {name: float(np.dot(weights, [u[name] for u in updates])) for name in updates[-1]}
    mean.pop("num_tokens", None)  # of an optimizer step; the batch's are response_tokens
    mean |= {name: updates[-1][name] for name in ("lr", "skipped_steps") if name in updates[-1]}
    if "ratio_weight" in mean:
        second = mean.pop("ratio_weight_squared")
        mean["effective_sample_size"] = effective_sample_size(mean.pop("ratio_weight"), second)
    return mean
