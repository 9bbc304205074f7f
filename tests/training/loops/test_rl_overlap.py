"""Sampling and training at once: staleness is bounded, spans tell the truth, and stale tokens are corrected."""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from rl_task import Run, Silent, same_update

from rollouts.training import RLTrainingConfig, Sample, create_pytorch_backend, run_rl_training
from rollouts.training.loops.rl_batches import group_samples
from rollouts.training.loops.rl_loop import StoredRollouts
from rollouts.training.loops.rl_step import policy_loss
from rollouts.training.rollout_gen.ledger import GroupState


class Kept:
    """A rollout log that keeps the samples."""

    def __init__(self) -> None:
        self.steps: list[list[Sample]] = []

    def log(self, step: int, samples: list[Sample]) -> None:
        self.steps.append(samples)


def hold_training(run: Run, steps: set[int]) -> None:
    """In these steps, counting from 0, learning begins when everything that was begun beside it is sampled."""
    forward_backward, calls = run.backend.forward_backward, itertools.count()

    def sampling() -> bool:
        return any(group.state is GroupState.IN_FLIGHT for group in list(run.manager.ledger.open.values()))

    def held(batch: Any) -> Any:  # on a thread of its own, so that rollouts go on
        deadline = time.monotonic() + 240
        if next(calls) in steps:
            while sampling():
                assert time.monotonic() < deadline
                time.sleep(0.002)
        return forward_backward(batch)

    run.backend.forward_backward = held


@pytest.mark.parametrize(("staleness", "sync_every"), [(1, 1), (3, 1), (2, 2)])
def test_staleness_is_bounded_and_the_reward_rises(
    make_tiny_model, tiny_tokenizer, staleness: int, sync_every: int
) -> None:
    model = make_tiny_model()
    rollouts = {"max_staleness": staleness, "overlap": True, "n_samples_per_prompt": 8}
    run = Run(model, tiny_tokenizer, engine_model=copy.deepcopy(model), rollouts=rollouts, lr=5e-3)
    config = RLTrainingConfig(num_steps=30, max_staleness=staleness, sync_every=sync_every)
    hold_training(run, {1, 2})
    kept = Kept()
    history = run.train(config, rollout_log=kept)

    consumed_by = [
        (step, w.version) for step, samples in enumerate(kept.steps) for s in samples for w in s.weight_versions
    ]
    lags = [step - version for step, version in consumed_by]
    assert min(lags) >= 0 and max(lags) <= staleness
    assert max(lags) > 0  # what was generated while steps 1 and 2 were held
    assert max(row["staleness_max"] for row in history) == max(lags)
    rewards = [row["reward_mean"] for row in history]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
    # The old log-probs are the trainer's own, so the gap to the sampler's is the policy's movement, and weighed.
    assert max(row["mismatch_kl"] for row in history) > 1e-6
    assert all(row["effective_sample_size"] > 0.5 for row in history)


def test_log_probs_are_those_of_the_version_that_a_span_names(make_tiny_model, tiny_tokenizer) -> None:
    """Weights of every version are kept; each token's log-prob is recomputed with those it says it was sampled by."""
    model = make_tiny_model()
    run = Run(
        model,
        tiny_tokenizer,
        engine_model=copy.deepcopy(model),
        rollouts={"max_staleness": 2, "overlap": True},
        lr=2e-2,
    )
    versions = {0: copy.deepcopy(model.state_dict())}

    async def keep(step: int) -> dict[str, float]:
        versions[step] = copy.deepcopy(run.backend.model.state_dict())
        return {}

    hold_training(run, {1, 2, 3})  # so that versions 1, 2 and 3 have samples of their own
    kept = Kept()
    run.train(RLTrainingConfig(num_steps=6, max_staleness=2, eval_every=1), rollout_log=kept, evaluate=keep)
    reference, checked = make_tiny_model().eval(), set()
    for samples in kept.steps:
        for sample in samples[::3]:
            # A span after the first continues on keys of older weights: only whole samples can be recomputed.
            if len(sample.weight_versions) > 1:
                continue
            [span] = sample.weight_versions
            reference.load_state_dict(versions[span.version])
            ids = torch.tensor([sample.tokens])
            with torch.no_grad():
                found = reference(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            recorded = torch.tensor(sample.rollout_log_probs)[span.start : span.end]
            torch.testing.assert_close(recorded, found[span.start - 1 : span.end - 1], atol=1e-4, rtol=0)
            checked.add(span.version)
    assert len(checked) >= 3


def test_stale_rollouts_are_corrected_unless_told_otherwise(make_tiny_model) -> None:
    backend = create_pytorch_backend(make_tiny_model())

    def weighs(**settings: object) -> str:
        return policy_loss(RLTrainingConfig(num_steps=1, **settings), backend).correction.weight

    assert weighs() == "none"
    assert weighs(max_staleness=1) == "token"
    assert weighs(max_staleness=1, correction="none") == "none"
    assert weighs(max_staleness=1, correction="sequence_tis") == "sequence"


def test_stale_rollouts_are_weighed_without_a_pass_for_their_log_probs(make_tiny_model, tiny_tokenizer) -> None:
    """One update corrects by its own log-probs, as by those computed before it."""
    samples = Run(make_tiny_model(seed=1), tiny_tokenizer).sample()  # by weights far from those that learn
    rows, backends, passes = [], [], []
    for old_log_probs in ("auto", "trainer"):
        backend = create_pytorch_backend(make_tiny_model())
        compute, calls = backend.compute_log_probs, []
        backend.compute_log_probs = lambda *given, compute=compute, calls=calls: calls.append(1) or compute(*given)
        config = RLTrainingConfig(
            num_steps=1, batch_size=4, max_staleness=2, old_log_probs=old_log_probs, learning_rate=1e-3
        )
        stored = StoredRollouts(group_samples(samples), config)
        rows += asyncio.run(run_rl_training(backend, None, stored, (), config, Silent()))
        backends.append(backend)
        passes.append(len(calls))
    assert passes == [0, 1]
    assert rows[0]["mismatch_kl"] > 0.01 and rows[0]["effective_sample_size"] < 0.99  # there is something to correct
    for name in ("policy_loss", "grad_norm", "mismatch_kl", "effective_sample_size", "ratio"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-6), name
    assert same_update(*backends)
