"""Preference, reward-model, process-reward and value losses against NumPy, finite differences, trl, any batch split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import algo_reference as reference
import numpy as np
import pytest
import torch

from rollouts.errors import UserError
from rollouts.training.algorithms.preference import (
    Answers,
    PreferenceConfig,
    kto_loss,
    kto_reference_point,
    make_preference_loss,
    pair_loss,
)
from rollouts.training.algorithms.reward_model import bradley_terry_loss, make_prime_loss, reward_model_loss
from rollouts.training.algorithms.value import ValueLossConfig, make_value_loss
from rollouts.training.sft_losses import DeferredLogits, LossOutput

PAIRS = {
    "dpo": PreferenceConfig("dpo", beta=0.3),
    "dpo smoothed": PreferenceConfig("dpo", beta=0.3, label_smoothing=0.2),
    "dpo of means": PreferenceConfig("dpo", beta=2.0, length_normalized=True),
    "ipo": PreferenceConfig("ipo", beta=0.2),
    "simpo": PreferenceConfig("simpo", beta=2.0, margin=0.5),
    "orpo": PreferenceConfig("orpo", beta=0.4),
}


def answers_batch(seed: int, outputs: int = 11) -> dict[str, torch.Tensor]:
    """Six answers of a model, rows 2p chosen and 2p + 1 rejected: ragged, one of a single token, pair 2 half masked."""
    torch.manual_seed(seed)
    rows, width = 6, 8
    mask = torch.zeros(rows, width)
    for row, (start, end) in enumerate([(2, 8), (2, 5), (1, 2), (1, 6), (3, 7), (3, 3)]):
        mask[row, start:end] = 1
    mask[0, 4] = 0
    return {
        "logits": torch.randn(rows, width, outputs),
        "labels": torch.randint(0, max(outputs, 2), (rows, width)),
        "mask": mask,
        "ref_log_probs": -torch.rand(rows, width) * 4,
        "values": torch.randn(rows, width),
        "returns": torch.randn(rows, width),
    }


def call(
    loss_fn: Any, data: dict[str, torch.Tensor], logits: torch.Tensor, rows: list[int], **per_row: torch.Tensor
) -> LossOutput:
    mask = data["mask"][rows]
    learned = mask > 0
    ids = torch.arange(len(rows))[:, None].expand_as(mask)[learned]
    fields = {name: data[name][rows][learned] for name in ("ref_log_probs", "values", "returns")}
    chosen = {name: x[rows] if x.ndim else x for name, x in per_row.items()}
    return loss_fn(logits[rows], data["labels"][rows], mask, sequence_ids=ids, **fields, **chosen)


def numpy_log_probs(logits: np.ndarray, data: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """Log-probs of the learned tokens of each row."""
    mask, labels = data["mask"].numpy(), data["labels"].numpy()
    rows = []
    for row in range(len(mask)):
        found = []
        for t in np.nonzero(mask[row])[0]:
            z = logits[row, t - 1].astype(np.float64)
            found.append(z[labels[row, t]] - z.max() - np.log(np.exp(z - z.max()).sum()))
        rows.append(np.array(found))
    return rows


def check_against(
    value: Callable[[np.ndarray], float], loss_fn: Any, data: dict[str, torch.Tensor], **extra: Any
) -> None:
    """The mean loss and its gradient in a sample of logits."""
    logits = data["logits"].clone().requires_grad_(True)
    out = call(loss_fn, data, logits, list(range(len(logits))), **extra)
    mean = out.total / out.count
    (gradient,) = torch.autograd.grad(mean, logits)
    array = data["logits"].double().numpy()
    assert mean.item() == pytest.approx(value(array), rel=1e-5)
    rng = np.random.default_rng(0)
    places = np.argwhere(gradient.abs().numpy() > 1e-6)
    assert len(places) > 10 or array.shape[-1] == 1
    for place in map(tuple, rng.permutation(places)[:15]):
        up, down = array.copy(), array.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        assert gradient[place].item() == pytest.approx((value(up) - value(down)) / 2e-5, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_are_numpys(case: str) -> None:
    config, data = PAIRS[case], answers_batch(1)
    refs = [r[m > 0].double().numpy() for r, m in zip(data["ref_log_probs"], data["mask"])]
    options = {
        "beta": config.beta, "smoothing": config.label_smoothing, "margin": config.margin, "means": config.over_means,
    }  # fmt: skip

    def value(logits: np.ndarray) -> float:
        lps = numpy_log_probs(logits, data)
        pairs = [(0, 1), (2, 3)]  # the third has an answer without learned tokens
        return float(
            np.mean([reference.pair_loss(config.name, lps[c], lps[r], refs[c], refs[r], options) for c, r in pairs])
        )

    check_against(value, make_preference_loss(config), data)


def test_kto_is_numpys() -> None:
    config, data = PreferenceConfig("kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7), answers_batch(2)
    refs = [r[m > 0].double().numpy() for r, m in zip(data["ref_log_probs"], data["mask"])]
    desirable, point = torch.tensor([True, False, True, True, False, True]), torch.tensor(0.8)

    def value(logits: np.ndarray) -> float:
        ratios = [x.sum() - r.sum() for x, r in zip(numpy_log_probs(logits, data), refs)]
        return float(np.mean([reference.kto_loss(ratios[i], bool(desirable[i]), 0.8, 0.3, 1.2, 0.7) for i in range(5)]))

    check_against(value, make_preference_loss(config), data, desirable=desirable, reference_point=point)


def test_the_reference_point_is_a_clamped_mean_over_answers() -> None:
    ids = torch.tensor([0, 0, 2])
    d = torch.tensor([0.5, 1.0, -0.5])
    assert kto_reference_point(d, torch.zeros(3), ids).item() == pytest.approx((1.5 - 0.5) / 2)
    assert kto_reference_point(-d, torch.zeros(3), ids).item() == 0.0
    assert kto_reference_point(d[:0], d[:0], ids[:0]).item() == 0.0


def test_the_reward_model_is_numpys() -> None:
    data = answers_batch(3, outputs=1)

    def value(logits: np.ndarray) -> float:
        last = [np.nonzero(m)[0][-1] for m in data["mask"].numpy()[:4]]
        scores = [logits[row, t, 0] for row, t in enumerate(last)]  # read at the answer's last token itself
        return float(np.mean([-np.log(reference.sigmoid(scores[c] - scores[c + 1])) for c in (0, 2)]))

    check_against(value, reward_model_loss, data)


def test_prime_is_numpys() -> None:
    data, correct = answers_batch(4), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    refs = [r[m > 0].double().numpy() for r, m in zip(data["ref_log_probs"], data["mask"])]

    def value(logits: np.ndarray) -> float:
        p = [reference.sigmoid(0.3 * (x - r).sum()) for x, r in zip(numpy_log_probs(logits, data), refs)]
        return float(-np.mean([np.log(p[i] if correct[i] else 1 - p[i]) for i in range(5)]))

    check_against(value, make_prime_loss(0.3), data, correct=correct)


@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_values_are_numpys(clip: float | None, aggregation: str) -> None:
    data = answers_batch(5, outputs=1)
    mask = data["mask"].numpy()

    def value(logits: np.ndarray) -> float:
        now = np.zeros(mask.shape)
        now[:, 1:] = logits[:, :-1, 0]  # before the token is written
        loss = reference.value_loss(now, data["values"].double().numpy(), data["returns"].double().numpy(), clip)
        return reference.aggregate(loss, mask, aggregation)

    loss_fn = make_value_loss(ValueLossConfig(clip, aggregation))
    check_against(value, loss_fn, data)
    metrics = call(loss_fn, data, data["logits"], list(range(6))).metrics
    clipped = (metrics["value_clip_fraction"][0] / metrics["value_clip_fraction"][1]).item()
    assert 0 < clipped < 1 if clip else clipped == 0


def cases() -> Iterator[tuple[str, Any, int, dict[str, torch.Tensor]]]:
    for name, config in PAIRS.items():
        yield name, make_preference_loss(config), 11, {}
    kto = {"desirable": torch.tensor([True, False, True, True, False, True]), "reference_point": torch.tensor(0.4)}
    yield "kto", make_preference_loss(PreferenceConfig("kto")), 11, kto
    yield "reward model", reward_model_loss, 1, {}
    yield "prime", make_prime_loss(0.3), 11, {"correct": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])}
    yield "value", make_value_loss(), 1, {}
    yield "value by sequence", make_value_loss(ValueLossConfig(0.2, "seq-mean-token-mean")), 1, {}


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("case", CASES)
def test_any_split_into_micro_batches_gives_the_same_step(case: str) -> None:
    """Pairs stay together; everything else may be anywhere."""
    loss_fn, outputs, extra = CASES[case]
    data = answers_batch(6, outputs)
    logits = data["logits"].clone().requires_grad_(True)

    def step(parts: list[list[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found = [call(loss_fn, data, logits, rows, **extra) for rows in parts]
        (gradient,) = torch.autograd.grad(sum(o.total for o in found), logits)
        means = {
            name: sum(o.metrics[name][0] for o in found) / sum(o.metrics[name][1] for o in found)
            for name in found[0].metrics
        }
        return gradient / sum(o.count for o in found), means

    whole, metrics = step([[0, 1, 2, 3, 4, 5]])
    assert whole.abs().sum() > 0
    for parts in ([[4, 5], [0, 1], [2, 3]], [[2, 3, 0, 1], [4, 5]]):
        gradient, means = step(parts)
        torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(means, metrics, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_nothing_to_learn_adds_zero(case: str) -> None:
    loss_fn, outputs, extra = CASES[case]
    data = answers_batch(7, outputs)
    data["mask"] = torch.zeros_like(data["mask"])
    logits = data["logits"].requires_grad_(True)
    out = call(loss_fn, data, logits, [0, 1], **extra)
    out.total.backward()
    assert out.total == 0 and out.count == 0 and not logits.grad.any()


@pytest.mark.parametrize("case", ["dpo", "reward model", "value"])
def test_hidden_states_do_as_well_as_logits(case: str) -> None:
    loss_fn, outputs, extra = CASES[case]
    data = answers_batch(8, outputs)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 8, 5), torch.randn(outputs, 5), torch.randn(outputs)
    late = DeferredLogits(hidden, weight, bias, data["mask"].flatten().nonzero()[:, 0])
    mask, ids = data["mask"], torch.arange(6)[:, None].expand(6, 8)[data["mask"] > 0]
    fields = {name: data[name][mask > 0] for name in ("ref_log_probs", "values", "returns")}
    one = loss_fn(late, data["labels"], mask, sequence_ids=ids, **fields, **extra)
    other = loss_fn(late.materialize(), data["labels"], mask, sequence_ids=ids, **fields, **extra)
    torch.testing.assert_close(one, other)


def test_trls_pair_losses_agree() -> None:
    """CPOTrainer's SimPO and IPO forms, and ORPOTrainer's odds ratio, on the same log-probs."""
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    torch.manual_seed(0)
    chosen, rejected = -torch.rand(6) * 3 - 0.01, -torch.rand(6) * 3 - 0.01
    peer = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=0.1, accelerator=SimpleNamespace(device="cpu")
    )
    for loss_type, config in (
        ("sigmoid", PreferenceConfig("dpo", beta=2.0, label_smoothing=0.1)),
        ("ipo", PreferenceConfig("ipo", beta=2.0)),
        ("simpo", PreferenceConfig("simpo", beta=2.0, margin=0.7)),
    ):
        peer.loss_type = loss_type
        peer.label_smoothing = config.label_smoothing
        theirs = CPOTrainer.cpo_loss(peer, chosen, rejected)[0]
        torch.testing.assert_close(pair_loss(Answers(chosen, rejected), config), theirs)
    odds = ORPOTrainer.odds_ratio_loss(peer, chosen, rejected)[0]
    ours = pair_loss(Answers(chosen, rejected), PreferenceConfig("orpo", beta=2.0))
    torch.testing.assert_close(ours, -chosen - odds)


def test_orpo_survives_an_answer_that_is_certain() -> None:
    certain = torch.zeros(1, requires_grad=True)
    loss = pair_loss(Answers(certain, torch.full((1,), -1.0)), PreferenceConfig("orpo"))
    (gradient,) = torch.autograd.grad(loss.sum(), certain)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_metrics_of_pairs() -> None:
    data = answers_batch(9)
    out = call(make_preference_loss(PAIRS["dpo"]), data, data["logits"], list(range(6)))
    lps = numpy_log_probs(data["logits"].numpy(), data)
    refs = [r[m > 0].double().numpy() for r, m in zip(data["ref_log_probs"], data["mask"])]
    rewards = [0.3 * (x.sum() - r.sum()) for x, r in zip(lps, refs)]
    got = {name: (s / n).item() for name, (s, n) in out.metrics.items()}
    assert got["reward_chosen"] == pytest.approx((rewards[0] + rewards[2]) / 2, rel=1e-4)
    assert got["reward_rejected"] == pytest.approx((rewards[1] + rewards[3]) / 2, rel=1e-4)
    assert got["reward_margin"] == pytest.approx(got["reward_chosen"] - got["reward_rejected"], rel=1e-4)
    assert got["accuracy"] == np.mean([rewards[0] > rewards[1], rewards[2] > rewards[3]])
    assert got["log_prob_chosen"] == pytest.approx((lps[0].mean() + lps[2].mean()) / 2, rel=1e-4)


def test_preferred_answers_gain() -> None:
    """The direction of each gradient: chosen log-probs go up; kto's liked ones up and others down."""
    for name, config in PAIRS.items():
        chosen = torch.tensor([-1.0], requires_grad=True)
        rejected = torch.tensor([-0.9], requires_grad=True)
        up, down = torch.autograd.grad(pair_loss(Answers(chosen, rejected), config).sum(), (chosen, rejected))
        assert up < 0 < down, name
    ratio = torch.zeros(2, requires_grad=True)
    loss = kto_loss(ratio, torch.tensor([True, False]), torch.tensor(0.0), PreferenceConfig("kto"))
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    assert gradient[0] < 0 < gradient[1]
    assert bradley_terry_loss(torch.tensor(2.0), torch.tensor(0.0)) < bradley_terry_loss(
        torch.zeros(()), torch.zeros(())
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "dpoo"}, "unknown; use one of dpo, ipo"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PreferenceConfig(**wrong)


def test_missing_fields_are_named() -> None:
    logits, labels, mask = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    ids = torch.tensor([0, 0, 1, 1])
    with pytest.raises(UserError, match="ref_log_probs"):
        make_preference_loss(PreferenceConfig("dpo"))(logits, labels, mask, sequence_ids=ids)
    with pytest.raises(UserError, match="desirable"):
        make_preference_loss(PreferenceConfig("kto"))(
            logits, labels, mask, sequence_ids=ids, ref_log_probs=torch.zeros(4)
        )
    with pytest.raises(UserError, match="value clip"):
        ValueLossConfig(clip=0.0)


def test_constants_are_the_papers() -> None:
    assert ValueLossConfig() == ValueLossConfig(clip=0.5, aggregation="token-mean")
    config = PreferenceConfig()
    assert (config.beta, config.label_smoothing, config.margin) == (0.1, 0.0, 0.0)
    assert config.desirable_weight == config.undesirable_weight == 1
    assert {name: PreferenceConfig(name).over_means for name in ("dpo", "ipo", "kto", "simpo", "orpo")} == {
        "dpo": False, "ipo": False, "kto": False, "simpo": True, "orpo": True
    }  # fmt: skip


def test_a_pair_without_a_chosen_answer_does_not_count() -> None:
    data = answers_batch(10)
    data["mask"][2] = 0
    out = call(make_preference_loss(PAIRS["dpo"]), data, data["logits"], list(range(6)))
    alone = call(make_preference_loss(PAIRS["dpo"]), data, data["logits"], [0, 1])
    assert out.count == alone.count == 1
    torch.testing.assert_close(out.total, alone.total)
