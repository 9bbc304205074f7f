"""bfloat16 matrix products of training steps: ours beside torch's, at the shapes of small models' layers.

python -m benchmarks.products --shapes A B C
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.workload import ROWS, SHAPES
from rollouts.models.products import product


def seconds(run, repeats: int) -> list[float]:  # type: ignore[no-untyped-def]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def layers(name: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each kind of linear layer."""
    shape = SHAPES[name]
    return {
        "query": (shape.hidden_size, shape.num_heads * shape.head_dim),
        "key": (shape.hidden_size, shape.num_kv_heads * shape.head_dim),
        "gate": (shape.hidden_size, shape.intermediate_size),
        "down": (shape.intermediate_size, shape.hidden_size),
        "output": (shape.hidden_size, shape.vocab_size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "B"], choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("GFLOP/s, median: torch -> ours\n\n| layer | inputs x outputs | forward | to inputs | to weights |")
    print("|---|---|---|---|---|")
    for name in args.shapes:
        for kind, (inputs, outputs) in layers(name).items():
            rows = min(ROWS[256][name] * 256 - 93, max(64, (1 << 22) // outputs) if kind == "output" else 1 << 20)
            x, g = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, outputs).bfloat16()
            w = torch.randn(outputs, inputs).bfloat16()
            cells = []
            for a, b in ((x, w.T), (g, w), (g.T, x)):
                times: dict[str, list[float]] = {"torch": [], "ours": []}
                for _ in range(args.repeats):  # in turns: a machine whose speed drifts favors neither
                    times["torch"] += seconds(lambda a=a, b=b: a @ b, 2)[1:]  # type: ignore[misc]
                    times["ours"] += seconds(lambda a=a, b=b: product(a, b), 2)[1:]  # type: ignore[misc]
                rate = [2e-9 * rows * inputs * outputs / statistics.median(times[way]) for way in ("torch", "ours")]
                cells.append(f"{rate[0]:.0f} -> {rate[1]:.0f}")
            print(f"| {name} {kind} | {inputs} x {outputs} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
