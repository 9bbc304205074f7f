"""Every policy loss, aggregation, KL kind and correction against NumPy, finite differences and any batch split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import algo_reference as reference
import numpy as np
import pytest
import torch

from rollouts.errors import UserError
from rollouts.training.algorithms.aggregation import AGGREGATIONS, Sequences, aggregate
from rollouts.training.algorithms.corrections import (
    CORRECTIONS,
    CorrectionConfig,
    correction_weights,
    effective_sample_size,
    named_correction,
)
from rollouts.training.algorithms.kl import AdaptiveKLController, FixedKLController, kl_in_reward, kl_penalty
from rollouts.training.algorithms.policy_losses import (
    POLICY_LOSSES,
    PolicyLossConfig,
    PolicyTokens,
    make_policy_loss,
    policy_loss_terms,
    step_fields,
)
from rollouts.training.sft_losses import DeferredLogits, LossOutput

# Bounds narrow enough that every branch is taken by some token.
CONFIGS = {
    "reinforce": PolicyLossConfig("reinforce"),
    "ppo_clip": PolicyLossConfig("ppo_clip", eps_low=0.2, eps_high=0.28, dual_clip=1.4),
    "ppo_clip without dual clip": PolicyLossConfig("ppo_clip", dual_clip=None),
    "gspo": PolicyLossConfig("gspo", eps_low=0.05, eps_high=0.07),
    "cispo": PolicyLossConfig("cispo", eps_low=0.3, eps_high=0.2),
    "gmpo": PolicyLossConfig("gmpo", eps_low=0.3, eps_high=0.4),
    "sapo": PolicyLossConfig("sapo", tau_positive=1.0, tau_negative=1.5),
    "clip_cov": PolicyLossConfig("clip_cov", covariance_fraction=0.1, covariance_low=0.05, covariance_high=5.0),
    "kl_cov": PolicyLossConfig("kl_cov", covariance_fraction=0.2, covariance_coef=0.7),
    "dppo_tv": PolicyLossConfig("dppo_tv", eps_low=0.02, eps_high=0.35, ratio_cap=1.5),
    "dppo_kl": PolicyLossConfig("dppo_kl", eps_low=0.01, eps_high=0.08, ratio_cap=1.5),
    "dro": PolicyLossConfig("dro", drift_coef=0.3),
}
KINDS = ["k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+"]
UNBRANCHED = ("reinforce", "sapo", "dro", "ppo_clip without dual clip")
MIXED = named_correction("tis", mask="geometric", mask_low=0.7, mask_high=1.4, veto_below=0.2)


def flat(batch: dict[str, Any], *names: str) -> list[torch.Tensor]:
    """Learned tokens [N] float64, in the order of rows."""
    return [torch.tensor(batch[name][batch["mask"] > 0]) for name in names]


def sequences_of(batch: dict[str, Any]) -> Sequences:
    return Sequences.of(torch.tensor(np.nonzero(batch["mask"])[0]), size=len(batch["mask"]))


def options(config: PolicyLossConfig, selected: Any = None) -> dict[str, Any]:
    low, high = config.bounds
    return {
        "lo": low, "hi": high, "c": config.dual_clip, "tau_pos": config.tau_positive, "tau_neg": config.tau_negative,
        "cap": config.ratio_cap, "beta": config.drift_coef, "coef": config.covariance_coef, "selected": selected,
    }  # fmt: skip


def selection(batch: dict[str, Any], config: PolicyLossConfig) -> tuple[Any, Any]:
    """What ``step_fields`` selects, as [N] bool and as [S, L]."""
    advantages, log_probs = flat(batch, "advantages", "log_probs")
    selected = step_fields(config, advantages, log_probs, seed=3).get("selected")
    padded = np.zeros(batch["mask"].shape, dtype=bool)
    if selected is not None:
        padded[batch["mask"] > 0] = selected.numpy()
    return selected, padded


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CONFIGS)
def test_value_and_gradient_are_numpys(case: str, aggregation: str) -> None:
    """With KL, entropy bonus and off-policy weights in the sum, so that their aggregation is tested too."""
    config = replace(
        CONFIGS[case],
        aggregation=aggregation,
        max_length=11,
        kl="k3+",
        kl_coef=0.2,
        entropy_coef=0.03,
        correction=MIXED,
    )
    batch = reference.ragged_batch(seed=11)
    selected, padded = selection(batch, config)
    log_probs, old, advantages, rollout, ref, entropy = flat(
        batch, "log_probs", "old", "advantages", "rollout", "ref", "entropy"
    )
    log_probs.requires_grad_(True)
    tokens = PolicyTokens(log_probs, old, advantages, sequences_of(batch), selected)
    out = policy_loss_terms(config, tokens, entropy, None, rollout, ref)
    (gradient,) = torch.autograd.grad(out.total / out.count, log_probs)

    c = config.correction
    weights, _ = reference.correction(
        batch["old"], batch["rollout"], batch["mask"],
        {"weight": c.weight, "cap": c.cap, "mask": c.mask, "lo": c.mask_low, "hi": c.mask_high, "veto": c.veto_below},
    )  # fmt: skip

    def parts(lp: np.ndarray) -> tuple[float, float]:
        per_token = reference.policy_loss(
            config.name, lp, batch["log_probs"], batch["old"], batch["advantages"], batch["mask"],
            options(config, padded),
        )  # fmt: skip
        kl = reference.kl("k3+", lp, batch["log_probs"], batch["ref"])
        policy, penalty, bonus = (
            reference.aggregate(x, batch["mask"], aggregation, 11) for x in (per_token * weights, kl, batch["entropy"])
        )
        return policy, policy + 0.2 * penalty - 0.03 * bonus

    policy, total = parts(batch["log_probs"])
    assert (out.total / out.count).item() == pytest.approx(total, rel=1e-6)
    assert (out.metrics["policy_loss"][0] / out.metrics["policy_loss"][1]).item() == pytest.approx(policy, rel=1e-5)
    expected = reference.finite_differences(lambda lp: parts(lp)[1], batch["log_probs"], batch["mask"])
    np.testing.assert_allclose(gradient.numpy(), expected[batch["mask"] > 0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", [c for c in CONFIGS if c not in UNBRANCHED])
def test_every_branch_was_taken_by_some_token(case: str) -> None:
    """Otherwise the comparison above would say nothing of clipping, selection and masks."""
    batch = reference.ragged_batch(seed=11)
    config = CONFIGS[case]
    log_probs, old, advantages = flat(batch, "log_probs", "old", "advantages")
    tokens = PolicyTokens(log_probs, old, advantages, sequences_of(batch), selection(batch, config)[0])
    metrics = policy_loss_terms(config, tokens).metrics
    fractions = {
        name: (s / n).item() for name, (s, n) in metrics.items() if name.endswith(("_fraction", "_low", "_high"))
    }
    if case in ("gspo", "clip_cov"):  # their dual clip is ppo_clip's
        del fractions["dual_clip_fraction"]
    assert fractions and all(0 < x < 1 for x in fractions.values()), fractions


@pytest.mark.parametrize("case", [c for c, config in CONFIGS.items() if config.bounds[0] != config.bounds[1]])
def test_each_bound_is_felt_by_some_token(case: str) -> None:
    """Otherwise the comparisons would not notice one bound in the place of the other."""
    batch = reference.ragged_batch(seed=11)
    log_probs, old, advantages = flat(batch, "log_probs", "old", "advantages")
    tokens = PolicyTokens(log_probs, old, advantages, sequences_of(batch), selection(batch, CONFIGS[case])[0])

    def total(low: float, high: float) -> float:
        return policy_loss_terms(replace(CONFIGS[case], eps_low=low, eps_high=high), tokens).total.item()

    low, high = CONFIGS[case].bounds
    assert len({total(low, high), total(high, high), total(low, low)}) == 3


def test_metrics_are_numpys() -> None:
    batch = reference.ragged_batch(seed=12)
    log_probs, old, advantages, entropy, ref = flat(batch, "log_probs", "old", "advantages", "entropy", "ref")
    tokens = PolicyTokens(log_probs, old, advantages, sequences_of(batch))
    config = PolicyLossConfig(eps_low=0.1, eps_high=0.3, dual_clip=1.2, kl="k2")
    got = {
        k: (s / n).item() for k, (s, n) in policy_loss_terms(config, tokens, entropy, None, None, ref).metrics.items()
    }
    valid = batch["mask"] > 0
    d, a = (batch["log_probs"] - batch["old"])[valid], batch["advantages"][valid]
    ratio = np.exp(d)
    expected = {
        "ratio": ratio.mean(),
        "approx_kl_k1": (-d).mean(),
        "approx_kl_k3": (ratio - 1 - d).mean(),
        "entropy": batch["entropy"][valid].mean(),
        "kl_ref": (((batch["log_probs"] - batch["ref"])[valid]) ** 2 / 2).mean(),
        "clip_fraction_low": ((a < 0) & (ratio < 0.9)).mean(),
        "clip_fraction_high": ((a > 0) & (ratio > 1.3)).mean(),
        "dual_clip_fraction": ((a < 0) & (ratio > 1.2)).mean(),
    }
    assert got.keys() == {*expected, "policy_loss"}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_kl_kinds(kind: str) -> None:
    batch = reference.ragged_batch(seed=13, scale=1.0)
    log_probs, ref = flat(batch, "log_probs", "ref")
    log_probs.requires_grad_(True)
    value = kl_penalty(log_probs, ref, kind)
    (gradient,) = torch.autograd.grad(value.sum(), log_probs)
    valid = batch["mask"] > 0
    expected = reference.kl(kind, batch["log_probs"], batch["log_probs"], batch["ref"])
    np.testing.assert_allclose(value.detach().numpy(), expected[valid], rtol=1e-9, atol=1e-12)
    slopes = reference.finite_differences(
        lambda lp: (reference.kl(kind, lp, batch["log_probs"], batch["ref"]) * batch["mask"]).sum(),
        batch["log_probs"], batch["mask"],
    )  # fmt: skip
    np.testing.assert_allclose(gradient.numpy(), slopes[valid], rtol=1e-5, atol=1e-7)


def test_estimators_agree_with_the_exact_kl_in_expectation() -> None:
    """Over all words of a small vocabulary, weighted by their probability, k1 and k3 are exact; so is k2's gradient."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    log_p, log_q = torch.log_softmax(logits, 0), torch.log_softmax(torch.randn(7, dtype=torch.float64), 0)
    p = log_p.exp().detach()
    exact = (log_p.exp() * (log_p - log_q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_penalty(log_p, log_q, kind)).sum(), exact)
    (want,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for kind in ("k2", "k1+", "k3+", "abs+"):
        (got,) = torch.autograd.grad((p * kl_penalty(log_p, log_q, kind)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_the_full_kl_is_taken_as_given_or_moves_along_k2() -> None:
    batch = reference.ragged_batch(seed=19)
    log_probs, ref, full = flat(batch, "log_probs", "ref", "entropy")  # any numbers do for the sum
    log_probs.requires_grad_(True)
    full.requires_grad_(True)
    assert kl_penalty(log_probs, None, "full", full) is full
    value = kl_penalty(log_probs, ref, "full+", full)
    torch.testing.assert_close(value, full)
    value.sum().backward()
    torch.testing.assert_close(log_probs.grad, (log_probs - ref).detach())
    assert full.grad is None
    for kind, given in (("full", (ref, None)), ("full+", (None, full)), ("k3", (None, None))):
        with pytest.raises(UserError, match=f"KL kind {kind.removesuffix('+')}"):
            kl_penalty(log_probs, given[0], kind, given[1])


def test_exponents_are_bounded() -> None:
    far = torch.tensor([-500.0, 500.0], requires_grad=True)
    for kind in KINDS:
        assert kl_penalty(far, torch.zeros(2), kind).isfinite().all()
    tokens = PolicyTokens(
        far, -far.detach(), torch.tensor([1.0, -1.0]), Sequences.of(torch.tensor([0, 1])), torch.ones(2) > 0
    )
    for config in CONFIGS.values():
        out = policy_loss_terms(config, tokens, rollout_log_probs=3 * far.detach(), ref_log_probs=-far.detach())
        assert out.total.isfinite() and all(s.isfinite() for s, _ in out.metrics.values())
        (gradient,) = torch.autograd.grad(out.total, far)
        assert gradient.isfinite().all(), config.name


@pytest.mark.parametrize("name", [*CORRECTIONS, "mixed"])
def test_corrections_are_numpys(name: str) -> None:
    config = MIXED if name == "mixed" else CORRECTIONS[name]
    if name == "geometric":
        config = replace(config, mask_low=0.8, mask_high=1.2)
    batch = reference.ragged_batch(seed=14)
    old, rollout = flat(batch, "old", "rollout")
    weights, metrics = correction_weights(old, rollout, sequences_of(batch).ids, config)
    want, expected = reference.correction(
        batch["old"], batch["rollout"], batch["mask"],
        {"weight": config.weight, "cap": config.cap, "mask": config.mask, "lo": config.mask_low,
         "hi": config.mask_high, "veto": config.veto_below},
    )  # fmt: skip
    np.testing.assert_allclose(weights.numpy(), want[batch["mask"] > 0], rtol=1e-9)
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    if config.mask != "none":
        assert 0 < metrics["masked_fraction"] < 1


def test_mismatch_is_measured_without_a_correction_and_weights_given_are_not_made_again() -> None:
    batch = reference.ragged_batch(seed=15)
    log_probs, old, advantages, rollout = flat(batch, "log_probs", "old", "advantages", "rollout")
    tokens = PolicyTokens(log_probs, old, advantages, sequences_of(batch))
    plain = policy_loss_terms(PolicyLossConfig(), tokens)
    measured = policy_loss_terms(PolicyLossConfig(), tokens, rollout_log_probs=rollout)
    assert measured.total == plain.total
    wanted = correction_weights(old, rollout, tokens.sequences.ids, CorrectionConfig())[1]
    mean = {k: (s / n).item() for k, (s, n) in measured.metrics.items()}
    assert mean["mismatch_kl"] == pytest.approx(wanted["mismatch_kl"], rel=1e-5) and mean["mismatch_kl"] > 0
    found = effective_sample_size(mean["ratio_weight"], mean["ratio_weight_squared"])
    assert found == pytest.approx(wanted["effective_sample_size"], rel=1e-5)

    tis = replace(PolicyLossConfig(), correction=named_correction("tis"))
    given = correction_weights(old, rollout, tokens.sequences.ids, tis.correction)[0]
    inside = policy_loss_terms(tis, tokens, rollout_log_probs=rollout)
    before = policy_loss_terms(tis, tokens, rollout_log_probs=rollout, token_weights=given)
    assert inside.total == before.total != plain.total


def test_sampling_that_equals_training_is_left_alone_by_every_correction() -> None:
    batch = reference.ragged_batch(seed=16)
    (old,) = flat(batch, "old")
    for config in CORRECTIONS.values():
        weights, metrics = correction_weights(old, old, sequences_of(batch).ids, config)
        assert (weights == 1).all() and metrics["mismatch_kl"] == 0 and metrics["effective_sample_size"] == 1


def test_covariance_is_selected_over_the_whole_step() -> None:
    batch = reference.ragged_batch(seed=17)
    batch["advantages"] = 3 * batch["advantages"]
    covariance = reference.covariance_candidates(batch["log_probs"], batch["advantages"], batch["mask"])
    flat_covariance = covariance[batch["mask"] > 0]
    n = len(flat_covariance)
    _, top = selection(batch, PolicyLossConfig("kl_cov", covariance_fraction=0.1))
    assert set(covariance[top]) == set(np.sort(flat_covariance)[-int(0.1 * n) :])
    config = PolicyLossConfig("clip_cov", covariance_fraction=0.1)
    _, some = selection(batch, config)
    inside = (flat_covariance > 1) & (flat_covariance < 5)
    assert inside.sum() > 0.1 * n, "the test needs more candidates than are taken"
    assert some.sum() == int(0.1 * n) and all(1 < x < 5 for x in covariance[some])
    advantages, log_probs = flat(batch, "advantages", "log_probs")
    runs = [step_fields(config, advantages, log_probs, seed)["selected"] for seed in (3, 3, 4, 5, 6)]
    assert (runs[0] == runs[1]).all() and any((runs[0] != other).any() for other in runs[2:])
    # At 2e-4 of a small step one token is still selected; a step without tokens has none; other losses need nothing.
    assert step_fields(PolicyLossConfig("kl_cov"), advantages, log_probs, 0)["selected"].sum() == 1
    assert step_fields(config, advantages[:0], log_probs[:0], 0)["selected"].shape == (0,)
    assert step_fields(PolicyLossConfig(), advantages, log_probs, 0) == {}


def model_batch(seed: int, rows: int = 6, width: int = 9, vocab: int = 11) -> dict[str, torch.Tensor]:
    """Padded rows of a model: logits [B, P, V], labels, mask, and every field a policy loss can take, per row."""
    torch.manual_seed(seed)
    labels = torch.randint(0, vocab, (rows, width))
    mask = (torch.rand(rows, width) < 0.7).float()
    mask[:, 0] = 0
    mask[1] = 0  # nothing to learn
    mask[2] = 0
    mask[2, 4] = 1  # one token
    logits = torch.randn(rows, width, vocab)
    log_probs = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])[..., 0]
    log_probs = torch.cat([torch.zeros(rows, 1), log_probs], 1)
    fields = {
        name: log_probs + 0.4 * torch.randn(rows, width)
        for name in ("old_log_probs", "rollout_log_probs", "ref_log_probs")
    }
    advantages, ref_logits = torch.randn(rows, width), torch.randn(rows, width, vocab)
    return {
        "logits": logits,
        "labels": labels,
        "mask": mask,
        "advantages": advantages,
        "ref_logits": ref_logits,
        **fields,
    }


def call(config: PolicyLossConfig, data: dict[str, torch.Tensor], logits: torch.Tensor, rows: list[int]) -> LossOutput:
    """The loss of some rows, as one micro-batch."""
    mask = data["mask"][rows]
    learned = mask > 0
    fields = {
        name: data[name][rows][learned]
        for name in ("advantages", "old_log_probs", "rollout_log_probs", "ref_log_probs", "selected")
        if name in data
    }
    if config.kl.startswith("full"):
        fields["ref_logits"] = data["ref_logits"][rows][learned]
    ids = torch.arange(len(rows))[:, None].expand_as(mask)[learned]
    return make_policy_loss(config)(logits[rows], data["labels"][rows], mask, sequence_ids=ids, **fields)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CONFIGS)
def test_any_split_into_micro_batches_gives_the_same_step(case: str, aggregation: str) -> None:
    config = replace(
        CONFIGS[case], aggregation=aggregation, max_length=20, kl="full" if case == "gspo" else "k3", kl_coef=0.1,
        entropy_coef=0.05, correction=MIXED, temperature=0.9,
    )  # fmt: skip
    data = model_batch(21)
    learned = data["mask"] > 0
    for name, values in step_fields(config, data["advantages"][learned], data["old_log_probs"][learned], 0).items():
        data[name] = torch.zeros(learned.shape, dtype=torch.bool).masked_scatter(learned, values)
    logits = data["logits"].clone().requires_grad_(True)

    def step(parts: list[list[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = [call(config, data, logits, rows) for rows in parts]
        count = sum(o.count for o in outputs)
        (gradient,) = torch.autograd.grad(sum(o.total for o in outputs), logits)
        means = {
            name: sum(o.metrics[name][0] for o in outputs) / sum(o.metrics[name][1] for o in outputs)
            for name in outputs[0].metrics
        }
        return gradient / count, means

    whole, metrics = step([[0, 1, 2, 3, 4, 5]])
    assert whole.abs().sum() > 0
    for parts in ([[0, 1], [2, 3], [4, 5]], [[5, 0, 3, 2], [1], [4]], [[i] for i in range(6)]):
        gradient, means = step(parts)
        torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(means, metrics, rtol=1e-4, atol=1e-6)


def test_packed_and_deferred_is_padded_and_materialized() -> None:
    """The layout of training, [1, T] with hidden states and positions, gives the loss of the padded rows."""
    data = model_batch(22)
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01, temperature=0.8, aggregation="seq-mean-token-mean")
    padded = call(config, data, data["logits"], list(range(6)))
    learned = data["mask"] > 0
    rows, width, vocab = data["logits"].shape
    late = DeferredLogits(
        data["logits"].reshape(1, rows * width, vocab), torch.eye(vocab), None, learned.flatten().nonzero()[:, 0]
    )
    fields = {n: data[n][learned] for n in ("advantages", "old_log_probs", "rollout_log_probs", "ref_log_probs")}
    ids = torch.arange(rows)[:, None].expand(rows, width)[learned]
    packed = make_policy_loss(config)(
        late, data["labels"].reshape(1, -1), data["mask"].reshape(1, -1), sequence_ids=ids, values=None, **fields
    )
    torch.testing.assert_close(packed, padded)


def test_without_old_log_probs_the_step_is_on_policy() -> None:
    data = model_batch(23)
    del data["old_log_probs"]
    logits = data["logits"].requires_grad_(True)
    out = call(PolicyLossConfig(), data, logits, list(range(6)))
    reinforce = call(PolicyLossConfig("reinforce"), data, logits, list(range(6)))
    assert out.metrics["ratio"][0] == out.metrics["ratio"][1]
    torch.testing.assert_close(torch.autograd.grad(out.total, logits), torch.autograd.grad(reinforce.total, logits))


def test_a_micro_batch_without_learned_tokens_adds_zero() -> None:
    data = model_batch(24)
    data["mask"] = torch.zeros_like(data["mask"])
    for config in CONFIGS.values():
        fields = step_fields(config, torch.zeros(0), torch.zeros(0), 0)
        logits = data["logits"].clone().requires_grad_(True)
        nothing = torch.zeros(0)
        out = make_policy_loss(config)(
            logits, data["labels"], data["mask"], advantages=nothing, sequence_ids=nothing.long(),
            old_log_probs=nothing, **fields,
        )  # fmt: skip
        out.total.backward()
        assert out.total == 0 and out.count == 0 and not logits.grad.any()


def test_sequences_without_learned_tokens_do_not_count() -> None:
    sequences = Sequences.of(torch.tensor([0, 0, 2]), size=5)
    for aggregation in AGGREGATIONS[1:]:
        assert aggregate(torch.ones(3), sequences, aggregation, 4)[1] == 2


def test_controllers_and_kl_in_the_reward() -> None:
    fixed, adaptive = FixedKLController(0.1), AdaptiveKLController(0.1, target=2.0, horizon=100)
    assert fixed.update(50.0, 10) == fixed.coef == 0.1
    assert adaptive.update(2.2, 10) == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    assert adaptive.update(50.0, 10) == pytest.approx(0.1 * 1.01 * (1 + 0.2 * 10 / 100))
    assert adaptive.update(0.0, 10) == pytest.approx(0.1 * 1.01 * 1.02 * (1 - 0.2 * 10 / 100)) == adaptive.coef
    batch = reference.ragged_batch(seed=18)
    rewards, log_probs, ref = flat({**batch, "r": batch["values"]}, "r", "log_probs", "ref")
    shaped = kl_in_reward(rewards, log_probs, ref, 0.3, "k2")
    expected = batch["values"] - 0.3 * reference.kl("k2", batch["log_probs"], batch["log_probs"], batch["ref"])
    np.testing.assert_allclose(shaped.numpy(), expected[batch["mask"] > 0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "pppo"}, "unknown; use one of reinforce, ppo_clip"),
        ({"aggregation": "mean"}, "unknown; use one of token-mean"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "give max_length"),
        ({"kl": "k4"}, "unknown; use one of k1"),
        ({"eps_low": -0.1}, "0 or more"),
        ({"dual_clip": 0.5}, "above 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"covariance_fraction": 0.0}, "above 0"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PolicyLossConfig(**wrong)


def test_a_missing_field_is_named() -> None:
    data = model_batch(25)
    rows = list(range(6))
    for config, field in (
        (PolicyLossConfig(kl_coef=0.1), "ref_log_probs"),
        (PolicyLossConfig(correction=named_correction("tis")), "rollout_log_probs"),
    ):
        with pytest.raises(UserError, match=field):
            call(config, {k: v for k, v in data.items() if k != field}, data["logits"], rows)
    with pytest.raises(UserError, match="step_fields"):
        call(PolicyLossConfig("clip_cov"), data, data["logits"], rows)
    with pytest.raises(UserError, match="learned tokens"):
        make_policy_loss(PolicyLossConfig())(
            data["logits"], data["labels"], data["mask"], advantages=torch.zeros(3), sequence_ids=torch.zeros(3).long()
        )
    with pytest.raises(UserError, match="unknown; use one of none, tis"):
        named_correction("tiss")
    with pytest.raises(UserError, match="mask_low"):
        CorrectionConfig(mask_low=2.0, mask_high=1.0)


def test_defaults_belong_to_each_loss() -> None:
    assert set(POLICY_LOSSES) == {c.name for c in CONFIGS.values()}, "a loss has no test"
    assert PolicyLossConfig("gspo").bounds == (3e-4, 4e-4) and PolicyLossConfig("gspo", eps_low=0.1).bounds == (
        0.1,
        0.1,
    )
    assert PolicyLossConfig("ppo_clip", eps_high=0.28).bounds == (0.2, 0.28)
    assert PolicyLossConfig("gmpo").aggregate_by == "seq-mean-token-mean"
    assert PolicyLossConfig("gmpo", aggregation="token-mean").aggregate_by == "token-mean"


def test_exponents_are_cut_at_20() -> None:
    """The sums above are finite with any bound; this is the bound itself, e^±20."""
    far = torch.tensor([50.0, -50.0], dtype=torch.float64)
    edge = torch.tensor([20.0, -20.0], dtype=torch.float64).exp()
    torch.testing.assert_close(kl_penalty(-far, torch.zeros(2), "k3"), edge - far - 1)
    tokens = PolicyTokens(far, torch.zeros(2), torch.ones(2), Sequences.of(torch.tensor([0, 1])), torch.ones(2) < 0)
    per_token = POLICY_LOSSES["kl_cov"].loss(tokens, PolicyLossConfig("kl_cov"))[0]
    torch.testing.assert_close(per_token, -edge)


def test_constants_are_the_papers() -> None:
    """What nobody sets, and so no comparison above looks at."""
    config = PolicyLossConfig()
    assert config.dual_clip == 3 and (config.tau_positive, config.tau_negative) == (1.0, 1.05)
    assert (config.covariance_fraction, config.covariance_low, config.covariance_high) == (2e-4, 1.0, 5.0)
    assert config.ratio_cap == 20 and config.kl == "k3" and config.kl_coef == config.entropy_coef == 0
    bounds = {name: registered.bounds for name, registered in POLICY_LOSSES.items()}
    own = {"gspo": (3e-4, 4e-4), "cispo": (1.0, 0.2), "gmpo": (0.4, 0.4), "dppo_kl": (0.05, 0.05)}
    assert bounds == dict.fromkeys(bounds, (0.2, 0.2)) | own
    aggregations = {name: registered.aggregation for name, registered in POLICY_LOSSES.items()}
    by_sequence = dict.fromkeys(("gspo", "gmpo"), "seq-mean-token-mean")
    assert aggregations == dict.fromkeys(bounds, "token-mean") | by_sequence
    corrections = {n: (c.weight, c.cap, c.mask, c.mask_low, c.mask_high) for n, c in CORRECTIONS.items()}
    assert corrections == {
        "none": ("none", None, "none", 0.5, 2.0),
        "tis": ("token", 2.0, "none", 0.5, 2.0),
        "sequence_tis": ("sequence", 2.0, "none", 0.5, 2.0),
        "icepop": ("token", None, "token", 0.5, 5.0),
        "mis": ("sequence", None, "sequence", 0.0, 2.0),
        "geometric": ("none", None, "geometric", 0.99, 1.01),
    }


def test_one_impossible_token_vetoes_its_sequence() -> None:
    old, rollout = torch.tensor([-1.0, -12.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0])
    ids = torch.tensor([0, 0, 1])
    weights, metrics = correction_weights(old, rollout, ids, CorrectionConfig(veto_below=1e-4))
    assert weights.tolist() == [0.0, 0.0, 1.0] and metrics["masked_fraction"] == pytest.approx(2 / 3)
