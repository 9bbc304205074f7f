"""The losses under their plain names: what they equal, and that they learn to predict rather than to copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rollouts.training as training
from rollouts.errors import UserError
from rollouts.training.rl_losses import compute_group_advantages, compute_grpo_loss, grpo_loss, ppo_loss
from rollouts.training.types import RLTrainingConfig, Sample


def padded(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [3, 6, 7], labels, and a mask whose rows learn four, one and no tokens."""
    torch.manual_seed(seed)
    mask = torch.zeros(3, 6)
    mask[0, 2:] = 1
    mask[1, 4] = 1
    return torch.randn(3, 6, 7), torch.randint(0, 7, (3, 6)), mask


def shifted_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """[B, P] float64; column t is log p(label t | before)."""
    scores = torch.log_softmax(logits.double(), -1).numpy()
    out = np.zeros(labels.shape)
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            out[row, t] = scores[row, t - 1, labels[row, t]]
    return out


def test_grpo_loss_is_the_mean_log_prob_of_a_row_times_its_advantage() -> None:
    logits, labels, mask = padded()
    advantages = torch.tensor([0.7, -1.2, 5.0])
    out = grpo_loss(logits, labels, mask, advantages)
    lp = shifted_log_probs(logits, labels)
    expected = -0.7 * lp[0, 2:].mean() + 1.2 * lp[1, 4]
    assert out.total.item() == pytest.approx(expected, rel=1e-5)
    assert out.count == 2, "the row without learned tokens does not count"


def test_grpo_loss_rewards_predicting_and_not_copying() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    copies, predicts = 50.0 * F.one_hot(labels, 7), 50.0 * F.one_hot(labels.roll(-1, dims=1), 7)
    ones, advantage = torch.ones(labels.shape), torch.tensor([1.0])
    assert grpo_loss(copies, labels, ones, advantage).total > 40
    assert grpo_loss(predicts, labels, ones, advantage).total < 1e-3


def test_packed_rows_and_advantages_of_tokens() -> None:
    logits, labels, mask = padded(1)
    learned = mask > 0
    ids = torch.arange(3)[:, None].expand(3, 6)[learned]
    advantages = torch.tensor([0.7, -1.2, 5.0])
    rows = grpo_loss(logits, labels, mask, advantages)
    one_row = grpo_loss(
        logits.reshape(1, 18, 7),
        labels.reshape(1, 18),
        mask.reshape(1, 18),
        advantages[ids],
        sequence_ids=ids,
        values=None,
    )
    torch.testing.assert_close(one_row.total, rows.total)


def test_ppo_loss_is_numpys() -> None:
    logits, labels, mask = padded(2)
    lp, learned = shifted_log_probs(logits, labels), mask.numpy() > 0
    rng = np.random.default_rng(0)
    old = lp + 0.5 * rng.normal(size=lp.shape)
    advantages = np.array([0.7, -1.2, 5.0])
    ratio = np.exp(lp - old)
    a = advantages[:, None]
    loss = np.maximum(-a * ratio, -a * np.clip(ratio, 0.9, 1.1))[learned].sum()
    given = torch.tensor(old, dtype=torch.float32)
    for shaped in (given, given[torch.tensor(learned)]):
        out = ppo_loss(logits, labels, mask, torch.tensor(advantages, dtype=torch.float32), shaped, clip_range=0.1)
        assert out.total.item() == pytest.approx(loss, rel=1e-5) and out.count == 5


def sample(reward: float | None, group: str, log_probs: list[float]) -> Sample:
    """Two prompt tokens, then one learned token a log-prob."""
    n = len(log_probs)
    return Sample(
        tokens=range(n + 2), loss_mask=[0, 0, *[1] * n], rollout_log_probs=[0.0, 0.0, *log_probs], reward=reward,
        group_id=group, id=f"{group}{reward}",
    )  # fmt: skip


def test_compute_grpo_loss_groups_samples_and_follows_given_log_probs() -> None:
    samples = [sample(1.0, "a", [-1.0, -2.0]), sample(0.5, "b", [-0.5]), sample(0.0, "a", [-1.5, -0.1, -0.2])]
    std = np.std([1.0, 0.0], ddof=1) + 1e-6
    a, b, c = 0.5 / std, 0.5, -0.5 / std
    now = compute_grpo_loss(samples)
    assert now.total.item() == pytest.approx(-(a + b + c), abs=1e-6) and now.count == 3

    log_probs = torch.tensor([-1.1, -1.9, -0.4, -1.5, -0.1, -0.3], requires_grad=True)
    out = compute_grpo_loss(samples, log_probs=log_probs)
    ratios = np.exp([-0.1, 0.1, 0.1, 0.0, 0.0, -0.1])
    expected = -(a * ratios[:2].mean() + b * ratios[2] + c * ratios[3:].mean())
    assert out.total.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(out.total, log_probs)
    np.testing.assert_allclose(gradient.numpy(), -np.array([a / 2, a / 2, b, c / 3, c / 3, c / 3]) * ratios, rtol=1e-5)
    by_rloo = compute_grpo_loss(samples, RLTrainingConfig(num_steps=1, batch_size=1, advantage="rloo"))
    assert by_rloo.total.item() == pytest.approx(-(1.0 + 0.5 - 1.0), abs=1e-6)
    with pytest.raises(UserError, match="has no reward"):
        compute_grpo_loss([sample(None, "a", [-1.0])])


def test_compute_group_advantages() -> None:
    found = compute_group_advantages([1.0, 0.0, 0.25, 0.5], ["a", "a", "only", "a"])
    std = np.std([1.0, 0.0, 0.5], ddof=1) + 1e-6
    assert found.tolist() == pytest.approx([0.5 / std, -0.5 / std, 0.25, 0.0], abs=1e-6)
    assert compute_group_advantages([1.0, 0.0], normalize_std=False).tolist() == [0.5, -0.5]


def test_the_package_gives_the_names() -> None:
    assert training.grpo_loss is grpo_loss and training.compute_grpo_loss is compute_grpo_loss
    assert training.compute_advantages([1.0], 0.25) == [0.75]
