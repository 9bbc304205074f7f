"""Which sequences run, what each step computes, and what happens to what it sampled.

A sequence's life: waiting -> (admitted: it owns a row and pages) prefilling or following -> decoding -> done. A
preempted sequence goes back to waiting with all that it sampled; its pages go, its text does not. One that finds its
own prompt being prefilled follows that row and forks it, so that the samples of a prompt cost one prefill; one that
finds a longer part of its prompt being prefilled than is cached waits for it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from rollouts.inference.kv_cache import PAGE_SIZE, KVCache
from rollouts.inference.prefix_tree import common_prefix
from rollouts.inference.sequences import BROKEN, FULL, STOPPED, WATCHED, LiveSample, PromptScores, Rows


@dataclass(frozen=True)
class Plan:
    """One step: every decoding row computes a token, then each chunk (row, start, end) a part of a prompt.

    ``sampling`` [B] are the rows that get a token; ``outputs`` [B, then all scored] says which of the step's tokens
    give logits. ``scored`` are prompt tokens whose own log-probs are wanted: where among the outputs those logits lie
    that come from tokens [start, end) of a row.
    """

    decoding: np.ndarray  # [D]
    chunks: list[tuple[int, int, int]]
    sampling: np.ndarray
    outputs: np.ndarray
    scored: list[tuple[slice, tuple[int, int, int]]]


# Logits that a step computes for prompt tokens at most: 128 MB in float32.
_SCORED_LOGITS = 1 << 25


class Scheduler:
    """First come, first served; when pages run out the latest comers wait again.

    Args:
        step_tokens: tokens that one step computes at most, so that a long prompt does not stall those that decode.
    """

    def __init__(self, rows: Rows, cache: KVCache, step_tokens: int) -> None:
        self.rows = rows
        self.cache = cache
        self.waiting: deque[LiveSample] = deque()
        self.prefilling: list[int] = []  # rows in order of admission
        self.decoding = np.empty(0, np.int64)  # rows
        self.weight_version = 0
        self.num_prefilled = 0  # prompt tokens computed so far
        self.num_sampled = 0
        self._decoding_plan: Plan | None = None  # kept while the same rows decode and nothing else happens
        self.num_preemptions = 0
        self._step_tokens = step_tokens
        self._followers: dict[int, list[LiveSample]] = {}  # by their leader's row
        self._by_first_page: dict[bytes, list[int]] = {}  # prefilling rows by the tokens that they begin with
        self._free_rows = list(range(len(rows.sequences) - 1, -1, -1))

    @property
    def num_running(self) -> int:
        return len(self.rows.sequences) - len(self._free_rows)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.num_running

    def plan(self, admit_new: bool = True) -> Plan | None:
        """Admit who fits and say what the next step computes; None if there is nothing to do.

        ``admit_new=False`` lets only those in that have sampled tokens already.
        """
        self._make_room()
        self._admit(admit_new)
        if not self.prefilling and len(self.decoding):
            if self._decoding_plan is None or self._decoding_plan.decoding is not self.decoding:
                self._decoding_plan = Plan(self.decoding, [], self.decoding, np.arange(len(self.decoding)), [])
            return self._decoding_plan
        budget = max(self._step_tokens - len(self.decoding), PAGE_SIZE)
        score_budget = max(_SCORED_LOGITS // self.rows.vocab_size, 1)
        chunks, finishing, outputs, scored = [], [], [], []
        total = len(self.decoding)
        for row in self.prefilling:
            if budget == 0:
                break
            start, end = int(self.rows.num_computed[row]), int(self.rows.num_tokens[row])
            length = min(end - start, budget)
            scores = self._scores(row)
            if scores is not None:
                length = min(length, score_budget)
                if length == 0:
                    continue
                score_budget -= length
                first, last = max(start, len(scores.log_probs)), min(start + length, scores.num_wanted)
                if first < last:
                    scored.append((total + first - start, (row, first, last)))
            budget -= length
            total += length
            chunks.append((row, start, start + length))
            if start + length == end:
                group = [row, *(follower.row for follower in self._followers.get(row, ()))]
                finishing += group
                outputs += [total - 1] * len(group)
        if not total:
            return None
        sampling = np.concatenate((self.decoding, np.array(finishing, np.int64)))
        places, count = [], len(sampling)
        for _, (_, first, last) in scored:
            places.append(slice(count, count + last - first))
            count += last - first
        return Plan(
            self.decoding,
            chunks,
            sampling,
            np.concatenate(
                (
                    np.arange(len(self.decoding)),
                    np.array(outputs, np.int64),
                    *(np.arange(token, token + last - first) for token, (_, first, last) in scored),
                )
            ),
            list(zip(places, (part for _, part in scored), strict=True)),
        )

    def computed(self, plan: Plan) -> np.ndarray:
        """Note that the step's keys and values are in the cache; gives a mask [B] of the rows that may go on.

        Rows whose prefill is complete start to decode, and their followers fork them; a follower for which no page is
        left goes back to waiting, without its token.
        """
        rows = self.rows
        rows.num_computed[plan.decoding] += 1
        keep = np.ones(len(plan.sampling), bool)
        place = len(plan.decoding)
        for row, start, end in plan.chunks:
            self.num_prefilled += end - start
            rows.num_computed[row] = end
            self.cache.share(row, rows.tokens[row, :end])
            if end < rows.num_tokens[row]:
                continue
            place += 1
            for follower in self._end_prefill(row):
                if self.cache.fork_row(follower.row, row, end):
                    rows.num_computed[follower.row] = end
                    if follower.num_cached is None:
                        follower.num_cached = end
                else:
                    keep[place] = False
                    self._leave(follower.row)
                    self.waiting.appendleft(follower)
                place += 1
        if plan.chunks:
            self.decoding = plan.sampling[keep]
        return keep

    def append(
        self, sampling: np.ndarray, token_ids: np.ndarray, log_probs: np.ndarray, raw_log_probs: np.ndarray
    ) -> np.ndarray:
        """Give each of ``sampling`` [B] its token; flags [B] of what that makes of it."""
        rows = self.rows
        ends = rows.num_tokens[sampling]
        rows.tokens[sampling, ends] = token_ids
        rows.log_probs[sampling, ends] = log_probs
        rows.raw_log_probs[sampling, ends] = raw_log_probs
        rows.num_tokens[sampling] = ends + 1
        self.num_sampled += len(sampling)
        stopped = (token_ids[:, None] == rows.stop_ids[sampling]).any(1)
        full = ends + 1 >= rows.max_length[sampling]
        return stopped * STOPPED | full * FULL | np.isnan(raw_log_probs) * BROKEN | rows.watched[sampling] * WATCHED

    def retire(self, row: int) -> LiveSample:
        """Take a sequence off its row; it is done, or will be put back into ``waiting``."""
        if row in self.prefilling:
            for follower in reversed(self._end_prefill(row)):
                self._leave(follower.row)
                self.waiting.appendleft(follower)
        else:
            self.decoding = self.decoding[self.decoding != row]
        return self._leave(row)

    def remove(self, sequence: LiveSample) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
        elif sequence.leader is not None:
            self._followers[sequence.leader.row].remove(sequence)
            sequence.leader = None
            self._leave(sequence.row)
        else:
            self.retire(sequence.row)

    def change_weights(self, version: int, retract: bool = False) -> None:
        """The weights are others from here on: forget cached text and begin half-computed prompts anew.

        Sequences that decode keep their keys and values, or with ``retract`` wait to have them computed anew.
        """
        self.weight_version = version
        if retract:
            for row in reversed(self.decoding.tolist()):
                self.waiting.appendleft(self.retire(row))
        self.cache.flush()
        for row in self.decoding.tolist():
            sequence = self.rows.sequences[row]
            assert sequence is not None
            sequence.note_version(version, int(self.rows.num_tokens[row] - self.rows.num_prompt[row]))
        for prefilling in reversed(self.prefilling.copy()):
            if (scores := self._scores(prefilling)) is not None:
                scores.clear()
            self.waiting.appendleft(self.retire(prefilling))

    def _leave(self, row: int) -> LiveSample:
        self.cache.close_row(row, self.rows.tokens[row, : self.rows.num_computed[row]])
        self._free_rows.append(row)
        return self.rows.store(row)

    def _make_room(self) -> None:
        """A page for every decoding row that has filled its last one; the latest comers pay if there is none."""
        rows, cache = self.rows, self.cache
        while True:
            full = self.decoding[rows.num_computed[self.decoding] == cache.num_held[self.decoding] * PAGE_SIZE]
            if len(full) <= cache.num_available:
                break
            running = np.concatenate((self.decoding, np.array(self.prefilling, np.int64)))
            latest = int(running[rows.arrival[running].argmax()])
            self.waiting.appendleft(self.retire(latest))
            self.num_preemptions += 1
        if len(full):
            cache.grow(full)

    def _admit(self, admit_new: bool) -> None:
        deferred: list[LiveSample] = []
        while self.waiting and self._free_rows:
            sequence = self.waiting[0]
            if not admit_new and not sequence.started:
                deferred.append(self.waiting.popleft())
                continue
            scores = sequence.request.scores
            wanted = scores is not None and not scores.complete
            if wanted:
                assert scores is not None
                leader, same = (self.rows.sequences[scores.row], True) if scores.row >= 0 else (None, False)
            else:
                leader, same = self._ahead(sequence.tokens)
            if leader is not None and not same:
                deferred.append(self.waiting.popleft())
                continue
            row = self._free_rows[-1]
            if leader is None:
                # Those that decode will soon need pages as well: leave them one each for every page's worth of steps.
                reserve = -(-len(self.decoding) // PAGE_SIZE)
                limit = len(scores.log_probs) if wanted and scores is not None else None
                known = self.cache.open_row(row, sequence.tokens, reserve, limit)
                if known is None:
                    break
                if sequence.num_cached is None:
                    sequence.num_cached = known
            self.waiting.popleft()
            self._free_rows.pop()
            self.rows.load(row, sequence)
            sequence.note_version(self.weight_version, len(sequence.tokens) - sequence.num_prompt)
            if leader is None:
                assert known is not None
                self.rows.num_computed[row] = known
                if wanted and scores is not None:
                    scores.row = row
                self._start_prefill(row)
            else:
                sequence.leader = leader
                self._followers.setdefault(leader.row, []).append(sequence)
        self.waiting.extendleft(reversed(deferred))

    def _ahead(self, tokens: np.ndarray) -> tuple[LiveSample | None, bool]:
        """Who is computing ``tokens`` or at least a page more of them than the cache knows, and whether all of them."""
        known = None
        for row in self._by_first_page.get(tokens[:PAGE_SIZE].tobytes(), ()):
            other = self.rows.sequences[row]
            assert other is not None
            common = common_prefix(other.tokens, tokens)
            if common == len(tokens) == len(other.tokens):
                return other, True
            if known is None:
                known = self.cache.num_known(tokens)
            if common // PAGE_SIZE * PAGE_SIZE >= known + PAGE_SIZE:
                return other, False
        return None, False

    def _scores(self, row: int) -> PromptScores | None:
        """What the row, which prefills, must find out about its prompt."""
        sequence = self.rows.sequences[row]
        assert sequence is not None
        scores = sequence.request.scores
        return scores if scores is not None and scores.row == row else None

    def _start_prefill(self, row: int) -> None:
        self.prefilling.append(row)
        sequence = self.rows.sequences[row]
        assert sequence is not None
        self._by_first_page.setdefault(sequence.tokens[:PAGE_SIZE].tobytes(), []).append(row)

    def _end_prefill(self, row: int) -> list[LiveSample]:
        """The row's prompt is computed, or never will be; gives its followers."""
        self.prefilling.remove(row)
        if (scores := self._scores(row)) is not None:
            scores.row = -1
        key = self.rows.tokens[row, : min(PAGE_SIZE, self.rows.num_tokens[row])].tobytes()
        self._by_first_page[key].remove(row)
        if not self._by_first_page[key]:
            del self._by_first_page[key]
        followers = self._followers.pop(row, [])
        for follower in followers:
            follower.leader = None
        return followers
