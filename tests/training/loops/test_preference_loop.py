"""Preference training on a tiny model: the formula, what it learns, its reference, and how it resumes."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pairs_task import Quiet, draw_pairs
from transformers import PreTrainedModel

from rollouts.errors import UserError
from rollouts.models import LoRAConfig, add_lora
from rollouts.training.algorithms.preference import PreferenceConfig
from rollouts.training.backends import OptimizerConfig, PyTorchTrainingBackend, create_pytorch_backend
from rollouts.training.datasets.preferences import PreferencePair
from rollouts.training.loops.preference_batches import PreferenceItem, collate_items, measure_log_probs
from rollouts.training.loops.preference_loop import REFERENCE_FILE, PreferenceTrainingConfig, run_preference_training
from rollouts.training.types import Sample

MakeModel = Callable[..., PreTrainedModel]
LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")


def make_pairs(count: int = 12, seed: int = 0) -> list[PreferencePair]:
    """Chosen answers are made of some tokens, rejected ones of others; in both, prompts and lengths differ."""

    def answer(rng: np.random.Generator, low: int) -> list[int]:
        return rng.integers(low, low + 50, int(rng.integers(2, 6))).tolist()

    return draw_pairs(answer, count, seed)


def make_backend(make_tiny_model: MakeModel, folder: Path | None = None, **options: Any) -> PyTorchTrainingBackend:
    lora, optimizer = (
        options.pop("lora", None),
        OptimizerConfig(lr=options.pop("lr", 3e-3), eps=options.pop("eps", 1e-8)),
    )
    model: Any = make_tiny_model(seed=options.pop("seed", 0))
    model = add_lora(model, lora) if lora else model
    return create_pytorch_backend(model, checkpoint_dir=folder, optimizer=optimizer, device="cpu", **options)


def config(name: str = "dpo", beta: float = 0.1, **changes: Any) -> PreferenceTrainingConfig:
    options = {"num_steps": 4, "batch_size": 4, "max_tokens_per_micro_batch": 40, **changes}
    return PreferenceTrainingConfig(loss=PreferenceConfig(name, beta), **options)


def run(
    backend: PyTorchTrainingBackend, pairs: list[PreferencePair], settings: PreferenceTrainingConfig, **options: Any
) -> list[dict[str, Any]]:
    event_loop = options.pop("event_loop", "asyncio")
    return anyio.run(lambda: run_preference_training(backend, pairs, settings, Quiet(), **options), backend=event_loop)


def answer_log_probs(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Log-probs [n] of one answer, alone in its batch, by the model's own forward."""
    tokens = torch.tensor(sample.tokens)
    logits = model(tokens[None]).logits[0].double()
    log_probs = torch.log_softmax(logits[:-1], dim=-1).gather(1, tokens[1:, None])[:, 0]
    return log_probs[torch.tensor(sample.loss_mask[1:]) != 0]


def loss_by_hand(name: str, beta: float, pairs: list[PreferencePair], model: Any, reference: Any) -> torch.Tensor:
    """The mean loss of pairs, from the papers' formulas, one answer at a time in double precision."""
    losses = []
    for pair in pairs:
        assert pair.chosen is not None and pair.rejected is not None
        c, r = answer_log_probs(model, pair.chosen), answer_log_probs(model, pair.rejected)
        with torch.no_grad():
            c0, r0 = answer_log_probs(reference, pair.chosen), answer_log_probs(reference, pair.rejected)
        h = (c.sum() - c0.sum()) - (r.sum() - r0.sum())
        if name == "dpo":
            losses.append(-torch.log(1 / (1 + torch.exp(-beta * h))))
        elif name == "ipo":
            losses.append((h - 1 / (2 * beta)) ** 2)
        elif name == "simpo":
            losses.append(-torch.log(torch.sigmoid(beta * (c.mean() - r.mean()))))
        else:
            odds = [torch.exp(x.mean()) / (1 - torch.exp(x.mean())) for x in (c, r)]
            losses.append(-c.mean() - beta * torch.log(torch.sigmoid(torch.log(odds[0]) - torch.log(odds[1]))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_losses_and_gradients_are_the_papers(make_tiny_model: MakeModel, name: str) -> None:
    """Three steps of the loop, packed and with shared prompts, against plain SGD on the formula."""
    pairs, beta = make_pairs(6), 0.5
    model, reference = make_tiny_model(seed=0), make_tiny_model(seed=0)
    policy = make_tiny_model(seed=0)
    backend = PyTorchTrainingBackend(policy, torch.optim.SGD(policy.parameters(), lr=0.05), max_grad_norm=None)
    history = run(backend, pairs, config(name, beta, num_steps=3, batch_size=6))
    for row in history:
        loss = loss_by_hand(name, beta, pairs, model, reference)
        assert row["loss"] == pytest.approx(loss.item(), rel=2e-4)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=2e-3)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad  # type: ignore[operator]
    if name in ("dpo", "ipo"):
        assert history[0]["reward_margin"] == pytest.approx(0.0, abs=1e-5)  # the policy is the reference
    assert history[0]["num_tokens"] == 6  # pairs are counted


def test_kto_is_the_papers(make_tiny_model: MakeModel) -> None:
    pairs = [*make_pairs(3), PreferencePair("alone", None, make_pairs(1, seed=5)[0].rejected)]
    reference, policy = make_tiny_model(seed=0), make_tiny_model(seed=1)
    backend = PyTorchTrainingBackend(make_tiny_model(seed=0), lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    settings = config("kto", 0.3, num_steps=1, shuffle=False)

    loaded: list[int] = []
    measure = backend.compute_log_probs

    def then_become_the_policy(batch: Any) -> Any:  # after the reference has been measured
        if len(loaded) == 2:
            backend.load_weights(policy.state_dict()).wait()
        loaded.append(1)
        return measure(batch)

    backend.compute_log_probs = then_become_the_policy  # type: ignore[method-assign, assignment]
    loaded.append(1)  # one call measures the reference: answers and mismatched ones together
    row = run(backend, pairs, settings)[0]

    with torch.no_grad():

        def ratio(s: Sample) -> float:
            return (answer_log_probs(policy, s).sum() - answer_log_probs(reference, s).sum()).item()

        answers = [(i, s) for i, p in enumerate(pairs) for s in p.samples]
        mismatched = []
        for i, s in answers:
            other = pairs[(i + 1) % 4].samples
            theirs = other[min([x is s for x in pairs[i].samples].index(True), len(other) - 1)]
            cut, their_cut = s.loss_mask.index(1), theirs.loss_mask.index(1)
            mismatched.append(Sample(
                tokens=[*s.tokens[:cut], *theirs.tokens[their_cut:]],
                loss_mask=[*s.loss_mask[:cut], *theirs.loss_mask[their_cut:]],
            ))  # fmt: skip
        z = max(0.0, sum(map(ratio, mismatched)) / len(mismatched))
        values = []
        for i, s in answers:
            gain = 0.3 * (ratio(s) - z) * (1 if s is pairs[i].chosen else -1)
            values.append(1 - 1 / (1 + math.exp(-gain)))
    assert row["reference_point"] == pytest.approx(z, rel=1e-3, abs=1e-5)
    assert row["loss"] == pytest.approx(sum(values) / 7, rel=1e-4)
    assert row["num_tokens"] == 7  # answers are counted


def test_kto_is_trls(make_tiny_model: MakeModel) -> None:
    """Steps of plain SGD by the loss of trl's KTOTrainer, on the same answers and the same mismatched ones."""
    pytest.importorskip("trl")
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
    from trl.trainer.utils import add_fused_lm_head

    pairs = [replace(pair, **{"rejected" if i % 4 else "chosen": None}) for i, pair in enumerate(make_pairs(8))]
    loss = PreferenceConfig("kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.4)
    policy = make_tiny_model()
    backend = PyTorchTrainingBackend(policy, torch.optim.SGD(policy.parameters(), lr=0.5), max_grad_norm=None)
    settings = PreferenceTrainingConfig(
        loss=loss, num_steps=4, batch_size=8, shuffle=False, max_tokens_per_micro_batch=30
    )
    history = run(backend, pairs, settings)

    answers = [s for pair in pairs for s in pair.samples]
    cuts = [s.loss_mask.index(1) for s in answers]
    completions = [list(s.tokens[cut:]) for s, cut in zip(answers, cuts, strict=True)]
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0).torch_call(
        [
            {
                "prompt_ids": list(s.tokens[:cut]),
                "completion_ids": completion,
                "KL_completion_ids": mismatched,
                "label": pair.chosen is not None,
            }
            for pair, s, cut, completion, mismatched in zip(
                pairs, answers, cuts, completions, [*completions[1:], completions[0]], strict=True
            )
        ]
    )
    assert 0 < sum(inputs["label"]) < 8
    model, reference = make_tiny_model(), make_tiny_model()
    for each in (model, reference):
        add_fused_lm_head(each, outputs=("log_probs", "entropy", "mean_logits"))
    trainer = SimpleNamespace(
        model=model, ref_model=reference, beta=0.3, desirable_weight=1.2, undesirable_weight=0.4, loss_type="kto",
        calculate_KL=True, precompute_ref_logps=False, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
    )  # fmt: skip
    trainer._compute_kl_logps = functools.partial(KTOTrainer._compute_kl_logps, trainer)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for row in history:
        optimizer.zero_grad()
        theirs = KTOTrainer._compute_loss(trainer, model, inputs, False)
        theirs.backward()
        assert row["loss"] == pytest.approx(theirs.item(), rel=1e-4)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        optimizer.step()
    measured = trainer._metrics["train"]
    for ours, name in (
        ("reference_point", "kl"),
        ("reward_chosen", "rewards/chosen"),
        ("reward_rejected", "rewards/rejected"),
    ):
        assert [row[ours] for row in history] == pytest.approx(measured[name], rel=1e-2, abs=1e-4), name
    assert max(measured["kl"]) > 0.01  # else nothing is said of the reference point
    for (name, a), b in zip(policy.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", LOSSES)
def test_held_out_preferences_are_learned(make_tiny_model: MakeModel, name: str) -> None:
    pairs, held_out = make_pairs(64), make_pairs(40, seed=1)
    backend = make_backend(make_tiny_model, lr=2e-3)
    settings = config(name, {"simpo": 2.0}.get(name, 0.1), num_steps=40, batch_size=16, max_tokens_per_micro_batch=512)

    def accuracy() -> float:
        items = [PreferenceItem.of(p) for p in held_out]
        sums = [(c.mean(), r.mean()) for c, r in measure_log_probs(backend, items, 512)]
        return float(np.mean([c > r for c, r in sums]))

    before = accuracy()
    history = run(backend, pairs, settings, validation=held_out, event_loop="trio" if name == "dpo" else "asyncio")
    assert before < 0.75 and accuracy() > 0.95
    if name != "kto":
        assert history[-1]["val_accuracy"] > 0.95
    if name not in ("orpo", "simpo"):
        assert history[-1]["reward_chosen"] > history[-1]["reward_rejected"] + 0.3
    assert history[-1]["loss"] < history[0]["loss"]


def test_how_a_step_is_divided_changes_nothing(make_tiny_model: MakeModel) -> None:
    for name in LOSSES:
        rows = []
        for changes in (
            {"max_tokens_per_micro_batch": 4096},
            {"max_tokens_per_micro_batch": 1},
            {"share_prompts": False, "max_tokens_per_micro_batch": 50},
        ):
            rows.append(
                run(make_backend(make_tiny_model, lr=1e-3), make_pairs(8), config(name, num_steps=2, **changes))
            )
        for other in rows[1:]:
            for a, b in zip(rows[0], other, strict=True):
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), name
                assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), name


def test_ranks_share_the_pairs_of_a_step_whole() -> None:
    items = [PreferenceItem.of(p) for p in make_pairs(7)]
    seen = []
    counts = set()
    for rank in range(3):
        batches = collate_items(items, 30, rank=rank, world_size=3)
        counts.add(len(batches))
        for batch in batches:
            desirable = batch["desirable"].tolist()
            assert desirable == [True, False] * (len(desirable) // 2)
            ids = batch["sequence_ids"]
            learned = batch["labels"].flatten()[batch["loss_positions"]]
            for k in range(len(desirable)):
                seen.append(tuple(learned[ids == k].tolist()))
    assert len(counts) == 1
    expected = [
        tuple(t for t, m in zip(s.tokens, s.loss_mask, strict=True) if m) for item in items for s in item.answers
    ]
    assert sorted(seen) == sorted(expected)


# Reference and resume -----------------------------------------------------------------------------------------------


def state(backend: PyTorchTrainingBackend) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in backend.model.named_parameters()}


@pytest.mark.parametrize("name", ["dpo", "kto"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4, dropout=0.1)])
def test_resume_is_bitwise(make_tiny_model: MakeModel, tmp_path: Path, name: str, lora: LoRAConfig | None) -> None:
    pairs, held_out = make_pairs(10), make_pairs(4, seed=3)
    settings = config(name, num_steps=6, checkpoint_every=2, eval_every=2)

    def backend(folder: str) -> PyTorchTrainingBackend:
        torch.manual_seed(8 if (tmp_path / folder).exists() else 7)  # a resumed run's dropout goes on all the same
        return make_backend(make_tiny_model, tmp_path / folder, lora=lora)

    whole = backend("whole")
    expected = run(whole, pairs, settings, validation=held_out)
    first = config(name, num_steps=4, checkpoint_every=2, eval_every=2)
    run(backend("parts"), pairs, first, validation=held_out)
    resumed = backend("parts")
    got = run(resumed, pairs, settings, validation=held_out)
    assert [row["step"] for row in got] == [5, 6]
    for a, b in zip(expected[4:], got, strict=True):
        for key in ("loss", "grad_norm", "reward_chosen", "reward_rejected"):
            assert a[key] == b[key], key
    assert expected[-1]["val_loss"] == got[-1]["val_loss"]
    for weight, value in state(whole).items():
        assert torch.equal(value, state(resumed)[weight]), weight


def test_the_reference_is_the_model_before_training(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    pairs = make_pairs(6)
    fresh = make_backend(make_tiny_model)
    items = [PreferenceItem.of(p) for p in pairs]
    expected = np.concatenate([x for answers in measure_log_probs(fresh, items, 40) for x in answers])

    backend = make_backend(make_tiny_model, tmp_path, lr=0.02, lora=LoRAConfig(r=4))
    run(backend, pairs, config(num_steps=3, checkpoint_every=1))
    from safetensors.numpy import load_file

    file = load_file(tmp_path / REFERENCE_FILE)
    np.testing.assert_array_equal(file["train"], expected)  # a fresh adapter changes nothing
    assert list(tmp_path.glob("*.partial")) == []

    now = np.concatenate([x for answers in measure_log_probs(backend, items, 40) for x in answers])
    assert np.abs(now - expected).max() > 0.01
    base = backend.compute_log_probs(collate_items(items, 4096), adapter=False).wait()[0].numpy()
    np.testing.assert_allclose(np.sort(base), np.sort(expected), atol=1e-5)  # and without the adapter it is there still


def test_a_run_does_not_go_on_with_other_data(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    pairs = make_pairs(6)
    run(make_backend(make_tiny_model, tmp_path), pairs, config(num_steps=2))
    others = [*pairs[:-1], make_pairs(6, seed=9)[-1]]
    with pytest.raises(UserError, match="other train data"):
        run(make_backend(make_tiny_model, tmp_path), others, config(num_steps=4))
    run(make_backend(make_tiny_model, tmp_path), others, config(num_steps=2), resume=False)


def test_bad_input_is_the_users_error(make_tiny_model: MakeModel) -> None:
    pairs = make_pairs(2)
    single = PreferencePair("row 7", pairs[0].chosen, None)
    silent = PreferencePair("row 8", pairs[0].chosen, Sample(tokens=[1, 2], loss_mask=[0, 0]))
    for bad, message in (
        ([], "cannot be empty"),
        ([single], "row 7 has 1 answer"),
        ([silent], "row 8 has an answer in"),
    ):
        with pytest.raises(UserError, match=message):
            run(make_backend(make_tiny_model), bad, config())
        with pytest.raises(UserError, match=f"validation pairs.*{message}"):
            run(make_backend(make_tiny_model), pairs, config(), validation=bad)
    with pytest.raises(UserError, match="packing"):
        config(packing=False)
    with pytest.raises(UserError, match="unknown"):
        config("dpoo")


@pytest.mark.long
def test_it_trains_as_trl_does(
    make_tiny_model: MakeModel, tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The same weights, pairs and AdamW in trl's DPOTrainer: the same losses, rewards and weights after five steps."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    words = "one two three four five six".split()
    rows = [
        {"prompt": f"Say {a}:", "chosen": f" {a} {b}", "rejected": f" {b} indeed"}
        for a in words
        for b in words
        if a != b
    ][:8]
    arguments = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=5, learning_rate=1e-3, beta=0.3,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, adam_beta2=0.95, adam_epsilon=1e-3,
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = DPOTrainer(
        model=str(tiny_model_dir),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer,
    )
    pairs = []
    for i, row in enumerate(trainer.train_dataset):
        samples = {
            name: Sample(
                tokens=row["prompt_ids"] + row[f"{name}_ids"],
                loss_mask=[0] * len(row["prompt_ids"]) + [1] * len(row[f"{name}_ids"]),
                group_id=str(i),
            )
            for name in ("chosen", "rejected")
        }
        pairs.append(PreferencePair(str(i), **samples))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]

    # Adam's first steps are signs of gradients, of noise where they are 0: the large epsilon leaves that out.
    backend = make_backend(make_tiny_model, lr=1e-3, eps=1e-3)
    history = run(backend, pairs, config("dpo", 0.3, num_steps=5, batch_size=8, max_tokens_per_micro_batch=4096))
    for mine, row in zip(history, logged, strict=True):
        assert mine["loss"] == pytest.approx(row["loss"], rel=1e-3, abs=1e-4)
        assert mine["reward_chosen"] == pytest.approx(row["rewards/chosen"], rel=1e-2, abs=1e-4)
        assert mine["reward_rejected"] == pytest.approx(row["rewards/rejected"], rel=1e-2, abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-2)
    for (name, a), b in zip(backend.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert F.mse_loss(a, b).sqrt() < 1e-4, name
