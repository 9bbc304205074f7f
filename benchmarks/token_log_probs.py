"""Log-probs and entropies of tokens and the gradient through them, beside the bare matrix products and plain operators.

Seconds of one thread's processor time, which other work on the machine hardly changes:
    python -m benchmarks.token_log_probs --tokens 4096
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from rollouts.training.algorithms import log_probs as module
from rollouts.training.algorithms.log_probs import token_statistics
from rollouts.training.sft_losses import DeferredLogits, causal_lm_loss

SHAPES = {"A": (512, 128), "B": (4096, 320), "C": (16384, 768)}  # vocabulary, hidden width


def best(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of the fastest of ``repeats`` runs after one more."""
    run()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return 1000 * min(times)


def measure(shape: str, dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, float]:
    vocab, width = SHAPES[shape]
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens + 1, width).to(dtype).requires_grad_(True)
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_(True)
    labels, positions = torch.randint(0, vocab, (1, tokens + 1)), torch.arange(1, tokens + 1)
    factors, mask = torch.randn(tokens), torch.ones(1, tokens + 1)
    step = max(64, module.CHUNK_ELEMENTS // vocab)
    rows, outer = hidden.detach()[0, :-1].contiguous(), weight.detach()
    wide = torch.randn(min(step, tokens), vocab).to(dtype)

    def products() -> None:
        for start in range(0, tokens, step):
            chunk = rows[start : start + step]
            gradient = wide[: len(chunk)]
            _ = chunk @ outer.T, gradient @ outer, gradient.T @ chunk

    def ours(entropy_gradient: bool = False) -> None:
        late = DeferredLogits(hidden, weight)
        found = token_statistics(late, labels, positions, entropy=True, entropy_gradient=entropy_gradient)
        assert found.entropy is not None
        loss = (found.log_probs * factors).sum()
        (loss + found.entropy.sum() if entropy_gradient else loss).backward()

    def reading() -> None:
        with torch.no_grad():
            token_statistics(DeferredLogits(hidden, weight), labels, positions)

    def plain() -> None:
        log_probs = torch.log_softmax((hidden[0, :-1] @ weight.T).float(), -1)
        with torch.no_grad():
            _ = -(log_probs.exp() * log_probs).sum(-1)
        (log_probs.gather(1, labels[0, 1:, None])[:, 0] * factors).sum().backward()

    def recomputing() -> None:
        kept, module.KEEP_BYTES = module.KEEP_BYTES, 0
        ours()
        module.KEEP_BYTES = kept

    ways = {
        "three products": products,
        "ours": ours,
        "ours, logits computed again": recomputing,
        "ours, entropy differentiated": lambda: ours(True),
        "ours, no gradient": reading,
        "torch operators": plain,
        "cross-entropy": lambda: causal_lm_loss(DeferredLogits(hidden, weight), labels, mask).total.backward(),
    }
    return {name: best(run, repeats) for name, run in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=["A", "B"], choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| shape, precision | way | ms |\n|---|---|---|")
    for shape in args.shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for name, ms in measure(shape, dtype, args.tokens, args.repeats).items():
                print(f"| {shape} {str(dtype).removeprefix('torch.')} | {name} | {ms:.1f} |", flush=True)


if __name__ == "__main__":
    main()
