"""One rank of a policy update, or the only one: python policy_ranks_worker.py FOLDER writes FOLDER/<ranks>.json."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollouts.models.critic import add_value_head, make_critic
from rollouts.models.lora import LoRAConfig, add_lora
from rollouts.training.algorithms.aggregation import AGGREGATIONS
from rollouts.training.algorithms.corrections import named_correction
from rollouts.training.algorithms.policy_losses import POLICY_LOSSES, PolicyLossConfig, make_policy_loss
from rollouts.training.algorithms.value import make_shared_loss, make_value_loss
from rollouts.training.backends import FSDPConfig, OptimizerConfig, create_fsdp_backend, create_pytorch_backend
from rollouts.training.backends.optimizers import trainable_parameters
from rollouts.training.backends.reference import BaseModel
from rollouts.training.distributed_utils import cleanup
from rollouts.training.loops.rl_batches import collate_rl_step
from rollouts.training.loops.rl_step import select_tokens
from rollouts.training.types import Sample

AGGREGATE = itertools.cycle(AGGREGATIONS)
LOSSES = {
    **{
        name: PolicyLossConfig(
            name, aggregation=next(AGGREGATE), max_length=30, covariance_fraction=0.2, covariance_low=0.01
        )
        for name in POLICY_LOSSES
    },
    "gspo": PolicyLossConfig("gspo", eps_low=0.05, eps_high=0.07, kl_coef=0.1, entropy_coef=0.01),
    "ppo_clip": PolicyLossConfig(correction=named_correction("tis"), aggregation="seq-mean-token-mean"),
    "full kl": PolicyLossConfig(kl="full", kl_coef=0.5),
}


def make_model(tied: bool) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 127, "hidden_size": 32, "intermediate_size": 47, "num_hidden_layers": 2, "head_dim": 16}
    return Qwen3ForCausalLM(
        Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    )


def make_samples() -> tuple[list[Sample], dict[str, list[np.ndarray]]]:
    rng = np.random.default_rng(0)
    names = ("old_log_probs", "ref_log_probs", "values", "returns")
    samples, columns = [], {name: [] for name in names}  # type: ignore[var-annotated]
    for i in range(5):
        n = int(rng.integers(6, 20))
        mask = [0.0, 0.0, *[1.0] * (n - 2)]
        near_uniform = -4.8 + 0.2 * rng.normal(size=n)
        samples.append(
            Sample(
                tokens=rng.integers(0, 127, n).tolist(), loss_mask=mask, advantages=rng.normal(size=n).tolist(),
                rollout_log_probs=near_uniform.tolist(), reward=0.0, id=str(i),
            )
        )  # fmt: skip
        for name, column in columns.items():
            column.append(rng.normal(size=n - 2) * 0.1 - 4.8 * name.endswith("log_probs"))
    return samples, columns


def update(ranks: int, name: str, tied: bool) -> dict[str, Any]:
    """Metrics of one optimizer step, and a digest of the weights after it."""
    is_critic, has_base, is_shared = name == "critic", name == "full kl", name.startswith("shared")
    options: dict[str, Any] = {
        "precision": "float32", "device": "cpu", "optimizer": OptimizerConfig("adamw", lr=3e-3),
        "loss_fn": make_value_loss() if is_critic else make_policy_loss(LOSSES[name.removeprefix("shared ")]),
    }  # fmt: skip
    model: Any = make_critic(make_model(tied)) if is_critic else make_model(tied)
    if is_shared:
        add_value_head(model)
        torch.nn.init.normal_(model.value_head.weight)
        options["loss_fn"] = make_shared_loss(options["loss_fn"], make_value_loss(), value_coef=0.5)
    if has_base:
        model = add_lora(model, LoRAConfig(r=4, dropout=0.0))
        for _, parameter in trainable_parameters(model):
            torch.nn.init.normal_(parameter, std=0.2)  # a fresh adapter would be no different from its base
    if ranks > 1:
        config = FSDPConfig("FULL_SHARD", mixed_precision=False)
        backend: Any = create_fsdp_backend(model, config=config, **options)
    else:
        backend = create_pytorch_backend(model, **options)
    samples, columns = make_samples()
    if name in LOSSES:
        columns |= select_tokens(LOSSES[name], samples, range(5), columns, seed=0)
    batches, _ = collate_rl_step(samples, range(5), 24, columns, backend.rank, backend.world_size)
    if has_base:
        states = BaseModel(backend).compute_states(batches).wait()
        batches = [{**batch, "ref_logits": found} for batch, found in zip(batches, states, strict=True)]
    metrics = {}
    if is_shared:  # its head alone first, as in the first steps of a run
        metrics = backend.forward_backward([{**batch, "values_alone": True} for batch in batches]).wait()
        backend.optim_step().wait()
        metrics = {f"alone {n}": value for n, value in metrics.items()}
    metrics |= backend.forward_backward(batches).wait()
    backend.optim_step().wait()
    weights = {
        n: [w.double().sum().item(), w.double().abs().sum().item()] for n, w in backend.get_weights().wait().items()
    }
    if is_shared:
        [head] = [whole(p).double() for name, p in model.named_parameters() if "value_head" in name]
        weights["head"] = [head.sum().item(), head.abs().sum().item()]
    return {"metrics": metrics, "weights": weights}


def whole(parameter: Any) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def main(folder: Path, ranks: int) -> None:
    both = ("gspo", "ppo_clip")  # the head and the embedding apart, too
    found = {
        f"{name} {tied}": update(ranks, name, tied)
        for name in [*LOSSES, "critic", "shared reinforce"]
        for tied in {True, name not in both}
    }
    if ranks == 1 or torch.distributed.get_rank() == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(found))
    if ranks > 1:
        cleanup()


if __name__ == "__main__":
    main(Path(sys.argv[1]), 2)
