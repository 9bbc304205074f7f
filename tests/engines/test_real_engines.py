"""Real vLLM and SGLang servers: what they sample is what transformers computes, before and after new weights.

Each server starts once; its weights are put back to model ``a`` before every test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import anyio
import httpx
import pytest
import torch
from real_engines import sglang_server, vllm_server
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rollouts.errors import UserError
from rollouts.inference import Completion, SamplingParams, StopReason
from rollouts.inference.protocol import InferenceEngine, UpdateMode
from rollouts.models.lora import LoRAConfig, add_lora, save_lora
from rollouts.providers import (
    Endpoint,
    LogProbMode,
    Message,
    ProviderError,
    chat,
    connect,
    sample_tokens,
    stream_chat,
    stream_tokens,
)
from rollouts.training.remote_engines import RemoteEngine
from rollouts.training.weight_sync import (
    SGLangEngine,
    VLLMEngine,
    WeightSyncError,
    check_engine,
    sync_weights_to_engines,
    update_sglang_weights_from_disk,
    update_vllm_weights_from_disk,
)

pytestmark = [pytest.mark.engines, pytest.mark.anyio]

PROMPT = [20 + i % 60 for i in range(300)]  # two of vLLM's blocks: less is never found in its prefix cache
SHORT = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
ATTEMPTS = 8  # to reach a server while it samples
Models = dict[str, PreTrainedModel]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def models(make_tiny_model: Callable[..., PreTrainedModel]) -> Models:
    """Peaked float32 models whose log-probs differ by whole units; vLLM's CPU attention wants heads of 32."""
    make = partial(make_tiny_model, initializer_range=0.2, head_dim=32, max_position_embeddings=2048)
    return {name: make(seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def folders(
    models: Models, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine_models")
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def address(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[tuple[str, str]]:
    log = folders["a"].parent / f"{request.param}.log"
    if request.param == "vllm":
        with vllm_server(folders["a"], log, "--weight-transfer-config", '{"backend": "gloo"}') as url:
            yield "vllm", url
    else:
        with sglang_server(folders["a"], log) as url:
            yield "sglang", url


@pytest.fixture
async def engine(address: tuple[str, str], folders: dict[str, Path]) -> AsyncIterator[RemoteEngine]:
    """The server with model ``a`` as version 1."""
    kind, url = address
    made: RemoteEngine = VLLMEngine(url, timeout=60) if kind == "vllm" else SGLangEngine(url, timeout=60)
    await made.connect()
    await made.update_weights_from_checkpoint(folders["a"], 1, mode="abort")
    yield made


def log_probs(model: PreTrainedModel, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """transformers' own: for each token its log-prob given those before it; the first has none."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0].float()
    table = torch.log_softmax(logits[:-1] / temperature, dim=-1)
    return [0.0, *table.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].tolist()]


def assert_sampled_by(model: PreTrainedModel, sample: Completion, temperature: float = 1.0) -> None:
    expected = log_probs(model, [*PROMPT, *sample.token_ids], temperature)[len(PROMPT) :]
    torch.testing.assert_close(torch.tensor(sample.log_probs), torch.tensor(expected), atol=1e-4, rtol=0)


async def begun(engine: RemoteEngine) -> None:
    """Once this returns, what was asked for before has its first tokens: a later, short request has been answered."""
    await anyio.sleep(0.2)
    await sample_tokens(engine.endpoint, PROMPT, SamplingParams(max_tokens=1))


async def test_samples_are_what_transformers_computes(engine: RemoteEngine, models: Models) -> None:
    assert isinstance(engine, InferenceEngine)
    assert await engine.is_healthy()
    for temperature in (1.0, 0.5, 1.7):
        params = SamplingParams(max_tokens=12, temperature=temperature, n=3, ignore_eos=True)
        group = await engine.generate_group(PROMPT, params)
        assert [sample.sample_index for sample in group] == [0, 1, 2]
        for sample in group:
            assert len(sample.token_ids) == 12 and sample.stop_reason is StopReason.LENGTH
            assert [(s.version, s.start, s.end) for s in sample.weight_versions] == [(1, 0, 12)]
            assert_sampled_by(models["a"], sample, temperature)
    (greedy,) = await engine.generate_group(PROMPT, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(models["a"](torch.tensor([ids])).logits[0, -1].argmax()))
    assert greedy.token_ids == ids[len(PROMPT) :]
    assert_sampled_by(models["a"], greedy)


async def test_streams_and_stops(engine: RemoteEngine, models: Models) -> None:
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    (whole,) = await sample_tokens(engine.endpoint, PROMPT, greedy)
    chunks = [chunk async for chunk in stream_tokens(engine.endpoint, PROMPT, greedy)]
    last = chunks[-1].completion
    assert last is not None and last.token_ids == whole.token_ids == [t for c in chunks for t in c.token_ids]
    assert_sampled_by(models["a"], last)
    stop = whole.token_ids[5]
    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,))
    (stopped,) = await sample_tokens(engine.endpoint, PROMPT, params)
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert (stopped.stop_reason, stopped.stop_match) == (StopReason.STOP_TOKEN, stop)
    with pytest.raises(UserError):
        await sample_tokens(engine.endpoint, PROMPT * 100, SHORT)


async def test_chat(engine: RemoteEngine, tiny_tokenizer: PreTrainedTokenizerFast, models: Models) -> None:
    from dataclasses import replace

    endpoint = replace(engine.endpoint, max_tokens=8)
    messages = [Message("system", "Be brief."), Message("user", "Where is Anna?")]
    answer = await chat(endpoint, messages, with_tokens=True)
    rendered = [message.to_dict() for message in messages]
    prompt = tiny_tokenizer.apply_chat_template(rendered, add_generation_prompt=True, return_dict=False)
    assert answer.prompt_token_ids == prompt
    assert answer.token_ids and answer.usage.completion_tokens == len(answer.token_ids)
    assert answer.log_probs is not None
    expected = log_probs(models["a"], [*prompt, *answer.token_ids])[len(prompt) :]
    assert list(answer.log_probs) == pytest.approx(expected, abs=1e-4)
    chunks = [chunk async for chunk in stream_chat(endpoint, messages)]
    assert chunks[-1].kind == "done"
    if engine.provider == "vllm":  # which speaks Anthropic's language as well
        said = await chat(Endpoint("anthropic", "tiny", engine.base_url, max_tokens=8), messages)
        assert said.usage.prompt_tokens == len(prompt) and said.message.role == "assistant"
        pieces = [p async for p in stream_chat(Endpoint("anthropic", "tiny", engine.base_url, max_tokens=8), messages)]
        assert pieces[-1].kind == "done"


@pytest.mark.parametrize("source", ["disk", "gloo"])
@pytest.mark.parametrize("mode", ["drain", "continue", "abort"])
async def test_new_weights(
    engine: RemoteEngine, models: Models, folders: dict[str, Path], source: str, mode: str
) -> None:
    await engine.generate_group(PROMPT, SHORT)  # the prompt is in the prefix cache now
    before = await engine.get_weights_checksum()
    (result,) = await sync_weights_to_engines(
        [engine],
        folders["b"] if source == "disk" else models["b"],
        7,
        mode=mode,  # type: ignore[arg-type]
        reference=partial(log_probs, models["b"]),
        tolerance=1e-4,
    )
    assert result.version == 7 == await engine.get_weight_version()
    assert result.coverage == 1 if engine.provider == "sglang" else 0 < result.coverage < 1
    assert before != await engine.get_weights_checksum()
    (sample,) = await engine.generate_group(PROMPT, SHORT)
    assert_sampled_by(models["b"], sample)
    assert sample.weight_version == 7
    if source == "gloo":  # the group stays: a second push needs no new one
        await engine.update_weights(models["a"], 8)
        (sample,) = await engine.generate_group(PROMPT, SHORT)
        assert_sampled_by(models["a"], sample)
        assert await engine.get_weights_checksum() == before


async def test_a_wrong_push_is_detected(engine: RemoteEngine, models: Models, folders: dict[str, Path]) -> None:
    await engine.update_weights(models["b"], 5)
    assert await check_engine(engine, 5, folders["b"])
    with pytest.raises(WeightSyncError, match="reports version 5 instead of 6"):
        await check_engine(engine, 6, folders["b"])
    with pytest.raises(WeightSyncError, match="not those that were sent"):
        await check_engine(engine, 5, folders["a"])
    # One layer alone is wrong. vLLM's packed layers hide their bytes on a CPU: the log-probs tell there.
    mixed = dict(models["b"].state_dict())
    name = "model.layers.1.mlp.down_proj.weight"
    mixed[name] = models["a"].state_dict()[name]
    await engine.update_weights(mixed, 5)
    with pytest.raises(WeightSyncError, match=r"not those that were sent|log-probs"):
        await check_engine(engine, 5, folders["b"], reference=partial(log_probs, models["b"]))


async def test_a_stale_prefix_cache_is_detected(engine: RemoteEngine, models: Models, folders: dict[str, Path]) -> None:
    """New weights on the keys and values of old ones match neither; this is what the flush is for."""

    async def no_flush() -> None:
        return None

    await engine.generate_group(PROMPT, SHORT)
    if engine.provider == "vllm":
        await engine._load_folder(folders["b"], 3)  # without the pause, which empties the cache of an idle vLLM
    else:
        flush, engine.flush_cache = engine.flush_cache, no_flush  # type: ignore[method-assign]
        await engine.update_weights(models["b"], 3, mode="continue")
        engine.flush_cache = flush  # type: ignore[method-assign]
    (stale,) = await engine.generate_group(PROMPT, SHORT)
    for model in models.values():
        with pytest.raises(AssertionError):
            assert_sampled_by(model, stale)
    await engine.flush_cache()
    (fresh,) = await engine.generate_group(PROMPT, SHORT)
    assert_sampled_by(models["b"], fresh)


async def test_requests_in_flight_tell_their_versions(engine: RemoteEngine, models: Models) -> None:
    long = SamplingParams(max_tokens=1400, seed=3, ignore_eos=True)
    version = 1

    def served(version: int) -> PreTrainedModel:
        return models["ab"[version % 2 == 0]]

    async def update_beside(mode: UpdateMode) -> Completion:
        """What is sampled while new weights come. A server on few cores may hear of them only when it is done."""
        nonlocal version
        for _ in range(ATTEMPTS):
            version += 1
            group: list[Completion] = []

            async def generate(group: list[Completion] = group) -> None:
                group += await engine.generate_group(PROMPT, long)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(generate)
                await begun(engine)
                await engine.update_weights(served(version), version, mode=mode)
            (sample,) = group
            if mode == "drain" or len(sample.weight_versions) > 1 or sample.stop_reason is StopReason.ABORTED:
                return sample
        raise AssertionError(f"no update ({mode}) came while the server sampled")

    kept = await update_beside("continue")
    first, second = kept.weight_versions
    assert (first.version, second.version, first.start, second.end) == (version - 1, version, 0, 1400)
    assert first.end == second.start > 0
    old = log_probs(served(version - 1), [*PROMPT, *kept.token_ids])[len(PROMPT) :]
    new = log_probs(served(version), [*PROMPT, *kept.token_ids])[len(PROMPT) :]
    assert kept.log_probs[: first.end] == pytest.approx(old[: first.end], abs=1e-4)
    assert kept.log_probs[second.start :] == pytest.approx(new[second.start :], abs=1e-4)  # recomputed, not stale
    drained = await update_beside("drain")
    assert [(span.version, span.end) for span in drained.weight_versions] == [(version - 1, 1400)]
    aborted = await update_beside("abort")
    assert aborted.stop_reason is StopReason.ABORTED and 0 < len(aborted.token_ids) < 1400


async def test_pause_continue_abort(engine: RemoteEngine) -> None:
    done = anyio.Event()

    async def generate() -> None:
        await engine.generate_group(PROMPT, SHORT)
        done.set()

    async with anyio.create_task_group() as tasks:
        await engine.pause_generation()
        tasks.start_soon(generate)
        await anyio.sleep(1)
        assert not done.is_set()
        await engine.continue_generation()
        with anyio.fail_after(300):
            await done.wait()
    for _ in range(ATTEMPTS):
        last, aborted = None, False
        async for chunk in stream_tokens(engine.endpoint, PROMPT, SamplingParams(max_tokens=1500, ignore_eos=True)):
            if not aborted:  # at its first tokens
                await engine.abort_all()
                aborted = True
            last = chunk.completion
        assert last is not None
        if last.stop_reason is StopReason.ABORTED:
            break
    assert last.stop_reason is StopReason.ABORTED and len(last.token_ids) < 1500


async def test_a_trainer_that_dies_in_an_update_leaves_a_server_that_another_can_use(
    address: tuple[str, str], engine: RemoteEngine, models: Models, folders: dict[str, Path]
) -> None:
    """Paused, with half of an update: the next one resumes it and its own update is whole."""
    for source in (models["b"], folders["b"]):
        await engine.pause_generation()
        await engine._begin_push()
        other = type(engine)(address[1], timeout=60)
        await other.take_over()
        await other.take_over()  # where nothing is open
        await other.connect()
        await sync_weights_to_engines([other], source, 11, reference=partial(log_probs, models["b"]), tolerance=1e-4)
        (sample,) = await other.generate_group(PROMPT, SHORT)
        assert_sampled_by(models["b"], sample)
        await other.update_weights_from_checkpoint(folders["a"], 12)


async def test_one_server_by_one_call(address: tuple[str, str], engine: RemoteEngine, folders: dict[str, Path]) -> None:
    update = update_vllm_weights_from_disk if address[0] == "vllm" else update_sglang_weights_from_disk
    assert (await update(address[1], folders["b"], 9)).version == 9
    with pytest.raises((UserError, WeightSyncError)):
        await update(address[1], folders["b"] / "none", 10)
    assert await engine.get_weight_version() == 9
    assert await engine.is_healthy()


async def test_raw_log_probs_and_a_stale_output_layer(models: Models, folders: dict[str, Path], tmp_path: Path) -> None:
    """vLLM's defaults: raw log-probs; and without the plugin a tied output layer stays behind, as log-probs show."""
    with vllm_server(folders["a"], tmp_path / "raw.log", "--logprobs-mode", "raw_logprobs") as url:
        endpoint = Endpoint("vllm", "tiny", url)
        with pytest.raises(ProviderError, match="--logprobs-mode processed_logprobs"):
            await connect(endpoint)
        assert await connect(endpoint, tempered=False) is LogProbMode.RAW
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 200
        (sample,) = await sample_tokens(endpoint, PROMPT, SamplingParams(max_tokens=4, temperature=0.5))
        assert all(value != value for value in sample.log_probs) and max(sample.raw_log_probs) < 0
        engine = VLLMEngine(url, timeout=60)
        await sync_weights_to_engines([engine], folders["b"], 2)  # the digests that it shows are right
        with pytest.raises(WeightSyncError, match="off the trainer's"):
            await check_engine(engine, 2, folders["b"], reference=partial(log_probs, models["b"]))


async def test_an_adapter_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """LoRA: the base stays where it is, versions of the adapter come and go. SGLang's LoRA does not run on a CPU."""
    adapted: list[PreTrainedModel] = []
    for seed in (1, 2):
        model = add_lora(AutoModelForCausalLM.from_pretrained(folders["a"]), LoRAConfig(r=8), seed=seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        save_lora(model, tmp_path / f"adapter{seed}")
        adapted.append(model)
    with vllm_server(
        folders["a"], tmp_path / "lora.log", "--enable-lora", "--max-lora-rank", "8", allow_lora=True
    ) as url:
        engine = VLLMEngine(url, timeout=60)
        await engine.connect()
        for version, model in enumerate(adapted, start=1):
            (result,) = await sync_weights_to_engines(
                [engine], tmp_path / f"adapter{version}", version, reference=partial(log_probs, model), tolerance=1e-3
            )
            assert result.version == version
            (sample,) = await engine.generate_group(PROMPT, SHORT)
            expected = log_probs(model, [*PROMPT, *sample.token_ids])[len(PROMPT) :]
            assert sample.log_probs == pytest.approx(expected, abs=1e-3)
