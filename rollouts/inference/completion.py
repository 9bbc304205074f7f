"""What the engine gives back: the sampled tokens with what is known about each, and why they ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from rollouts.types import WeightSpan


class StopReason(StrEnum):
    """Why a sample ended."""

    STOP_TOKEN = "stop_token"  # one of the model's end ids or of the request's stop_token_ids; it is the last token
    STOP_STRING = "stop_string"  # the text came to hold a stop string; the token that completed it is the last one
    LENGTH = "length"  # max_tokens, or the longest sequence that the engine holds
    ABORTED = "aborted"  # cancelled, or cut by a weight update; the tokens so far are valid


@dataclass(frozen=True)
class Completion:
    """One sample. Per-token fields have ``len(token_ids)`` entries.

    Args:
        token_ids: exactly what was sampled, the stop token included.
        log_probs: log-prob of each token under the full distribution at the sampling temperature, without penalties,
            bias or truncation: what a trainer computes from logits / temperature. For greedy samples it is 1.
        raw_log_probs: the same at temperature 1.
        stop_match: the id or the string that ended the sample.
        weight_versions: which weights sampled which tokens; spans follow one another and cover all tokens.
        top_log_probs: for each token the likeliest (id, raw log-prob) pairs, likeliest first; None unless asked for.
        num_cached_tokens: prompt tokens whose keys and values were already there.
        sample_index: which of the request's ``n`` samples this is.
        prompt_log_probs: raw log-prob of each prompt token, None for the first, which nothing predicts; None unless
            asked for. An aborted sample may have fewer.
        prompt_top_log_probs: the same as ``top_log_probs`` for the prompt's tokens.
    """

    token_ids: list[int]
    log_probs: list[float]
    raw_log_probs: list[float]
    stop_reason: StopReason
    stop_match: int | str | None = None
    weight_versions: list[WeightSpan] = field(default_factory=list)
    top_log_probs: list[list[tuple[int, float]]] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    sample_index: int = 0
    prompt_log_probs: list[float | None] | None = None
    prompt_top_log_probs: list[list[tuple[int, float]]] | None = None

    @property
    def weight_version(self) -> int | None:
        """The version that sampled the last token; None for an empty sample."""
        return self.weight_versions[-1].version if self.weight_versions else None


@dataclass(frozen=True)
class CompletionChunk:
    """Tokens that one sample of a streamed request gained; its last chunk carries the whole completion.

    ``top_log_probs`` are as a completion's; ``weight_version`` sampled these tokens.
    """

    sample_index: int
    token_ids: list[int]
    log_probs: list[float]
    raw_log_probs: list[float]
    completion: Completion | None = None
    top_log_probs: list[list[tuple[int, float]]] | None = None
    weight_version: int | None = None


def take_chunks(queue: deque[CompletionChunk]) -> list[CompletionChunk]:
    """All chunks, a sample's tokens in one: whoever falls behind the engine has no more work for that."""
    merged: dict[tuple[int, int | None], CompletionChunk] = {}
    finals = []
    while queue:
        chunk = queue.popleft()
        if chunk.completion is not None:
            finals.append(chunk)
            continue
        before = merged.get((chunk.sample_index, chunk.weight_version))
        if before is None:
            merged[chunk.sample_index, chunk.weight_version] = chunk
            continue
        before.token_ids.extend(chunk.token_ids)
        before.log_probs.extend(chunk.log_probs)
        before.raw_log_probs.extend(chunk.raw_log_probs)
        if before.top_log_probs is not None and chunk.top_log_probs is not None:
            before.top_log_probs.extend(chunk.top_log_probs)
    return [*merged.values(), *finals]
