"""How much of a GPU's memory bandwidth decoding reaches: Qwen2.5-0.5B's shape, bfloat16, many sequences at once.

    python -m benchmarks.gpu.decode_rate                       # 64 sequences of 64 tokens in and 256 out
    python -m benchmarks.gpu.decode_rate --concurrency 1 16 64 256

A decoding step reads every weight once and the keys and values of every sequence once. Bandwidth allows
``bandwidth / (weights + keys and values)`` steps a second; the card's own bandwidth is measured in the same run by
copying 2 GB (bytes read and bytes written both count). Steps with torch operators one by one, as they run without CUDA
graphs, stand beside it. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.shapes import QWEN2_5_0_5B, cuda_device, make_model

if TYPE_CHECKING:
    import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(args, QWEN2_5_0_5B, cuda_device(), 1 << 30), indent=1))


def measure(args: argparse.Namespace, shape: dict[str, Any], device: torch.device, copied: int) -> dict[str, Any]:
    """Tokens a second and the share of the bandwidth, for each concurrency; ``copied`` bytes tell the bandwidth."""
    import torch

    model = make_model(shape, device).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    per_token = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim
    bandwidth = copy_rate(copied, device)
    found = []
    for count in args.concurrency:
        read = weights + count * per_token * (args.prompt + args.new / 2)
        allowed = count * bandwidth / read
        ways = {"graphs": decode_rate(model, args, count, True), "operators": decode_rate(model, args, count, False)}
        shares = {f"share_{way}": rate / allowed for way, rate in ways.items()}
        found.append({"concurrency": count, "allowed_tokens_per_s": allowed, **ways, **shares})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "torch": torch.__version__, "GB_per_s": bandwidth / 1e9, "weights_GB": weights / 1e9,
            "decoding": found}  # fmt: skip


def decode_rate(model: Any, args: argparse.Namespace, count: int, native: bool) -> float:
    """Sampled tokens a second of ``count`` sequences; what their prompts and first tokens cost is taken off."""
    from rollouts.inference import EmbeddedEngine, SamplingParams

    length = args.prompt + args.new + 1
    prompts = [[(7 * i + j) % 1000 for j in range(args.prompt)] for i in range(count)]
    rates = []
    with EmbeddedEngine(model, max_length=length, max_rows=count, native=native) as engine:
        for _ in range(args.rounds + 1):  # the first round records the graphs
            seconds = []
            for tokens in (1, args.new):
                engine.update_weights().wait()  # forgets the prompts
                started = time.perf_counter()
                engine.generate_batch(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True))
                seconds.append(time.perf_counter() - started)
            rates.append(count * (args.new - 1) / (seconds[1] - seconds[0]))
    return max(rates[1:])


def copy_rate(num_bytes: int, device: torch.device) -> float:
    """Bytes read and written a second; the best of five copies."""
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * num_bytes / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
