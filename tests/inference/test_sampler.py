"""Sampling against the distributions that it must follow, and against transformers' own logits processors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rollouts.errors import UserError
from rollouts.inference.completion import Completion
from rollouts.inference.native import native_library
from rollouts.inference.random_numbers import stream_start, uniforms
from rollouts.inference.sampler import inverse_cdf, penalize, sample, sample_truncated
from rollouts.inference.sampling_params import SamplingParams
from rollouts.inference.sequences import LiveSample, Request, Rows

DRAWS = 20_000


def rows_of(params: list[SamplingParams], vocab_size: int, prompt: list[int] | None = None) -> Rows:
    rows = Rows(len(params), max_length=64, vocab_size=vocab_size)
    for i, p in enumerate(params):
        tokens = np.array(prompt or [0], np.int32)
        request = Request(tokens, p, lambda f: f(), lambda: None)
        rows.load(i, LiveSample(request, 0, tokens, len(tokens), 64, np.empty(0, np.int64), np.uint64(i), i))
    return rows


def draw(
    logits: torch.Tensor,
    params: SamplingParams,
    count: int = DRAWS,
    seed: int = 0,
    library: ctypes.CDLL | None = None,
) -> torch.Tensor:
    """``count`` tokens from one row of logits [V], each with a position of its own."""
    batch = rows_of([params], len(logits)).batch_params(np.zeros(count, np.int64), logits.device)
    numbers = uniforms(np.full(count, stream_start(seed)), np.arange(count))
    return sample(logits.expand(count, -1), batch, torch.from_numpy(numbers), library=library).token_ids


def assert_follows(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-square at p = 1e-6 (Wilson and Hilferty's normal approximation); nothing of probability 0."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    assert not counts[probs == 0].any()
    common = expected >= 5
    rare = expected[~common].sum()
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    if rare > 0:
        statistic += (counts[~common].sum() - rare) ** 2 / rare
    freedom = int(common.sum()) + int(rare > 0) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-6
    assert statistic < limit, f"chi-square {statistic:.1f} at {freedom} degrees of freedom"


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        (SamplingParams(), []),
        (SamplingParams(temperature=0.5), [TemperatureLogitsWarper(0.5)]),
        (SamplingParams(temperature=1.7), [TemperatureLogitsWarper(1.7)]),
        (SamplingParams(top_k=7), [TopKLogitsWarper(7)]),
        (SamplingParams(top_p=0.6), [TopPLogitsWarper(0.6)]),
        (SamplingParams(min_p=0.2), [MinPLogitsWarper(0.2)]),
        (
            SamplingParams(temperature=1.4, top_k=20, top_p=0.8, min_p=0.05),
            [TemperatureLogitsWarper(1.4), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_tokens_follow_the_distribution_that_transformers_would_sample_from(
    params: SamplingParams, warpers: list[Callable[..., torch.Tensor]]
) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    warped = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())
    assert_follows(draw(logits, params), warped[0].softmax(-1))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("vocab_size", [1, 5, 16, 61, 4096])
def test_the_compiled_sampler_equals_torch_operators(temperature: float, vocab_size: int) -> None:
    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, vocab_size // 2 + 1 :: 7] = -math.inf
    rows = np.arange(64)
    params = [SamplingParams(temperature=temperature if i % 2 else 1.0) for i in rows]
    batch = rows_of(params, vocab_size).batch_params(rows, logits.device)
    numbers = torch.from_numpy(uniforms(np.full(64, stream_start(0)), rows))
    expected, got = sample(logits, batch, numbers), sample(logits, batch, numbers, library=native_library())
    # A number within rounding of a boundary may fall on either side of it.
    same = expected.token_ids == got.token_ids
    assert same.sum() >= 63
    torch.testing.assert_close(got.log_probs[same], expected.log_probs[same], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.raw_log_probs[same], expected.raw_log_probs[same], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compiler")
def test_the_compiled_sampler_follows_the_distribution() -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    logits[::7] = -math.inf
    for temperature in (1.0, 1.7):
        tokens = draw(logits, SamplingParams(temperature=temperature), library=native_library())
        assert_follows(tokens, (logits / temperature).softmax(-1))


def test_the_chi_square_test_notices_a_wrong_temperature() -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    with pytest.raises(AssertionError, match="chi-square"):
        assert_follows(draw(logits, SamplingParams(temperature=0.95)), logits.softmax(-1))


def test_logit_bias_and_greedy() -> None:
    logits = torch.zeros(10)
    assert draw(logits, SamplingParams(temperature=0, logit_bias={4: 1.0}), 5).tolist() == [4] * 5
    biased = torch.zeros(10)
    biased[2], biased[3] = -100, 2
    assert_follows(draw(logits, SamplingParams(logit_bias={2: -100.0, 3: 2.0})), biased.softmax(-1))


def test_log_probs_ignore_truncation_and_bias() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=0.7, top_k=2, logit_bias={5: 3.0}, top_log_probs=3)
    batch = rows_of([params], 30).batch_params(np.array([0]), logits.device)
    got = sample(logits, batch, torch.tensor([0.3]))
    token = int(got.token_ids)
    torch.testing.assert_close(got.log_probs[0], (logits / 0.7).log_softmax(-1)[0, token])
    torch.testing.assert_close(got.raw_log_probs[0], logits.log_softmax(-1)[0, token])
    values, ids = logits.log_softmax(-1).topk(3)
    assert got.top is not None
    assert got.top[1].tolist() == ids.tolist()
    torch.testing.assert_close(got.top[0], values)


def test_repetition_penalty_equals_transformers_and_the_others_their_definition() -> None:
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    history = torch.tensor([[1, 5, 5, 7, -1], [2, 0, 3, 3, 3]])
    is_output = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    got = penalize(logits, history, is_output, torch.tensor([[1.3, 0.0, 0.0], [1.0, 0.5, 0.25]]))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(history[:1, :4], logits[:1].clone())[0]
    torch.testing.assert_close(got[0], expected)
    expected = logits[1].clone()
    for token, count in ((0, 1), (3, 3)):
        expected[token] -= 0.5 + 0.25 * count
    torch.testing.assert_close(got[1], expected)


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 3.0]), max_size=40), st.floats(0, 1 - 2**-24))
def test_inverse_cdf_never_takes_a_weight_of_zero(weights: list[float], uniform: float) -> None:
    weights = [*weights, 1.0, 0.0]
    index = int(inverse_cdf(torch.tensor([weights]), torch.tensor([uniform])))
    assert weights[index] > 0


@given(st.integers(0, 2**32), st.integers(1, 50), st.floats(0.01, 1), st.floats(0, 1))
@settings(max_examples=50)
def test_truncation_always_leaves_the_likeliest_token(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    probs = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)).mul(5).softmax(-1)
    got = sample_truncated(
        probs, torch.zeros(1), torch.tensor([[top_k]]), torch.tensor([[top_p]]), torch.tensor([[min_p]])
    )
    assert int(got) == int(probs.argmax())


def test_uniforms_are_uniform_and_unrelated_between_seeds_and_positions() -> None:
    streams = np.stack([uniforms(np.full(4096, stream_start(seed)), np.arange(4096)) for seed in range(64)])
    assert streams.min() >= 0 and streams.max() < 1
    counts = np.histogram(streams, bins=256, range=(0, 1))[0]
    expected = streams.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 degrees of freedom: p < 1e-8
    centered = streams - 0.5
    between_seeds = (centered[:-1] * centered[1:]).mean(axis=1) * 12
    between_positions = (centered[:, :-1] * centered[:, 1:]).mean(axis=1) * 12
    assert np.abs(between_seeds).max() < 0.08 and np.abs(between_positions).max() < 0.08  # 5 standard deviations
    assert stream_start(1, 0) != stream_start(0, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("top_p", 1.5), ("min_p", 2), ("n", 0),
     ("top_k", -1), ("max_tokens", 0), ("repetition_penalty", 0), ("seed", -1), ("seed", 2**64), ("stop", ("",)),
     ("presence_penalty", math.inf), ("logit_bias", {1: math.nan}), ("logit_bias", {1: 1e300}),
     ("temperature", 1e-300)],
)  # fmt: skip
def test_bad_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})


def test_completion_without_tokens_has_no_version() -> None:
    assert Completion([], [], [], "aborted").weight_version is None  # type: ignore[arg-type]
