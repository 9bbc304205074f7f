"""A reward that ends the process it runs in; in a module of its own, because a worker imports what it runs."""

from __future__ import annotations

import os

from rollouts.training.types import Sample


def exits_for_the_first(sample: Sample) -> float:
    if sample.id.endswith("/0"):
        os._exit(0)
    return 1.0
