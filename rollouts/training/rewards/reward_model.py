"""A trained reward model as the reward: its score of the whole sequence, prompt and response."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

from rollouts.training.types import Sample


class RewardModel:
    """``sample -> score``, for ``RewardRunner``; one forward pass at a time, in a thread of this process.

    Args:
        path: the folder of a reward model (``rollouts reward-model`` writes one; any sequence classifier of
            transformers with one label is one); or a loaded model, with ``tokenizer`` beside it.
        device, dtype: where and how precisely to compute.
        tokenizer: None takes the folder's.
        same_tokens: the policy's tokens are the reward model's: score exactly what was sampled. False renders the
            prompt and the response's text by the reward model's own template, as every other model needs.

    Raises:
        UserError: no reward model there.
    """

    isolation = "thread"

    def __init__(
        self,
        path: str | Path | Any,
        *,
        device: str | None = "auto",
        dtype: str = "bfloat16",
        tokenizer: Any = None,
        same_tokens: bool = False,
    ) -> None:
        from rollouts.models.load import load_reward_model

        if isinstance(path, str | Path):
            self.model, loaded = load_reward_model(path, device, dtype)
            tokenizer = tokenizer if tokenizer is not None else loaded
        else:
            self.model = path
        self.tokenizer, self.same_tokens = tokenizer, same_tokens
        self._lock = threading.Lock()
        self.__name__ = "reward_model"

    def __call__(self, sample: Sample) -> float:
        import torch

        from rollouts.training.loops.reward_loop import scored_position

        tokens = list(sample.tokens) if self.same_tokens else self._render(sample)
        position = scored_position(tokens, self.model.config.pad_token_id)
        inputs = torch.tensor([tokens[: position + 1]], device=self.model.device)
        with self._lock, torch.inference_mode():
            return self.model(input_ids=inputs, use_cache=False).logits[0, 0].float().item()

    def _render(self, sample: Sample) -> list[int]:
        from rollouts.training.datasets.sft import encode_renderings, render_conversation

        prompt = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        messages = [*prompt, {"role": "assistant", "content": sample.response}]
        rendering = render_conversation({"messages": messages, "tools": sample.metadata.get("tools")}, self.tokenizer)
        return encode_renderings([rendering], self.tokenizer)[0][0].tolist()


@functools.lru_cache(maxsize=4)
def _loaded(path: str, device: str, dtype: str, same_tokens: bool) -> RewardModel:
    return RewardModel(path, device=device, dtype=dtype, same_tokens=same_tokens)


def reward_model(
    sample: Sample, *, path: str, device: str = "auto", dtype: str = "bfloat16", same_tokens: bool = False
) -> float:
    """The score that the reward model in ``path`` gives; see ``RewardModel``. It is loaded once, before the first."""
    return _loaded(path, device, dtype, same_tokens)(sample)


def _prepare(path: str, device: str = "auto", dtype: str = "bfloat16", same_tokens: bool = False) -> None:
    _loaded(path, device, dtype, same_tokens)


reward_model.isolation = "thread"  # type: ignore[attr-defined]
reward_model.prepare = _prepare  # type: ignore[attr-defined]
