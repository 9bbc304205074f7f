"""Three ways to ask a server for tokens, each as a path, a body and how to read what comes back.

sglang  POST /generate                events hold a sample's tokens so far
vllm    POST /inference/v1/generate   events hold a sample's new tokens (needs ``--enable-scale-out``)
openai  POST /v1/completions          the same; ids through vLLM's ``return_token_ids``, which `rollouts serve` has too
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollouts.errors import UserError
from rollouts.inference.completion import StopReason
from rollouts.inference.sampling_params import SamplingParams
from rollouts.providers.errors import ProviderError
from rollouts.types import WeightSpan

PATHS = {"sglang": "/generate", "vllm": "/inference/v1/generate", "openai": "/v1/completions"}


@dataclass
class Piece:
    """What one event, or one whole answer, tells about one sample.

    Args:
        whole: the tokens are all so far, not the new ones.
        stop_reason: None while the sample goes on.
    """

    index: int
    token_ids: list[int]
    log_probs: list[float]
    whole: bool = False
    stop_reason: StopReason | None = None
    stop_match: int | str | None = None
    weight_versions: list[WeightSpan] = field(default_factory=list)
    num_cached: int = 0
    top_log_probs: list[list[tuple[int, float]]] | None = None


def body(provider: str, model: str, prompt_ids: Sequence[int], params: SamplingParams, stream: bool) -> dict[str, Any]:
    """The request in a provider's words. What a model's own generation config could change is always said.

    Raises:
        UserError: the provider has no words for a parameter.
    """
    if params.top_log_probs and provider != "sglang":
        raise UserError(f"provider {provider} gives no top_log_probs by token id; use sglang or embedded")
    if provider == "sglang" and params.ignore_eos and params.stop_token_ids:
        raise UserError("SGLang's ignore_eos ignores stop_token_ids too; give one of the two")
    if params.prompt_log_probs:
        raise UserError(f"provider {provider} gives no prompt_log_probs; use embedded")
    if isinstance(params.seed, tuple):
        raise UserError("one request takes one seed; ask for each sample by itself")
    sampling: dict[str, Any] = {
        "temperature": params.temperature,
        "top_k": params.top_k or -1,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "n": params.n,
        "ignore_eos": params.ignore_eos,
    }
    optional = {
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in params.logit_bias.items()},
        "stop_token_ids": list(params.stop_token_ids),
        "stop": list(params.stop),
    }
    sampling |= {name: value for name, value in optional.items() if value}
    seed = None if params.seed is None else params.seed % 2**63
    ids = [int(token) for token in prompt_ids]
    sampling |= _structure(provider, params)
    if provider == "sglang":
        sampling |= {"max_new_tokens": params.max_tokens} | ({} if seed is None else {"sampling_seed": seed})
        request: dict[str, Any] = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        if params.top_log_probs:
            request["top_logprobs_num"] = params.top_log_probs
    else:
        sampling |= {"max_tokens": params.max_tokens, "logprobs": 0} | ({} if seed is None else {"seed": seed})
        if provider == "vllm":
            request = {"model": model, "token_ids": ids, "sampling_params": sampling}
        else:
            request = {"model": model, "prompt": ids, "return_token_ids": True, **sampling}
    return {**request, "stream": True} if stream else request


def _structure(provider: str, params: SamplingParams) -> dict[str, Any]:
    """What binds the text of a sample, in a provider's words."""
    if params.json_schema is not None:
        schema = params.json_schema
        if provider == "sglang":
            return {"json_schema": schema if isinstance(schema, str) else json.dumps(schema)}
        return {"structured_outputs": {"json": schema}}
    if params.regex is not None:
        return {"regex": params.regex} if provider == "sglang" else {"structured_outputs": {"regex": params.regex}}
    if params.grammar is not None:
        if provider == "sglang":
            raise UserError("provider sglang takes no Lark grammar; use json_schema or regex")
        return {"structured_outputs": {"grammar": params.grammar}}
    return {}


def pieces(provider: str, answer: Any) -> list[Piece]:
    """The samples that an answer or an event tells of. Raises ProviderError when it lacks what was asked for."""
    read = {"sglang": _sglang, "vllm": _vllm, "openai": _openai}[provider]
    try:
        if provider == "sglang":
            answers = answer if isinstance(answer, list) else [answer]
            return [read(one, i) for i, one in enumerate(answers)]
        return [read(choice, choice["index"]) for choice in answer["choices"]]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ProviderError(
            f"the {provider} server's answer lacks token ids or log-probs ({type(error).__name__}: {error}); is it one?"
        ) from error


def _sglang(answer: Mapping[str, Any], index: int) -> Piece:
    meta = answer["meta_info"]
    ids = list(answer["output_ids"])
    entries = meta.get("output_token_logprobs", ())
    if len(entries) != len(ids):
        raise ValueError(f"{len(entries)} log-probs for {len(ids)} tokens")
    reason, match = None, None
    if finish := meta.get("finish_reason"):
        reason, match = _stop(finish["type"], finish.get("matched"), ids)
    tops = meta.get("output_top_logprobs")
    return Piece(
        answer.get("index", index),
        ids,
        [float(entry[0]) for entry in entries],
        whole=True,
        stop_reason=reason,
        stop_match=match,
        weight_versions=spans(meta.get("weight_versions"), len(ids)),
        num_cached=meta.get("cached_tokens", 0),
        top_log_probs=[[(pair[1], float(pair[0])) for pair in top] for top in tops] if tops else None,
    )


def _vllm(choice: Mapping[str, Any], index: int) -> Piece:
    ids = list(choice.get("token_ids") or ())
    log_probs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]] if ids else []
    return _delta(choice, index, ids, log_probs)


def _openai(choice: Mapping[str, Any], index: int) -> Piece:
    ids = list(choice["token_ids"] or ())
    log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]] if ids else []
    return _delta(choice, index, ids, log_probs)


def _delta(choice: Mapping[str, Any], index: int, ids: list[int], log_probs: list[float]) -> Piece:
    if len(log_probs) != len(ids):
        raise ValueError(f"{len(log_probs)} log-probs for {len(ids)} tokens")
    piece = Piece(index, ids, log_probs, weight_versions=spans(choice.get("weight_versions")))
    if reason := choice.get("finish_reason"):
        piece.stop_reason, piece.stop_match = _stop(reason, choice.get("stop_reason"), ids)
    return piece


def _stop(kind: str, match: int | str | None, ids: Sequence[int]) -> tuple[StopReason, int | str | None]:
    if kind == "stop":
        if isinstance(match, str):
            return StopReason.STOP_STRING, match
        return StopReason.STOP_TOKEN, ids[-1] if match is None and ids else match
    return (StopReason.ABORTED if kind == "abort" else StopReason.LENGTH), None


def spans(given: Sequence[Mapping[str, Any]] | None, limit: int | None = None) -> list[WeightSpan]:
    """A server's weight versions by token; empty spans, and those beyond ``limit``, are dropped."""
    found = []
    for span in given or ():
        end = span["end"] if limit is None else min(span["end"], limit)
        if span["start"] < end:
            found.append(WeightSpan(version_number(span["version"]), span["start"], end))
    return found


def version_number(version: Any) -> int:
    """Servers have versions as text, ``default`` until the first update: that is version 0."""
    text = str(version)
    return int(text) if text.isascii() and text.isdecimal() else 0
