"""Pages are never lost, never owned twice, and hold what the tree says they hold."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollouts.inference.kv_cache import PAGE_SIZE, KVCache
from rollouts.inference.prefix_tree import common_prefix

NUM_PAGES, NUM_ROWS, MAX_LENGTH = 24, 5, 120
TEXTS = st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=100)


class CacheMachine(RuleBasedStateMachine):
    """Writes each row's tokens into the cache as its keys; whatever a row is given must already hold its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(1, 1, 1, NUM_PAGES, NUM_ROWS, MAX_LENGTH, torch.float32, torch.device("cpu"))
        self.texts: dict[int, np.ndarray] = {}
        self.epoch = 0
        self.written: dict[int, int] = {}  # row -> epoch of its keys

    def free_row(self) -> int:
        return min(set(range(NUM_ROWS)) - set(self.texts))

    def write(self, row: int, start: int, end: int) -> None:
        for position in range(start, end):
            page = self.cache.page_table[row, position // PAGE_SIZE]
            self.cache.keys[0][page, 0, 0, position % PAGE_SIZE] = self.texts[row][position] + 10 * self.epoch

    @precondition(lambda self: len(self.texts) < NUM_ROWS)
    @rule(text=TEXTS)
    def open(self, text: list[int]) -> None:
        row, tokens = self.free_row(), np.array(text, np.int32)
        before = self.cache.num_available
        known = self.cache.open_row(row, tokens)
        if known is None:
            assert self.cache.num_available == before
            assert -(-len(text) // PAGE_SIZE) > before
            return
        assert known < len(text)
        self.texts[row], self.written[row] = tokens, self.epoch
        self.write(row, known, len(text))
        self.cache.share(row, tokens)

    @precondition(lambda self: 0 < len(self.texts) < NUM_ROWS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source, row = data.draw(st.sampled_from(sorted(self.texts))), self.free_row()
        if self.cache.fork_row(row, source, len(self.texts[source])):
            self.texts[row], self.written[row] = self.texts[source].copy(), self.written[source]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), token=st.integers(1, 2))
    def append(self, data: st.DataObject, token: int) -> None:
        row = data.draw(st.sampled_from(sorted(self.texts)))
        length = len(self.texts[row])
        if length == MAX_LENGTH:
            return
        if length == self.cache.num_held[row] * PAGE_SIZE:
            if not self.cache.num_available:
                return
            self.cache.grow(np.array([row]))
        self.texts[row] = np.append(self.texts[row], np.int32(token))
        page = self.cache.page_table[row, length // PAGE_SIZE]
        self.cache.keys[0][page, 0, 0, length % PAGE_SIZE] = token + 10 * self.written[row]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.texts)))
        self.cache.close_row(row, self.texts.pop(row))
        del self.written[row]

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        self.epoch += 1

    @invariant()
    def rows_hold_their_own_text(self) -> None:
        for row, text in self.texts.items():
            pages = self.cache.page_table[row, : self.cache.num_held[row]]
            held = self.cache.keys[0][torch.from_numpy(pages), 0, 0].flatten()[: len(text)]
            assert held.tolist() == (text + 10 * self.written[row]).tolist()

    @invariant()
    def every_page_is_free_or_idle_or_held(self) -> None:
        held = {int(p) for row in self.texts for p in self.cache.page_table[row, : self.cache.num_held[row]]}
        assert len(held) + self.cache.num_available == NUM_PAGES


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_common_prefix() -> None:
    def common(a: list[int], b: list[int]) -> int:
        return common_prefix(np.array(a), np.array(b))

    assert [common([], [1]), common([1, 2], [1, 2, 3]), common([1, 2], [1, 3]), common([2], [1])] == [0, 2, 1, 0]


def test_the_text_unused_for_longest_goes_first() -> None:
    cache = KVCache(1, 1, 1, 6, 2, 96, torch.float32, torch.device("cpu"))
    texts = [np.full(2 * PAGE_SIZE, value, np.int32) for value in range(4)]
    for text in texts[:3]:
        cache.open_row(0, text)
        cache.close_row(0, text)
    assert [cache.num_known(text) for text in texts] == [31, 31, 31, 0]
    cache.open_row(0, texts[0])  # used again, so text 1 is the oldest now
    cache.close_row(0, texts[0])
    cache.open_row(0, texts[3])
    assert [cache.num_known(text) for text in texts[:3]] == [31, 0, 31]
