"""Steps that one compiled call makes beside the same steps by array operations: everybody's outcome is the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain import random_prompt
from transformers import PreTrainedModel

from rollouts.inference import Completion, EmbeddedEngine, SamplingParams
from rollouts.inference.random_numbers import stream_start, uniforms
from rollouts.inference.sequences import BROKEN, FULL, STOPPED, WATCHED


def crowd() -> list[SamplingParams]:
    """Every way to end and every temperature, some seeds of groups, and now and then one that the call cannot serve."""
    draw = random.Random(0)
    return [
        SamplingParams(
            temperature=draw.choice((0.0, 0.7, 1.0, 1.5)),
            max_tokens=draw.choice((1, 2, 17, 40)),
            stop_token_ids=tuple(draw.sample(range(10, 500), draw.choice((0, 1, 5, 60)))),
            ignore_eos=draw.random() < 0.5,
            n=draw.choice((1, 1, 3)),
            top_k=draw.choice((0,) * 15 + (3,)),
            seed=seed,
        )
        for seed in range(40)
    ]


def sampled(model: PreTrainedModel, params: list[SamplingParams], compiled: bool, rows: int) -> list[Completion]:
    with EmbeddedEngine(model, max_rows=rows, max_length=100) as engine:
        assert engine._thread._native_decode is not None
        if not compiled:
            engine._thread._native_decode = None
        completions = engine.generate_batch([random_prompt(5 + i, i) for i in range(len(params))], params)
        assert engine.num_sampled_tokens == sum(len(c.token_ids) for c in completions)
        return completions


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 64])
def test_every_sample_is_the_same_as_by_array_operations(
    make_peaked_model: Callable[..., PreTrainedModel], dtype: torch.dtype, rows: int
) -> None:
    model, params = make_peaked_model(dtype=dtype), crowd()
    with_call, without = sampled(model, params, True, rows), sampled(model, params, False, rows)
    assert len({c.stop_reason for c in without}) == 2
    for a, b in zip(with_call, without, strict=True):
        assert (a.token_ids, a.stop_reason, a.stop_match) == (b.token_ids, b.stop_reason, b.stop_match)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-6)
        np.testing.assert_allclose(a.raw_log_probs, b.raw_log_probs, atol=1e-6)


@pytest.mark.usefixtures("compiler")
def test_one_call_writes_down_tokens_and_says_what_they_make_of_their_rows(
    make_peaked_model: Callable[..., PreTrainedModel],
) -> None:
    """Straight from the arrays: positions, random numbers, and each flag where it is due and nowhere else."""
    model = make_peaked_model()
    with EmbeddedEngine(model, max_rows=8, max_length=100) as engine, engine.paused():
        rows, cache, decode = engine._thread._rows, engine._thread._cache, engine._thread._native_decode
        assert decode is not None
        which = np.array([6, 1, 4, 2])
        cache.page_table[:] = np.arange(8)[:, None]  # each row one page for all it may need
        rows.tokens[:, :11] = 20 + np.arange(11)
        rows.num_prompt[:], rows.num_tokens[:], rows.num_computed[:] = 3, 11, 10
        rows.max_length[:], rows.random_start[:] = 90, [stream_start(i) for i in range(8)]
        rows.max_length[1], rows.watched[4] = 12, True
        with torch.inference_mode():
            flags = decode(which)
            assert flags is not None and flags.tolist() == [0, FULL, WATCHED, 0]
            assert rows.num_tokens.tolist() == [11, 12, 12, 11, 12, 11, 12, 11]
            assert rows.num_computed.tolist() == [10, 11, 11, 10, 11, 10, 11, 10]
            logits = engine._thread._forward._logits[: 4 * rows.vocab_size].view(4, -1).double()  # type: ignore[attr-defined]
            cdf = logits.softmax(-1).cumsum(-1).numpy()
            for i, u in enumerate(uniforms(rows.random_start[which], np.full(4, 8))):
                token = rows.tokens[which[i], 11]
                assert (cdf[i, token - 1] if token else 0) - 1e-6 <= u <= cdf[i, token] + 1e-6
                assert abs(rows.log_probs[which[i], 11] - logits[i].log_softmax(-1)[token]) < 1e-5
            token = int(rows.tokens[6, 11])
            rows.num_tokens[:], rows.num_computed[:], rows.watched[4] = 11, 10, False
            rows.stop_ids = np.full((8, 3), -1, np.int64)  # wider: its memory is another's
            rows.stop_ids[[6, 4], 2] = token, int(rows.tokens[4, 11]) + 1
            rows.generation += 1
            flags = decode(which)
            assert flags is not None and flags.tolist() == [STOPPED, FULL, 0, 0]
            model.model.norm.weight.data[0] = torch.nan
            rows.num_tokens[:], rows.num_computed[:] = 11, 10
            flags = decode(which)
            assert flags is not None and (flags & BROKEN).all()
