"""Rollout generation from end to end, on a CPU in seconds: prompts in, batches of scored groups out.

    python examples/test_rollout_generation.py [--model FOLDER] [--steps 3]

A demonstration, not a unit test. Without ``--model`` the model is tiny and random, and the reward, how many of a
response's characters are letters, is as silly as it is.
"""

from __future__ import annotations

import argparse

from common import load_or_make_model

from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.training import DataBuffer, EngineGenerate, RolloutConfig, Sample, generate_rollout_batches
from rollouts.training.filters import check_reward_nonzero_std

PROMPTS = [f"What is {a} + {b}?" for a in range(1, 5) for b in range(1, 5)]


async def share_of_letters(sample: Sample) -> float:
    return sum(c.isalpha() for c in sample.response) / max(1, len(sample.response))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder; default: a tiny model made on the spot")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load_or_make_model(args.model)

    data_buffer = DataBuffer([[{"role": "user", "content": text}] for text in PROMPTS], seed=0)
    with EmbeddedEngine(model, tokenizer, max_length=256) as engine:
        config = RolloutConfig(
            batch_size=4,
            n_samples_per_prompt=4,
            generate_fn=EngineGenerate(engine, tokenizer, SamplingParams(max_tokens=24)),
            reward_fn=share_of_letters,
            filter_fn=check_reward_nonzero_std,
            over_sampling_factor=1.5,  # begin 6 groups, keep 4
        )
        batches = generate_rollout_batches(data_buffer, config)
        for _, batch in zip(range(args.steps), batches):
            rewards = [reward for reward in batch.rewards if reward is not None]
            print(
                f"batch {batch.step_id}: {len({s.group_id for s in batch.samples})} prompts, {len(batch)} samples, "
                f"{sum(batch.response_lengths)} tokens, mean reward {sum(rewards) / len(rewards):.3f}, "
                f"dropped {batch.metadata['dropped'] or 'none'}"
            )
        batches.close()
        sample = batch.samples[0]
        print(f"{sample.prompt[-1]['content']!r} -> {sample.response!r} ({sample.stop_reason})")


if __name__ == "__main__":
    main()
