"""Log-probs as each API shows them: OpenAI's at temperature 1, SGLang's at the sampling temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollouts.inference import Completion, CompletionChunk
from rollouts.serving.text import TokenNames

LOWEST = -9999.0  # JSON has no infinity


def chat_log_probs(names: TokenNames, source: Completion | CompletionChunk) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion: every sampled token, the stop token included."""
    tops = source.top_log_probs or [[]] * len(source.token_ids)
    content = [
        {**_entry(names, token, log_prob), "top_logprobs": [_entry(names, *pair) for pair in top]}
        for token, log_prob, top in zip(source.token_ids, source.raw_log_probs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token_id: int, log_prob: float) -> dict[str, Any]:
    return {"token": names.text(token_id), "logprob": max(log_prob, LOWEST), "bytes": names.utf8(token_id)}


def completion_log_probs(
    names: TokenNames,
    source: Completion | CompletionChunk,
    num_top: int,
    offset: int = 0,
    prompt_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """``choices[].logprobs`` of a text completion.

    Args:
        num_top: alternatives a token.
        offset: where in the text the first token begins.
        prompt_ids: of the prompt, where the text begins with it; ``source`` then knows its log-probs.
    """  # fmt: skip
    log_probs: list[float | None] = [*source.raw_log_probs]
    tops = source.top_log_probs or []
    if prompt_ids:
        assert isinstance(source, Completion) and source.prompt_log_probs is not None
        log_probs = source.prompt_log_probs + log_probs
        tops = (source.prompt_top_log_probs or []) + tops
    tokens = [names.text(token_id) for token_id in (*prompt_ids, *source.token_ids)]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [p if p is None else max(p, LOWEST) for p in log_probs],
        "top_logprobs": [
            None if p is None else _by_text(names, top[:num_top]) for p, top in zip(log_probs, tops, strict=True)
        ]
        if num_top
        else None,
        "text_offset": offsets,
    }


def _by_text(names: TokenNames, top: list[tuple[int, float]]) -> dict[str, float]:
    """Log-probs by text; of tokens with the same text, such as parts of characters, that of the likeliest."""
    return {names.text(token): max(log_prob, LOWEST) for token, log_prob in reversed(top)}


def prompt_log_probs(
    names: TokenNames, prompt_ids: Sequence[int], completion: Completion, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: by id, the likeliest tokens of each place, and the one that stands there."""
    assert completion.prompt_log_probs is not None
    tops = completion.prompt_top_log_probs or [[]] * len(prompt_ids)
    entries: list[dict[str, Any] | None] = []
    for token, log_prob, top in zip(prompt_ids, completion.prompt_log_probs, tops, strict=True):
        if log_prob is None:
            entries.append(None)
            continue
        ranks = {i: rank for rank, (i, _) in enumerate(top, 1)}
        shown = dict(top[:num_top]) | {token: log_prob}
        entries.append(
            {
                str(i): {"logprob": max(p, LOWEST), "rank": ranks.get(i), "decoded_token": names.text(i)}
                for i, p in shown.items()
            }
        )
    return entries


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
