"""The vLLM arm of generation_vs_engines.py: run by vLLM's own interpreter, one round for each line "concurrency seed".

    echo 16 0 | .engines/vllm/bin/python benchmarks/vllm_in_process.py MODEL_FOLDER [eager]

Prompts of 64 tokens, 64 sampled at temperature 1 with the log-prob of each; nothing is tokenized or written as text.
"""

from __future__ import annotations

import os
import random
import sys
import time

PROMPT_TOKENS = NEW_TOKENS = 64
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, not in one of its own
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=sys.argv[1],
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=256,
        enforce_eager="eager" in sys.argv,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(
        max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False
    )
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    for line in sys.stdin:
        count, seed = map(int, line.split())
        rng = random.Random(seed)
        prompts = [
            {"prompt_token_ids": [rng.randrange(9, vocab_size) for _ in range(PROMPT_TOKENS)]} for _ in range(count)
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == NEW_TOKENS and o.outputs[0].logprobs for o in outputs)
        print("seconds", seconds, flush=True)


if __name__ == "__main__":
    main()
