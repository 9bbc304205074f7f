"""Pre-training: documents cut into blocks of equal length, then the same loop as supervised fine-tuning."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from rollouts.errors import UserError
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops.batches import sample_lengths
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.metrics import MetricsLogger
from rollouts.training.types import Sample, SFTTrainingConfig


@dataclass(frozen=True)
class PretrainingConfig(SFTTrainingConfig):
    """As ``SFTTrainingConfig``, but ``batch_size`` counts blocks: a step has ``batch_size * block_length`` tokens.

    Args:
        block_length: tokens of one block.
    """

    block_length: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length < 2:
            raise ValueError(f"block_length must be at least 2, got {self.block_length}")


class TokenBlocks(Sequence[Sample]):
    """Documents, in an order drawn from ``seed``, as one stream cut into blocks that overlap by one token.

    The overlap lets every token but a document's first be predicted exactly once an epoch. Within a block, documents
    stay isolated: ``metadata["segments"]`` holds where each begins. Blocks are made when asked for.

    Args:
        documents: tokenized texts; the loss mask of each is kept.
        block_length: tokens of a block; the stream's last block may be shorter.
    """

    def __init__(self, documents: Sequence[Sample], block_length: int, seed: int = 0) -> None:
        self.documents, self.block_length = documents, block_length
        order = DataBuffer(range(len(documents)), seed=seed).get_prompts(len(documents))
        self._order = order
        self._ends = np.cumsum(sample_lengths(documents)[order])
        stride = block_length - 1
        self._stride, self._total = stride, int(self._ends[-1])
        self._count = max(1, -(-(self._total - 1) // stride))

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> np.ndarray:
        lengths = np.full(self._count, self.block_length, dtype=np.int64)
        lengths[-1] = self._total - (self._count - 1) * self._stride
        return lengths

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = (index % len(self)) * self._stride
        stop = min(start + self.block_length, self._total)
        tokens: list[int] = []
        mask: list[float] = []
        segments: list[int] = []
        document = bisect_right(self._ends, start)
        while start < stop:
            first = int(self._ends[document - 1]) if document else 0
            end = min(int(self._ends[document]), stop)
            source = self.documents[self._order[document]]
            segments.append(len(tokens))
            tokens += source.tokens[start - first : end - first]
            mask += source.loss_mask[start - first : end - first]
            start, document = end, document + 1
        return Sample(tokens=tokens, loss_mask=mask, id=f"block-{index}", metadata={"segments": segments})


async def run_pretraining(
    backend: PyTorchTrainingBackend,
    documents: Sequence[Sample],
    config: PretrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    validation: Sequence[Sample] | None = None,
    resume: bool = True,
) -> list[dict[str, Any]]:
    """Train on ``documents`` in blocks of ``config.block_length`` tokens; everything else as ``run_sft_training``.

    Raises:
        UserError: also when ``config.packing`` is False: a block is documents packed.
    """
    if not config.packing:
        raise UserError("pre-training packs documents into blocks: leave train.packing at true")
    if len(documents) == 0:
        raise UserError("there is no document to train on: give at least one")
    blocks = TokenBlocks(documents, config.block_length, config.seed)
    held_out = TokenBlocks(validation, config.block_length, config.seed) if validation else validation
    return await run_sft_training(backend, blocks, config, metrics_logger, validation=held_out, resume=resume)
