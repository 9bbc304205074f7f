"""The backend on one device against a plain loop of transformers, F.cross_entropy, clip_grad_norm_ and AdamW."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollouts.errors import UserError
from rollouts.models.lora import LoRAConfig, add_lora
from rollouts.training.backends import (
    OptimizerConfig,
    PyTorchTrainingBackend,
    ScheduleConfig,
    TrainingBackend,
    create_backend_with_scheduler,
    create_pytorch_backend,
)
from rollouts.training.backends.loss_model import LossModel, flops_per_token
from rollouts.training.checkpoints import read_json, read_tensors, verify_checkpoint
from rollouts.training.loops.batches import empty_batch, prepare_sft_batch
from rollouts.training.sft_losses import LossOutput, causal_lm_loss
from rollouts.training.types import Sample

MakeModel = Callable[..., PreTrainedModel]


def make_samples(count: int = 6, seed: int = 0, vocab: int = 512) -> list[Sample]:
    """Ragged samples with a prompt part that carries no loss."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        n = int(rng.integers(4, 20))
        prompt = int(rng.integers(1, n - 1))
        tokens = rng.integers(3, vocab, n).tolist()
        samples.append(Sample(tokens=tokens, loss_mask=[0.0] * prompt + [1.0] * (n - prompt)))
    return samples


def batches(step: int, parts: int = 1, packing: bool = True) -> list[dict[str, Any]]:
    samples = make_samples(seed=step)
    return [prepare_sft_batch(samples[i::parts], packing) for i in range(parts)]


def backend_for(model: PreTrainedModel, lr: float = 1e-3, **kwargs: Any) -> PyTorchTrainingBackend:
    optimizer = kwargs.pop("optimizer", None) or OptimizerConfig(lr=lr, weight_decay=0.1)
    return create_pytorch_backend(model, device="cpu", optimizer=optimizer, **kwargs)


def train(backend: PyTorchTrainingBackend, steps: range, parts: int = 1) -> list[dict[str, float]]:
    history = []
    for step in steps:
        learned = backend.forward_backward(batches(step, parts)).wait()
        history.append(learned | backend.optim_step().wait())
    return history


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(a[name], b[name]), name


# Against an independent loop ----------------------------------------------------------------------------------------


def plain_gradient(model: PreTrainedModel, samples: list[Sample]) -> tuple[float, float]:
    """Mean loss over all learned tokens, one sample a pass, gradient left on the model; and the token accuracy."""
    count = sum(s.num_loss_tokens for s in samples)
    total, hits = 0.0, 0
    for sample in samples:
        tokens = torch.tensor([sample.tokens])
        logits = model(input_ids=tokens).logits[0, :-1]
        learned = torch.tensor(sample.loss_mask[1:]) > 0
        loss = F.cross_entropy(logits[learned], tokens[0, 1:][learned], reduction="sum") / count
        loss.backward()
        total += loss.item()
        hits += int((logits[learned].argmax(-1) == tokens[0, 1:][learned]).sum())
    return total, hits / count


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_are_those_of_a_plain_loop(make_tiny_model: MakeModel, packing: bool, parts: int) -> None:
    model, lr = make_tiny_model(seed=3), 3e-3
    reference = copy.deepcopy(model)
    vectors = [p for p in reference.parameters() if p.ndim < 2]
    matrices = [p for p in reference.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: 1.0 - step / 4)
    config = ScheduleConfig("linear", warmup_steps=0, min_lr_ratio=0.0)
    backend = backend_for(model, lr=lr, schedule=config, num_steps=5, max_grad_norm=0.5)
    for step in range(4):
        adamw.zero_grad()
        loss, accuracy = plain_gradient(reference, make_samples(seed=step))
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item()
        assert norm > 0.5  # the clipping is seen at work
        adamw.step()
        learned = backend.forward_backward(batches(step, parts, packing)).wait()
        updated = backend.optim_step().wait()
        assert learned["loss"] == pytest.approx(loss, rel=1e-5)
        assert learned["accuracy"] == pytest.approx(accuracy)
        assert learned["num_tokens"] == sum(s.num_loss_tokens for s in make_samples(seed=step))
        assert learned["grad_norm"] == pytest.approx(norm, rel=1e-4) == updated["grad_norm"]
        assert updated["lr"] == pytest.approx(schedule.get_last_lr()[0])
        assert (updated["step"], updated["skipped"]) == (step + 1, 0)
        schedule.step()
        assert_same(state(model), state(reference), rtol=1e-3, atol=1e-4)


def test_packed_and_padded_losses_agree_for_every_sample(make_tiny_model: MakeModel) -> None:
    backend, samples = backend_for(make_tiny_model()), make_samples(8)

    def per_sample(logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, owner: torch.Tensor) -> Any:
        """Each sample's own loss as a metric; ``owner`` [B, S] says whose token it is."""
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        losses, owner = losses * loss_mask[:, 1:].flatten(), owner[:, 1:].flatten()
        one = torch.ones(())
        metrics = {str(i): (losses[owner == i].sum().detach(), one) for i in range(len(samples))}
        return LossOutput(losses.sum(), loss_mask.sum(), metrics)

    backend.loss_fn = per_sample
    packed = dict(
        prepare_sft_batch(samples), owner=torch.repeat_interleave(torch.tensor([len(s) for s in samples]))[None]
    )
    padded = dict(prepare_sft_batch(samples, packing=False))
    padded["owner"] = torch.arange(len(samples))[:, None].expand(padded["input_ids"].shape)
    a, b = backend.evaluate(packed).wait(), backend.evaluate(padded).wait()
    alone = [backend_for(make_tiny_model()).evaluate(prepare_sft_batch([s])).wait() for s in samples]
    for i, (sample, one) in enumerate(zip(samples, alone, strict=True)):
        mean = 1 / sample.num_loss_tokens
        assert abs(a[str(i)] - b[str(i)]) * mean < 1e-5
        assert abs(a[str(i)] * mean - one["loss"]) < 1e-5


def test_an_ordinary_loss_function_works_too(make_tiny_model: MakeModel) -> None:
    def mean(logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        learned = loss_mask[:, 1:] > 0
        return F.cross_entropy(logits[:, :-1][learned], labels[:, 1:][learned])

    a, b = backend_for(make_tiny_model(), loss_fn=mean), backend_for(make_tiny_model())
    for x, y in zip(train(a, range(2), parts=3), train(b, range(2), parts=3), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)


def test_a_mean_over_no_token_adds_nothing(make_tiny_model: MakeModel) -> None:
    def mean(logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        learned = loss_mask[:, 1:] > 0
        return F.cross_entropy(logits[:, :-1][learned], labels[:, 1:][learned])

    a, b = backend_for(make_tiny_model(), loss_fn=mean), backend_for(make_tiny_model(), loss_fn=mean)
    with_empty = a.forward_backward([empty_batch(), *batches(0)]).wait()
    assert with_empty["loss"] == b.forward_backward(batches(0)).wait()["loss"]
    assert a.optim_step().wait() == b.optim_step().wait()
    assert_same(state(a.model), state(b.model))


# Accumulation and division ------------------------------------------------------------------------------------------


def test_micro_batches_and_calls_add_up_to_one_batch(make_tiny_model: MakeModel) -> None:
    whole, parted, called = (backend_for(make_tiny_model()) for _ in range(3))
    assert isinstance(whole, TrainingBackend)
    for step in range(3):
        one = whole.forward_backward(batches(step)).wait()
        many = parted.forward_backward(batches(step, 4)).wait()
        several = [called.forward_backward(b).wait() for b in batches(step, 4)]
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert sum(s["loss"] * s["num_tokens"] for s in several) / one["num_tokens"] == pytest.approx(one["loss"])
        assert several[-1]["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        norms = [b.optim_step().wait()["grad_norm"] for b in (whole, parted, called)]
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    assert_same(state(whole.model), state(parted.model), rtol=1e-3, atol=1e-5)
    assert_same(state(whole.model), state(called.model), rtol=1e-3, atol=1e-5)


def test_the_gradient_is_divided_by_the_global_count(make_tiny_model: MakeModel) -> None:
    """One long and one short micro-batch: the mean over tokens, not the mean of two means."""
    long, short = Sample(tokens=list(range(40)), loss_mask=[1.0] * 40), Sample(tokens=[7, 8], loss_mask=[0.0, 1.0])
    model = make_tiny_model()
    reference = copy.deepcopy(model)
    loss, _ = plain_gradient(reference, [long, short])
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()]).item()
    learned = backend_for(model).forward_backward([prepare_sft_batch([s]) for s in (long, short)]).wait()
    assert learned["loss"] == pytest.approx(loss, rel=1e-5)
    assert learned["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_evaluating_between_changes_nothing(make_tiny_model: MakeModel) -> None:
    a, b = backend_for(make_tiny_model()), backend_for(make_tiny_model())
    train(a, range(2), parts=2)
    for step in range(2):
        first, second = batches(step, 2)
        b.forward_backward(first).wait()
        before = b.evaluate(batches(9)).wait()
        assert b.evaluate(batches(9, 3)).wait()["loss"] == pytest.approx(before["loss"], rel=1e-5)
        b.forward_backward(second).wait()
        b.optim_step().wait()
    assert_same(state(a.model), state(b.model), rtol=1e-4, atol=1e-6)


def test_the_caller_sets_learning_rate_and_clipping_of_a_step(make_tiny_model: MakeModel) -> None:
    backend = backend_for(make_tiny_model(), lr=1e-3, schedule=ScheduleConfig("constant", warmup_steps=0), num_steps=9)
    backend.forward_backward(batches(0)).wait()
    before = state(backend.model)
    assert backend.optim_step(lr=0.0).wait()["lr"] == 0.0
    assert_same(state(backend.model), before)
    backend.forward_backward(batches(0)).wait()
    assert backend.optim_step().wait()["lr"] == 1e-3  # for that step only

    sgd = PyTorchTrainingBackend(make_tiny_model(), lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    before = state(sgd.model)
    sgd.forward_backward(batches(0)).wait()
    sgd.optim_step(max_grad_norm=0.01).wait()
    moved = torch.nn.utils.get_total_norm([p - before[n] for n, p in sgd.model.named_parameters()])
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_a_step_without_a_gradient_is_refused(make_tiny_model: MakeModel) -> None:
    backend = backend_for(make_tiny_model())
    with pytest.raises(UserError, match="call forward_backward first"):
        backend.optim_step().wait()
    train(backend, range(1))
    with pytest.raises(UserError, match="call forward_backward first"):
        backend.optim_step().wait()
    train(backend, range(1))  # and nothing is broken by having asked


# Precision ----------------------------------------------------------------------------------------------------------


def test_masters_start_from_the_exact_weights(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    model = make_tiny_model()
    exact = state(model)
    backend = backend_for(model, precision="bfloat16", checkpoint_dir=tmp_path)
    assert {p.dtype for p in backend.model.parameters()} == {torch.bfloat16}
    assert not all(torch.equal(p.float(), exact[n]) for n, p in model.named_parameters())  # rounding loses something
    folder = backend.save_checkpoint(0).wait()
    saved = read_tensors(folder / "model.safetensors")
    for name, value in exact.items():
        assert torch.equal(saved[name], value), name


def test_updates_below_bfloat16s_grain_are_not_lost(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    """A thousandth of bfloat16's spacing a step: the rounded weights stand still, the masters move each time."""
    model = make_tiny_model()
    exact = state(model)
    optimizer = OptimizerConfig(lr=1e-7)
    backend = backend_for(model, precision="bfloat16", optimizer=optimizer, checkpoint_dir=tmp_path)
    train(backend, range(10))
    saved = read_tensors(backend.save_checkpoint(10).wait() / "model.safetensors")
    moved = torch.cat([(saved[n] - exact[n]).abs().flatten() for n in exact])
    assert 5e-7 < moved.median() < 1.1e-6 or moved.gt(0).float().mean() > 0.5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16()), name


def test_gradients_of_bfloat16_add_up_in_float32(make_tiny_model: MakeModel) -> None:
    """1,000 equal small gradients after a large one: bfloat16 would drop each of them."""
    seen: list[torch.Tensor] = []

    def factory(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)

    backend = PyTorchTrainingBackend(make_tiny_model(), factory, precision=torch.bfloat16)
    name = "model.norm.weight"
    parameter = dict(backend.model.named_parameters())[name]
    scales = iter([256.0] + [0.5] * 1000)

    def loss(logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> LossOutput:
        total = (parameter * next(scales)).sum().float()
        return LossOutput(total, torch.ones(()), {})

    backend.loss_fn = loss
    backend._loss_model.forward = lambda batch, fn: fn(None, None, None)  # type: ignore[method-assign]
    backend.forward_backward([{"loss_mask": None} for _ in range(1001)]).wait()
    (gradient,) = (m.grad for n, m in backend._weights.masters.items() if n == name)
    seen.append(gradient)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full_like(gradient, 256.0 + 500.0))
    assert parameter.grad is None  # half-precision gradients are freed


def test_bfloat16_follows_float32(make_tiny_model: MakeModel) -> None:
    exact, half = backend_for(make_tiny_model()), backend_for(make_tiny_model(), precision="bfloat16")
    for a, b in zip(train(exact, range(6)), train(half, range(6)), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-3)


# Faults -------------------------------------------------------------------------------------------------------------


def bad_batch(value: float = math.nan) -> dict[str, Any]:
    batch = dict(prepare_sft_batch(make_samples()))
    batch["loss_mask"] = batch["loss_mask"] * value
    return batch


def everything(backend: PyTorchTrainingBackend) -> dict[str, torch.Tensor]:
    return state(backend.model) | {key: value.clone() for key, value in backend._moments()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(
    make_tiny_model: MakeModel, value: float, precision: str
) -> None:
    schedule = ScheduleConfig("linear", warmup_steps=0)
    clean, hit = (
        backend_for(make_tiny_model(), precision=precision, schedule=schedule, num_steps=10) for _ in range(2)
    )
    train(clean, range(2))
    train(hit, range(2))
    before = everything(hit)
    hit.forward_backward([*batches(5), bad_batch(value)]).wait()
    updated = hit.optim_step().wait()
    assert (updated["skipped"], updated["skipped_steps"], updated["step"]) == (1, 1, 2)
    assert hit.weight_version == 2
    assert_same(everything(hit), before)
    assert_same(everything(clean), before)
    # And it goes on as if that step had never been.
    assert [m["lr"] for m in train(clean, range(2, 4))] == [m["lr"] for m in train(hit, range(2, 4))]
    assert_same(everything(hit), everything(clean))


def test_too_many_in_a_row_raise(make_tiny_model: MakeModel) -> None:
    backend = backend_for(make_tiny_model(), max_bad_steps=3)
    for pattern in ("bb", "g", "bb", "g"):  # good steps in between start the count again
        for kind in pattern:
            backend.forward_backward(bad_batch() if kind == "b" else batches(0)).wait()
            backend.optim_step().wait()
    before = everything(backend)
    for _ in range(2):
        backend.forward_backward(bad_batch()).wait()
        backend.optim_step().wait()
    backend.forward_backward(bad_batch()).wait()
    with pytest.raises(FloatingPointError, match="3 gradients in a row"):
        backend.optim_step().wait()
    assert_same(everything(backend), before)
    assert backend.skipped_steps == 7


def test_after_an_error_only_a_checkpoint_heals(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    backend = backend_for(make_tiny_model(), checkpoint_dir=tmp_path / "run")
    train(backend, range(2))
    folder = backend.save_checkpoint(2).wait()
    train(backend, range(2, 4))
    expected = everything(backend)

    def fails_later(*args: Any) -> LossOutput:
        out = causal_lm_loss(*args)
        out.total.register_hook(lambda gradient: 1 / 0)
        return out

    backend.loss_fn = fails_later
    first, second = batches(4, 2)
    backend.loss_fn = causal_lm_loss
    backend.forward_backward(first)
    backend.loss_fn = fails_later
    failed = backend.forward_backward(second)
    backend.loss_fn = causal_lm_loss
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    for refused in (
        backend.optim_step(),
        backend.forward_backward(first),
        backend.evaluate(first),
        backend.get_weights(),
        backend.save_checkpoint(5),
    ):
        with pytest.raises(RuntimeError, match=r"forward_backward failed before.*load a checkpoint first"):
            refused.wait()
    with pytest.raises(UserError):
        backend.load_checkpoint(tmp_path / "nowhere").wait()
    with pytest.raises(RuntimeError, match="load a checkpoint first"):  # that did not heal it
        backend.optim_step().wait()
    backend.load_checkpoint(folder).wait()
    train(backend, range(2, 4))
    assert_same(everything(backend), expected)  # nothing of the half-done gradient is left


def test_operations_take_effect_in_order_whenever_they_are_awaited(make_tiny_model: MakeModel) -> None:
    a, b = backend_for(make_tiny_model()), backend_for(make_tiny_model())
    train(a, range(3))
    futures = [f for step in range(3) for f in (b.forward_backward(batches(step)), b.optim_step())]
    for future in reversed(futures):
        future.wait()
    assert_same(state(a.model), state(b.model))


# Options ------------------------------------------------------------------------------------------------------------


def test_recomputed_activations_give_the_same_gradients(make_tiny_model: MakeModel) -> None:
    a, b = backend_for(make_tiny_model()), backend_for(make_tiny_model(), activation_checkpointing=True)
    runs = [0]
    b.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    assert train(a, range(3)) == train(b, range(3))
    assert_same(state(a.model), state(b.model))
    assert runs[0] == 6  # twice a step: it did recompute


def test_a_parameter_that_is_never_used_hinders_no_resume(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    def backend(seed: int) -> PyTorchTrainingBackend:
        model = make_tiny_model(seed=seed)
        model.register_parameter("spare", torch.nn.Parameter(torch.full((3,), float(seed))))
        return backend_for(model, checkpoint_dir=tmp_path)

    a, b = backend(1), backend(2)
    train(a, range(2))
    b.load_checkpoint(a.save_checkpoint(2).wait()).wait()
    assert train(a, range(2, 4)) == train(b, range(2, 4))
    assert_same(everything(a), everything(b))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay(make_tiny_model: MakeModel, tmp_path: Path, name: str) -> None:
    model = make_tiny_model()
    frozen = {n for n, p in model.named_parameters() if "layers.0" in n or "embed" in n}
    for n, p in model.named_parameters():
        p.requires_grad_(n not in frozen)
    before = state(model)
    backend = backend_for(model, optimizer=OptimizerConfig(name, weight_decay=0.1), checkpoint_dir=tmp_path)
    train(backend, range(2))
    after = state(model)
    assert {n for n in before if torch.equal(before[n], after[n])} == frozen
    folder = backend.save_checkpoint(2).wait()
    assert_same(state(AutoModelForCausalLM.from_pretrained(folder)), after)

    other = make_tiny_model(seed=7)
    for n, p in other.named_parameters():
        p.requires_grad_(n not in frozen)
    backend_for(other, optimizer=OptimizerConfig(name, weight_decay=0.1)).load_checkpoint(folder).wait()
    assert_same(state(other), after)


def test_the_schedule_needs_a_length(make_tiny_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        create_pytorch_backend(make_tiny_model(), schedule=ScheduleConfig())


def test_a_backend_from_a_folder(tiny_model_dir: Path) -> None:
    backend = create_backend_with_scheduler(str(tiny_model_dir), 10, lr=2e-3, warmup_ratio=0.2, device="cpu")
    assert backend.tokenizer is not None
    assert next(backend.model.parameters()).dtype == torch.bfloat16
    history = train(backend, range(10))
    assert history[0]["lr"] == pytest.approx(2e-4) and history[-1]["lr"] == pytest.approx(2e-4)
    assert history[2]["lr"] == pytest.approx(2e-3)


def test_models_whose_logits_are_more_than_a_product() -> None:
    from transformers import CohereConfig

    config = CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        logit_scale=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    samples = make_samples(vocab=64)
    expected, _ = plain_gradient(copy.deepcopy(model), samples)
    got = backend_for(model).evaluate(prepare_sft_batch(samples)).wait()
    assert got["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_attention_that_cannot_be_packed_is_refused() -> None:
    """Attention sinks would be dropped in silence."""
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="GptOssForCausalLM"):
        LossModel(AutoModelForCausalLM.from_config(config))


def test_flops_of_a_token(make_tiny_model: MakeModel) -> None:
    """Six per weight of the layers and of the output projection; attention grows with the length."""
    for tied in (True, False):
        model = make_tiny_model(tie_embeddings=tied)
        hidden = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)
        assert flops_per_token(model, 0.0) == 6 * (hidden + 512 * 64)
    assert flops_per_token(model, 10.0) - flops_per_token(model, 0.0) == 6 * 2 * (4 * 16) * 10


# Checkpoints and weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_goes_on_bit_for_bit(
    make_tiny_model: MakeModel, tmp_path: Path, optimizer: str, precision: str, tied: bool
) -> None:
    options: dict[str, Any] = {
        "precision": precision,
        "optimizer": OptimizerConfig(optimizer, lr=1e-3, weight_decay=0.1),
        "schedule": ScheduleConfig("cosine"),
        "num_steps": 6,
        "checkpoint_dir": tmp_path,
    }
    a = backend_for(make_tiny_model(seed=1, tie_embeddings=tied), **options)
    train(a, range(3))
    a.forward_backward(bad_batch()).wait()
    a.optim_step().wait()
    folder = a.save_checkpoint(3, {"loss": 1.5}, {"cursor": [1, 2]}).wait()
    assert folder.name == "step_000003"
    verify_checkpoint(folder)
    after_save = torch.rand(3)
    rest = train(a, range(3, 6))

    b = backend_for(make_tiny_model(seed=2, tie_embeddings=tied), **options)
    train(b, range(1))
    b.forward_backward(batches(0)).wait()  # a gradient that loading has to forget
    assert b.load_checkpoint(folder).wait() == {"cursor": [1, 2]}
    assert torch.equal(torch.rand(3), after_save)
    assert (b.step, b.weight_version, b.skipped_steps) == (3, 3, 1)
    assert train(b, range(3, 6)) == rest
    assert_same(everything(a), everything(b))
    assert read_json(folder / "trainer_state.json")["metrics"] == {"loss": 1.5}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_a_transformers_model(
    make_tiny_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path, precision: str, tied: bool
) -> None:
    model = make_tiny_model(tie_embeddings=tied)
    backend = backend_for(model, tokenizer=tiny_tokenizer, precision=precision, checkpoint_dir=tmp_path, lr=1e-2)
    train(backend, range(3))
    folder = backend.save_checkpoint(3).wait()
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, value in state(loaded).items():
        assert torch.equal(value, backend._weights.masters[name]), name
    if precision == "float32":
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_model_names_the_weight(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    small = backend_for(make_tiny_model(num_layers=1), checkpoint_dir=tmp_path / "small")
    train(small, range(1))
    folder = small.save_checkpoint(1).wait()
    deeper, wider = backend_for(make_tiny_model()), backend_for(make_tiny_model(num_layers=1, hidden_size=32))
    with pytest.raises(UserError, match=r"lacks the weight 'model\.layers\.1\."):
        deeper.load_checkpoint(folder).wait()
    with pytest.raises(UserError, match=r"'model\.embed_tokens\.weight' has shape \[512, 64\] there, \[512, 32\] here"):
        wider.load_checkpoint(folder).wait()
    big = backend_for(make_tiny_model(), checkpoint_dir=tmp_path / "big")
    train(big, range(1))
    folder = big.save_checkpoint(1).wait()
    with pytest.raises(UserError, match=r"'model\.layers\.1\."):
        small.load_checkpoint(folder).wait()
    with pytest.raises(RuntimeError, match="load a checkpoint first"):  # half loaded is no state to train from
        small.forward_backward(batches(0)).wait()


def test_a_checkpoint_of_another_optimizer_is_refused(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    muon = backend_for(make_tiny_model(), optimizer=OptimizerConfig("muon"), checkpoint_dir=tmp_path)
    train(muon, range(1))
    folder = muon.save_checkpoint(1).wait()
    with pytest.raises(UserError, match=r"optimizer was 'Muon\+AdamW' and is now 'AdamW'"):
        backend_for(make_tiny_model()).load_checkpoint(folder).wait()


def test_without_a_folder_there_is_no_checkpoint(make_tiny_model: MakeModel) -> None:
    backend = backend_for(make_tiny_model())
    assert backend.find_checkpoint() is None
    with pytest.raises(UserError, match="checkpoint_dir"):
        backend.save_checkpoint(1).wait()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_go_from_backend_to_backend(make_tiny_model: MakeModel, precision: str) -> None:
    a, b = (backend_for(make_tiny_model(seed=s), precision=precision) for s in (1, 2))
    train(a, range(2))
    weights = a.get_weights().wait()
    assert set(weights) == set(a.model.state_dict())
    version = b.weight_version
    assert b.load_weights(weights).wait() is None
    assert b.weight_version == version + 1
    assert a.evaluate(batches(7)).wait() == b.evaluate(batches(7)).wait()
    train(b, range(1))  # the masters follow
    moved = max((p - weights[n]).float().abs().max() for n, p in b.model.named_parameters())
    assert 0 < moved < 0.1


def test_loading_weights_overwrites_frozen_ones_too(make_tiny_model: MakeModel) -> None:
    model = make_tiny_model(seed=2)
    model.get_input_embeddings().weight.requires_grad_(False)
    backend, other = backend_for(model), make_tiny_model(seed=1)
    backend.load_weights(other.state_dict()).wait()
    assert_same(state(model), state(other))


def test_loading_weights_of_another_model_is_refused_whole(make_tiny_model: MakeModel) -> None:
    backend = backend_for(make_tiny_model())
    before = state(backend.model)
    weights = dict(make_tiny_model(seed=5).state_dict())
    del weights["model.norm.weight"]
    with pytest.raises(UserError, match=r"'model\.norm\.weight'"):
        backend.load_weights(weights).wait()
    assert_same(state(backend.model), before)
    train(backend, range(1))  # and goes on


# LoRA ---------------------------------------------------------------------------------------------------------------


def lora_backend(tiny_model_dir: Path, seed: int = 0, targets: Any = "all-linear", **options: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = add_lora(base, LoRAConfig(r=4, target_modules=targets), seed=seed)
    return backend_for(model, lr=1e-2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapter_trains_saves_resumes_and_loads_in_peft(
    tiny_model_dir: Path, tmp_path: Path, precision: str
) -> None:
    from peft import PeftModel

    a = lora_backend(tiny_model_dir, precision=precision, checkpoint_dir=tmp_path)
    before = state(a.model)
    train(a, range(3))
    changed = {n for n, p in a.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    folder = a.save_checkpoint(3).wait()
    assert not list(folder.glob("model*.safetensors"))  # the adapter alone
    rest = train(a, range(3, 5))

    b = lora_backend(tiny_model_dir, seed=9, precision=precision, checkpoint_dir=tmp_path)
    b.load_checkpoint(folder).wait()
    at_step_3 = state(b.model)
    assert train(b, range(3, 5)) == rest
    assert_same(everything(a), everything(b))

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, folder).named_parameters())
    for name in changed:
        assert torch.equal(loaded[name].to(at_step_3[name].dtype), at_step_3[name]), name


def test_an_adapter_on_the_output_layer_learns(tiny_model_dir: Path) -> None:
    backend = lora_backend(tiny_model_dir, targets=["q_proj", "lm_head"])
    before = state(backend.model)
    train(backend, range(2))
    after = state(backend.model)
    assert all(not torch.equal(before[n], after[n]) for n in before if "lora_B" in n)


def test_dropout_is_off_in_evaluation_and_on_in_training(tiny_model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    backend = backend_for(add_lora(base, LoRAConfig(r=4, dropout=0.5)), lr=1e-2)  # type: ignore[arg-type]
    train(backend, range(2))
    a, b = (backend.evaluate(batches(5)).wait()["loss"] for _ in range(2))
    assert a == b
    a, b = (backend.forward_backward(batches(5)).wait()["loss"] for _ in range(2))
    assert a != b


def test_an_adapters_gradient_is_that_of_a_plain_loop(tiny_model_dir: Path) -> None:
    backend = lora_backend(tiny_model_dir)
    train(backend, range(2))
    reference = copy.deepcopy(backend.model)
    loss, _ = plain_gradient(reference, make_samples(seed=2))
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None]).item()
    learned = backend.forward_backward(batches(2)).wait()
    assert learned["loss"] == pytest.approx(loss, rel=1e-4)
    assert learned["grad_norm"] == pytest.approx(norm, rel=1e-3)


# Compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_model_learns_the_same(make_tiny_model: MakeModel, precision: str) -> None:
    a = backend_for(make_tiny_model(), precision=precision)
    b = backend_for(make_tiny_model(), precision=precision, compile=True)
    tolerance = 1e-5 if precision == "float32" else 1e-2
    for x, y in zip(train(a, range(4), parts=2), train(b, range(4), parts=2), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=tolerance)
    assert b.evaluate(batches(5)).wait()["loss"] == pytest.approx(a.evaluate(batches(5)).wait()["loss"], rel=tolerance)
