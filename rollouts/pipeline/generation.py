"""Text from a model with plain transformers: batched, greedy or sampled, and chats with a calculator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rollouts.pipeline.tasks import Message, Problem, parse_tool_call, run_calculator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """Continue each prompt until the end of its turn or document, or for ``max_new_tokens`` tokens.

    Prompts of similar length share a batch, padded on the left. The global random state is left as it was.

    Args:
        prompts: rendered text, in which special tokens are recognized.
        temperature: 0 takes the likeliest token; above 0 samples from the whole distribution, repeatably by ``seed``.

    Returns:
        The continuations in the order of the prompts, without special tokens.
    """
    from transformers import GenerationConfig

    was_training = model.training
    model.eval()
    stop_ids = sorted({tokenizer.eos_token_id, tokenizer.pad_token_id})
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    token_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(token_ids[i]))
    texts = [""] * len(prompts)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            padded = tokenizer.pad(
                {"input_ids": [token_ids[i] for i in batch]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(**padded, generation_config=config)
            new = output[:, padded["input_ids"].shape[1] :]  # [batch, new tokens]
            for i, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[i] = text
    model.train(was_training)
    return texts


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> str:
    """The chat so far as the model reads it, up to where the assistant speaks next."""
    return tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
    )


def reply_to_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The model's reply to each problem; when it calls the calculator, it reads the result and speaks again.

    Returns:
        The assistant's text in the order of the problems. Where it called the tool: the call, an arrow with the tool's
        result, and the final message, each on a line of its own.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    replies = generate(model, tokenizer, [render_prompt(tokenizer, p.prompt, p.tools) for p in problems], **options)
    calls = {i: call for i, p in enumerate(problems) if p.tools and (call := parse_tool_call(replies[i]))}
    results = {i: run_calculator(call.get("arguments")) for i, call in calls.items()}
    prompts = [
        render_prompt(tokenizer, [*problems[i].prompt, *tool_turns(call, results[i])], problems[i].tools)
        for i, call in calls.items()
    ]
    for i, final in zip(calls, generate(model, tokenizer, prompts, **options), strict=True):
        replies[i] = f"{replies[i].strip()}\n→ {results[i]}\n{final}"
    return replies


def tool_turns(call: dict[str, Any], result: str) -> list[Message]:
    """The assistant's tool call and the tool's answer, as they join the chat."""
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": result},
    ]
