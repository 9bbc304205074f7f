"""Every advantage estimator against NumPy on ragged groups, the rules they share, and rewards that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import algo_reference as reference
import numpy as np
import pytest
import torch

from rollouts.errors import UserError
from rollouts.training.algorithms.advantages import (
    ESTIMATORS,
    AdvantageBatch,
    AdvantageConfig,
    compute_advantages,
    overlong_penalty,
    whiten,
)

GROUP_RELATIVE = ("grpo", "rloo", "opo", "gpg", "grpo_passk")


def make_batch(seed: int, name: str, with_token_rewards: bool = False) -> tuple[AdvantageBatch, dict, dict]:
    """The same rows for the package (flat, tool tokens and all) and for the reference (padded)."""
    padded = reference.ragged_batch(seed)
    rng, shape = padded["rng"], padded["mask"].shape
    options = {
        "norm": True, "gamma": 0.9, "lam": 0.8, "weights": (1.0, 0.5),
        "greedy": rng.normal(size=8),
        "many": np.stack([padded["rewards"], rng.normal(size=8)], axis=1),
        "token_rewards": rng.normal(size=shape) * padded["mask"] * with_token_rewards,
        "collision": np.exp(2 * padded["old"]) + 0.1 * rng.random(size=shape),
        "process": rng.normal(size=shape),
    }  # fmt: skip
    lengths = [9, 6, 4, 7, 1, 5, 3, 8]  # of ragged_batch, masked tokens included
    present = np.arange(shape[1])[None] < np.array(lengths)[:, None]

    def flat(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x[present])

    batch = AdvantageBatch(
        rewards=torch.tensor(options["many"] if name == "gdpo" else padded["rewards"]),
        group_ids=padded["groups"],
        sequence_ids=torch.tensor(np.nonzero(present)[0]),
        mask=flat(padded["mask"]),
        token_rewards=flat(options["token_rewards"]) if with_token_rewards else None,
        values=flat(padded["values"]),
        greedy_rewards=torch.tensor(options["greedy"]),
        log_probs=flat(padded["old"]),
        collision=flat(options["collision"]),
        process_rewards=flat(options["process"]),
    )
    return batch, padded | {"present": present}, options


def config_of(name: str, **changes: Any) -> AdvantageConfig:
    return AdvantageConfig(**({"name": name, "gamma": 0.9, "lam": 0.8} | changes))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("with_token_rewards", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_numpys(name: str, with_token_rewards: bool, seed: int) -> None:
    with_token_rewards = with_token_rewards and name != "gdpo"
    batch, padded, options = make_batch(seed, name, with_token_rewards)
    config = config_of(name, reward_weights=(1.0, 0.5) if name == "gdpo" else ())
    found = compute_advantages(config, batch)
    expected = reference.advantages(name, padded, options)
    assert found.advantages.dtype == torch.float32
    np.testing.assert_allclose(found.advantages.numpy(), expected[padded["present"]], rtol=1e-5, atol=1e-6)
    assert (found.advantages[batch.mask == 0] == 0).all() and found.advantages.abs().sum() > 0
    assert (found.returns is not None) == (name == "gae")
    assert found.metrics["groups"] == 4 and found.metrics["singleton_groups"] == 1


@pytest.mark.parametrize("name", ["grpo", "grpo_passk", "gdpo"])
def test_without_the_deviation(name: str) -> None:
    batch, padded, options = make_batch(3, name)
    found = compute_advantages(config_of(name, norm_by_std=False, reward_weights=(1.0, 0.5)), batch)
    expected = reference.advantages(name, padded, options | {"norm": False})
    np.testing.assert_allclose(found.advantages.numpy(), expected[padded["present"]], rtol=1e-5, atol=1e-6)


def test_returns_of_gae_are_before_whitening() -> None:
    batch, padded, options = make_batch(4, "gae", True)
    found = compute_advantages(config_of("gae"), batch)
    r = options["token_rewards"] + reference.outcome_at_end(padded["rewards"], padded["mask"])
    raw = reference.gae(r, padded["values"], padded["mask"], 0.9, 0.8)
    returns = (raw + padded["values"]) * padded["mask"]
    np.testing.assert_allclose(found.returns.numpy(), returns[padded["present"]], rtol=1e-5, atol=1e-6)


def test_gae_skips_a_tools_tokens() -> None:
    """A turn of the tool between two turns of the model changes nothing, whatever the critic says of it."""
    values, rewards = torch.tensor([0.3, -0.2, 0.5]), torch.tensor([1.0])
    bare = AdvantageBatch(rewards, ["g"], torch.zeros(3, dtype=torch.int64), values=values)
    with_tool = replace(
        bare,
        sequence_ids=torch.zeros(5, dtype=torch.int64),
        mask=torch.tensor([1, 1, 0, 0, 1]),
        values=torch.tensor([0.3, -0.2, 77.0, -99.0, 0.5]),
    )
    short, long = compute_advantages("gae", bare), compute_advantages("gae", with_tool)
    torch.testing.assert_close(long.advantages[[0, 1, 4]], short.advantages)
    torch.testing.assert_close(long.returns[[0, 1, 4]], short.returns)
    assert not long.advantages[2:4].any() and not long.returns[2:4].any()


def outcome_batch(rewards: list[float], groups: list[Any], lengths: list[int] | None = None) -> AdvantageBatch:
    lengths = lengths or [2] * len(rewards)
    ids = torch.repeat_interleave(torch.arange(len(rewards)), torch.tensor(lengths))
    return AdvantageBatch(torch.tensor(rewards), groups, ids)


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_groups_go_by_id_and_never_by_place(name: str) -> None:
    rewards, groups, lengths = [1.0, 0.25, 0.0, 0.5, 0.75, 0.125], ["x", "y", "x", "y", "x", "y"], [1, 4, 2, 3, 5, 2]
    order = [4, 1, 0, 5, 3, 2]
    first = compute_advantages(name, outcome_batch(rewards, groups, lengths)).advantages
    mixed = compute_advantages(
        name,
        outcome_batch([rewards[i] for i in order], [groups[i] for i in order], [lengths[i] for i in order]),
    ).advantages
    of_sample = dict(zip(order, torch.split(mixed, [lengths[i] for i in order])))
    for i, tokens in enumerate(torch.split(first, lengths)):
        torch.testing.assert_close(of_sample[i], tokens)


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_a_group_of_one_has_its_reward_and_is_counted(name: str) -> None:
    found = compute_advantages(name, outcome_batch([0.7], ["only"]))
    assert found.advantages.tolist() == pytest.approx([0.7, 0.7])
    assert found.metrics == {"groups": 1, "singleton_groups": 1, "zero_variance_groups": 0}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_group_that_agrees_teaches_nothing_and_is_counted(name: str) -> None:
    count = 3
    batch = replace(
        outcome_batch([0.1] * count, ["g"] * count),
        greedy_rewards=torch.full((count,), 0.1),
        values=torch.full((6,), 0.1),
        log_probs=torch.full((6,), -1.0),
        collision=torch.full((6,), 0.5),
        process_rewards=torch.zeros(6),
    )
    config = AdvantageConfig(name, gamma=1.0, lam=1.0)
    found = compute_advantages(config, replace(batch, rewards=batch.rewards[:, None]) if name == "gdpo" else batch)
    assert found.advantages.abs().max() < 1e-3
    assert found.metrics["zero_variance_groups"] == 1


def test_a_sample_without_reward_is_no_member_of_its_group() -> None:
    """A reward that failed is never scored 0: the others' baseline is theirs alone."""
    batch = outcome_batch([1.0, float("nan"), 0.0], ["g"] * 3)
    masked = replace(batch, mask=torch.tensor([1, 1, 0, 0, 1, 1]))
    for name in GROUP_RELATIVE:
        found = compute_advantages(name, masked).advantages
        without = compute_advantages(name, outcome_batch([1.0, 0.0], ["g"] * 2)).advantages
        assert found.tolist() == pytest.approx([*without[:2].tolist(), 0, 0, *without[2:].tolist()]), name
    with pytest.raises(UserError, match="has no reward"):
        compute_advantages("grpo", batch)


def test_whitening_of_fewer_than_two_tokens_changes_nothing() -> None:
    x = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    assert whiten(x, torch.tensor([[0, 1]])).tolist() == [[0.0, 5.0]]
    assert whiten(x, torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
    two = whiten(x, torch.ones(1, 2))
    assert two.mean().item() == pytest.approx(0.0) and two.var().item() == pytest.approx(1.0)


def test_what_is_added_to_a_deviation_that_is_nearly_0() -> None:
    """1e-6 to a group's deviation, 1e-8 to the variance that whitens: seen only where they are as large themselves."""
    rewards = [0.0, 2e-6]
    deviation = 2e-6 / 2**0.5
    found = compute_advantages("grpo", outcome_batch(rewards, ["g", "g"], [1, 1])).advantages
    assert found.tolist() == pytest.approx([-1e-6 / (deviation + 1e-6), 1e-6 / (deviation + 1e-6)], rel=1e-4)
    x = torch.tensor([[0.0, 2e-4]], dtype=torch.float64)
    wanted = 1e-4 / (2e-8 + 1e-8) ** 0.5
    assert whiten(x, torch.ones(1, 2)).flatten().tolist() == pytest.approx([-wanted, wanted])


def test_an_empty_batch_is_an_empty_answer() -> None:
    nothing = AdvantageBatch(torch.zeros(0), [], torch.zeros(0, dtype=torch.int64))
    for name in ("grpo", "reinforce_plus_plus", "rloo", "opo", "gpg", "grpo_passk"):
        assert compute_advantages(name, nothing).advantages.shape == (0,)


def test_the_plain_baseline() -> None:
    assert compute_advantages([1.0, 0.0, 0.5], 0.5) == [0.5, -0.5, 0.0]
    assert compute_advantages(rewards=[1.0, 2.0]) == [1.0, 2.0]
    assert compute_advantages([1.0], baseline=0.25) == [0.75]


def test_the_overlong_penalty_rises_through_the_buffer() -> None:
    lengths = torch.tensor([10, 80, 90, 100, 120])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0.0, 0.0, -0.5, -1.0, -2.0])
    assert overlong_penalty(lengths, 100, 20, 0.5).tolist() == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0])
    with pytest.raises(UserError, match="buffer"):
        overlong_penalty(lengths, 100, 0)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("remax", {}, "greedy_rewards"),
        ("gae", {}, "values"),
        ("optimal_token_baseline", {}, "log_probs"),
        ("prime", {}, "process_rewards"),
        ("grpo", {"group_ids": ["g"]}, "group ids"),
        ("grpo", {"rewards": torch.zeros(2, 3)}, "one reward a sample"),
        ("gdpo", {"rewards": torch.zeros(2, 3)}, "reward_weights"),
        ("grpo", {"sequence_ids": torch.tensor([0, 0, 1, 5])}, "sequence id 5"),
        ("grpo", {"mask": torch.tensor([1, 0, 1, 1]), "token_rewards": torch.tensor([0, 0.5, 0, 0])}, "not learned"),
    ],
)
def test_what_an_estimator_lacks_is_said(name: str, changes: dict[str, Any], says: str) -> None:
    batch = replace(outcome_batch([1.0, 0.0], ["g", "g"]), **changes)
    with pytest.raises(UserError, match=says):
        compute_advantages(AdvantageConfig(name, reward_weights=(1.0, 2.0)), batch)


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="unknown; use one of grpo, rloo"):
        AdvantageConfig("grop")
    with pytest.raises(UserError, match=r"0\.\.1"):
        AdvantageConfig("gae", lam=1.5)
