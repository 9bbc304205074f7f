"""Pre-training: blocks that lose no token, learn none twice and keep documents apart; then the same loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from rollouts.errors import UserError
from rollouts.training.backends import OptimizerConfig, create_pytorch_backend
from rollouts.training.loops import PretrainingConfig, TokenBlocks, prepare_sft_batch, run_pretraining
from rollouts.training.types import Sample

MakeModel = Callable[..., PreTrainedModel]


class Silent:
    def log(self, step: int, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def documents(lengths: list[int]) -> list[Sample]:
    """Every token of all documents is different, so that a token says where it comes from."""
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return [Sample(tokens=list(range(s, s + n)), loss_mask=[1.0] * n) for s, n in zip(starts, lengths, strict=True)]


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths=LENGTHS, block=st.integers(2, 20), seed=st.integers(0, 5))
def test_every_token_but_a_documents_first_is_learned_once(lengths: list[int], block: int, seed: int) -> None:
    texts = documents(lengths)
    blocks = TokenBlocks(texts, block, seed)
    learned: Counter[tuple[int, int]] = Counter()
    for i in range(len(blocks)):
        batch = prepare_sft_batch([blocks[i]])
        tokens = batch["labels"][0].tolist()
        learned.update((tokens[t - 1], tokens[t]) for t in batch["loss_positions"].tolist())
    expected = [(t - 1, t) for text in texts for t in text.tokens[1:]]  # from its own predecessor, too
    assert learned == Counter(expected)


@given(lengths=LENGTHS, block=st.integers(2, 20), seed=st.integers(0, 5))
def test_lengths_are_known_beforehand(lengths: list[int], block: int, seed: int) -> None:
    blocks = TokenBlocks(documents(lengths), block, seed)
    assert [len(b) for b in blocks] == blocks.lengths.tolist()
    assert all(len(b) == block for b in blocks[:-1]) and 1 <= len(blocks[-1]) <= block
    assert sum(len(b) for b in blocks) == sum(lengths) + len(blocks) - 1


@given(lengths=LENGTHS, block=st.integers(2, 20))
def test_segments_begin_where_documents_do(lengths: list[int], block: int) -> None:
    firsts = {text.tokens[0] for text in documents(lengths)}
    for made in TokenBlocks(documents(lengths), block):
        segments = made.metadata["segments"]
        assert segments[0] == 0 and segments == sorted(set(segments))
        inside = [made.tokens[s] for s in segments[1:]]
        assert inside == [t for t in made.tokens[1:] if t in firsts]


def test_the_order_of_documents_comes_from_the_seed() -> None:
    texts = documents([5] * 20)
    a, b, c = (TokenBlocks(texts, 8, seed) for seed in (0, 0, 1))
    assert [x.tokens for x in a] == [x.tokens for x in b] != [x.tokens for x in c]


def test_indexing_is_a_sequences() -> None:
    blocks = TokenBlocks(documents([9, 9]), 5)
    assert blocks[-1].tokens == blocks[len(blocks) - 1].tokens
    assert [b.tokens for b in blocks[1:3]] == [blocks[1].tokens, blocks[2].tokens]
    for index in (len(blocks), -len(blocks) - 1):
        with pytest.raises(IndexError):
            blocks[index]


def test_a_documents_mask_is_kept() -> None:
    text = Sample(tokens=list(range(7)), loss_mask=[1, 1, 0, 0, 1, 1, 1])
    positions = [b.tokens[t] for b in TokenBlocks([text], 4) for t in range(1, len(b)) if b.loss_mask[t]]
    assert positions == [1, 4, 5, 6]


def test_a_block_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="block_length must be at least 2"):
        PretrainingConfig(num_steps=1, batch_size=1, block_length=1)


def backend_for(make_tiny_model: MakeModel, folder: Path | None = None) -> Any:
    return create_pytorch_backend(
        make_tiny_model(), checkpoint_dir=folder, optimizer=OptimizerConfig(lr=5e-3), device="cpu"
    )


def texts() -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(12):
        n = int(rng.integers(5, 40))
        made.append(Sample(tokens=[50 + (i * 3) % 20 for i in range(n)], loss_mask=[1.0] * n))
    return made


def run(backend: Any, config: PretrainingConfig, **options: Any) -> list[dict[str, Any]]:
    return asyncio.run(run_pretraining(backend, options.pop("documents", texts()), config, Silent(), **options))


def test_it_learns_resumes_and_validates(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    config = PretrainingConfig(num_steps=12, batch_size=4, block_length=16, eval_every=6)
    history = run(backend_for(make_tiny_model), config, validation=texts()[:4])
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["val_loss"] < history[5]["val_loss"]
    assert all(row["tokens"] <= 4 * 16 for row in history)

    run(backend_for(make_tiny_model, tmp_path), PretrainingConfig(num_steps=5, batch_size=4, block_length=16))
    rest = run(backend_for(make_tiny_model, tmp_path), config, validation=texts()[:4])
    assert [row["loss"] for row in rest] == [row["loss"] for row in history[5:]]


def test_a_step_learns_from_whole_documents_as_if_alone(make_tiny_model: MakeModel) -> None:
    """One block that holds all documents: the loss is the mean over them, each computed by itself."""
    made = texts()
    config = PretrainingConfig(num_steps=1, batch_size=1, block_length=1000)
    row = run(backend_for(make_tiny_model), config)[0]
    measured = [backend_for(make_tiny_model).evaluate(prepare_sft_batch([d])).wait() for d in made]
    count = sum(m["num_tokens"] for m in measured)
    assert row["num_tokens"] == count == sum(len(d) - 1 for d in made)
    assert row["loss"] == pytest.approx(sum(m["loss"] * m["num_tokens"] for m in measured) / count, rel=1e-5)


def test_padding_blocks_is_refused(make_tiny_model: MakeModel) -> None:
    """Documents of one block would see each other."""
    with pytest.raises(UserError, match=r"train\.packing"):
        run(backend_for(make_tiny_model), PretrainingConfig(num_steps=3, batch_size=3, packing=False))


def test_another_block_length_cannot_resume(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    run(backend_for(make_tiny_model, tmp_path), PretrainingConfig(num_steps=2, batch_size=2, block_length=16))
    with pytest.raises(UserError, match="num_"):
        run(backend_for(make_tiny_model, tmp_path), PretrainingConfig(num_steps=4, batch_size=2, block_length=12))


def test_nothing_to_learn_is_the_users_error(make_tiny_model: MakeModel) -> None:
    config = PretrainingConfig(num_steps=1, batch_size=1)
    backend = backend_for(make_tiny_model)
    with pytest.raises(UserError, match="no document"):
        run(backend, config, documents=[])
    for nothing in ([Sample(tokens=[1], loss_mask=[1])], [Sample(tokens=[], loss_mask=[])]):
        with pytest.raises(UserError, match="carries loss"):
            run(backend, config, documents=nothing)
    with pytest.raises(UserError, match="validation"):
        run(backend, config, validation=[])
