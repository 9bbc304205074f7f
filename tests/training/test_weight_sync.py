"""New weights for embedded engines and our own servers: read back, in order; nobody serves who has not caught up."""

from __future__ import annotations

import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.errors import UserError
from rollouts.inference import Completion, EmbeddedEngine, SamplingParams, StopReason
from rollouts.inference.protocol import InferenceEngine, PauseMode
from rollouts.providers import ProviderError
from rollouts.training import remote_engines
from rollouts.training.weight_digests import compare_digests, digest
from rollouts.training.weight_push import buckets, named_tensors
from rollouts.training.weight_sync import (
    SGLangEngine,
    VLLMEngine,
    WeightSyncError,
    WeightSyncManager,
    check_engine,
    sync_weights_to_engines,
    update_sglang_weights_from_disk,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from running_server import Running, running

pytestmark = pytest.mark.anyio

PROMPT = [20 + i % 40 for i in range(50)]
SHORT = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
Models = dict[str, PreTrainedModel]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(make_tiny_model: Callable[..., PreTrainedModel]) -> Models:
    return {name: make_tiny_model(seed=seed, initializer_range=0.2) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def folders(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def servers(folders: dict[str, Path], tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Running]]:
    """Two of our own servers, over HTTP."""
    with ExitStack() as stack:
        yield [stack.enter_context(running(folders["a"], tiny_tokenizer)) for _ in range(2)]


@pytest.fixture
def engines(
    make_tiny_model: Callable[..., PreTrainedModel], servers: list[Running], folders: dict[str, Path]
) -> Iterator[list[Any]]:
    """An embedded engine between two remote ones, all with model ``a`` as version 0."""
    with EmbeddedEngine(make_tiny_model(seed=0, initializer_range=0.2), max_length=1024) as embedded:
        for server in servers:
            server.served.updates.from_folder(str(folders["a"]), 0, True)
        remote = [SGLangEngine(server.url, "tiny", timeout=120) for server in servers]
        yield [remote[0], embedded, remote[1]]


def log_probs(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """transformers' own: of each token given those before it; the first has none."""
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([list(ids)])).logits[0, :-1], dim=-1)
    return [0.0, *table.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].tolist()]


async def assert_serves(engine: InferenceEngine, model: PreTrainedModel) -> None:
    (sample,) = await engine.generate_group(PROMPT, SHORT)
    expected = log_probs(model, [*PROMPT, *sample.token_ids])[len(PROMPT) :]
    assert sample.log_probs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("source", ["disk", "memory"])
@pytest.mark.parametrize("mode", ["drain", "continue", "abort"])
async def test_every_engine_serves_the_new_weights(
    engines: list[Any], models: Models, folders: dict[str, Path], source: str, mode: str
) -> None:
    for engine in engines:
        assert isinstance(engine, InferenceEngine)
        await assert_serves(engine, models["a"])
    given: Any = folders["b"] if source == "disk" else models["b"]
    results = await sync_weights_to_engines(
        engines,
        given,
        mode=mode,
        reference=partial(log_probs, models["b"]),
        tolerance=1e-4,  # type: ignore[arg-type]
    )
    assert [result.engine for result in results] == engines
    assert [(result.version, result.coverage) for result in results] == [(1, 1.0)] * 3
    checksums = {await engine.get_weights_checksum() for engine in engines}
    assert len(checksums) == 1
    for engine in engines:
        await assert_serves(engine, models["b"])  # the prompt was cached under the old weights


async def test_a_mismatch_raises(engines: list[Any], models: Models, folders: dict[str, Path]) -> None:
    await sync_weights_to_engines(engines, folders["b"], 4)
    for engine in engines:
        assert await check_engine(engine, 4, models["b"]) == (1.0, None)
        with pytest.raises(WeightSyncError, match="version 4 instead of 5"):
            await check_engine(engine, 5, models["b"])
        with pytest.raises(WeightSyncError, match="not those that were sent"):
            await check_engine(engine, 4, folders["a"])
        with pytest.raises(WeightSyncError, match="off the trainer's"):
            await check_engine(engine, 4, models["b"], reference=partial(log_probs, models["a"]))


async def test_one_wrong_number_is_seen(models: Models) -> None:
    state = {name: tensor.clone() for name, tensor in named_tensors(models["b"]).items()}
    reported = {name: digest(tensor)[:16] for name, tensor in state.items()}
    q, k, v = (state[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    for part in "qkv":
        del reported[f"model.layers.0.self_attn.{part}_proj.weight"]
    reported["model.layers.0.self_attn.qkv_proj.weight"] = digest(torch.cat([q, k, v]))
    assert compare_digests(reported, state) == (1.0, [])
    embedding = {"lm_head.weight": state["model.embed_tokens.weight"]}  # one tensor by two names
    assert compare_digests({n: d for n, d in reported.items() if n not in embedding}, state | embedding) == (1.0, [])
    half = {name: digest(tensor.bfloat16()) for name, tensor in state.items()}
    assert compare_digests(half, state) == (1.0, [])  # an engine that keeps them in bfloat16
    state["model.layers.0.self_attn.k_proj.weight"].view(torch.int32)[0, 0] ^= 1
    assert compare_digests(reported, state)[1] == ["model.layers.0.self_attn.qkv_proj.weight"]
    hidden = {name: digest(torch.empty(0)) for name in reported}  # packed away: nothing can be said
    assert compare_digests(hidden, state) == (0.0, [])


def test_buckets_hold_everything_once(models: Models) -> None:
    tensors = named_tensors(models["a"])
    assert "lm_head.weight" not in tensors  # tied
    parts = list(buckets(tensors, 20_000))
    assert len(parts) > 2 and [name for part in parts for name in part] == list(tensors)
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= 20_000 for part in parts)


async def test_engines_that_are_no_engines(folders: dict[str, Path], engines: list[Any], models: Models) -> None:
    with pytest.raises(UserError, match="no engines"):
        await sync_weights_to_engines([], folders["b"])
    dead = SGLangEngine("http://127.0.0.1:9", timeout=2)
    assert not await dead.is_healthy()
    with pytest.raises(WeightSyncError, match=r"127\.0\.0\.1:9"):
        await sync_weights_to_engines([engines[0], dead, engines[1]], folders["b"], 6)
    for engine in engines[:2]:  # the others have the weights all the same
        assert await engine.get_weight_version() == 6
        await assert_serves(engine, models["b"])
    for bad, words in ((folders["b"] / "none", "is not a folder"), (None, "shares no memory")):
        with pytest.raises(WeightSyncError, match=words):
            await sync_weights_to_engines([engines[0]], bad, 7)
    adapted = {f"base_model.model.{name}": tensor for name, tensor in models["b"].named_parameters()}
    with pytest.raises(WeightSyncError, match="save the adapter"):
        await sync_weights_to_engines([engines[0]], adapted, 7)
    assert await engines[0].is_healthy()
    assert VLLMEngine().base_url.endswith(":8000") and SGLangEngine().base_url.endswith(":30000")


async def test_one_server_by_one_call(servers: list[Running], folders: dict[str, Path]) -> None:
    assert (await update_sglang_weights_from_disk(servers[0].url, folders["c"], 30)).version == 30


class Hold:
    """Stops an engine of this process after some steps; new weights and aborts still come in."""

    def __init__(self, engine: EmbeddedEngine, steps: int) -> None:
        self.reached, self._go, self._left = threading.Event(), threading.Event(), steps
        self._thread, self._step = engine._thread, engine._thread._step
        self._thread._step = self._held  # type: ignore[method-assign]

    def _held(self) -> None:
        if self._left == 0 and not self._go.is_set():
            self.reached.set()
            time.sleep(0.001)
            return
        self._left -= self._left > 0 and not self._thread.scheduler.idle
        self._step()

    def release(self) -> None:
        self._go.set()
        self._thread._step = self._step  # type: ignore[method-assign]


async def test_what_is_in_flight(
    engines: list[Any], servers: list[Running], models: Models, folders: dict[str, Path]
) -> None:
    """drain: whole on the old weights; continue: on both, and the spans tell; abort: cut, with what there is."""
    params = SamplingParams(max_tokens=100, seed=2, n=4, ignore_eos=True)
    for engine, inner in ((engines[0], servers[0].served.engine), (engines[1], engines[1])):
        start = await engine.get_weight_version()
        for i, (mode, folder) in enumerate((("drain", "b"), ("continue", "a"), ("abort", "b"))):
            results: list[Completion] = []
            hold = Hold(inner, steps=20)

            async def generate(engine: Any = engine, results: list[Completion] = results) -> None:
                results.extend(await engine.generate_group(PROMPT, params))

            with anyio.fail_after(120):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(generate)
                    assert await anyio.to_thread.run_sync(hold.reached.wait, 120)
                    if mode == "drain":  # waits for what is in flight
                        tasks.start_soon(engine.update_weights_from_checkpoint, folders[folder], start + i + 1, mode)
                        await anyio.sleep(0.01)
                    else:
                        await engine.update_weights_from_checkpoint(folders[folder], start + i + 1, mode)
                    hold.release()
            versions = [(span.version, span.end) for span in results[0].weight_versions]
            if mode == "drain":
                assert versions == [(start, 100)]
            elif mode == "continue":
                [old, new] = versions
                assert old[0] == start + 1 and 0 < old[1] <= 20 and new == (start + 2, 100)
            else:
                assert results[0].stop_reason is StopReason.ABORTED and 0 < len(results[0].token_ids) <= 20


class Fragile:
    """An engine that stops working when told, as a crashed server does; otherwise the one inside."""

    def __init__(self, inner: EmbeddedEngine) -> None:
        self.inner, self.broken, self.seen = inner, False, list[int | None]()

    def __getattr__(self, name: str) -> Any:
        if self.broken:
            raise RuntimeError("the engine has crashed")
        return getattr(self.inner, name)

    async def update_weights_from_checkpoint(self, folder: Any, version: int, mode: Any) -> int:
        if self.broken:
            raise RuntimeError("the engine has crashed")
        self.seen.append(version)
        return await self.inner.update_weights_from_checkpoint(folder, version, mode)


async def test_a_failed_engine_is_out_until_it_has_caught_up(
    make_tiny_model: Callable[..., PreTrainedModel], models: Models, folders: dict[str, Path]
) -> None:
    with ExitStack() as stack:
        inner = [
            stack.enter_context(EmbeddedEngine(make_tiny_model(initializer_range=0.2), max_length=256))
            for _ in range(3)
        ]
        first, second = inner[0], Fragile(inner[1])
        allowed = anyio.Event()
        restarts: list[InferenceEngine] = []

        async def restart(engine: InferenceEngine) -> InferenceEngine:
            restarts.append(engine)
            if len(restarts) == 1:
                raise RuntimeError("no machine is free")
            await allowed.wait()
            return inner[2]  # another one takes its place, with the first weights of all

        with anyio.fail_after(240):
            async with WeightSyncManager([first, second], restart, restart_delays=[0.01] * 5) as manager:  # type: ignore[list-item]
                assert [r.version for r in await manager.sync(folders["b"])] == [1, 1]
                assert manager.engines == [first, second]
                second.broken = True
                results = await manager.sync(folders["c"])
                assert [result.ok for result in results] == [True, False] and manager.engines == [first]
                await anyio.sleep(0.05)
                assert manager.engines == [first]
                futures = [manager.sync(folders[name]) for name in "abc"]  # meanwhile the trainer goes on
                assert [await future for future in futures] and manager.version == 5
                assert manager.engines == [first]
                allowed.set()
                while len(manager.engines) == 1:
                    for engine in manager.engines:
                        assert await engine.get_weight_version() == manager.version
                    await anyio.sleep(0.01)
                assert manager.engines == [first, inner[2]]  # in its predecessor's place
                assert await inner[2].get_weight_version() == 5
                await assert_serves(inner[2], models["c"])
                # Dropped while it sampled: the same way back.
                await manager.drop(first)
                assert manager.engines == [inner[2]]
                while len(manager.engines) == 1:
                    await anyio.sleep(0.01)


async def test_syncs_out_of_memory_wait_for_the_next(
    make_tiny_model: Callable[..., PreTrainedModel], models: Models
) -> None:
    """The trainer has changed its weights meanwhile: an engine that comes back must not be given a mixture."""
    with ExitStack() as stack:
        inner = [
            stack.enter_context(EmbeddedEngine(make_tiny_model(initializer_range=0.2), max_length=256))
            for _ in range(2)
        ]

        async def restart(engine: InferenceEngine) -> InferenceEngine:
            return engine

        with anyio.fail_after(240):
            async with WeightSyncManager(inner, restart, restart_delays=[0.01]) as manager:
                await manager.sync(models["b"])
                await manager.drop(inner[1])
                while not manager.num_restarts:
                    await anyio.sleep(0.01)
                await anyio.sleep(0.05)
                assert manager.engines == [inner[0]]
                assert [result.version for result in await manager.sync(models["c"])] == [2, 2]
                assert manager.engines == inner
                await assert_serves(inner[1], models["c"])


async def test_an_engine_that_is_given_weights_on_its_way_back_is_waited_for(
    make_tiny_model: Callable[..., PreTrainedModel], models: Models
) -> None:
    """It is the only one: a request that finds none there meanwhile must not take all for lost."""
    asked, allowed, found = anyio.Event(), anyio.Event(), anyio.Event()

    class Slow(Fragile):
        async def update_weights(self, weights: Any, version: int, mode: Any) -> int:
            if version == 2:
                asked.set()
                await allowed.wait()
            return await self.inner.update_weights(weights, version, mode)

    async def restart(engine: InferenceEngine) -> InferenceEngine:
        return engine

    async def wait(manager: WeightSyncManager) -> None:
        await manager.wait_for_engine()
        found.set()

    with EmbeddedEngine(make_tiny_model(initializer_range=0.2), max_length=256) as inner:
        engine = Slow(inner)
        with anyio.fail_after(240):
            async with WeightSyncManager([engine], restart, restart_delays=[0.01]) as manager:  # type: ignore[list-item]
                await manager.sync(models["b"])
                await manager.drop(engine)  # type: ignore[arg-type]
                future = manager.sync(models["c"])
                await asked.wait()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(wait, manager)
                    await anyio.wait_all_tasks_blocked()
                    assert not found.is_set()
                    allowed.set()
                assert [result.version for result in await future] == [2] and manager.engines == [engine]


async def test_what_was_asked_of_a_closed_manager_fails(folders: dict[str, Path], monkeypatch: Any) -> None:
    """The syncs that wait behind another too: nobody waits for them for ever."""
    monkeypatch.setattr(remote_engines, "HEALTH_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = SGLangEngine(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=3600)
        with anyio.fail_after(240):
            async with WeightSyncManager([engine]) as manager:
                futures = [manager.sync(folders["b"]) for _ in range(3)]
                await anyio.sleep(0.1)
        for future in futures:
            with pytest.raises(RuntimeError, match="closed"):
                future.wait(60)
        with pytest.raises(RuntimeError, match="not entered"):
            manager.sync(folders["b"])


async def test_no_engine_left_is_an_error(folders: dict[str, Path]) -> None:
    async with WeightSyncManager([SGLangEngine("http://127.0.0.1:9", timeout=1)]) as manager:
        with pytest.raises(WeightSyncError, match="no engine serves version 1"):
            await manager.sync(folders["b"])
        assert manager.engines == []
    with pytest.raises(UserError):
        WeightSyncManager([])


async def test_a_push_that_fails_leaves_its_group(servers: list[Running], models: Models) -> None:
    """torch keeps every group, with threads and sockets, that is not destroyed."""
    engine = SGLangEngine(servers[0].url, "tiny", timeout=60)
    groups = distributed_c10d._world.pg_map
    before = len(groups)
    await engine.update_weights(models["b"], 40)
    assert engine._group is not None and len(groups) == before + 1
    servers[0].post("/destroy_weights_update_group", group_name=engine._group.name)
    with pytest.raises(WeightSyncError):
        await engine.update_weights(models["c"], 41)
    assert len(groups) == before
    await engine.update_weights(models["c"], 42)  # in a new one
    await assert_serves(engine, models["c"])
    await engine.reconnect()
    assert len(groups) == before
    await engine.update_weights(models["b"], 43)
    at_the_server = servers[0].served.updates.groups._groups
    assert engine._group.name in at_the_server
    name = engine._group.name
    await engine.aclose()
    assert len(groups) == before and name not in at_the_server


class LosesAnAnswer(SGLangEngine):
    """As when the connection breaks: the server has paused, and its trainer does not know."""

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        await super().pause_generation(mode)
        raise ProviderError("the connection broke")


async def test_a_pause_that_fails_is_ended(servers: list[Running], folders: dict[str, Path]) -> None:
    with pytest.raises(WeightSyncError, match="the connection broke"):
        await LosesAnAnswer(servers[0].url, "tiny", timeout=60).update_weights_from_checkpoint(folders["a"], 50)
    assert not servers[0].served.paused


REFUSED_PUSH = """
import anyio
from rollouts.training.remote_engines import SGLangEngine
from rollouts.training.weight_push import WeightGroup

async def refuse():
    await anyio.sleep(0.1)
    raise ValueError("refused")

async def main():
    try:
        await SGLangEngine()._together(refuse, WeightGroup("127.0.0.1", 1, 3600).join)
    except ValueError as error:
        print(error)

anyio.run(main)
"""


def test_a_refused_push_does_not_hold_the_process() -> None:
    """Its thread still waits for the engine, and would for an hour."""
    done = subprocess.run([sys.executable, "-c", REFUSED_PUSH], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def _serve_for_a_while(folder: str, port: Any, tokenizer_folder: str) -> None:
    from transformers import AutoTokenizer

    with running(Path(folder), AutoTokenizer.from_pretrained(tokenizer_folder)) as server:
        port.put(server.url)
        time.sleep(600)


async def test_a_server_killed_in_a_push_takes_nobody_with_it(
    engines: list[Any], models: Models, folders: dict[str, Path], tiny_model_dir: Path
) -> None:
    """kill -9 of one server: the push to it ends, the others have the weights."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=_serve_for_a_while, args=(str(folders["a"]), queue, str(tiny_model_dir)))
    process.start()
    try:
        url = await anyio.to_thread.run_sync(lambda: queue.get(timeout=300))
        doomed = SGLangEngine(url, "tiny", timeout=60)
        with anyio.fail_after(240):
            async with WeightSyncManager([engines[0], doomed, engines[1]]) as manager:
                assert all(result.ok for result in await manager.sync(models["b"]))
                process.kill()
                results = await manager.sync(models["c"])
                assert [result.ok for result in results] == [True, False, True]
                assert manager.engines == [engines[0], engines[1]]
        await assert_serves(engines[0], models["c"])
    finally:
        process.kill()
        process.join()
