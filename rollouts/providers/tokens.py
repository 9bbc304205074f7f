"""Sampling tokens: prompt ids in, the sampled ids out with their log-probs, whoever samples them.

What a server's ids and log-probs mean is the same for all: ``Completion`` says what. Servers that mean another
distribution by a log-prob are told apart by asking (``log_probs``), once a server.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from rollouts.errors import UserError
from rollouts.inference.completion import Completion, CompletionChunk
from rollouts.inference.sampling_params import SamplingParams
from rollouts.providers import token_dialects as dialects
from rollouts.providers.embedded import find_engine
from rollouts.providers.endpoint import Endpoint
from rollouts.providers.errors import ProviderError
from rollouts.providers.http import request_json, run_all, stream_events
from rollouts.providers.log_probs import LogProbMode, is_raw, needs_mode, normalize
from rollouts.types import WeightSpan

NUM_PROBES = 3

_modes: dict[tuple[str, str, str], LogProbMode] = {}


async def sample_tokens(
    endpoint: Endpoint, prompt_ids: Sequence[int], params: SamplingParams | None = None
) -> list[Completion]:
    """The ``params.n`` samples of one prompt, in order; cancelling the caller ends them on the server too.

    Log-probs that a server cannot tell (``log_probs.normalize``) are NaN.

    Args:
        params: None = the endpoint's temperature and ``max_tokens``, less if nobody set it and there is no room.

    Raises:
        UserError: a parameter is out of range or refused (then a BadRequestError).
        ProviderError: the server failed, and so did every retry.
    """
    params = params or await _default_params(endpoint, len(prompt_ids))
    if endpoint.provider == "embedded":
        return await find_engine(endpoint.model).engine.generate_group(prompt_ids, params)
    if isinstance(params.seed, tuple):
        return await _one_by_one(endpoint, prompt_ids, params, params.seed)
    path, body = _request(endpoint, prompt_ids, params, stream=False)
    mode = await log_prob_mode(endpoint) if needs_mode(params) else None
    answer = await request_json(endpoint, "POST", path, body)
    samples = _Samples(len(prompt_ids), params, mode)
    for piece in dialects.pieces(endpoint.provider, answer):
        samples.add(piece)
    return samples.completions()


async def _one_by_one(
    endpoint: Endpoint, prompt_ids: Sequence[int], params: SamplingParams, seeds: Sequence[int]
) -> list[Completion]:
    """A request for each seed, side by side: servers take one seed a request."""
    found: list[Completion | None] = [None] * len(seeds)

    async def one(i: int) -> None:
        (sample,) = await sample_tokens(endpoint, prompt_ids, replace(params, n=1, seed=seeds[i]))
        found[i] = replace(sample, sample_index=i)

    await run_all([partial(one, i) for i in range(len(seeds))])
    return [sample for sample in found if sample is not None]


async def stream_tokens(
    endpoint: Endpoint, prompt_ids: Sequence[int], params: SamplingParams | None = None
) -> AsyncIterator[CompletionChunk]:
    """The samples as they grow; the last chunk of each holds it whole. Close the iterator to stop sampling.

    Raises as ``sample_tokens`` does. A stream that breaks off is asked for again only if nothing of it was handed on.
    """
    params = params or await _default_params(endpoint, len(prompt_ids))
    if endpoint.provider == "embedded":
        async with aclosing(find_engine(endpoint.model).engine.stream(prompt_ids, params)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk
        return
    path, body = _request(endpoint, prompt_ids, params, stream=True)
    mode = await log_prob_mode(endpoint) if needs_mode(params) else None
    samples = _Samples(len(prompt_ids), params, mode)
    async with aclosing(stream_events(endpoint, path, body)) as events:  # type: ignore[type-var]
        async for event in events:
            for piece in dialects.pieces(endpoint.provider, event):
                for chunk in samples.add(piece):
                    yield chunk
    samples.completions()


async def _default_params(endpoint: Endpoint, num_prompt: int) -> SamplingParams:
    """The endpoint's own. A ``max_tokens`` that nobody has set gives way to the room that the server says it has."""
    max_tokens = int(endpoint.max_tokens)
    if endpoint.provider in dialects.PATHS and not endpoint.sets_max_tokens:
        models = (await request_json(endpoint, "GET", "/v1/models") or {}).get("data") or [{}]
        model = next((m for m in models if m.get("id") == endpoint.model), models[0])
        if isinstance(length := model.get("max_model_len"), int):
            max_tokens = max(min(max_tokens, length - num_prompt), 1)
    return SamplingParams(max_tokens=max_tokens, temperature=endpoint.temperature)


async def log_prob_mode(endpoint: Endpoint) -> LogProbMode:
    """What the server means by a log-prob; asked once a process. Raises ProviderError when it cannot be told."""
    if endpoint.provider == "embedded":
        return LogProbMode.SCALED
    server = (endpoint.provider, endpoint.url, endpoint.model)
    if server not in _modes:
        _modes[server] = await _probe(endpoint)
    return _modes[server]


async def connect(endpoint: Endpoint, *, tempered: bool = True) -> LogProbMode:
    """Check that a server answers, and that a trainer can use its log-probs.

    Args:
        tempered: log-probs at the sampling temperature are needed; False for sampling at temperature 1 alone.

    Raises:
        ProviderError: no answer; or log-probs at temperature 1 only, where others are needed.
    """
    _modes.pop((endpoint.provider, endpoint.url, endpoint.model), None)
    mode = await log_prob_mode(endpoint)
    if tempered and mode is LogProbMode.RAW:
        remedy = {
            "vllm": "start vLLM with --logprobs-mode processed_logprobs",
            "sglang": "start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB",
        }.get(endpoint.provider, "use provider vllm, sglang or embedded")
        raise ProviderError(
            f"{endpoint.provider} at {endpoint.url} gives log-probs at temperature 1 whatever it samples at; "
            f"{remedy}, or sample at temperature 1"
        )
    return mode


async def _probe(endpoint: Endpoint) -> LogProbMode:
    """Compare log-probs of likely tokens at two temperatures."""
    rng = random.Random()
    for _ in range(NUM_PROBES):
        prompt = [rng.randrange(100) for _ in range(8)]
        found = []
        for temperature in (1.0, 2.0):  # of two tokens, eight samples see the same one at both
            params = SamplingParams(max_tokens=1, temperature=temperature, top_k=2, n=8, ignore_eos=True)
            path, body = _request(endpoint, prompt, params, stream=False)
            answer = dialects.pieces(endpoint.provider, await request_json(endpoint, "POST", path, body))
            found.append({piece.token_ids[0]: piece.log_probs[0] for piece in answer})
        raw = is_raw(*found)
        if raw is not None:
            tempered = LogProbMode.SCALED if endpoint.provider == "sglang" else LogProbMode.PROCESSED
            return LogProbMode.RAW if raw else tempered
    raise ProviderError(f"{endpoint.provider} at {endpoint.url}: its log-probs tell nothing; the model is always sure")


def _request(
    endpoint: Endpoint, prompt_ids: Sequence[int], params: SamplingParams, stream: bool
) -> tuple[str, dict[str, object]]:
    if endpoint.provider not in dialects.PATHS:
        raise UserError(f"provider {endpoint.provider} takes no token ids; use chat, or another provider")
    if not len(prompt_ids):
        raise UserError("the prompt is empty; give at least one token id")
    if min(prompt_ids) < 0:
        raise UserError("the prompt has a negative token id")
    body = dialects.body(endpoint.provider, endpoint.model, prompt_ids, params, stream)
    return dialects.PATHS[endpoint.provider], {**body, **(endpoint.extra_params or {})}


@dataclass
class _Sample:
    """One sample as far as it has arrived."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # as the server gives them
    weight_versions: list[WeightSpan] = field(default_factory=list)
    completion: Completion | None = None


class _Samples:
    """The samples of one request, put together from pieces."""

    def __init__(self, num_prompt: int, params: SamplingParams, mode: LogProbMode | None) -> None:
        self._num_prompt, self._params, self._mode = num_prompt, params, mode
        self._samples = [_Sample() for _ in range(params.n)]

    def add(self, piece: dialects.Piece) -> list[CompletionChunk]:
        """Take a piece; gives the chunks that it makes: new tokens, and the whole sample if it is the last."""
        if not 0 <= piece.index < len(self._samples):
            raise ProviderError(f"the server gave a sample {piece.index}, but {len(self._samples)} were asked for")
        sample = self._samples[piece.index]
        have = len(sample.token_ids) if piece.whole else 0
        token_ids, given = piece.token_ids[have:], piece.log_probs[have:]
        sample.token_ids += token_ids
        sample.log_probs += given
        sample.weight_versions = piece.weight_versions or sample.weight_versions
        chunks = []
        if token_ids:
            log_probs, raw = normalize(given, self._params, self._mode)
            chunks.append(CompletionChunk(piece.index, token_ids, log_probs, raw))
        if piece.stop_reason is not None:
            log_probs, raw = normalize(sample.log_probs, self._params, self._mode)
            tops = piece.top_log_probs
            sample.completion = Completion(
                token_ids=sample.token_ids,
                log_probs=log_probs,
                raw_log_probs=raw,
                stop_reason=piece.stop_reason,
                stop_match=piece.stop_match,
                weight_versions=sample.weight_versions,
                top_log_probs=tops if not any(map(math.isnan, raw)) else None,
                num_prompt_tokens=self._num_prompt,
                num_cached_tokens=piece.num_cached,
                sample_index=piece.index,
            )
            chunks.append(CompletionChunk(piece.index, [], [], [], sample.completion))
        return chunks

    def completions(self) -> list[Completion]:
        """All samples. Raises ProviderError when one has not ended."""
        done = [sample.completion for sample in self._samples if sample.completion is not None]
        if len(done) < len(self._samples):
            raise ProviderError(f"the answer ended with {len(done)} of {len(self._samples)} samples complete")
        return done
