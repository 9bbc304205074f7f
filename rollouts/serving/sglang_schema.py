"""The requests of SGLang's own endpoints, as far as this server takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from pydantic import Field

from rollouts.serving.errors import RequestError
from rollouts.serving.openai_schema import token_biases
from rollouts.serving.requests import StrictModel


class SglangSampling(StrictModel):
    """SGLang's ``sampling_params``."""

    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: Literal[0] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    sampling_seed: int | None = Field(None, ge=0, lt=2**63)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None

    def sampling(self) -> dict[str, object]:
        """The arguments of ``SamplingParams`` that are set, but for log-probs. Raises RequestError."""
        given = {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(self.top_k, 0) if self.top_k is not None else None,
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "n": self.n,
            "seed": self.sampling_seed,
            "logit_bias": token_biases(self.logit_bias),
        }
        return {name: value for name, value in given.items() if value is not None}


class GenerateRequest(StrictModel):
    """``POST /generate``; exactly one of ``text`` and ``input_ids``, and a list of either is a batch."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | None = None
    logprob_start_len: Literal[-1] | None = None
    top_logprobs_num: int | None = Field(None, ge=0)
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    model: str | None = None  # ours: which of several served models; the first unless said

    def prompts(self) -> tuple[str, Sequence[str | list[int]], bool]:
        """(name of the field that holds them, the prompts, whether they came as a list). Raises RequestError."""
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("send either text or input_ids", "text" if self.text is not None else "input_ids")
        if self.text is not None:
            return ("text", self.text, True) if isinstance(self.text, list) else ("text", [self.text], False)
        assert self.input_ids is not None
        if self.input_ids and isinstance(self.input_ids[0], list):
            return "input_ids", self.input_ids, True
        return "input_ids", [cast(list[int], self.input_ids)], False


class ModelRequest(StrictModel):
    """A request about one served model; the first unless ``model`` names another."""

    model: str | None = None


class UpdateWeightsRequest(ModelRequest):
    """``POST /update_weights_from_disk``."""

    model_path: str = Field(min_length=1, max_length=4096)
    load_format: Literal["auto", "safetensors"] | None = None
    weight_version: str | int | None = None
    flush_cache: bool | None = None  # the cache never outlives the weights that it was computed with
    abort_all_requests: bool | None = None
    is_async: Literal[False] | None = None

    def version(self) -> int | None:
        """The version as the engine counts it. Raises RequestError."""
        given = self.weight_version
        if isinstance(given, str):
            if not (given.isascii() and given.isdecimal() and len(given) <= 18):
                raise RequestError("weight_version: versions are whole numbers here", "weight_version")
            return int(given)
        if given is not None and not 0 <= given < 10**18:
            raise RequestError("weight_version: out of range", "weight_version")
        return given


class PauseRequest(ModelRequest):
    """``POST /pause_generation``; SGLang's ``retract`` would recompute the cache of samples in flight."""

    mode: Literal["abort", "in_place"] = "abort"


class AbortRequest(ModelRequest):
    """``POST /abort_request``."""

    rid: str | None = None
    abort_all: bool = False


class WeightsCheckRequest(ModelRequest):
    """``POST /weights_checker``."""

    action: Literal["checksum"]
