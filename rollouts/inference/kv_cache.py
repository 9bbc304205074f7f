"""The keys and values of all sequences in preallocated pages, and who holds which page.

Pages of 16 tokens rather than one slot of full length a sequence: sequences share pages, a page is 3% of a 512-token
sequence, and the attention kernel reads pages where they lie. Shapes: P pages, K key/value heads, d head width,
s tokens a page, R rows (sequences that run), M pages a row may have.
"""

from __future__ import annotations

import numpy as np
import torch

from rollouts.inference.native import use_huge_pages
from rollouts.inference.prefix_tree import Node, PrefixTree

PAGE_SIZE = 16


class KVCache:
    """Pages of every layer, the page table of every row, and the tree of shared pages.

    Keys lie as [P, K, d, s] and values as [P, K, s, d]: attention then multiplies 16 keys or a whole value at once and
    never sums across the lanes of a register.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        num_rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def pages(*shape: int) -> list[torch.Tensor]:
            made = [torch.empty(num_pages, num_kv_heads, *shape, dtype=dtype, device=device) for _ in range(num_layers)]
            for each in made:
                use_huge_pages(each)
            return [each.zero_() for each in made]

        self.keys = pages(head_dim, PAGE_SIZE)
        self.values = pages(PAGE_SIZE, head_dim)
        self.num_pages = num_pages
        self.tree = PrefixTree(PAGE_SIZE)
        self.page_table = np.zeros((num_rows, -(-max_length // PAGE_SIZE)), np.int32)  # [R, M]
        self.num_held = np.zeros(num_rows, np.int64)  # [R] pages of the row, shared ones first
        self._shared: list[list[Node]] = [[] for _ in range(num_rows)]
        self._detached = np.zeros(num_rows, bool)  # [R] rows whose keys and values are of weights since replaced
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = num_pages

    @property
    def num_available(self) -> int:
        """Pages that can be taken now: free ones and those that only the tree remembers."""
        return self._num_free + self.tree.num_idle

    def num_known(self, tokens: np.ndarray) -> int:
        """How many first tokens ``open_row`` would find."""
        path, _, common = self.tree.match(tokens[:-1])
        return len(path) * PAGE_SIZE + common

    def open_row(self, row: int, tokens: np.ndarray, reserve: int = 0, limit: int | None = None) -> int | None:
        """Give ``row`` the pages for ``tokens``, with as many keys and values as are known; how many, or None if
        fewer than ``reserve`` pages would be left. The last token never counts as known: its logits are needed, and so
        are those of all tokens from ``limit`` on."""
        path, partial, common = self.tree.match(tokens[:-1][:limit])
        self.tree.acquire(path)  # before pages are taken, which could evict them
        held = [] if partial is None else [partial]
        idle = [node for node in held if node.readers == 0]
        needed = -(-len(tokens) // PAGE_SIZE) - len(path)
        if needed + reserve > self.num_available - len(idle):
            self._return(self.tree.release(path))
            return None
        self.tree.acquire(held)
        self._shared[row] = path
        self._detached[row] = False
        self.num_held[row] = len(path) + needed
        self.page_table[row, : len(path)] = [node.block for node in path]
        self.page_table[row, len(path) : len(path) + needed] = self._take(needed)
        if partial is not None:
            self._copy_page(partial.block, self.page_table[row, len(path)])
            self._return(self.tree.release(held))
        return len(path) * PAGE_SIZE + common

    def fork_row(self, row: int, source: int, length: int) -> bool:
        """Give ``row`` the same ``length`` keys and values as ``source``, whole pages shared; False if pages lack.

        ``share`` must have run for ``source``, so that its whole pages are in the tree.
        """
        path = self._shared[source][: length // PAGE_SIZE]
        tail = length - len(path) * PAGE_SIZE
        needed = -(-tail // PAGE_SIZE)
        if needed > self.num_available:
            return False
        self.tree.acquire(path)
        self._shared[row] = list(path)
        self._detached[row] = self._detached[source]
        self.num_held[row] = len(path) + needed
        self.page_table[row, : len(path)] = self.page_table[source, : len(path)]
        own = self.page_table[row, len(path) : len(path) + needed] = self._take(needed)
        for page, new in zip(self.page_table[source, len(path) : len(path) + needed], own, strict=True):
            self._copy_page(page, new)
        return True

    def grow(self, rows: np.ndarray) -> None:
        """One more page for each of ``rows``; ``num_available`` must suffice."""
        self.page_table[rows, self.num_held[rows]] = self._take(len(rows))
        self.num_held[rows] += 1

    def share(self, row: int, tokens: np.ndarray) -> None:
        """Let others find the whole pages among ``tokens``, whose keys and values ``row`` has computed."""
        path = self._shared[row]
        while not self._detached[row] and (len(path) + 1) * PAGE_SIZE <= len(tokens):
            start = len(path) * PAGE_SIZE
            node = self.tree.insert(
                path, tokens[start : start + PAGE_SIZE].copy(), int(self.page_table[row, len(path)])
            )
            if node is None:
                break  # another row computed the same text at the same time: this row keeps its own pages
            path.append(node)

    def close_row(self, row: int, tokens: np.ndarray) -> None:
        """Give the row's pages back; the tree remembers ``tokens``, whose keys and values they hold."""
        self.share(row, tokens)
        path = self._shared[row]
        start = len(path) * PAGE_SIZE
        tail = tokens[start : start + PAGE_SIZE]
        if not self._detached[row] and len(tail):
            node = self.tree.insert(path, tail.copy(), int(self.page_table[row, len(path)]))
            if node is not None:
                path.append(node)
        self._return(self.page_table[row, len(path) : self.num_held[row]])
        self._return(self.tree.release(path))
        self._shared[row] = []
        self.num_held[row] = 0

    def flush(self) -> None:
        """Forget all shared text: what was computed under weights that are no more is never found again."""
        self._return(self.tree.flush())
        self._detached[:] = True

    def _take(self, count: int) -> np.ndarray:
        while self._num_free < count:
            self._return([self.tree.evict()])
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def _return(self, pages: np.ndarray | list[int]) -> None:
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def _copy_page(self, source: int, target: int) -> None:
        for pages in (*self.keys, *self.values):
            pages[target] = pages[source]
