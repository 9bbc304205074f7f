"""The plain generator, the pure functions, the settings, and the example that shows them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from arithmetic import Writer, dealt, numbered, prompt_ids

from rollouts.errors import UserError
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.filters import check_any_success
from rollouts.training.rollout_gen import (
    RolloutConfig,
    RolloutManager,
    apply_sample_transforms,
    convert_to_batch,
    generate_rollout_batches,
)
from rollouts.training.rollout_gen.ledger import as_prompt, pending_samples
from rollouts.training.types import Sample, SampleStatus

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_the_generator_gives_batches_without_end() -> None:
    config = RolloutConfig(batch_size=3, n_samples_per_prompt=2, generate_fn=Writer())
    batches = generate_rollout_batches(numbered(5), config)
    first = [next(batches) for _ in range(5)]
    batches.close()
    assert [p for batch in first for p in prompt_ids(batch.samples, 2)] == dealt(5, 15)
    assert [batch.step_id for batch in first] == list(range(5))


def test_texts_messages_and_mappings_are_prompts() -> None:
    def echo(samples: list[Sample]) -> list[Sample]:
        for sample in samples:
            sample.response = str(sample.prompt)
        return samples

    prompts = ["Solve 2+2", [{"role": "user", "content": "5*7"}], {"prompt": "x", "answer": "y", "id": "row 3"}]
    batch = next(generate_rollout_batches(DataBuffer(prompts, shuffle=False), RolloutConfig(3, generate_fn=echo)))
    assert [s.prompt for s in batch.samples] == ["Solve 2+2", [{"role": "user", "content": "5*7"}], "x"]
    assert batch.samples[2].metadata["answer"] == "y" and batch.samples[2].metadata["prompt_id"] == "row 3"
    assert len({s.metadata["prompt_id"] for s in batch.samples}) == 3
    with pytest.raises(UserError, match="not int"):
        next(generate_rollout_batches(DataBuffer([1, 2]), RolloutConfig(1, generate_fn=echo)))


def test_the_samples_of_a_group_share_nothing_that_changes() -> None:
    prompt = as_prompt(Sample(prompt="p", id="a", metadata={"answer": 1}))
    one, two = pending_samples(prompt, 7, 2)
    assert (one.id, two.id, one.group_id, one.status) == ("7/0", "7/1", "7", SampleStatus.PENDING)
    one.metadata["answer"] = 2
    one.rewards["x"] = 1.0
    assert two.metadata["answer"] == prompt.metadata["answer"] == 1 and not two.rewards and not prompt.rewards


def test_the_deprecated_class_names_its_replacements() -> None:
    with pytest.warns(DeprecationWarning, match=r"generate_rollout_batches.*AsyncRolloutManager"):
        manager = RolloutManager(numbered(4), RolloutConfig(batch_size=2, generate_fn=Writer()))
    for batch in manager:
        assert prompt_ids(batch.samples) == dealt(4, 2)
        break


def scored(group: str, *rewards: float) -> list[Sample]:
    return [
        Sample(tokens=[1], loss_mask=[1], group_id=group, id=f"{group}{i}", reward=r) for i, r in enumerate(rewards)
    ]


def test_transforms_then_the_filter_on_whole_groups_wherever_their_samples_stand() -> None:
    def halve(group: list[Sample]) -> list[Sample]:
        for sample in group:
            assert len({s.group_id for s in group}) == 1
            sample.reward /= 2
        return group

    a, b, c = scored("a", 0, 1), scored("b", 0, 0), scored("c", 1, 1)
    mixed = [a[0], b[0], c[0], a[1], c[1], b[1]]
    config = RolloutConfig(batch_size=1, transforms=[halve], filter_fn=check_any_success)
    kept = apply_sample_transforms(mixed, config)
    assert [s.id for s in kept] == ["a0", "a1", "c0", "c1"] and [s.reward for s in kept] == [0, 0.5, 0.5, 0.5]
    batch = convert_to_batch(mixed, epoch_id=2, step_id=5)
    assert [s.id for s in batch.samples] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert (batch.epoch_id, batch.step_id) == (2, 5)
    with pytest.raises(UserError, match="at least one sample"):
        convert_to_batch([], 0, 0)
    shorten = RolloutConfig(batch_size=1, transforms=[lambda group: group[1:]])
    with pytest.raises(UserError, match="made 1 samples of a group of 2"):
        apply_sample_transforms(mixed, shorten)


def test_settings_go_through_json_without_their_functions() -> None:
    config = RolloutConfig(
        batch_size=32, n_samples_per_prompt=8, over_sampling_factor=1.5, generate_fn=Writer(), max_staleness=1,
        overlap=True, generate_timeout_s=None, seed=7,
    )  # fmt: skip
    stored = json.loads(json.dumps(config.to_dict()))
    assert RolloutConfig.from_dict(stored, generate_fn=config.generate_fn) == config
    with pytest.raises(UserError, match="'oversampling' is unknown"):
        RolloutConfig.from_dict({"batch_size": 1, "oversampling": 2})


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0}, {"n_samples_per_prompt": 0}, {"over_sampling_factor": 0.5}, {"order": "random"},
        {"max_staleness": -1}, {"max_retries": -1}, {"generate_timeout_s": 0}, {"seed": -1},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(change: dict) -> None:
    with pytest.raises(UserError, match=f"rollout setting {next(iter(change))} is out of range"):
        RolloutConfig(**{"batch_size": 1, **change})


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["test_rollout_generation.py", "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "test_rollout_generation.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "batch 0: 4 prompts, 16 samples" in output and "batch 1: 4 prompts, 16 samples" in output
    assert "batch 2" not in output and "'What is " in output
