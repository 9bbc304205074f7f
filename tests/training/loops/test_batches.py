"""Micro-batch plans and collation: every sample once, equal rounds on all ranks, nothing too large, right positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollouts.training.datasets.packing import best_fit_bins
from rollouts.training.loops.batches import (
    collate_batch,
    collate_step,
    empty_batch,
    plan_micro_batches,
    prepare_sft_batch,
)
from rollouts.training.types import Sample

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def sample(start: int, n: int, learned_from: int = 0, **fields: object) -> Sample:
    mask = [0.0] * learned_from + [1.0] * (n - learned_from)
    return Sample(tokens=list(range(start, start + n)), loss_mask=mask, **fields)  # type: ignore[arg-type]


@given(lengths=LENGTHS, max_tokens=st.integers(1, 100), world=st.integers(1, 5), packing=st.booleans())
def test_plans(lengths: list[int], max_tokens: int, world: int, packing: bool) -> None:
    plan = plan_micro_batches(lengths, max_tokens, world, packing)
    assert len(plan) == world
    assert len({len(of_rank) for of_rank in plan}) == 1 and plan[0]
    micro_batches = [m for of_rank in plan for m in of_rank]
    assert sorted(i for m in micro_batches for i in m) == list(range(len(lengths)))
    for m in micro_batches:
        sizes = [lengths[i] for i in m]
        used = sum(sizes) if packing else len(sizes) * max(sizes, default=0)
        assert used <= max_tokens or len(m) == 1
    assert plan == plan_micro_batches(np.array(lengths), max_tokens, world, packing)
    if world == 1:
        assert all(micro_batches)


@given(lengths=LENGTHS, max_tokens=st.integers(60, 200), world=st.integers(2, 4))
def test_more_ranks_never_need_more_rounds_than_the_bins_do(lengths: list[int], max_tokens: int, world: int) -> None:
    bins = len(best_fit_bins(lengths, max_tokens))
    assert len(plan_micro_batches(lengths, max_tokens, world)[0]) == -(-bins // world)


def test_work_is_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 500, 256)
    loads = [sum(lengths[m].sum() for m in of_rank) for of_rank in plan_micro_batches(lengths, 4096, 4)]
    assert max(loads) < 1.03 * min(loads)
    alone = plan_micro_batches(range(51, 61), 60, 2)  # too long to share: 60, 57, 56, ... and 59, 58, 55, ...
    loads = [sum(range(51, 61)[i] for m in of_rank for i in m) for of_rank in alone]
    assert max(loads) - min(loads) <= 1
    lengths = np.array([80, 70, 60, 55, 40])  # four of them, 80, 70, 60 and 55 + 40: the heaviest meet first
    turns = plan_micro_batches(lengths, 100, 2)
    assert [[lengths[m].sum() for m in of_rank] for of_rank in turns] == [[95, 60], [80, 70]]
    few = plan_micro_batches([100, 100, 100, 100], 1000, 2)  # one bin would hold them; two ranks share them
    assert [[len(m) for m in of_rank] for of_rank in few] == [[2], [2]]


def test_one_rank_has_no_small_rest() -> None:
    [plan] = plan_micro_batches([583] * 16, 4608)  # seven would fit: 7, 7 and 2
    assert [len(m) for m in plan] == [6, 5, 5]
    lengths = [50, 50, 40, 30, 30]  # two of a hundred, but not if each next one goes where least is
    assert [[lengths[i] for i in m] for m in plan_micro_batches(lengths, 100)[0]] == [[50, 50], [40, 30, 30]]


def test_a_packed_batch_by_hand() -> None:
    batch = prepare_sft_batch([sample(10, 4, learned_from=2), sample(20, 3), sample(30, 1)])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21, 22, 30]]
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 0, 1, 1, 0]]
    assert batch["loss_positions"].tolist() == [2, 3, 5, 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 8] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 4


def test_a_padded_batch_by_hand() -> None:
    batch = prepare_sft_batch([sample(10, 4, learned_from=2), sample(20, 2)], packing=False)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [20, 21, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch["loss_positions"].tolist() == [2, 3, 5]
    assert "cu_seqlens" not in batch


def test_segments_of_a_sample_are_isolated() -> None:
    documents = sample(10, 6, metadata={"segments": [0, 2, 5]})
    joined = prepare_sft_batch([documents, sample(20, 3)])
    apart = prepare_sft_batch([sample(10, 2), sample(12, 3), sample(15, 1), sample(20, 3)])
    assert joined.keys() == apart.keys()
    for key in apart:
        assert torch.equal(torch.as_tensor(joined[key]), torch.as_tensor(apart[key])), key
    with pytest.raises(ValueError, match="must be packed"):
        prepare_sft_batch([documents], packing=False)


def test_weights_other_than_one_are_kept() -> None:
    odd = Sample(tokens=[1, 2, 3], loss_mask=[0.5, 0.25, -2.0])
    for packing in (True, False):
        assert prepare_sft_batch([odd], packing)["loss_mask"].tolist() == [[0, 0.25, -2.0]]
    assert list(odd.loss_mask) == [0.5, 0.25, -2.0]  # untouched


def test_samples_are_not_changed() -> None:
    tokens, mask = np.array([5, 6, 7]), np.ones(3, np.float32)
    for packing in (True, False):
        prepare_sft_batch([Sample(tokens=tokens, loss_mask=mask)], packing)
    assert mask.tolist() == [1, 1, 1]


def test_collate_batch_goes_round_and_round() -> None:
    samples = [sample(10 * i, 2) for i in range(5)]
    firsts = [collate_batch(samples, 3, step)["input_ids"][0, ::2].tolist() for step in range(5)]
    assert firsts == [[0, 10, 20], [30, 40, 0], [10, 20, 30], [40, 0, 10], [20, 30, 40]]
    assert collate_batch(samples, 7, 0)["input_ids"][0, ::2].tolist() == [0, 10, 20, 30, 40, 0, 10]
    a, b = collate_batch(samples, 3, 1, packing=False), collate_batch(samples, 3, 1, packing=False)
    assert a["input_ids"].tolist() == b["input_ids"].tolist() == [[30, 31], [40, 41], [0, 1]]


@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12), world=st.integers(1, 4), packing=st.booleans())
def test_the_ranks_batches_hold_the_steps_tokens(lengths: list[int], world: int, packing: bool) -> None:
    """Whatever the number of ranks, the same tokens learn, each once."""
    samples = [sample(100 * i + 1, n) for i, n in enumerate(lengths)]
    order = list(range(len(samples)))[::-1]
    learned: list[int] = []
    for rank in range(world):
        for batch in collate_step(samples, order, 32, packing, rank, world):
            learned += batch["labels"].flatten()[batch["loss_positions"]].tolist()
    assert sorted(learned) == sorted(t for s in samples for t in s.tokens[1:])


def test_a_step_takes_the_samples_of_its_indices() -> None:
    samples = [Sample(tokens=[i] * (i + 2), loss_mask=[1.0] * (i + 2)) for i in range(6)]
    (batch,) = collate_step(samples, [4, 1], 100)
    assert sorted(batch["input_ids"][0].tolist()) == [1] * 3 + [4] * 6


def test_an_empty_batch_has_the_packed_form_and_no_loss() -> None:
    batch = empty_batch()
    assert batch.keys() == prepare_sft_batch([sample(0, 3)]).keys()
    assert not batch["loss_mask"].any() and batch["loss_positions"].numel() == 0


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        prepare_sft_batch([])
