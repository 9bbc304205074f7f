"""Sampling seeds as a pure function of what is sampled, so that no sample depends on who shares its batch."""

from __future__ import annotations

import hashlib


def sampling_seed(*key: object) -> int:
    """A seed in [0, 2**63) from the parts of ``key``: run seed, prompt, sample index, attempt.

    The upper bound is what every engine takes. Parts are told apart: ``("a", "bc")`` and ``("ab", "c")`` differ.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
