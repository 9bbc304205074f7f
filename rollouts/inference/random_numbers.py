"""Random numbers as a pure function of (seed, position), so that no request depends on its company.

SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195): output i is a bijective mix of
``start + i * gamma``; hashing the seed first keeps the streams of seeds 0, 1, 2, ... apart.
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64 of any shape (wraps around on overflow)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_start(seed: int, stream: int = 0) -> np.uint64:
    """Where the random numbers of sample ``stream`` of a request with ``seed`` begin."""
    keys = np.array([seed, stream], dtype=np.uint64)
    hashed = mix64(keys[:1] + _GAMMA) + mix64(keys[1:] * _GAMMA)
    return mix64(hashed)[0]


def uniforms(starts: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each row: float32 with 24 random bits, from uint64 starts and int positions [B]."""
    bits = mix64(starts + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
