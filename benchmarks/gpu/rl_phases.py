"""Where the time of reinforcement learning goes on a GPU: GRPO with Qwen2.5-0.5B's shape, every phase of a step timed.

    python -m benchmarks.gpu.rl_phases                         # 16 prompts x 8 samples of 64 + 256 tokens a step

Policy and engine are one model in one process; rewards depend on the sampled ids alone. Prints one JSON object: median
seconds of each phase, tokens a second, and the mismatch between what the engine reported and what the trainer computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.shapes import QWEN2_5_0_5B, cuda_device, make_model

if TYPE_CHECKING:
    import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=16_384, help="tokens of one forward pass of the trainer")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    print(json.dumps(measure(args, QWEN2_5_0_5B, cuda_device()), indent=1))


def measure(args: argparse.Namespace, shape: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train ``args.steps`` steps and report those after the first two."""
    import torch

    from benchmarks.grpo_vs_trl import train_by_grpo
    from rollouts.training import create_pytorch_backend
    from rollouts.training.hardware import peak_memory_mb

    backend = create_pytorch_backend(
        make_model(shape, device), precision="bfloat16", device=str(device), compile=args.compile
    )

    class Silent:
        def log(self, step: int, metrics: dict[str, Any]) -> None: ...

        def close(self) -> None: ...

    steps = train_by_grpo(
        backend, args.steps, Silent(), args.prompts, args.samples, args.new,
        max_tokens_per_micro_batch=args.micro_batch, old_log_probs="trainer",
    )  # fmt: skip
    shown = ("seconds", "tokens_per_second", "mismatch_kl")
    common = set.intersection(*(set(step) for step in steps[2:]))
    timed = sorted(name for name in common if any(word in name for word in shown))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": name,
        "torch": torch.__version__,
        "arguments": vars(args),
        **{name: statistics.median(step[name] for step in steps[2:]) for name in timed},
        "peak_memory_mb": peak_memory_mb(device),
    }


if __name__ == "__main__":
    main()
