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
    json_schema: str | None = None
    regex: str | None = None
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
            "json_schema": self.json_schema,
            "regex": self.regex,
        }
        return {name: value for name, value in given.items() if value is not None}


class GenerateRequest(StrictModel):
    """``POST /generate``; exactly one of ``text`` and ``input_ids``, and a list of either is a batch."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = Field(None, ge=-1)  # of the prompt, whose log-probs come from there on
    top_logprobs_num: int | None = Field(None, ge=0)
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    model: str | None = None  # ours: which of several served models; the first unless said

    @property
    def scores_prompt(self) -> bool:
        return bool(self.return_logprob) and self.logprob_start_len not in (None, -1)

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


class VersionedRequest(ModelRequest):
    """What the requests that bring new weights share."""

    weight_version: str | int | None = None
    flush_cache: bool | None = None  # the cache never outlives the weights that it was computed with
    abort_all_requests: bool | None = None
    torch_empty_cache: bool | None = None
    selector: Literal["target", "all"] | None = None

    def version(self) -> int | None:
        """The version as the engine counts it. Raises RequestError."""
        return None if self.weight_version is None else whole_version(self.weight_version, "weight_version")


class UpdateWeightsRequest(VersionedRequest):
    """``POST /update_weights_from_disk``."""

    model_path: str = Field(min_length=1, max_length=4096)
    load_format: Literal["auto", "safetensors"] | None = None
    is_async: Literal[False] | None = None
    keep_pause: bool | None = None  # a paused server stays paused
    token_step: int | None = None


class TensorWeightsRequest(VersionedRequest):
    """``POST /update_weights_from_tensor``; safetensors files in base64 where SGLang has pickles."""

    serialized_named_tensors: list[str] = Field(min_length=1, max_length=1024)
    load_format: Literal["safetensors"] | None = None


class GroupRequest(ModelRequest):
    """``POST /init_weights_update_group``."""

    master_address: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,253}$")
    master_port: int = Field(ge=1, le=65535)
    rank_offset: int = Field(ge=1)
    world_size: int = Field(ge=2, le=4096)
    group_name: str = Field("weight_update_group", min_length=1, max_length=200)
    backend: Literal["gloo"]


class LeaveGroupRequest(ModelRequest):
    """``POST /destroy_weights_update_group``."""

    group_name: str = "weight_update_group"


class GroupWeightsRequest(VersionedRequest):
    """``POST /update_weights_from_distributed``."""

    names: list[str] = Field(min_length=1, max_length=100_000)
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = None


class BeginUpdateRequest(ModelRequest):
    """``POST /begin_weight_update``."""

    selector: Literal["target", "all"] | None = None


class WeightVersionRequest(ModelRequest):
    """``POST /update_weight_version``."""

    new_version: str | int
    abort_all_requests: bool = True  # SGLang's default


def whole_version(given: str | int, field: str) -> int:
    """Raises RequestError: SGLang's versions are any text, the engine's are numbers."""
    if isinstance(given, str):
        if not (given.isascii() and given.isdecimal() and len(given) <= 18):
            raise RequestError(f"{field}: versions are whole numbers here", field)
        return int(given)
    if not 0 <= given < 10**18:
        raise RequestError(f"{field}: out of range", field)
    return given


class PauseRequest(ModelRequest):
    """``POST /pause_generation``."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueRequest(ModelRequest):
    """``POST /continue_generation``."""

    torch_empty_cache: bool | None = None


class AbortRequest(ModelRequest):
    """``POST /abort_request``."""

    rid: str | None = None
    abort_all: bool = False


class WeightsCheckRequest(ModelRequest):
    """``POST /weights_checker``."""

    action: Literal["checksum"] = "checksum"
    selector: Literal["target", "all"] | None = None
