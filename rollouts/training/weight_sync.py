"""New weights for every engine that samples: sent, then read back; an engine that fails is out until it has caught up.

    training loop                         WeightSyncManager
    -------------                         ---------------------------------------------------------------
    future = manager.sync(...)   ----->   queue: one sync at a time, in the order they were asked for
    (goes on, or awaits it)               all engines side by side: send, read version and checksum back
    await future                 <-----   the results, in the engines' order
                                          an engine failed: it is dropped; restart(engine) in the background,
    manager.engines                       then the newest weights, checked; only then is it among the engines again
    wait_for_engine()            <-----   (whoever finds none there waits for that)

`manager.engines` is what may sample now. `sync_weights_to_engines` is the same without memory: one call, no restarts.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc

from rollouts.errors import UserError
from rollouts.inference.engine import EmbeddedEngine
from rollouts.inference.protocol import InferenceEngine, UpdateMode
from rollouts.inference.sampling_params import SamplingParams
from rollouts.providers.errors import ProviderError
from rollouts.providers.http import run_all
from rollouts.training.remote_engines import RemoteEngine, RolloutsEngine, SGLangEngine, VLLMEngine, WeightSyncError
from rollouts.training.types import TrainFuture
from rollouts.training.weight_digests import compare_digests, read_weights
from rollouts.training.weight_push import named_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    Weights = str | Path | Mapping[str, torch.Tensor] | nn.Module | None

__all__ = [
    "Reference",
    "RolloutsEngine",
    "SGLangEngine",
    "SyncResult",
    "VLLMEngine",
    "WeightSyncError",
    "WeightSyncManager",
    "check_engine",
    "sync_weights_to_engines",
    "update_sglang_weights_from_disk",
    "update_vllm_weights_from_disk",
]

logger = logging.getLogger(__name__)

Reference = Callable[[Sequence[int]], Sequence[float]]
"""A trainer's own log-probs: token ids in, for each token its log-prob at temperature 1 given those before it (of the
first, anything)."""

PROBE_TOKENS = 16
RESTART_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each attempt to bring an engine back


@dataclass(frozen=True)
class SyncResult:
    """What became of one engine.

    Args:
        version: what it serves now, read back; None when it failed.
        coverage: share of the parameters whose bytes were compared with what was sent.
        gap: mean absolute difference between its log-probs and the reference's; None without a reference.
    """

    engine: InferenceEngine
    version: int | None
    coverage: float = 0.0
    gap: float | None = None
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


async def sync_weights_to_engines(
    engines: Sequence[InferenceEngine],
    ckpt_path: Weights,
    version: int | None = None,
    *,
    mode: UpdateMode = "drain",
    reference: Reference | None = None,
    tolerance: float = 0.05,
) -> list[SyncResult]:
    """Serve one set of weights on every engine, side by side, and read back that they do.

    Args:
        ckpt_path: a model's folder that every engine can read; or weights in memory; or None for engines that share
            them with the trainer.
        version: None = one more than the highest that any engine serves.
        reference, tolerance: also let each engine sample, and compare its log-probs with the trainer's own: the one
            check that sees everything, the engine's private copies of weights too.

    Returns:
        One result an engine, in their order.

    Raises:
        UserError: there are no engines.
        WeightSyncError: an engine failed, or serves something else; all were given the weights first.
    """
    if not engines:
        raise UserError("there are no engines to give weights to; pass at least one")
    if version is None:
        version = 1 + max(await _gather([engine.get_weight_version for engine in engines]))
    results = await _sync_all(engines, ckpt_path, version, mode, reference, tolerance)
    for result in results:
        if result.error is not None:
            raise WeightSyncError(f"{result.engine!r} does not serve version {version}: {result.error}") from (
                result.error
            )
    return results


async def check_engine(
    engine: InferenceEngine,
    version: int,
    weights: Weights = None,
    *,
    reference: Reference | None = None,
    tolerance: float = 0.05,
) -> tuple[float, float | None]:
    """Read an engine's version and checksum back, and compare them with what was sent.

    Returns:
        The share of parameters compared, and the log-prob gap (None without ``reference``).

    Raises:
        WeightSyncError: the engine serves something else.
    """
    found = await engine.get_weight_version()
    if found != version:
        raise WeightSyncError(f"it reports version {found} instead of {version}")
    coverage, differing = await _compare(engine, weights)
    if differing:
        raise WeightSyncError(
            f"{len(differing)} of its tensors are not those that were sent, for example {differing[0]}"
        )
    gap = None if reference is None else await _log_prob_gap(engine, reference)
    if gap is not None and not gap <= tolerance:
        raise WeightSyncError(
            f"its log-probs are {gap:.3g} off the trainer's on average, more than {tolerance}; its weights are others "
            "than they seem"
        )
    return coverage, gap


async def _compare(engine: InferenceEngine, weights: Weights) -> tuple[float, list[str]]:
    if weights is None:
        return 1.0, []  # one memory: there is nothing to differ
    if isinstance(engine, RemoteEngine):
        digests = await engine.get_weights_digests()
    elif isinstance(engine, EmbeddedEngine):
        digests = await anyio.to_thread.run_sync(engine.weights_digests)
    else:
        return 0.0, []
    return await anyio.to_thread.run_sync(lambda: compare_digests(digests, _tensors(weights)))


def _tensors(weights: Weights) -> Mapping[str, torch.Tensor]:
    if isinstance(weights, str | Path):
        return read_weights(weights)
    assert weights is not None
    return named_tensors(weights)


async def _log_prob_gap(engine: InferenceEngine, reference: Reference) -> float:
    """Mean |engine - trainer| over tokens that the engine samples from a prompt of a few low ids."""
    prompt = [5, 6, 7, 8]
    params = SamplingParams(max_tokens=PROBE_TOKENS, temperature=1.0, ignore_eos=True)
    (sample,) = await engine.generate_group(prompt, params)
    expected = await anyio.to_thread.run_sync(lambda: list(reference([*prompt, *sample.token_ids])))
    pairs = zip(sample.raw_log_probs, expected[len(prompt) :], strict=True)
    return sum(abs(a - b) for a, b in pairs) / max(len(sample.token_ids), 1)


async def _sync_one(
    engine: InferenceEngine,
    weights: Weights,
    version: int,
    mode: UpdateMode,
    reference: Reference | None,
    tolerance: float,
) -> SyncResult:
    try:
        if isinstance(weights, str | Path):
            await engine.update_weights_from_checkpoint(weights, version, mode)
        else:
            await engine.update_weights(weights, version, mode)
        coverage, gap = await check_engine(engine, version, weights, reference=reference, tolerance=tolerance)
    except (WeightSyncError, ProviderError, UserError, RuntimeError, OSError) as error:
        logger.warning("%r did not take the weights of version %d: %s", engine, version, error)
        return SyncResult(engine, None, error=error)
    if coverage < 1 and reference is None:
        logger.log(
            logging.INFO if coverage else logging.WARNING,
            "%r shows %.0f %% of its weights; give a reference to check the rest by log-probs", engine, 100 * coverage,
        )  # fmt: skip
    return SyncResult(engine, version, coverage, gap)


async def _sync_all(engines: Sequence[InferenceEngine], *arguments: Any) -> list[SyncResult]:
    return await _gather([partial(_sync_one, engine, *arguments) for engine in engines])


async def _gather(functions: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Their results, in order, computed side by side."""
    results: list[Any] = [None] * len(functions)

    async def one(i: int) -> None:
        results[i] = await functions[i]()

    await run_all([partial(one, i) for i in range(len(functions))])
    return results


@dataclass
class _Job:
    weights: Weights
    version: int
    mode: UpdateMode
    future: TrainFuture[list[SyncResult]]


class WeightSyncManager:
    """Keeps engines on the newest weights; use it as an asynchronous context manager.

    Args:
        engines: those to begin with; they serve ``version`` already.
        restart: ``await restart(engine)`` gives a running engine in place of one that failed, the same one or another;
            None: what fails stays out.
        prepare: ``prepare(weights, version)`` gives what the engines are sent of what ``sync`` is given: other tensors,
            or a folder. It runs in a thread, and what it gives must stay as it is until it is called again.
        version: of the weights that the engines have now.
        reference, tolerance: as in ``sync_weights_to_engines``.
        restart_delays: seconds before each attempt to bring an engine back; after the last it stays out.
    """

    def __init__(
        self,
        engines: Sequence[InferenceEngine],
        restart: Callable[[InferenceEngine], Awaitable[InferenceEngine]] | None = None,
        *,
        prepare: Callable[[Any, int], Weights] | None = None,
        version: int = 0,
        reference: Reference | None = None,
        tolerance: float = 0.05,
        restart_delays: Sequence[float] = RESTART_DELAYS,
    ) -> None:
        if not engines:
            raise UserError("there are no engines to give weights to; pass at least one")
        self.version = version
        self.num_restarts = 0
        self._slots: list[InferenceEngine | None] = list(engines)  # None: out
        self._restart = restart
        self._restart_delays = restart_delays
        self._check = (reference, tolerance)
        self._prepare = prepare
        self._returning: dict[int, InferenceEngine] = {}  # restarted, and waiting for the next sync
        self._restarting = 0
        self._changed = anyio.Event()  # an engine came back, or never will
        self._kept: Weights = None  # those of the current version, if they stay as they are
        self._why: Exception | None = None  # the last engine failed
        self._last = version  # asked for
        self._changing = anyio.Lock()  # one sync, or one engine that catches up, at a time
        self._scope: anyio.abc.TaskGroup | None = None
        self._send: Any = None
        self._jobs: deque[_Job] = deque()  # asked for, and not done yet

    @property
    def engines(self) -> list[InferenceEngine]:
        """Those that serve the current version, in their order."""
        return [engine for engine in self._slots if engine is not None]

    async def __aenter__(self) -> WeightSyncManager:
        self._send, receive = anyio.create_memory_object_stream[_Job](math.inf)
        self._scope = anyio.create_task_group()
        await self._scope.__aenter__()
        self._scope.start_soon(self._work, receive)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._scope is not None
        self._send.close()
        self._send = None
        self._scope.cancel_scope.cancel()
        try:
            # The group need not know of an error in the block, which it would wrap in a group.
            await self._scope.__aexit__(None, None, None)
        finally:
            while self._jobs:  # somebody may wait for them
                self._jobs.popleft().future.set_exception(RuntimeError("the manager was closed"))

    def sync(
        self, weights: Weights, version: int | None = None, mode: UpdateMode = "drain"
    ) -> TrainFuture[list[SyncResult]]:
        """Give every engine these weights; the future has one result an engine that was in, in their order.

        Syncs happen in the order of the calls. The future raises WeightSyncError when no engine took the weights and
        none that is restarted will be given them.

        Args:
            weights: as in ``sync_weights_to_engines``. Those in memory must stay as they are until the future is done.
            version: None = one more than the last.
        """
        if self._send is None:
            raise RuntimeError("the manager is not entered; use it in `async with`")
        self._last = self._last + 1 if version is None else version
        job = _Job(weights, self._last, mode, TrainFuture("sync_weights"))
        self._jobs.append(job)
        self._send.send_nowait(job)
        return job.future

    async def drop(self, engine: InferenceEngine, error: Exception | None = None) -> None:
        """Take an engine out that failed while it sampled; it is restarted and caught up like any other."""
        async with self._changing:
            if engine in self._slots:
                self._why = error or self._why
                self._drop(self._slots.index(engine))

    async def wait_for_engine(self) -> None:
        """Until there is an engine that serves the current version. Raises WeightSyncError: none will come back."""
        while not self.engines:
            if not self._restarting and not self._returning:
                why = f" (the last one: {self._why})" if self._why else ""
                raise WeightSyncError(f"no engine is left{why}; start the servers again and resume the run")
            await self._changed.wait()

    async def _work(self, jobs: Any) -> None:
        async for job in jobs:
            try:
                while not self.engines and not self._returning and self._restarting:
                    await self._changed.wait()
                async with self._changing:
                    results = await self._sync(job)
            except Exception as error:
                self._jobs.popleft().future.set_exception(error)
            else:
                self._jobs.popleft().future.set_result(results)

    async def _sync(self, job: _Job) -> list[SyncResult]:
        weights: Weights = job.weights
        if self._prepare is not None:
            weights = await anyio.to_thread.run_sync(self._prepare, weights, job.version)
        members = {i: engine for i, engine in enumerate(self._slots) if engine is not None} | self._returning
        places = sorted(members)
        results = await _sync_all([members[i] for i in places], weights, job.version, job.mode, *self._check)
        self._returning = {}  # not before: whoever needs an engine meanwhile waits for those
        # From here on this is what an engine must serve, whether all could take it or not.
        self.version = job.version
        self._kept = weights if self._prepare is not None or isinstance(weights, str | Path) else None
        for place, result in zip(places, results, strict=True):
            self._slots[place] = result.engine
            if not result.ok:
                self._drop(place)
            self._why = result.error or self._why
        self._notify()
        if not self.engines and not (self._restarting and self._kept is not None):
            raise WeightSyncError(
                f"no engine serves version {job.version}: {self._why or 'none is left'}"
            ) from self._why
        return results

    def _drop(self, place: int) -> None:
        engine, self._slots[place] = self._slots[place], None
        logger.warning("%r is out until it serves version %d", engine, self.version)
        if self._restart is not None and self._scope is not None and engine is not None:
            self._restarting += 1
            self._scope.start_soon(self._bring_back, place, engine)

    async def _bring_back(self, place: int, engine: InferenceEngine) -> None:
        try:
            await self._restart_until_it_serves(place, engine)
        finally:
            self._restarting -= 1
            self._notify()

    async def _restart_until_it_serves(self, place: int, engine: InferenceEngine) -> None:
        """Restart an engine and give it the newest weights, again and again if need be."""
        assert self._restart is not None
        for delay in self._restart_delays:
            await anyio.sleep(delay)
            try:
                engine = await self._restart(engine)
                self.num_restarts += 1
                if await self._catch_up(place, engine):
                    return
            except Exception as error:  # a restart may fail in any way; the next attempt may not
                logger.warning("%r did not come back: %s", engine, error)
        logger.error("%r stays out after %d attempts", engine, len(self._restart_delays))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _catch_up(self, place: int, engine: InferenceEngine) -> bool:
        async with self._changing:
            if self._kept is None:
                self._returning[place] = engine
                return True
            # Without the reference: the trainer may have gone on from these weights meanwhile.
            result = await _sync_one(engine, self._kept, self.version, "abort", None, self._check[1])
            self._why = result.error or self._why
            if result.ok:
                self._slots[place] = engine
                logger.info("%r serves version %d again", engine, self.version)
            return result.ok


async def update_sglang_weights_from_disk(
    base_url: str, ckpt_path: str | Path, version: int | None = None, timeout: float = 600.0
) -> SyncResult:
    """Let one SGLang server load a folder. Raises WeightSyncError."""
    engine = SGLangEngine(base_url, timeout=timeout)
    return (await sync_weights_to_engines([engine], ckpt_path, version))[0]


async def update_vllm_weights_from_disk(
    base_url: str, ckpt_path: str | Path, version: int | None = None, timeout: float = 600.0
) -> SyncResult:
    """Let one vLLM server load a folder. Raises WeightSyncError."""
    engine = VLLMEngine(base_url, timeout=timeout)
    return (await sync_weights_to_engines([engine], ckpt_path, version))[0]
