"""Log-probs as each API shows them: OpenAI's at temperature 1, SGLang's at the sampling temperature."""

from __future__ import annotations

from typing import Any

from rollouts.inference import Completion, CompletionChunk
from rollouts.serving.text import TokenNames

LOWEST = -9999.0  # JSON has no infinity


def chat_log_probs(names: TokenNames, source: Completion | CompletionChunk) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion: every sampled token, the stop token included."""
    tops = _tops(source) or [[]] * len(source.token_ids)
    content = [
        {**_entry(names, token, log_prob), "top_logprobs": [_entry(names, *pair) for pair in top]}
        for token, log_prob, top in zip(source.token_ids, source.raw_log_probs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _tops(source: Completion | CompletionChunk) -> list[list[tuple[int, float]]] | None:
    return source.top_log_probs if isinstance(source, Completion) else None  # the engine's chunks carry none


def _entry(names: TokenNames, token_id: int, log_prob: float) -> dict[str, Any]:
    return {"token": names.text(token_id), "logprob": max(log_prob, LOWEST), "bytes": names.utf8(token_id)}


def completion_log_probs(names: TokenNames, source: Completion | CompletionChunk, offset: int = 0) -> dict[str, Any]:
    """``choices[].logprobs`` of a text completion; ``offset`` is where in the text its first token begins."""
    tokens = [names.text(token_id) for token_id in source.token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops = _tops(source)
    return {
        "tokens": tokens,
        "token_logprobs": [max(value, LOWEST) for value in source.raw_log_probs],
        "top_logprobs": tops and [{names.text(token): max(p, LOWEST) for token, p in top} for top in tops],
        "text_offset": offsets,
    }


def scaled_top_log_probs(completion: Completion, temperature: float) -> list[list[tuple[float, int]]]:
    """The likeliest (log-prob, id) pairs of each token at the sampling temperature.

    Raw log-probs divided by the temperature are off by one constant a position, which the sampled token's own pair of
    log-probs gives.
    """
    t = temperature or 1.0
    return [
        [(p / t - (raw / t - scaled), token) for token, p in top]
        for top, raw, scaled in zip(
            completion.top_log_probs or [], completion.raw_log_probs, completion.log_probs, strict=True
        )
    ]
