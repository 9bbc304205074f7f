"""Attention over packed sequences, forward and backward: ours beside torch's, which takes a call a sequence.

python -m benchmarks.packed_attention --shapes A B C --sequences 256 1024
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.workload import ROWS, SHAPES, Workload
from rollouts.models.packed_attention import packed_attention_cpu
from rollouts.training.hardware import keep_freed_memory

Attention = Callable[..., torch.Tensor]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    return packed_attention_cpu(q, k, v, bounds, q.shape[-1] ** -0.5)[0]


def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    parts = zip(*(x.split(bounds.diff().tolist(), dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True) for x in parts], dim=2)


def seconds(run: Attention, tensors: list[torch.Tensor], grad: torch.Tensor, bounds: torch.Tensor) -> list[float]:
    """Of the forward and of the backward pass."""
    begin = time.perf_counter()
    out = run(*tensors, bounds)
    middle = time.perf_counter()
    torch.autograd.grad(out, tensors, grad)
    return [middle - begin, time.perf_counter() - middle]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--sequences", nargs="+", type=int, default=[256], choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as training does
    print("ms of one layer in float32, median: torch -> ours\n\n| shape | sequence | tokens | forward | backward |")
    print("|---|---|---|---|---|")
    for sequence in args.sequences:
        for name in args.shapes:
            shape, workload = SHAPES[name], Workload(name, sequence)
            bounds = torch.tensor([0, *map(len, workload.samples(1))]).cumsum(0).to(torch.int32)
            tokens = int(bounds[-1])
            torch.manual_seed(0)
            query, key, value, grad = (
                torch.randn(1, tokens, heads, shape.head_dim).transpose(1, 2)
                for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
            )
            tensors = [x.requires_grad_() for x in (query, key, value)]
            times: dict[Attention, list[list[float]]] = {torchs: [], ours: []}
            for _ in range(args.repeats):  # in turns: a machine whose speed drifts favors neither
                for run, measured in times.items():
                    measured.append(seconds(run, tensors, grad, bounds))
            cells = [
                " -> ".join(f"{1e3 * statistics.median(m[i] for m in measured[1:]):.1f}" for measured in times.values())
                for i in (0, 1)
            ]
            print(f"| {name} | {sequence} | {tokens} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
