"""Floor 3: reinforcement learning on one device, from prompts with verifiable answers to a model that answers them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.training import (
    AsyncRolloutManager,
    DataBuffer,
    EngineGenerate,
    OptimizerConfig,
    RLTrainingConfig,
    RolloutConfig,
    Sample,
    create_pytorch_backend,
    run_rl_training,
)
from rollouts.training.checkpoints import find_latest, verify_checkpoint

COLORS = ("red", "green", "blue", "yellow")


def prompt(word: str) -> Sample:
    """A chat whose right answer is the one word in it."""
    return Sample(prompt=[{"role": "user", "content": f"Say {word}"}], metadata={"answer": word})


async def first_letter(sample: Sample) -> float:
    """1 for an answer that begins as the right one does."""
    return float(sample.response.strip()[:1] == sample.metadata["answer"][0])


def test_a_random_model_learns_what_is_rewarded(tmp_path: Path, make_tiny_model, tiny_tokenizer) -> None:
    """From random weights the right letter is one in hundreds: the reward finds it, and GRPO makes it the rule."""
    backend = create_pytorch_backend(
        make_tiny_model(),
        tiny_tokenizer,
        checkpoint_dir=tmp_path / "checkpoints",
        optimizer=OptimizerConfig(lr=5e-3),
    )
    buffer = DataBuffer([prompt(color) for color in COLORS])
    with EmbeddedEngine(backend.model, tiny_tokenizer, max_length=128) as engine:
        config = RolloutConfig(
            batch_size=4,
            n_samples_per_prompt=64,
            generate_fn=EngineGenerate(engine, tiny_tokenizer, SamplingParams(max_tokens=2)),
            reward_fn=first_letter,
        )
        manager = AsyncRolloutManager(buffer, config)
        history = asyncio.run(
            run_rl_training(backend, buffer, manager, [engine], RLTrainingConfig(num_steps=60, log_every=20))
        )
        greedy = {}
        for color in COLORS:
            ids = tiny_tokenizer.apply_chat_template(
                prompt(color).prompt, add_generation_prompt=True, return_dict=False
            )
            [completion] = engine.generate_batch([ids], SamplingParams(max_tokens=2, temperature=0))
            greedy[color] = tiny_tokenizer.decode(completion.token_ids).strip()[:1]

    assert sum(row["reward_mean"] for row in history[:5]) / 5 < 0.1
    assert sum(row["reward_mean"] for row in history[-5:]) / 5 > 0.5, [row["reward_mean"] for row in history]
    assert sum(letter == color[0] for color, letter in greedy.items()) >= 2, greedy
    assert max(row["mismatch_kl"] for row in history) < 1e-5

    step = find_latest(tmp_path / "checkpoints")
    assert step is not None and step.name == "step_000060"
    verify_checkpoint(step)
    assert all(torch.isfinite(p).all() for p in backend.model.parameters())
