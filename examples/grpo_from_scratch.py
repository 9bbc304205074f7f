#!/usr/bin/env python3
"""GRPO in one file, from public pieces and nothing hidden: sample groups, judge them, compare, step.

    prompts --engine--> groups of samples --reward--> R --group mean and spread--> A
        --backend.forward_backward(clipped loss)--> optim_step --> the engine serves the new weights

`run_rl_training` does the same and more; here the loop lies open, to be read and changed.

python examples/grpo_from_scratch.py [--model Qwen/Qwen2.5-0.5B-Instruct] [--steps 30]

Shapes: P prompts a step, G samples a prompt, N learned tokens of a micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from common import learning_rate, load_or_make_model, parse_arguments

from rollouts.inference import Completion, EmbeddedEngine, SamplingParams
from rollouts.training.algorithms.log_probs import learned_positions, token_log_probs
from rollouts.training.backends.optimizers import OptimizerConfig
from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.loops.rl_batches import collate_rl_step
from rollouts.training.sft_losses import DeferredLogits, LossOutput, accepts_deferred_logits
from rollouts.training.types import Sample

TOPICS = ("trees", "rain", "bread", "boats", "stars", "music", "chess", "rivers")
P, G = 4, 8
EPOCHS = 2  # passes over the samples of a step; after the first the policy is no longer what sampled them
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def reward(text: str) -> float:
    """The share of characters that are lower-case letters and spaces: anything that can be computed would do."""
    return sum(c == " " or (c.isascii() and c.islower()) for c in text) / max(len(text), 1)


def to_sample(prompt_ids: Sequence[int], completion: Completion, group: str, text: str) -> Sample:
    """What was sampled, as it was sampled: ids, log-probs and which tokens are the policy's own (mask 1)."""
    start = len(prompt_ids)
    return Sample(
        tokens=[*prompt_ids, *completion.token_ids],
        loss_mask=[0] * start + [1] * len(completion.token_ids),
        rollout_log_probs=[0.0] * start + completion.log_probs,
        response=text,
        group_id=group,
        reward=reward(text),
    )


def give_advantages(group: Sequence[Sample]) -> None:
    """A = (R - mean) / (std + 1e-6) over the group, the same for each of a sample's learned tokens."""
    rewards = torch.tensor([s.reward for s in group], dtype=torch.float64)  # [G]
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    for sample, advantage in zip(group, advantages.tolist(), strict=True):
        sample.advantages = [advantage * m for m in sample.loss_mask]


@accepts_deferred_logits
def clipped_policy_loss(
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    advantages: torch.Tensor,  # [N]
    rollout_log_probs: torch.Tensor,  # [N]
    **_: Any,
) -> LossOutput:
    """Sum over tokens of max(-A r, -A clip(r)), r = exp(log-prob now - log-prob when sampled); the backend divides."""
    log_probs, entropy = token_log_probs(logits, labels, learned_positions(logits, loss_mask), with_entropy=True)
    assert entropy is not None
    difference = log_probs - rollout_log_probs
    ratio = difference.clamp(-20, 20).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    count = torch.tensor(float(len(loss)), device=loss.device)
    clipped = (ratio < 1 - CLIP_LOW) | (ratio > 1 + CLIP_HIGH)
    kl = (ratio - difference - 1).detach()  # of the sampler to the policy, the k3 estimate
    metrics = {"entropy": entropy.detach(), "clipped": clipped.float(), "kl": kl}
    return LossOutput(loss.sum(), count, {name: (x.sum(), count) for name, x in metrics.items()})


def sample_groups(engine: EmbeddedEngine, tokenizer: Any, topics: Sequence[str], step: int) -> list[list[Sample]]:
    """G answers to each prompt; a prompt is computed once for all of them."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Tell me about {topic}."}], add_generation_prompt=True, return_dict=False
        )
        for topic in topics
    ]
    params = [SamplingParams(max_tokens=16, n=G, seed=1000 * step + i) for i in range(len(prompts))]
    completions = engine.generate_batch(prompts, params)  # those of one prompt side by side
    samples = [
        to_sample(prompts[i // G], completion, f"{step}/{i // G}", tokenizer.decode(completion.token_ids))
        for i, completion in enumerate(completions)
    ]
    return [samples[i : i + G] for i in range(0, len(samples), G)]


def main() -> None:
    args = parse_arguments(__doc__, out="runs/example_grpo", steps=30)
    model, tokenizer = load_or_make_model(args.model, args.device)
    backend = create_pytorch_backend(
        model,
        tokenizer,
        checkpoint_dir=args.out / "checkpoints",
        optimizer=OptimizerConfig(lr=learning_rate(args.model)),
        loss_fn=clipped_policy_loss,
    )
    rng, rewards = random.Random(0), []
    with EmbeddedEngine(backend.model, tokenizer, max_length=512) as engine:
        for step in range(args.steps):
            groups = sample_groups(engine, tokenizer, rng.sample(TOPICS, P), step)
            for group in groups:
                give_advantages(group)
            samples = [sample for group in groups for sample in group]

            for _ in range(EPOCHS):
                batches, _ = collate_rl_step(samples, range(len(samples)), max_tokens=8192)
                learned = backend.forward_backward(batches).wait()
                backend.optim_step().wait()
            engine.update_weights(None, step + 1).wait()  # the same tensors; the engine forgets what it had cached

            rewards.append(sum(s.reward for s in samples) / len(samples))
            if (step + 1) % 10 == 0 or step == 0:
                print(
                    f"Step {step + 1}: reward={rewards[-1]:.3f}, loss={learned['loss']:.4f}, kl={learned['kl']:.1e}, "
                    f"clipped={learned['clipped']:.3f}, entropy={learned['entropy']:.3f}"
                )
    backend.save_checkpoint(args.steps).wait()
    few = max(len(rewards) // 6, 1)
    print(f"reward: {sum(rewards[:few]) / few:.3f} -> {sum(rewards[-few:]) / few:.3f}")


if __name__ == "__main__":
    main()
