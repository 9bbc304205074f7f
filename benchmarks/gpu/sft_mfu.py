"""Model FLOPs utilization of supervised training on one CUDA device: Qwen2.5-0.5B's shape, bfloat16, packed rows.

    python -m benchmarks.gpu.sft_mfu                          # 4 rows of 4,096 tokens a step
    python -m benchmarks.gpu.sft_mfu --rows 8 --compile

Weights are random and samples are random ids of ragged lengths up to 4,096, packed and isolated. Utilization is
``training_flops / seconds / measured matrix rate``; recomputed activations count nothing. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.shapes import QWEN2_5_0_5B, cuda_device

if TYPE_CHECKING:
    import torch

    from rollouts.training.types import Sample

SEQUENCE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of 4,096 tokens in one micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches in one optimizer step")
    parser.add_argument("--median-length", type=float, default=1500, help="of a sample, in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    args = parser.parse_args()
    print(json.dumps(measure(args, QWEN2_5_0_5B, cuda_device()), indent=1))


def measure(args: argparse.Namespace, shape: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train ``args.warmup + args.steps`` steps of a Qwen2 model of ``shape`` and say how fast they were."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.matrix_peak import matrix_peak
    from rollouts.training.backends.pytorch_factory import create_pytorch_backend
    from rollouts.training.hardware import peak_memory_mb
    from rollouts.training.loops.batches import prepare_sft_batch

    peak = matrix_peak(device.type, "bfloat16", sizes=(4096, 8192, 16384) if device.type == "cuda" else (1024,))
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    backend = create_pytorch_backend(
        model,
        precision="bfloat16",
        device=str(device),
        compile=args.compile,
        activation_checkpointing=args.checkpointing,
    )
    seconds, flops, tokens = [], [], []
    draw = random.Random(0)
    for step in range(args.warmup + args.steps):
        micro_batches = [
            [sample for _ in range(args.rows) for sample in full_row(draw, args.median_length, shape["vocab_size"])]
            for _ in range(args.micro_batches)
        ]
        _wait(device)
        started = time.perf_counter()
        backend.forward_backward([prepare_sft_batch(samples) for samples in micro_batches]).wait()
        backend.optim_step().wait()
        _wait(device)
        if step >= args.warmup:
            lengths = [len(sample) for samples in micro_batches for sample in samples]
            seconds.append(time.perf_counter() - started)
            tokens.append(sum(lengths))
            flops.append(training_flops(shape, model.num_parameters(), lengths))
    rates = [f / s for f, s in zip(flops, seconds, strict=True)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "arguments": vars(args),
        "parameters": model.num_parameters(),
        "tokens_per_step": statistics.mean(tokens),
        "tokens_per_second": statistics.median(t / s for t, s in zip(tokens, seconds, strict=True)),
        "model_tflops": statistics.median(rates) / 1e12,
        "matrix_tflops": peak / 1e12,
        "utilization": statistics.median(rates) / peak,
        "peak_memory_mb": peak_memory_mb(device),
    }


def full_row(draw: random.Random, median: float, vocab_size: int) -> list[Sample]:
    """Samples of random ids and log-normal lengths that make up ``SEQUENCE`` tokens exactly."""
    from rollouts.training.types import Sample

    samples = []
    room = SEQUENCE
    while room > 0:
        length = min(max(16, round(median * draw.lognormvariate(0.0, 0.8))), room)
        samples.append(Sample(draw.choices(range(vocab_size), k=length), [1] * length))
        room -= length
    return samples


def training_flops(shape: dict[str, Any], num_parameters: int, lengths: list[int]) -> int:
    """6 operations a parameter and token (the tied embedding once, as output projection), and causal attention."""
    attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * sum(n * (n + 1) for n in lengths)
    return 6 * num_parameters * sum(lengths) + attention


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
