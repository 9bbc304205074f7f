"""The RL loop: it learns, it resumes bit for bit, and what it measures is true."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rl_task import Run, Silent, same_update, share_of_bytes, weights_of

from rollouts.errors import UserError
from rollouts.training import (
    RLTrainingConfig,
    Sample,
    create_pytorch_backend,
    run_offline_rl_training,
    run_rl_training,
)
from rollouts.training.algorithms.advantages import ESTIMATORS
from rollouts.training.algorithms.policy_losses import POLICY_LOSSES
from rollouts.training.loops.rl_metrics import RolloutLog
from rollouts.training.sft_losses import LossOutput

# What depends on the clock: speeds, and how far the groups that were begun beyond a batch had come when it was full.
TIMES = ("seconds", "tokens_per_second", "requeued")


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in history]


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_reward_rises_and_sampler_agrees_with_trainer(
    make_tiny_model, tiny_tokenizer, precision: str, limit: float
) -> None:
    run = Run(make_tiny_model(), tiny_tokenizer, precision=precision, lr=5e-3)
    history = run.train(RLTrainingConfig(num_steps=25))
    rewards = [row["reward_mean"] for row in history]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert max(row["mismatch_kl"] for row in history) < limit
    assert all(row["effective_sample_size"] > 0.99 and row["staleness_max"] == 0 for row in history)
    assert [row["step"] for row in history] == list(range(1, 26))


@pytest.mark.usefixtures("compiled_step")
def test_resume_is_bitwise(make_tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    """Several mini-batches and epochs, groups dropped and begun anew, killed after step 4 with a commit at 3."""
    settings = {
        "over_sampling_factor": 1.5,
        "filter_fn": lambda group: len(group[0].tokens) % 5 > 0,
    }

    def config(num_steps: int) -> RLTrainingConfig:
        return RLTrainingConfig(num_steps=num_steps, mini_batches=2, num_epochs=2, checkpoint_every=3, log_every=0)

    def make(folder: str) -> Run:
        return Run(make_tiny_model(), tiny_tokenizer, tmp_path / folder, rollouts=settings)

    whole, killed, resumed = make("whole"), make("killed"), make("killed")
    history = whole.train(config(7), rollout_log=RolloutLog(tmp_path / "whole.jsonl"))

    async def kill(step: int) -> dict[str, float]:
        if step == 4:
            raise ZeroDivisionError
        return {}

    with pytest.raises(ZeroDivisionError):
        killed.train(
            RLTrainingConfig(**{**vars(config(7)), "eval_every": 1}),
            evaluate=kill,
            rollout_log=RolloutLog(tmp_path / "parts.jsonl"),
        )
    rest = resumed.train(config(7), rollout_log=RolloutLog(tmp_path / "parts.jsonl"))

    assert [row["step"] for row in rest] == [4, 5, 6, 7]
    assert without_times(rest) == without_times(history)[3:]
    a, b = weights_of(whole.backend), weights_of(resumed.backend)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for ledger in (whole.manager.ledger, resumed.manager.ledger):
        assert (ledger.num_consumed, ledger.num_batches) == (7 * 4, 7)
    assert whole.manager.ledger.dropped == resumed.manager.ledger.dropped
    lines = [(tmp_path / name).read_text().splitlines() for name in ("whole.jsonl", "parts.jsonl")]
    assert lines[0] == lines[1] and len(lines[0]) == 7 * 16

    again = make("whole").train(config(7))
    assert [row["step"] for row in again] == [7]


def test_rollouts_are_recorded(make_tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts.jsonl")
    run = Run(make_tiny_model(), tiny_tokenizer)
    before = weights_of(run.backend)
    run.train(RLTrainingConfig(num_steps=1), rollout_log=log)
    samples = [Sample.from_dict(json.loads(line)) for line in log.path.read_text().splitlines()]
    assert len(samples) == 16 and {s.metadata["step"] for s in samples} == {1}

    # An independent computation, from the recorded tokens and rewards alone.
    reference = make_tiny_model().eval()
    reference.load_state_dict(before)
    for sample in samples:
        ids = torch.tensor([sample.tokens])
        log_probs = reference(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        learned = [i for i, m in enumerate(sample.loss_mask) if m]
        assert [sample.rollout_log_probs[i] for i in learned] == pytest.approx(
            [log_probs[i - 1] for i in learned], abs=1e-4
        )
        assert sample.reward == asyncio.run(share_of_bytes(sample))
        group = np.array([s.reward for s in samples if s.group_id == sample.group_id])
        assert len(group) == 4
        expected = (sample.reward - group.mean()) / (group.std(ddof=1) + 1e-6)
        assert [sample.advantages[i] for i in learned] == pytest.approx([expected] * len(learned), abs=1e-5)
        assert sum(a != 0 for a in sample.advantages) <= len(learned)


def test_log_probs_that_an_engine_did_not_tell_are_refused(make_tiny_model, tiny_tokenizer) -> None:
    run = Run(make_tiny_model(), tiny_tokenizer)
    samples = run.sample()
    samples[5].rollout_log_probs = [*samples[5].rollout_log_probs[:-1], float("nan")]
    with pytest.raises(UserError, match="log-prob its engine did not tell"):
        run.train_offline(samples, RLTrainingConfig(num_steps=1, batch_size=4))


def test_samples_without_a_reward_are_left_out(make_tiny_model, tiny_tokenizer) -> None:
    """A reward that fails masks its sample: the step is that of the others, not one where it scored 0."""

    async def fails_sometimes(sample: Sample) -> float:
        if sample.id.endswith("/2"):
            raise ValueError("no verdict")
        return await share_of_bytes(sample)

    run, clean = (
        Run(make_tiny_model(), tiny_tokenizer, rollouts={"reward_fn": reward})
        for reward in (fails_sometimes, share_of_bytes)
    )
    [row] = run.train(RLTrainingConfig(num_steps=1))
    assert row["masked_samples"] == 4 and row["samples"] == 16

    others = [sample for sample in clean.sample() if not sample.id.endswith("/2")]
    [expected] = clean.train_offline(others, RLTrainingConfig(num_steps=1, batch_size=4))
    assert expected["masked_samples"] == 0
    for name in ("reward_mean", "response_tokens", "grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5)
    assert same_update(run.backend, clean.backend)


@pytest.mark.parametrize("kind", ["zero variance", "singletons", "nothing to learn"])
def test_degenerate_batches(make_tiny_model, tiny_tokenizer, kind: str) -> None:
    async def constant(sample: Sample) -> float:
        return 0.5

    settings: dict[str, Any] = {
        "zero variance": {"reward_fn": constant},
        "singletons": {"reward_fn": constant, "n_samples_per_prompt": 1},
        "nothing to learn": {"reward_fn": None},
    }[kind]
    run = Run(make_tiny_model(), tiny_tokenizer, rollouts=settings)
    before = weights_of(run.backend)
    [row] = run.train(RLTrainingConfig(num_steps=1))
    changed = any(not torch.equal(before[n], w) for n, w in weights_of(run.backend).items())
    if kind == "zero variance":
        assert row["zero_variance_groups"] == 4 and row["grad_norm"] == 0 and not changed
    elif kind == "singletons":
        assert row["singleton_groups"] == 4 and row["grad_norm"] > 0 and changed
    else:
        assert row["optimizer_steps"] == 0 and row["masked_samples"] == 16 and not changed


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "clip_cov"])
def test_a_step_does_not_depend_on_micro_batches(make_tiny_model, tiny_tokenizer, loss: str) -> None:
    """The whole step: log-probs, advantages, two mini-batches, three passes; one sample a pack against all in one."""
    rows, backends = [], []
    for max_tokens in (1, 10_000):
        run = Run(make_tiny_model(), tiny_tokenizer)
        config = RLTrainingConfig(
            num_steps=1, mini_batches=2, num_epochs=3, max_tokens_per_micro_batch=max_tokens, loss={"name": loss}
        )
        [row] = run.train(config)
        rows += without_times([row])
        backends.append(run.backend)
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)
    assert same_update(*backends)


def test_offline_training_learns_from_stored_rollouts(make_tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    source = Run(make_tiny_model(), tiny_tokenizer, rollouts={"batch_size": 10, "n_samples_per_prompt": 16})
    stored = source.sample()

    def train(folder: str, num_steps: int) -> tuple[list[dict[str, Any]], Any]:
        backend = create_pytorch_backend(make_tiny_model(), tiny_tokenizer, checkpoint_dir=tmp_path / folder)
        config = RLTrainingConfig(
            num_steps=num_steps, batch_size=5, learning_rate=1e-2, checkpoint_every=2, advantage="rloo", seed=1
        )
        return asyncio.run(run_offline_rl_training(backend, stored, config, Silent())), backend

    history, backend = train("whole", 12)
    assert history[-1]["approx_kl_k3"] > 1e-4  # it has moved away from what sampled the rollouts

    after = Run(backend.model, tiny_tokenizer, backend=backend, rollouts={"batch_size": 10, "n_samples_per_prompt": 16})
    [measured] = after.train(RLTrainingConfig(num_steps=1), resume=False)
    assert measured["reward_mean"] > np.mean([s.reward for s in stored]) + 0.05

    train("parts", 4)
    rest, _ = train("parts", 12)
    assert without_times(rest) == without_times(history)[4:]
    with pytest.raises(UserError, match="batch_size"):
        asyncio.run(run_offline_rl_training(backend, stored, RLTrainingConfig(num_steps=1)))
    with pytest.raises(UserError, match="empty"):
        asyncio.run(run_offline_rl_training(backend, [], RLTrainingConfig(num_steps=1, batch_size=1)))


def test_settings_that_do_not_fit(make_tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    run = Run(make_tiny_model(), tiny_tokenizer, tmp_path)
    for config, message in (
        (RLTrainingConfig(num_steps=1, max_staleness=1), "copy of its own"),
        (RLTrainingConfig(num_steps=1, sync_every=2), "max_staleness"),
        (RLTrainingConfig(num_steps=1, advantage="nonsense"), "nonsense"),
        (RLTrainingConfig(num_steps=1, kl_in_reward=0.1), "reference"),
        (RLTrainingConfig(num_steps=1, temperature=0.5, loss={"temperature": 0.7}), "temperature"),
    ):
        with pytest.raises(UserError, match=message):
            asyncio.run(_train(run, config))
    asyncio.run(_train(run, RLTrainingConfig(num_steps=1)))
    with pytest.raises(UserError, match="mini_batches was 1 and is now 2"):
        asyncio.run(_train(run, RLTrainingConfig(num_steps=2, mini_batches=2)))
    run.engine.close()
    with pytest.raises(ValueError, match="num_steps"):
        RLTrainingConfig(num_steps=0)


async def _train(run: Run, config: RLTrainingConfig) -> Any:
    return await run_rl_training(run.backend, run.buffer, run.manager, [run.engine], config, Silent())


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"gae", "remax", "prime"}))
def test_every_estimator_makes_a_step(make_tiny_model, tiny_tokenizer, name: str) -> None:
    """Those that need another model are tested with it (test_rl_models.py)."""
    [row] = Run(make_tiny_model(), tiny_tokenizer).train(RLTrainingConfig(num_steps=1, advantage=name))
    assert row["grad_norm"] > 0 and np.isfinite(row["loss"])


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_every_loss_makes_steps(make_tiny_model, tiny_tokenizer, name: str) -> None:
    config = RLTrainingConfig(num_steps=1, num_epochs=2, mini_batches=2, loss={"name": name})
    [row] = Run(make_tiny_model(), tiny_tokenizer).train(config)
    assert row["grad_norm"] > 0 and row["optimizer_steps"] == 4


def test_functions_of_the_users_own(make_tiny_model, tiny_tokenizer) -> None:
    """An advantage and a loss as plain functions give the step of the named ones that they copy."""

    def centered(batch: Any, scale: float) -> torch.Tensor:
        means = {g: np.mean([r for r, h in zip(batch.rewards, batch.group_ids) if h == g]) for g in batch.group_ids}
        return torch.tensor([(float(r) - means[g]) * scale for r, g in zip(batch.rewards, batch.group_ids)])

    def reinforce(logits: Any, labels: Any, loss_mask: Any, *, advantages: Any, **_: Any) -> LossOutput:
        positions = loss_mask.flatten().nonzero()[:, 0]
        log_probs = logits[0].float().log_softmax(-1)[positions - 1].gather(1, labels[0, positions, None])[:, 0]
        return LossOutput(-(advantages * log_probs).sum(), torch.tensor(float(len(positions))), {})

    rows, backends = [], []
    for config in (
        RLTrainingConfig(num_steps=1, advantage=centered, advantage_options={"scale": 1.0}, loss=reinforce),
        RLTrainingConfig(
            num_steps=1, advantage="grpo", advantage_options={"norm_by_std": False}, loss={"name": "reinforce"}
        ),
    ):
        run = Run(make_tiny_model(), tiny_tokenizer)
        rows += run.train(config)
        backends.append(run.backend)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    assert same_update(*backends)
