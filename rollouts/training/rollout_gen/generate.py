"""Batches of rollouts as a plain generator, for code that is not asynchronous."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from typing import Any

from anyio.from_thread import start_blocking_portal

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rollout_gen.config import RolloutConfig
from rollouts.training.rollout_gen.manager import AsyncRolloutManager
from rollouts.training.types import RolloutBatch


def generate_rollout_batches(
    data_buffer: DataBuffer[Any], config: RolloutConfig, **kwargs: Any
) -> Generator[RolloutBatch, None, None]:
    """Batches without end: ``for batch in generate_rollout_batches(data_buffer, config): train(batch)``.

    What ``AsyncRolloutManager`` does, for code that is not asynchronous: its event loop runs in a thread of its own,
    which ends when the generator is closed. Further keywords go to ``config.generate_fn``.
    """
    manager = AsyncRolloutManager(data_buffer, config, **kwargs)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(manager):
        while True:
            yield portal.call(manager.generate_batch)


class RolloutManager:
    """Deprecated: ``generate_rollout_batches`` iterated over. Use that, or ``AsyncRolloutManager``."""

    def __init__(self, data_buffer: DataBuffer[Any], config: RolloutConfig, **kwargs: Any) -> None:
        warnings.warn(
            "RolloutManager is deprecated: use generate_rollout_batches(data_buffer, config), a generator of batches, "
            "or AsyncRolloutManager for asynchronous generation",
            DeprecationWarning,
            stacklevel=2,
        )
        self._batches = generate_rollout_batches(data_buffer, config, **kwargs)

    def __iter__(self) -> Iterator[RolloutBatch]:
        return self._batches
