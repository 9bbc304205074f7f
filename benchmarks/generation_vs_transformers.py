"""Tokens a second of the embedded engine against transformers' ``generate``: same models, prompts and process.

    python -m benchmarks.generation_vs_transformers --shapes A B --concurrency 1 16 64 256 --dtypes float32 bfloat16

Every request has 64 prompt tokens and samples 64 at temperature 1. The engine reports the log-prob of every token;
transformers is spared that, and the padding that prompts of different lengths would cost it. Rounds alternate between
the two, so that a machine that slows down slows both; the best round of each counts.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import torch
import transformers

from benchmarks.workload import SHAPES
from rollouts.inference import EmbeddedEngine, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 64
NEW_TOKENS = 64


def run_engine(engine: EmbeddedEngine, prompts: list[list[int]], seed: int) -> float:
    """Seconds for one sample of every prompt."""
    params = [SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, seed=seed + i) for i in range(len(prompts))]
    started = time.perf_counter()
    completions = engine.generate_batch(prompts, params)
    seconds = time.perf_counter() - started
    assert all(len(c.log_probs) == NEW_TOKENS for c in completions)
    return seconds


@torch.inference_mode()
def run_transformers(model: PreTrainedModel, prompts: list[list[int]], cache: str | None) -> float:
    """The same with ``generate``."""
    ids = torch.tensor(prompts)
    options = {} if cache is None else {"cache_implementation": cache}
    started = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        disable_compile=True,
        **options,
    )
    seconds = time.perf_counter() - started
    assert output.shape[1] == PROMPT_TOKENS + NEW_TOKENS
    return seconds


def run_continuous_batching(model: PreTrainedModel, prompts: list[list[int]]) -> float:
    """The same with ``generate_batch``, transformers' continuous batching; it leaves the model with paged attention."""
    options = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1
    )
    started = time.perf_counter()
    outputs = model.generate_batch(prompts, options)
    seconds = time.perf_counter() - started
    assert [len(output.generated_tokens) for output in outputs.values()] == [NEW_TOKENS] * len(prompts)
    return seconds


def random_prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "B"], choices=sorted(SHAPES))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--arms", nargs="+", default=["engine", "generate"], choices=["engine", "generate", "static"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.threads} threads")
    print("| model | precision | concurrency | " + " | ".join(f"{arm} tokens/s" for arm in arguments.arms) + " |")
    for name in arguments.shapes:
        for dtype in arguments.dtypes:
            config = transformers.Qwen3Config(**SHAPES[name].hf_config())
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
            for concurrency in arguments.concurrency:
                print(f"| {name} | {dtype} | {concurrency} | " + measure(model, concurrency, arguments), flush=True)


def measure(model: PreTrainedModel, concurrency: int, arguments: argparse.Namespace) -> str:
    """One line of the table: the best round of every arm, after a round that is not counted."""
    best: dict[str, float] = {}
    with EmbeddedEngine(model, max_length=256, max_rows=concurrency) as engine:
        for round_ in range(arguments.rounds + 1):
            for arm in arguments.arms:
                # New prompts every round: nothing may come from the prefix cache.
                prompts = random_prompts(concurrency, model.config.vocab_size, seed=round_)
                if arm == "engine":
                    seconds = run_engine(engine, prompts, seed=round_)
                else:
                    seconds = run_transformers(model, prompts, "static" if arm == "static" else None)
                if round_:
                    best[arm] = min(best.get(arm, seconds), seconds)
    return " | ".join(f"{concurrency * NEW_TOKENS / best[arm]:,.0f}" for arm in arguments.arms) + " |"


if __name__ == "__main__":
    main()
