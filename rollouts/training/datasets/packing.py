"""Which samples share a row of a packed batch: best fit, decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit_bins(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group items into bins so that few bins are needed and each holds at most ``capacity``.

    Items are taken from longest to shortest (equal ones in the given order); each goes where the least space is left
    that still holds it, else into a new bin. An item longer than ``capacity`` gets a bin of its own. Best fit
    decreasing needs at most 11/9 of the optimal number of bins, plus four (Johnson 1973).

    >>> best_fit_bins([3, 7, 5, 4], 10)
    [[1, 0], [2, 3]]

    Returns:
        Item indices per bin. The same input always gives the same bins. O(n log n).
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or (sizes < 1).any():
        raise ValueError(f"capacity and all lengths must be at least 1, got capacity {capacity}")
    bins: list[list[int]] = []
    spaces: list[int] = []  # the different spaces left in open bins, ascending
    open_bins: dict[int, list[int]] = {}  # space left -> bins with that much
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        at = bisect_left(spaces, size)
        if at < len(spaces):
            space = spaces[at]
            chosen = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space]
                spaces.pop(at)
            bins[chosen].append(item)
        else:
            space, chosen = capacity, len(bins)
            bins.append([item])
        left = space - size
        if left > 0:
            if left not in open_bins:
                open_bins[left] = []
                insort(spaces, left)
            open_bins[left].append(chosen)
    return bins
