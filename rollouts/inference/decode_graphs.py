"""Decoding on a CUDA device as one launch a step instead of hundreds: a step is recorded once for each shape it takes.

Shapes: D decoding tokens, D' and M their number and that of the pages of the longest row, rounded up to powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from rollouts.inference.attention import Step
from rollouts.inference.kv_cache import PAGE_SIZE, KVCache
from rollouts.inference.model_runner import StructuredForward, without_chunks, without_decoding

Replay = Callable[[torch.Tensor], torch.Tensor]


class GraphedForward:
    """``StructuredForward`` whose decoding tokens are replayed from CUDA graphs; chunks of prompts run as they are.

    A step's inputs are one array [D', 4 + M] of token, position, page, place in the page, and the row's pages. Rows
    that fill it up are copies of the first: they compute what it computes, and write the same where it writes. On a
    device other than CUDA, which records nothing, the same operators run one by one.
    """

    needs_reads, on_host = False, True

    def __init__(self, structured: StructuredForward) -> None:
        self._structured = structured
        self._device = structured.cos.device
        self._recorded: dict[torch.Size, Replay] = {}
        self._addresses: list[int] = []
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def refresh(self) -> None:
        self._structured.refresh()

    def __call__(self, step: Step, cache: KVCache) -> torch.Tensor:
        decoded = [self._decode(without_chunks(step), cache)] if step.num_decode else []
        chunks = [self._structured(_moved(without_decoding(step), self._device), cache)] if step.chunks else []
        parts = decoded + chunks
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, step: Step, cache: KVCache) -> torch.Tensor:
        inputs = decode_inputs(step, cache)
        addresses = [x.data_ptr() for x in self._structured.parameters() if x is not None]
        if addresses != self._addresses:  # a graph reads where the weights lay when it was recorded
            self._recorded.clear()
            self._addresses = addresses
        if inputs.shape not in self._recorded:
            self._recorded[inputs.shape] = self._record(inputs.to(self._device), cache)
        return self._recorded[inputs.shape](inputs)[: step.num_decode]

    def _record(self, buffer: torch.Tensor, cache: KVCache) -> Replay:
        """A function of inputs of ``buffer``'s shape, which reads them from ``buffer``."""

        def compute() -> torch.Tensor:
            return self._structured(_decode_step(buffer), cache)

        if self._pool is None:
            return lambda inputs: _after(buffer.copy_(inputs), compute)
        # Once outside: libraries that make their workspaces at the first call must not do so in a recording. What it
        # writes into the cache is what the replay writes.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # a trainer's thread goes on
            logits = compute()

        def replay(inputs: torch.Tensor) -> torch.Tensor:
            buffer.copy_(inputs, non_blocking=True)
            graph.replay()
            return logits

        return replay


def decode_inputs(step: Step, cache: KVCache) -> torch.Tensor:
    """What the decoding tokens of a step on the host read and where they write: [D', 4 + M] int64."""
    rows, count = step.rows.numpy(), step.num_decode
    num_pages = _rounded_up(int(step.positions.max()) // PAGE_SIZE + 1, cache.page_table.shape[1])
    inputs = np.empty((_rounded_up(count, len(cache.page_table)), 4 + num_pages), np.int64)
    inputs[:count, :4] = np.stack([x.numpy() for x in (step.token_ids, step.positions, step.pages, step.offsets)], 1)
    inputs[:count, 4:] = cache.page_table[rows, :num_pages]
    inputs[count:] = inputs[0]
    return torch.from_numpy(inputs)


def _decode_step(inputs: torch.Tensor) -> Step:
    token_ids, positions, pages, offsets = inputs[:, :4].unbind(1)
    rows = torch.arange(len(inputs), device=inputs.device)
    return Step(
        token_ids, positions, pages, offsets, rows, len(inputs), None, [], outputs=rows, table=inputs[:, 4:]
    )  # fmt: skip


def _moved(step: Step, device: torch.device) -> Step:
    return replace(
        step,
        token_ids=step.token_ids.to(device),
        positions=step.positions.to(device),
        pages=step.pages.to(device),
        offsets=step.offsets.to(device),
        outputs=step.outputs.to(device),
        chunks=[replace(chunk, pages=chunk.pages.to(device)) for chunk in step.chunks],
    )


def _rounded_up(count: int, most: int) -> int:
    """The next power of two, or ``most`` if that is less."""
    return min(1 << (count - 1).bit_length(), most)


def _after(_: object, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    return compute()
