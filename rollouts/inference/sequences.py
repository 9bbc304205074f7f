"""The samples in the engine: what one is, and the state of those that run, as arrays over rows.

A sequence is one sample of a request. While it runs it owns a row; everything that a step needs to know about it lies
in arrays indexed by row, so that a step's bookkeeping is a few array operations however many sequences run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from rollouts.inference.completion import Completion, CompletionChunk, StopReason
from rollouts.inference.grammars import BoundText, TokenMasks
from rollouts.inference.sampler import BatchParams
from rollouts.inference.sampling_params import SamplingParams
from rollouts.inference.stop_strings import StopStrings
from rollouts.inference.wake import Wake
from rollouts.types import WeightSpan


@dataclass(eq=False)
class PromptScores:
    """The raw log-probs of a prompt's tokens from the second on, as far as they are known; one sample computes them."""

    tokens: np.ndarray  # int32, the prompt
    num_top: int
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    row: int = -1  # where they are being computed

    @property
    def num_wanted(self) -> int:
        return len(self.tokens) - 1

    @property
    def complete(self) -> bool:
        return len(self.log_probs) == self.num_wanted

    def clear(self) -> None:
        self.log_probs, self.top = [], []


@dataclass(eq=False)
class Request:
    """One prompt and its ``n`` samples.

    ``notify`` runs, by way of ``wake``, when the last sample is done and, if ``streaming``, when there are chunks.
    """

    prompt: np.ndarray  # int32
    params: SamplingParams
    wake: Wake
    notify: Callable[[], object]
    streaming: bool = False
    id: str | None = None
    scores: PromptScores | None = None
    bound_text: BoundText | None = None  # empty; what a grammar leaves each sample to say
    completions: dict[int, Completion] = field(default_factory=dict)
    chunks: deque[CompletionChunk] = field(default_factory=deque)
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.completions) == self.params.n


@dataclass(eq=False)
class LiveSample:
    """One sample. ``tokens`` and the log-probs are current only while no row holds them."""

    request: Request
    index: int
    tokens: np.ndarray  # int32, prompt and what was sampled
    num_prompt: int
    max_length: int  # of prompt and sample together
    stop_ids: np.ndarray  # int64
    random_start: np.uint64
    arrival: int
    stop_strings: StopStrings | None = None
    bound_text: BoundText | None = None  # all sampled tokens, whether a row holds them or not
    log_probs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # of the sampled tokens
    raw_log_probs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)  # (first sampled token, weight version)
    num_cached: int | None = None  # prompt tokens found in the cache when it first ran
    num_told: int = 0  # sampled tokens that a stream has been given
    row: int = -1
    leader: LiveSample | None = None  # computes the same tokens for this one, too

    @property
    def started(self) -> bool:
        return len(self.tokens) > self.num_prompt

    def note_version(self, version: int, sampled: int) -> None:
        """From token ``sampled`` of the sample on, ``version`` does the sampling."""
        if self.versions and self.versions[-1][0] == sampled:
            self.versions.pop()
        if not self.versions or self.versions[-1][1] != version:
            self.versions.append((sampled, version))

    def complete(self, reason: StopReason, match: int | str | None = None) -> Completion:
        """The sample as it is now; the sequence must have left its row."""
        count = len(self.tokens) - self.num_prompt
        bounds = [start for start, _ in self.versions if start < count] + [count]
        spans = [
            WeightSpan(version, start, end)
            for (_, version), start, end in zip(self.versions, bounds[:-1], bounds[1:], strict=False)
        ]
        scores = self.request.scores
        return Completion(
            token_ids=self.tokens[self.num_prompt :].tolist(),
            log_probs=self.log_probs.tolist(),
            raw_log_probs=self.raw_log_probs.tolist(),
            stop_reason=reason,
            stop_match=match,
            weight_versions=spans,
            top_log_probs=self.top_log_probs if self.request.params.top_log_probs else None,
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached or 0,
            sample_index=self.index,
            prompt_log_probs=None if scores is None else [None, *scores.log_probs],
            prompt_top_log_probs=[[], *scores.top] if scores is not None and scores.num_top else None,
        )


# What a new token makes of a row, also in step.cpp: a stop id or its length ends it, its log-prob is NaN, or something
# looks at each of its tokens.
STOPPED, FULL, BROKEN, WATCHED = (np.uint8(1 << i) for i in range(4))


class Rows:
    """The state of up to R running sequences, [R] or [R, longest sequence]."""

    def __init__(self, num_rows: int, max_length: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.sequences: list[LiveSample | None] = [None] * num_rows
        self.tokens = np.empty((num_rows, max_length), np.int32)
        self.log_probs = np.empty((num_rows, max_length), np.float32)
        self.raw_log_probs = np.empty((num_rows, max_length), np.float32)
        self.num_prompt = np.zeros(num_rows, np.int64)
        self.num_tokens = np.zeros(num_rows, np.int64)
        self.num_computed = np.zeros(num_rows, np.int64)  # tokens with keys and values in the cache
        self.max_length = np.zeros(num_rows, np.int64)
        self.arrival = np.zeros(num_rows, np.int64)
        self.random_start = np.zeros(num_rows, np.uint64)
        self.stop_ids = np.full((num_rows, 1), -1, np.int64)  # filled up with -1
        self.watched = np.zeros(num_rows, bool)  # something looks at each token: stop strings, top log-probs
        self.tell_at = np.full(num_rows, np.inf)  # when a stream may be given tokens again, in time.monotonic's seconds
        self.temperature = np.ones(num_rows, np.float32)
        self.greedy = np.zeros(num_rows, bool)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.penalized = np.zeros(num_rows, bool)
        self.penalties = np.zeros((num_rows, 3), np.float32)  # repetition, presence, frequency
        self.biased = np.zeros(num_rows, bool)
        self.num_top = np.zeros(num_rows, np.int64)
        self.constrained = np.zeros(num_rows, bool)
        self.generation = 0  # counts changes of who owns which row

    def load(self, row: int, sequence: LiveSample) -> None:
        """Copy a sequence's state into its row."""
        params, count = sequence.request.params, len(sequence.tokens)
        sequence.row = row
        self.sequences[row] = sequence
        self.generation += 1
        self.tokens[row, :count] = sequence.tokens
        self.log_probs[row, sequence.num_prompt : count] = sequence.log_probs
        self.raw_log_probs[row, sequence.num_prompt : count] = sequence.raw_log_probs
        self.num_prompt[row] = sequence.num_prompt
        self.num_tokens[row] = count
        self.num_computed[row] = 0
        self.max_length[row] = sequence.max_length
        self.arrival[row] = sequence.arrival
        self.random_start[row] = sequence.random_start
        missing = len(sequence.stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(sequence.stop_ids)] = sequence.stop_ids
        self.watched[row] = sequence.stop_strings is not None or params.top_log_probs > 0
        self.tell_at[row] = 0 if sequence.request.streaming else np.inf
        self.temperature[row] = params.temperature or 1
        self.greedy[row] = params.greedy
        self.top_k[row] = params.top_k or self.vocab_size
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.penalized[row] = params.penalizes
        self.penalties[row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.biased[row] = bool(params.logit_bias)
        self.num_top[row] = params.top_log_probs
        self.constrained[row] = sequence.bound_text is not None

    def store(self, row: int) -> LiveSample:
        """Copy a row's state back into its sequence, which leaves the row."""
        sequence = self.sequences[row]
        assert sequence is not None
        sampled = slice(self.num_prompt[row], self.num_tokens[row])
        sequence.tokens = self.tokens[row, : self.num_tokens[row]].copy()
        sequence.log_probs = self.log_probs[row, sampled].copy()
        sequence.raw_log_probs = self.raw_log_probs[row, sampled].copy()
        sequence.row = -1
        self.sequences[row] = None
        self.tell_at[row] = np.inf
        return sequence

    def batch_params(self, rows: np.ndarray, device: torch.device) -> BatchParams:
        """The sampling parameters of ``rows`` [B] as the sampler takes them."""
        greedy, penalized = self.greedy[rows], self.penalized[rows]
        truncating = ~greedy & ((self.top_k[rows] < self.vocab_size) | (self.top_p[rows] < 1) | (self.min_p[rows] > 0))
        f, p, m = np.nonzero(truncating)[0], np.nonzero(penalized)[0], np.nonzero(self.constrained[rows])[0]

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        temperature = self.temperature[rows]
        return BatchParams(
            temperature=None if (temperature == 1).all() else tensor(temperature[:, None]),
            greedy=tensor(greedy) if greedy.any() else None,
            all_greedy=bool(greedy.all()),
            truncating=tensor(f) if len(f) else None,
            top_k=tensor(self.top_k[rows[f], None]),
            top_p=tensor(self.top_p[rows[f], None]),
            min_p=tensor(self.min_p[rows[f], None]),
            penalized=tensor(p) if len(p) else None,
            penalties=tensor(self.penalties[rows[p]]),
            bias=self._bias(rows, device),
            num_top=int(self.num_top[rows].max(initial=0)),
            constrained=tensor(m) if len(m) else None,
        )

    def token_masks(self, rows: np.ndarray) -> TokenMasks | None:
        """What the grammars say of those of ``rows`` that have one; None if none has."""
        texts = [self.sequences[row].bound_text for row in rows[self.constrained[rows]]]  # type: ignore[union-attr]
        return TokenMasks(texts, self.vocab_size) if texts else None  # type: ignore[arg-type]

    def _bias(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        entries = [
            (int(i), token, bias)
            for i in np.nonzero(self.biased[rows])[0]
            for token, bias in self.sequences[rows[i]].request.params.logit_bias.items()  # type: ignore[union-attr]
        ]
        if not entries:
            return None
        where, ids, values = zip(*entries, strict=True)
        biases = torch.tensor(values, dtype=torch.float32, device=device)
        return torch.tensor(where, device=device), torch.tensor(ids, device=device), biases
