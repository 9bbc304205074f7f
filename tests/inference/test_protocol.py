"""The embedded engine is an ``InferenceEngine``: all of it awaited, under asyncio and trio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from plain import Held, plain_greedy, random_prompt
from transformers import PreTrainedModel

from rollouts.inference import EmbeddedEngine, SamplingParams, StopReason
from rollouts.inference.protocol import InferenceEngine

PROMPT = random_prompt(20)
LONG = SamplingParams(max_tokens=900, seed=0, ignore_eos=True, n=2)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


async def test_weights_from_a_folder(make_peaked_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    other = make_peaked_model(seed=1)
    other.save_pretrained(tmp_path)
    with EmbeddedEngine(make_peaked_model(seed=0), max_length=1024) as engine:
        assert isinstance(engine, InferenceEngine)
        before = await engine.get_weights_checksum()
        assert await engine.update_weights_from_checkpoint(tmp_path, version=7) == 7
        assert await engine.get_weight_version() == 7
        with EmbeddedEngine(other, max_length=64) as reference:
            assert await engine.get_weights_checksum() == reference.weights_checksum() != before
        (got,) = await engine.generate_group(PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        assert got.token_ids == plain_greedy(other, PROMPT, 8)


async def test_pause_continue_abort(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    with EmbeddedEngine(make_peaked_model(), max_length=1024) as engine:
        results = []

        async def generate() -> None:
            results.append(await engine.generate_group(PROMPT, LONG))

        held = Held(engine, lambda: engine.num_sampled_tokens < 6)
        with anyio.fail_after(120):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(generate)
                await anyio.to_thread.run_sync(held.wait)
                await engine.pause_generation()
                await engine.pause_generation()
                count = engine.num_sampled_tokens
                held.may_step = lambda: engine.num_sampled_tokens < count + 20
                await anyio.sleep(0.05)
                assert engine.num_sampled_tokens == count and not results
                await engine.continue_generation()
                while engine.num_sampled_tokens == count:
                    await anyio.sleep(0.001)
                assert await engine.is_healthy()
                await engine.abort_all()
        assert [sample.stop_reason for sample in results[0]] == [StopReason.ABORTED] * 2
    assert not await engine.is_healthy()
