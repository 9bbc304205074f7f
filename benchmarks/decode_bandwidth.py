"""How much of the memory's speed batch-1 decoding reaches: Qwen2.5-0.5B's shape, random bfloat16 weights (1 GB).

    python -m benchmarks.decode_bandwidth

Every token reads every weight once (the embedding, tied to the output layer, once as well). The memory's own speed is
measured in the same run, in rounds that alternate with the decoding: reading 1 GB by a sum over all threads, and
copying half of it over the other half (bytes read and bytes written both count). Prints one JSON object; the best round
of each counts.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import transformers

from rollouts.inference import EmbeddedEngine, SamplingParams

QWEN2_5_05B = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0, "tie_word_embeddings": True,
}  # fmt: skip


def read_rate(memory: torch.Tensor) -> float:
    """Bytes a second of one pass over all of ``memory``."""
    started = time.perf_counter()
    memory.view(torch.int64).sum()
    return memory.numel() * memory.element_size() / (time.perf_counter() - started)


def copy_rate(memory: torch.Tensor) -> float:
    """Bytes a second, read and written, of copying one half of ``memory`` over the other."""
    first, second = memory.chunk(2)
    started = time.perf_counter()
    second.copy_(first)
    return memory.numel() * memory.element_size() / (time.perf_counter() - started)


def decode_rate(engine: EmbeddedEngine, num_bytes: int, num_tokens: int) -> float:
    """Bytes of weights a second; the prompt is one token, so every step decodes."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    started = time.perf_counter()
    engine.generate_batch([[1]], params)
    return num_bytes * num_tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**QWEN2_5_05B)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = torch.ones(1 << 29, dtype=torch.bfloat16)
    best = dict.fromkeys(("read", "copy", "decode"), 0.0)
    with EmbeddedEngine(model, max_length=256, max_rows=1) as engine:
        decode_rate(engine, num_bytes, 4)
        for _ in range(arguments.rounds):
            rates = {
                "read": read_rate(memory),
                "copy": copy_rate(memory),
                "decode": decode_rate(engine, num_bytes, arguments.tokens),
            }
            best = {name: max(best[name], rate) for name, rate in rates.items()}
    report = {
        "threads": arguments.threads,
        "weight_GB": num_bytes / 1e9,
        "tokens_per_s": best["decode"] / num_bytes,
        **{f"{name}_GB_per_s": rate / 1e9 for name, rate in best.items()},
        "of_copy_bandwidth": best["decode"] / best["copy"],
        "of_read_bandwidth": best["decode"] / best["read"],
    }
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    main()
