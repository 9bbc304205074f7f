"""Which cache blocks hold which text: a tree of blocks that sequences with a common beginning share.

A node is one block of the cache and the tokens whose keys and values it holds; its path from the root is everything
that those depend on. Nodes are counted by the sequences that read them. A node that nobody reads stays until its block
is needed: the one unused for longest goes first, children before their parents.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

import numpy as np


@dataclass(eq=False)
class Node:
    """A block of tokens below ``parent``; only leaves may hold fewer tokens than a block has room for."""

    block: int
    tokens: np.ndarray  # int32
    parent: Node | None
    readers: int = 0
    attached: bool = True  # False once flushed: nobody new finds it, and its block is free after the last reader
    children: dict[bytes, Node] = field(default_factory=dict)  # by their tokens


class PrefixTree:
    """Blocks by the text that they hold. Lookup costs one comparison a block and touches no tensor."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._root = Node(-1, np.empty(0, np.int32), None)
        self._idle: OrderedDict[Node, None] = OrderedDict()  # nodes without readers, longest unused first

    @property
    def num_idle(self) -> int:
        """Blocks that ``evict`` can give back now."""
        return len(self._idle)

    def match(self, tokens: np.ndarray) -> tuple[list[Node], Node | None, int]:
        """The longest known beginning of ``tokens``: whole blocks, then a node that shares the next m tokens, and m."""
        path: list[Node] = []
        node, start = self._root, 0
        while start < len(tokens):
            rest = tokens[start : start + self.block_size]
            child = node.children.get(rest.tobytes()) if len(rest) == self.block_size else None
            if child is None:
                return path, *_closest(node, rest)
            path.append(child)
            node, start = child, start + self.block_size
        return path, None, 0

    def acquire(self, nodes: list[Node]) -> None:
        """Count one more reader of each."""
        for node in nodes:
            if node.readers == 0:
                del self._idle[node]
            node.readers += 1

    def release(self, nodes: list[Node]) -> list[int]:
        """Count one reader less of each node of a path; gives the blocks that are free now."""
        freed = []
        for node in reversed(nodes):
            node.readers -= 1
            if node.readers == 0:
                if node.attached:
                    self._idle[node] = None
                else:
                    freed.append(node.block)
        return freed

    def insert(self, path: list[Node], tokens: np.ndarray, block: int) -> Node | None:
        """Add ``block``, read by the caller, below ``path``; None if the tree has those tokens in another block."""
        parent = path[-1] if path else self._root
        key = tokens.tobytes()
        if key in parent.children or (len(tokens) < self.block_size and _closest(parent, tokens)[1] == len(tokens)):
            return None
        node = parent.children[key] = Node(block, tokens, parent, readers=1)
        return node

    def evict(self) -> int:
        """Forget the node unused for longest and give its block back."""
        node, _ = self._idle.popitem(last=False)
        assert node.parent is not None
        del node.parent.children[node.tokens.tobytes()]
        return node.block

    def flush(self) -> list[int]:
        """Forget all text; gives the blocks that nobody reads. The others are freed by their last reader."""
        freed = [node.block for node in self._idle]
        self._idle.clear()
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            node.attached = False
            stack.extend(node.children.values())
        self._root.children.clear()
        return freed


def _closest(parent: Node, tokens: np.ndarray) -> tuple[Node | None, int]:
    """The child that shares most first tokens, and how many. Only the newest are asked: a root may have thousands."""
    best, most = None, 0
    for child in islice(reversed(parent.children.values()), 64):
        length = common_prefix(child.tokens, tokens)
        if length > most:
            best, most = child, length
    return best, most


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two sequences have in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
