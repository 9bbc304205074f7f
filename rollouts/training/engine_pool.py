"""Several engines as one sampler: a request goes to the engine with the least to do, and past one that fails.

generate_group         the engine of fewest samples in flight
  answered    ----->   its samples
  refused     ----->   UserError, as it came: another engine would refuse it as well
  failed      ----->   still healthy: ProviderError, for the caller to ask again later
                       else: WeightSyncManager.drop(engine), and the request goes to another one
  none left   ----->   waits for one that is restarted and has the newest weights
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rollouts.errors import UserError
from rollouts.inference.protocol import InferenceEngine
from rollouts.inference.sampling_params import SamplingParams
from rollouts.providers.errors import ProviderError
from rollouts.providers.http import run_all

if TYPE_CHECKING:
    from rollouts.inference.completion import Completion
    from rollouts.training.weight_sync import WeightSyncManager


class EnginePool:
    """Samples with the engines that a ``WeightSyncManager`` keeps on the newest weights."""

    def __init__(self, manager: WeightSyncManager) -> None:
        self.manager = manager
        self._in_flight: Counter[InferenceEngine] = Counter()  # samples

    async def generate_group(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> list[Completion]:
        """The samples of one prompt, all by one engine, which computes the prompt once.

        Raises:
            UserError: an engine refuses the request.
            ProviderError: an engine that is healthy failed.
            WeightSyncError: no engine is left.
        """
        params = params or SamplingParams()
        while True:
            await self.manager.wait_for_engine()
            engine = min(self.manager.engines, key=lambda e: self._in_flight[e])
            self._in_flight[engine] += params.n
            try:
                return await engine.generate_group(prompt_ids, params)
            except ProviderError as error:
                if isinstance(error, UserError) or await engine.is_healthy():
                    raise
                await self.manager.drop(engine, error)
            finally:
                self._in_flight[engine] -= params.n

    async def get_weight_version(self) -> int:
        """The version that every engine serves, or is given before it samples."""
        return self.manager.version

    async def abort_all(self) -> None:
        """End what is in flight on every engine, with what it has."""
        await run_all([partial(_abort, engine) for engine in self.manager.engines])


async def _abort(engine: InferenceEngine) -> None:
    try:
        await engine.abort_all()
    except ProviderError:
        if await engine.is_healthy():
            raise  # one that is dead samples nothing any more
