"""Reinforcement learning: a flat loop over rollouts, advantages, updates, weight sync and checkpoint.

    rollout_manager.generate_batch: generate -> reward -> filter     (with max_staleness > 0: goes on beside the rest)
        --whole, judged groups-->  learn_from_rollouts: log-probs -> advantages -> mini-batches -> optimizer steps
        --> commit the step --> sync the engines' weights --> evaluate --> log

Versions: the weights before step i + 1 are version i, for the trainer, the engines and the rollout manager alike.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import anyio.lowlevel

from rollouts.errors import UserError
from rollouts.failpoints import failpoint
from rollouts.inference.protocol import InferenceEngine, UpdateMode
from rollouts.models.critic import is_value_head
from rollouts.training import distributed_utils as ranks
from rollouts.training.algorithms.policy_losses import PolicyLossConfig, make_policy_loss
from rollouts.training.algorithms.value import ValueLossConfig, make_shared_loss, make_value_loss
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.checkpoints import require_same
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops.rl_batches import compute_reward, group_samples, is_learnable
from rollouts.training.loops.rl_metrics import RolloutLog, Stopwatch, describe_rollouts
from rollouts.training.loops.rl_step import (
    LogProbSource,
    ProcessRewards,
    RLModels,
    learn_from_rollouts,
    measures_full_kl,
    own_log_probs,
    perform,
    policy_loss,
)
from rollouts.training.metrics import MetricsLogger, logging_to
from rollouts.training.remote_engines import RemoteEngine
from rollouts.training.rewards.runner import RewardRunner
from rollouts.training.rollout_gen.ledger import copy_sample
from rollouts.training.rollout_gen.manager import AsyncRolloutManager
from rollouts.training.sft_losses import LossFn
from rollouts.training.types import RLTrainingConfig, RolloutBatch, Sample
from rollouts.training.weight_sync import WeightSyncManager, sync_weights_to_engines

if TYPE_CHECKING:
    import torch.distributed as dist

Evaluate = Callable[[int], Awaitable[dict[str, float]]]

log = logging.getLogger(__name__)


async def run_rl_training(
    backend: PyTorchTrainingBackend,
    data_buffer: DataBuffer[Any] | None,
    rollout_manager: RolloutSource | None,
    inference_engines: Sequence[InferenceEngine] | WeightSyncManager,
    config: RLTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    reference: LogProbSource | None = None,
    critic: PyTorchTrainingBackend | None = None,
    process: ProcessRewards | None = None,
    reward_fn: Any = None,
    evaluate: Evaluate | None = None,
    rollout_log: RolloutLog | None = None,
    resume: bool = True,
) -> list[dict[str, Any]]:
    """Train a policy on its own rollouts for ``config.num_steps`` steps.

    With ``resume``, a committed step in ``backend.checkpoint_dir`` is loaded and the run goes on as if it had never
    stopped: with ``max_staleness`` 0 and the embedded engine bit for bit.

    Args:
        backend: the policy; its loss is set from ``config.loss``.
        data_buffer: the prompts; None or the rollout manager's own.
        rollout_manager: makes the batches, on rank 0; None on the other ranks, which are sent them.
        inference_engines: get the new weights every ``config.sync_every`` steps, and version and checksum are read
            back. An engine that was made over the backend's own model reads them where they lie.
        metrics_logger: gets every step's metrics on rank 0; None prints lines.
        reference: the policy that KL is measured against: a ``FrozenModel``, or ``BaseModel`` beneath an adapter.
        critic: a backend over ``make_critic`` with ``make_value_loss``, or ``backend`` itself if its model has a value
            head (``add_value_head``); its values are what ``gae`` needs.
        process: the model behind the token rewards that ``prime`` needs.
        reward_fn: judges samples that come without a reward; None takes ``metadata["correct"]`` where it is there.
        evaluate: ``await evaluate(step)`` gives metrics, every ``config.eval_every`` steps and at the end.
        rollout_log: gets every consumed sample.

    Returns:
        The metrics of each step done by this call, ``step`` counting from 1; of the last step alone if the run was
        complete already.

    Raises:
        UserError: settings that do not fit one another, or a checkpoint of another run.
        FloatingPointError: ``max_bad_steps`` gradients in a row were not finite.
    """
    _check(backend, data_buffer, rollout_manager, inference_engines, config)
    models = prepare_models(backend, reference, critic, process, config)
    patient = ranks.gloo_group(ranks.LONGEST_WAIT)  # the first rank alone samples, evaluates and brings the weights
    watch = Stopwatch()
    step, history = 0, []

    with logging_to(metrics_logger, config.num_steps, config.log_every, "RL") as logger:

        async def publish(metrics: dict[str, Any]) -> None:
            """What follows the commit of a step: also the first thing that a resumed run does."""
            if step % config.sync_every == 0:
                with watch.phase("sync"):
                    await sync_weights(backend, inference_engines, step, config)
            if rollout_manager is not None:
                rollout_manager.weight_version = step
            if evaluate is not None and (step == config.num_steps or _is_due(step, config.eval_every)):
                with watch.phase("evaluate"):
                    metrics |= {f"eval_{name}": value for name, value in (await evaluate(step)).items()}
            metrics |= watch.take()
            history.append(metrics)
            if backend.rank == 0:
                logger.log(step, metrics)

        if resume and (state := await resume_step(models, rollout_manager, config)) is not None:
            step = state["step"]
            if step % config.sync_every:  # no engine has the weights that were due before
                await sync_weights(backend, inference_engines, step, config)
            await publish(state["metrics"])
            history = [state["metrics"]] if step >= config.num_steps else []
        elif backend.world_size > 1 or not all(shares_model(e, backend) for e in _engines_of(inference_engines)):
            await sync_weights(backend, inference_engines, step, config)

        async with _entered(rollout_manager), _judge(reward_fn if backend.rank == 0 else None) as judge:
            while step < config.num_steps:
                await anyio.lowlevel.checkpoint()
                with watch.phase("generate"):
                    batch = await next_batch(rollout_manager, judge, patient)
                metrics = {"step": step + 1, "epoch": batch.epoch_id, **describe_rollouts(batch, step)}
                learnable = [sample for sample in batch.samples if is_learnable(sample)]
                metrics |= await learn_from_rollouts(models, learnable, config, step, watch)
                metrics |= speed(metrics, watch)
                step += 1
                if backend.rank == 0 and rollout_log is not None:
                    rollout_log.log(step, batch.samples)
                if step == config.num_steps or _is_due(step, config.checkpoint_every):
                    with watch.phase("checkpoint"):
                        await commit(models, rollout_manager, step, metrics, config)
                await publish(metrics)
    return history


async def run_offline_rl_training(
    backend: PyTorchTrainingBackend,
    samples: Sequence[Sample],
    config: RLTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    reference: LogProbSource | None = None,
    critic: PyTorchTrainingBackend | None = None,
    reward_fn: Any = None,
    resume: bool = True,
) -> list[dict[str, Any]]:
    """Train a policy on stored rollouts, ``config.batch_size`` groups a step: no engine, no weight sync.

    Whatever the rollouts were sampled with is the old policy: unless ``config.old_log_probs`` says otherwise their own
    log-probs are what the loss compares with, so that it corrects for the policy's moving away from them.

    Args:
        samples: finished rollouts; groups are told by ``group_id`` and dealt whole, in an order made from the seed.
        Everything else as ``run_rl_training``.

    Raises:
        UserError: no samples, no ``batch_size``, or a checkpoint of another run.
    """
    stored, config = deal_stored(samples, config)
    return await run_rl_training(
        backend, None, stored, (), config, metrics_logger,
        reference=reference, critic=critic, reward_fn=reward_fn, resume=resume,
    )  # fmt: skip


def deal_stored(samples: Sequence[Sample], config: RLTrainingConfig) -> tuple[StoredRollouts, RLTrainingConfig]:
    """Stored rollouts as a source of batches, and the configuration that fits them. Raises UserError."""
    groups = group_samples(samples)
    if not groups:
        raise UserError("samples cannot be empty: give at least one rollout")
    if config.batch_size is None:
        raise UserError("batch_size is missing: say how many groups of stored rollouts a step learns from")
    if config.old_log_probs == "auto" and all(s.rollout_log_probs is not None for s in samples):
        config = replace(config, old_log_probs="rollout")
    return StoredRollouts(groups, config), config


class StoredRollouts:
    """Deals stored groups as a rollout manager deals fresh ones: whole, epoch after epoch, and resumable."""

    def __init__(self, groups: Sequence[list[Sample]], config: RLTrainingConfig) -> None:
        assert config.batch_size is not None
        self.weight_version = 0
        self._size = config.batch_size
        self._groups = groups
        self._cursor = DataBuffer(range(len(groups)), seed=config.seed)
        self._num_batches = 0

    async def generate_batch(self) -> RolloutBatch:
        indices = self._cursor.get_prompts(self._size)
        # A group that is dealt twice in a batch, where two epochs meet, is two groups of one prompt.
        samples = [
            replace(copy_sample(s), group_id=f"{place}/{i}") for place, i in enumerate(indices) for s in self._groups[i]
        ]
        self._num_batches += 1
        return RolloutBatch(samples, self._cursor.epoch_id, self._num_batches - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self._cursor.state_dict(), "num_batches": self._num_batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "cursor" not in state:
            raise UserError("rollout state: saved by a run that sampled; start a new run to learn from stored rollouts")
        self._cursor.load_state_dict(state["cursor"])
        self._num_batches = state["num_batches"]


async def next_batch(
    source: RolloutSource | None, judge: RewardRunner | None, group: dist.ProcessGroup | None = None
) -> RolloutBatch:
    """The next rollouts, judged, on every rank of ``group``; ``source`` is rank 0's."""
    batch = None
    if source is not None:
        batch = await source.generate_batch()
        unjudged = [s for s in batch.samples if s.reward is None]
        if judge is not None and unjudged:
            await judge.score(unjudged)
        for sample in unjudged:
            if sample.reward is None and "correct" in sample.metadata:
                sample.reward = compute_reward(sample)
    return ranks.broadcast(batch, group=group)


async def sync_weights(
    backend: PyTorchTrainingBackend,
    engines: Sequence[InferenceEngine] | WeightSyncManager,
    version: int,
    config: RLTrainingConfig,
) -> None:
    """Have every engine serve the backend's weights as ``version``; samples in flight go on only if they may be stale.

    Raises:
        WeightSyncError: an engine serves something else afterwards (of a ``WeightSyncManager``: every engine).
    """
    failpoint("rl.before_sync")
    backend.model.eval()  # an engine over this very model samples without dropout
    mode: UpdateMode = "continue" if config.max_staleness > 0 else "drain"
    sharing = [engine for engine in _engines_of(engines) if shares_model(engine, backend)]
    others = [engine for engine in _engines_of(engines) if not shares_model(engine, backend)]
    weights = None
    managed = isinstance(engines, WeightSyncManager) and not sharing  # perhaps all are out, and about to come back
    if others or managed or backend.world_size > 1:
        weights = await perform(backend.get_weights, config)  # every rank takes part in gathering them
    if isinstance(engines, WeightSyncManager):
        await engines.sync(weights, version, mode)
        return
    if sharing:
        await sync_weights_to_engines(sharing, None, version, mode=mode)
    if others:
        # Digests tell all of an embedded engine's weights; some of those that servers hold are hidden.
        reference, tolerance = own_log_probs(backend)
        if not any(isinstance(engine, RemoteEngine) for engine in others):
            reference = None
        await sync_weights_to_engines(others, weights, version, mode=mode, reference=reference, tolerance=tolerance)


def shares_model(engine: InferenceEngine, backend: PyTorchTrainingBackend) -> bool:
    """Whether the engine reads the trainer's own weights."""
    return getattr(engine, "model", None) is backend.model


# Commit and resume ----------------------------------------------------------------------------------------------------


async def commit(
    models: RLModels, source: RolloutSource | None, step: int, metrics: dict[str, Any], config: RLTrainingConfig
) -> None:
    """Make a step of policy, companions and rollouts the one that a killed run resumes from.

    The policy's checkpoint is the commit: it tells where the rollouts stand, and the companions' step is there before.
    """
    if models.policy.checkpoint_dir is None:
        return
    for companion in models.companions:
        await perform(functools.partial(companion.save_checkpoint, step), config)
    state = {
        "step": step,
        "metrics": metrics,
        "settings": _settings(config),
        "rollouts": source.state_dict() if source is not None else None,
    }
    await perform(lambda: models.policy.save_checkpoint(step, {}, state), config)


async def resume_step(
    models: RLModels, source: RolloutSource | None, config: RLTrainingConfig
) -> dict[str, Any] | None:
    """Load the last commit, if there is one, into models and rollouts; returns its state."""
    checkpoint = models.policy.find_checkpoint()
    if checkpoint is None:
        return None
    state = await models.policy.load_checkpoint(checkpoint)
    require_same(state["settings"], _settings(config), checkpoint)
    for companion in models.companions:
        assert companion.checkpoint_dir is not None, "a policy with checkpoints has companions with checkpoints"
        companion.find_checkpoint()  # sweeps what a killed run left
        await companion.load_checkpoint(companion.checkpoint_dir / checkpoint.name)
    if source is not None:
        source.load_state_dict(state["rollouts"])
    log.info("going on after step %d, from %s", state["step"], checkpoint)
    return state


def _settings(config: RLTrainingConfig) -> dict[str, Any]:
    """What the continuation of a run depends on, beside what the rollout manager checks itself."""
    names = ("seed", "mini_batches", "num_epochs", "temperature", "kl_in_reward", "baseline", "sync_every")
    advantage = config.advantage if isinstance(config.advantage, str) else "function"
    return {name: getattr(config, name) for name in names} | {"advantage": advantage}


# Preparation ----------------------------------------------------------------------------------------------------------


class RolloutSource(Protocol):
    """What the loop asks of a rollout manager, or of stored rollouts in its place."""

    weight_version: int

    async def generate_batch(self) -> RolloutBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _check(
    backend: PyTorchTrainingBackend,
    data_buffer: DataBuffer[Any] | None,
    source: RolloutSource | None,
    engines: Sequence[InferenceEngine] | WeightSyncManager,
    config: RLTrainingConfig,
) -> None:
    if (source is None) != (backend.rank > 0):
        raise UserError("the rollout manager belongs on rank 0, and there only; give None on the other ranks")
    if config.sync_every > config.max_staleness + 1:
        raise UserError(
            f"sync_every is {config.sync_every}: rollouts would be {config.sync_every - 1} steps old where "
            f"max_staleness allows {config.max_staleness}; raise max_staleness or sync every step"
        )
    if config.max_staleness > 0 and any(shares_model(engine, backend) for engine in _engines_of(engines)):
        raise UserError(
            "max_staleness is above 0, so an engine samples while the weights change, but it shares the trainer's "
            "model; give it a copy of its own"
        )
    manager = getattr(source, "manager", source)
    if isinstance(manager, AsyncRolloutManager):
        if data_buffer is not None and manager.data_buffer is not data_buffer:
            raise UserError("the rollout manager deals from another data buffer than the one given; give the same")
        if manager.config.max_staleness != config.max_staleness:
            raise UserError(
                f"max_staleness is {config.max_staleness} for the trainer and {manager.config.max_staleness} for the "
                "rollouts; set both to the same"
            )


def _engines_of(engines: Sequence[InferenceEngine] | WeightSyncManager) -> Sequence[InferenceEngine]:
    return engines.engines if isinstance(engines, WeightSyncManager) else engines


def prepare_models(
    policy: PyTorchTrainingBackend,
    reference: LogProbSource | None,
    critic: PyTorchTrainingBackend | None,
    process: ProcessRewards | None,
    config: RLTrainingConfig,
) -> RLModels:
    """The models of a run, the policy with the run's loss. Raises UserError for those that do not fit together."""
    loss = policy_loss(config, policy)
    if measures_full_kl(loss) and reference is not None and not hasattr(reference, "compute_states"):
        raise UserError("KL kind full needs a FrozenModel or a BaseModel as the reference; k3 needs log-probs only")
    policy.loss_fn = make_policy_loss(loss) if isinstance(loss, PolicyLossConfig) else loss
    if critic is policy:
        policy.loss_fn = _shared_loss(policy, loss, config)
    policy.max_bad_steps, policy.keep_checkpoints = config.max_bad_steps, config.keep_checkpoints
    models = RLModels(policy, loss, reference, critic, process)
    for companion in models.companions:
        companion.max_bad_steps = config.max_bad_steps
        # One more than the policy's: it commits first, and its step before must still be there until the policy has.
        companion.keep_checkpoints = config.keep_checkpoints + 1 if config.keep_checkpoints else 0
        if policy.checkpoint_dir is not None and companion.checkpoint_dir is None:
            raise UserError("the policy has a checkpoint_dir, but its critic or process model has none; give it one")
    return models


def _shared_loss(policy: PyTorchTrainingBackend, loss: PolicyLossConfig | LossFn, config: RLTrainingConfig) -> LossFn:
    if not isinstance(loss, PolicyLossConfig):
        raise UserError("a critic on the policy's trunk needs a policy loss by name: how another averages is not known")
    if not any(is_value_head(name) for name, _ in policy.model.named_parameters()):
        raise UserError("the critic is the policy itself, but its model has no value head; call add_value_head first")
    value = ValueLossConfig(config.value_clip, loss.aggregate_by, loss.max_length)
    return make_shared_loss(policy.loss_fn, make_value_loss(value), config.value_coef)


@contextlib.asynccontextmanager
async def _entered(source: Any) -> AsyncIterator[None]:
    """Inside the rollout manager's block; an error of the loop comes out as it is, not in a group of one."""
    failure = None
    async with source if hasattr(source, "__aenter__") else contextlib.nullcontext():
        try:
            yield
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


@contextlib.asynccontextmanager
async def _judge(reward_fn: Any) -> AsyncIterator[RewardRunner | None]:
    if reward_fn is None:
        yield None
        return
    async with RewardRunner(reward_fn) as runner:
        yield runner


def speed(metrics: Mapping[str, float], watch: Stopwatch) -> dict[str, float]:
    """Response tokens a second: sampled, trained, and of the step as a whole."""
    tokens, seconds = metrics["response_tokens"], watch.seconds
    return {
        "generated_tokens_per_second": tokens / max(seconds["generate"], 1e-9),
        "trained_tokens_per_second": tokens / max(seconds["train"] + seconds["log_probs"], 1e-9),
        "tokens_per_second": tokens / max(sum(seconds.values()), 1e-9),
    }


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
