"""Policy losses against trl's GRPOTrainer on the same tensors: value and gradient, with the KL to a reference."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import algo_reference as reference
import numpy as np
import pytest
import torch

from rollouts.training.algorithms.advantages import AdvantageBatch, AdvantageConfig, compute_advantages
from rollouts.training.algorithms.aggregation import Sequences
from rollouts.training.algorithms.policy_losses import PolicyLossConfig, PolicyTokens, policy_loss_terms

# trl's loss type -> its own settings, and ours
PAIRS: dict[str, tuple[dict[str, Any], PolicyLossConfig]] = {
    "grpo": ({}, PolicyLossConfig(aggregation="seq-mean-token-mean", dual_clip=None)),
    "bnpo": ({}, PolicyLossConfig(aggregation="token-mean", dual_clip=None)),
    "dr_grpo": ({}, PolicyLossConfig(aggregation="seq-mean-token-sum-norm", max_length=11, dual_clip=None)),
    "dapo": ({"delta": 1.5}, PolicyLossConfig(eps_low=0.2, eps_high=0.28, aggregation="token-mean", dual_clip=1.5)),
    "sapo": ({}, PolicyLossConfig("sapo", aggregation="seq-mean-token-mean")),
    "cispo": ({"epsilon_high": 1.2}, PolicyLossConfig("cispo", eps_low=1.0, eps_high=0.2)),  # theirs bounds the ratio
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        PolicyLossConfig("gspo", eps_low=0.05, eps_high=0.07, dual_clip=None),
    ),
}


def trainer(config: PolicyLossConfig, log_probs: torch.Tensor, loss_type: str, settings: dict[str, Any]) -> Any:
    """What ``GRPOTrainer._compute_loss`` asks of its trainer, with the model's log-probs given."""
    options = {
        "loss_type": loss_type, "importance_sampling_level": "token", "epsilon_low": config.bounds[0],
        "epsilon_high": config.bounds[1], "beta": 0.1, "top_entropy_quantile": 1.0, "aux_loss_enabled": False,
        "off_policy_mask_threshold": None, "use_vllm": False, "_entropy_bonus_enabled": False,
        "max_completion_length": 11, "current_gradient_accumulation_steps": 1, "_metrics": {"train": defaultdict(list)},
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
    }  # fmt: skip
    args = SimpleNamespace(
        delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1,
        sapo_temperature_pos=config.tau_positive, sapo_temperature_neg=config.tau_negative,
    )  # fmt: skip
    return SimpleNamespace(**{**options, **{k: v for k, v in settings.items() if k != "delta"}}, args=args)


@pytest.mark.parametrize("loss_type", PAIRS)
def test_trls_loss_and_gradient(loss_type: str) -> None:
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    settings, config = PAIRS[loss_type]
    config = PolicyLossConfig(**{**config.__dict__, "kl_coef": 0.1, "kl": "k3"})
    batch = reference.ragged_batch(31)
    rows = [i for i in range(8) if batch["mask"][i].any()]  # theirs counts a row without tokens as a sequence
    mask = torch.tensor(batch["mask"][rows])
    log_probs, old, ref = (torch.tensor(batch[name][rows]) for name in ("log_probs", "old", "ref"))
    advantages = torch.tensor(np.linspace(-1.5, 1.2, len(rows)))

    theirs_at = log_probs.clone().requires_grad_(True)
    none = torch.zeros(len(rows), 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": none, "prompt_mask": none, "completion_ids": mask.long(), "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer(config, theirs_at, loss_type, settings), None, inputs)

    learned = mask > 0
    ours_at = log_probs[learned].requires_grad_(True)
    ids = torch.arange(len(rows))[:, None].expand_as(mask)[learned]
    out = policy_loss_terms(
        config, PolicyTokens(ours_at, old[learned], advantages[ids], Sequences.of(ids)), ref_log_probs=ref[learned]
    )
    ours = out.total / out.count
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    expected = torch.autograd.grad(theirs, theirs_at)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, ours_at)[0], expected[learned], rtol=1e-5, atol=1e-8)


def test_group_advantages_are_trls_formula() -> None:
    """trl reshapes rewards by position and has no rule for a group of one; on whole groups side by side we agree."""
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.7, 0.5, 0.5, 0.5, 0.5])
    grouped = rewards.view(-1, 4)
    expected = (rewards - grouped.mean(1).repeat_interleave(4)) / (grouped.std(1).repeat_interleave(4) + 1e-6)
    batch = AdvantageBatch(rewards, [0] * 4 + [1] * 4, torch.arange(8))
    torch.testing.assert_close(compute_advantages(AdvantageConfig("grpo"), batch).advantages, expected)
