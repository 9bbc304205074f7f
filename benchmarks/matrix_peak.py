"""The matrix rate of this machine: the best of several sizes, in both precisions, as one JSON line."""

from __future__ import annotations

import json
import time


def matrix_peak(device: str, dtype: str, sizes: tuple[int, ...], seconds: float = 1.0) -> float:
    """Operations per second of the fastest square product among ``sizes``; each is tried for about ``seconds``."""
    import torch

    def timed(a: torch.Tensor, b: torch.Tensor) -> float:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        timed(a, b)
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            best = max(best, 2 * n**3 / timed(a, b))
    return best


if __name__ == "__main__":
    sizes = (256, 512, 1024, 2048, 4096)
    print(json.dumps({"fp32": matrix_peak("cpu", "float32", sizes), "bf16": matrix_peak("cpu", "bfloat16", sizes)}))
