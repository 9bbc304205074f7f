"""One rank of the FSDP tests under torchrun: every check, then results_<rank>.json. python fsdp_worker.py FOLDER."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.optim import _muon
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from rollouts.errors import UserError
from rollouts.models.lora import LoRAConfig, add_lora
from rollouts.training import distributed_utils as ranks
from rollouts.training.backends import (
    FSDPConfig,
    FSDPTrainingBackend,
    OptimizerConfig,
    PyTorchTrainingBackend,
    create_fsdp_backend,
    create_pytorch_backend,
)
from rollouts.training.loops.batches import collate_step
from rollouts.training.sft_losses import LossOutput, causal_lm_loss
from rollouts.training.types import Sample

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
STEPS = 4
TORCH_MUON = _muon._zeropower_via_newtonschulz


# Shared with the tests, which run the same on one device ------------------------------------------------------------


def make_model(seed: int = 0, tied: bool = True, layers: int = 2) -> PreTrainedModel:
    """Odd sizes, so that shards are uneven."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=127,
        hidden_size=32,
        intermediate_size=47,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


def make_samples(step: int) -> list[Sample]:
    """Step 2 is a single sample: one rank has nothing to do."""
    rng = np.random.default_rng(step)
    samples = []
    for _ in range(1 if step == 2 else 5):
        n = int(rng.integers(6, 20))
        samples.append(Sample(tokens=rng.integers(0, 127, n).tolist(), loss_mask=[0.0, 0.0] + [1.0] * (n - 2)))
    return samples


def step_batches(step: int, backend: PyTorchTrainingBackend, max_tokens: int = 24) -> list[Any]:
    samples = make_samples(step)
    return collate_step(samples, range(len(samples)), max_tokens, True, backend.rank, backend.world_size)


def train(backend: PyTorchTrainingBackend, steps: range = range(STEPS)) -> list[dict[str, float]]:
    history = []
    for step in steps:
        learned = backend.forward_backward(step_batches(step, backend)).wait()
        history.append(learned | backend.optim_step().wait())
    return history


def evaluate(backend: PyTorchTrainingBackend) -> float:
    return backend.evaluate(step_batches(7, backend)).wait()["loss"]


def options(optimizer: str = "adamw") -> dict[str, Any]:
    return {"precision": "float32", "device": "cpu", "optimizer": OptimizerConfig(optimizer, lr=3e-3, weight_decay=0.1)}


def one_device(model: torch.nn.Module, optimizer: str = "adamw", **more: Any) -> PyTorchTrainingBackend:
    return create_pytorch_backend(model, **{**options(optimizer), **more})


def lora_model(seed: int = 0) -> torch.nn.Module:
    return add_lora(make_model(), LoRAConfig(r=2), seed=seed)


def frozen_model(seed: int = 0) -> PreTrainedModel:
    model = make_model(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name and "embed" not in name)
    return model


def orthogonalized(x: torch.Tensor, factors: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Muon's in float32: the rounding of torch's own, in bfloat16, hides what two ranks might do otherwise than one."""
    a, b, c = factors
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def muon_by(orthogonalize: Callable[..., torch.Tensor]) -> AbstractContextManager[Any]:
    return mock.patch.object(_muon, "_zeropower_via_newtonschulz", orthogonalize)


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


# On the ranks -------------------------------------------------------------------------------------------------------


def sharded(
    model: torch.nn.Module, strategy: str = "FULL_SHARD", optimizer: str = "adamw", **more: Any
) -> FSDPTrainingBackend:
    layout = {k: more.pop(k) for k in ("mixed_precision", "cpu_offload", "checkpoint_format") if k in more}
    config = FSDPConfig(strategy, **{"mixed_precision": False, **layout})
    return create_fsdp_backend(model, config=config, **{**options(optimizer), **more})


def weights(backend: PyTorchTrainingBackend) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backend.get_weights().wait().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that differ by a bit."""
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n]))


def check_training(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, make, more in (
        *((strategy, make_model, {"strategy": strategy}) for strategy in STRATEGIES),
        ("untied", lambda: make_model(tied=False), {}),
        ("muon", make_model, {"optimizer": "muon"}),
        ("muon_in_bfloat16", make_model, {"optimizer": "muon"}),
        ("recomputing", make_model, {"activation_checkpointing": True}),
        ("lora", lora_model, {}),
        ("frozen", frozen_model, {}),
        ("mixed_precision", make_model, {"mixed_precision": True}),
    ):
        with muon_by(TORCH_MUON if name == "muon_in_bfloat16" else orthogonalized):
            backend = sharded(make(), **more)
            results[name] = train(backend) + [{"loss": evaluate(backend)}]
        torch.save(weights(backend), folder / f"weights_{name}_{ranks.get_rank()}.pt")
    return results


def check_cpu_offload(folder: Path) -> Any:
    try:
        return train(sharded(make_model(), cpu_offload=True))
    except UserError as error:
        return str(error)


def check_communication(folder: Path) -> dict[str, Any]:
    """Collectives of one forward_backward call over 1 and over 4 micro-batches, and the layers that are sharded."""
    counts: dict[str, Any] = {}
    for strategy in STRATEGIES:
        backend = sharded(make_model(), strategy)
        whole = step_batches(0, backend, max_tokens=1000)
        for parts in (whole, whole * 4):
            with Collectives() as recorder:
                backend.forward_backward(parts).wait()
            counts[f"{strategy} {len(parts)}"] = recorder.counts
            backend.optim_step().wait()
    return counts


def check_stale_weights(folder: Path) -> dict[str, Any]:
    """A pass in evaluation mode leaves nothing behind that a later change of the weights would not reach."""
    results: dict[str, Any] = {}
    for strategy in STRATEGIES:
        backend, other = sharded(make_model(), strategy), one_device(make_model(seed=5))
        evaluate(backend)
        backend.load_weights(other.get_weights().wait()).wait()
        after_load = evaluate(backend)

        backend.forward_backward(step_batches(0, backend)).wait()
        evaluate(backend)
        backend.optim_step().wait()
        learned = backend.forward_backward(step_batches(1, backend)).wait()
        results[strategy] = [after_load, learned["loss"], learned["grad_norm"]]
    return results


def check_log_probs(folder: Path) -> dict[str, float]:
    """Log-probs and values against one device's, before and after the weights change; step 2 leaves one rank idle."""
    results: dict[str, float] = {}
    for strategy in STRATEGIES:
        backend, alone = sharded(make_model(), strategy), one_device(make_model())
        other = one_device(make_model(seed=5)).get_weights().wait()
        for step in (0, 2):
            batches = step_batches(step, backend)
            results[f"{strategy} {step}"] = difference(
                backend.compute_log_probs(batches, 0.7), alone.compute_log_probs(batches, 0.7)
            )
            results[f"{strategy} {step} values"] = difference(
                backend.compute_values(batches), alone.compute_values(batches)
            )
            for b in (backend, alone):
                b.load_weights(other).wait()
    backend, base = sharded(lora_model()), one_device(make_model())
    train(backend, range(2))
    batches = step_batches(0, backend)
    results["base"] = difference(backend.compute_log_probs(batches, adapter=False), base.compute_log_probs(batches))
    results["adapter"] = difference(backend.compute_log_probs(batches), base.compute_log_probs(batches))
    return results


def difference(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) if len(x) else 0.0 for x, y in zip(a.wait(), b.wait(), strict=True))


def check_checkpoints(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in ("full", "sharded"):
        for optimizer in ("adamw", "muon"):
            where = {
                "checkpoint_dir": folder / f"{kind}_{optimizer}",
                "checkpoint_format": kind,
                "optimizer": optimizer,
            }
            a = sharded(make_model(), **where)
            train(a, range(2))
            step = a.save_checkpoint(2, {}, {"cursor": 7}).wait()
            draw = torch.rand(2).tolist()
            rest = train(a, range(2, 4))
            b = sharded(make_model(seed=3), **where)
            train(b, range(1))
            evaluate(b)
            b.forward_backward(step_batches(1, b)).wait()
            loaded = b.load_checkpoint(b.find_checkpoint()).wait()
            results[f"{kind} {optimizer}"] = {
                "step": step.name,
                "state": loaded,
                "random": torch.rand(2).tolist() == draw,
                "history": train(b, range(2, 4)) == rest,
                "losses": [m["loss"] for m in rest],
                "different": same(weights(a), weights(b)),
            }
    return results


def check_partly_trained_checkpoints(folder: Path) -> dict[str, Any]:
    """Adapters and frozen weights: is what comes after loading what came after saving, bit for bit?"""
    results = {}
    for name, make in (("lora", lora_model), ("frozen", frozen_model)):
        for kind in ("full", "sharded"):
            where = {"checkpoint_dir": folder / f"{name}_{kind}", "checkpoint_format": kind}
            a, b = sharded(make(), **where), sharded(make(seed=4), **where)
            train(a, range(2))
            step = a.save_checkpoint(2).wait()
            torch.save(weights(a), folder / f"{name}_{kind}_{ranks.get_rank()}.pt")
            rest = train(a, range(2, 4))
            b.load_checkpoint(step).wait()
            results[f"{kind} {name}"] = [train(b, range(2, 4)) == rest, same(weights(a), weights(b))]
    return results


def check_from_one_device(folder: Path) -> dict[str, Any]:
    results = {}
    for optimizer in ("adamw", "muon"):
        backend = sharded(make_model(seed=3), optimizer=optimizer, checkpoint_dir=folder / f"one_{optimizer}")
        backend.load_checkpoint(backend.find_checkpoint()).wait()
        results[optimizer] = train(backend, range(2, 4))
    return results


def check_failed_save(folder: Path) -> dict[str, Any]:
    """The checkpoint folder is a file: what rank 0 meets, every rank hears of, and training can go on."""
    results: dict[str, Any] = {}
    for kind in ("full", "sharded"):
        backend = sharded(make_model(), checkpoint_dir=folder / "a_file", checkpoint_format=kind)
        train(backend, range(1))
        try:
            backend.save_checkpoint(1).wait()
        except Exception as error:
            results[kind] = [type(error).__name__, str(error), train(backend, range(1, 2))[0]["step"]]
    return results


def check_torn_pass(folder: Path) -> list[str]:
    """A backward pass fails on every rank; then a good checkpoint is loaded."""
    backend = sharded(make_model(), checkpoint_dir=folder / "torn")
    step = backend.save_checkpoint(0).wait()

    def fails_in_backward(*batch: Any) -> LossOutput:
        output = causal_lm_loss(*batch)
        output.total.register_hook(lambda gradient: 1 / 0)
        return output

    backend.loss_fn = fails_in_backward
    messages = []
    for operation in (backend.forward_backward(step_batches(0, backend)), backend.load_checkpoint(step)):
        try:
            operation.wait()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def check_wrong_checkpoint(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in ("full", "sharded"):
        backend = sharded(make_model(layers=3), checkpoint_format=kind)
        try:
            backend.load_checkpoint(folder / f"{kind}_adamw" / "step_000002").wait()
        except Exception as error:
            results[kind] = [isinstance(error, UserError), str(error)]
    return results


def check_bad_gradient_on_one_rank(folder: Path) -> dict[str, Any]:
    backend = sharded(make_model())
    before = weights(backend)
    batches = step_batches(0, backend)
    if ranks.get_rank() == 1:
        batches[0] = dict(batches[0], loss_mask=batches[0]["loss_mask"] * float("nan"))
    backend.forward_backward(batches).wait()
    updated = backend.optim_step().wait()
    return {"skipped": updated["skipped"], "different": same(before, weights(backend)), "next": train(backend)}


def check_helpers(folder: Path) -> dict[str, Any]:
    rank = ranks.get_rank()
    torch.manual_seed(rank)
    x, mask = torch.randn(3, 5) * (rank + 1) + rank, (torch.rand(3, 5) < 0.6).float()
    torch.save((x, mask, ranks.distributed_masked_whiten(x, mask)), folder / f"whiten_{rank}.pt")
    return {
        "gathered": ranks.all_gather({"rank": rank}),
        "broadcast": ranks.broadcast(f"from {rank}", source=1),
        "sum": ranks.all_reduce(torch.tensor([1.0 + rank])).tolist(),
        "main": ranks.is_main(),
        "world": ranks.get_world_size(),
    }


def check_refusals(folder: Path) -> str:
    model = make_model()
    try:
        FSDPTrainingBackend(model, torch.optim.AdamW(model.parameters()))
    except UserError as error:
        return str(error)
    return "accepted"


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.init_process_group("cpu", timeout_seconds=60)
    checks: list[Callable[[Path], Any]] = [f for name, f in globals().items() if name.startswith("check_")]
    results: dict[str, Any] = {}
    for check in checks:
        try:
            with muon_by(orthogonalized):
                results[check.__name__] = check(folder)
        except Exception:
            results[check.__name__] = {"error": traceback.format_exc()}
        (folder / f"results_{ranks.get_rank()}.json").write_text(json.dumps(results))
    ranks.barrier()
    ranks.cleanup()


if __name__ == "__main__":
    main()
