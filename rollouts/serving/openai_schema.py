"""The requests of OpenAI's API as this server takes them, with vLLM's extensions for sampling and token ids."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rollouts.serving.errors import RequestError
from rollouts.serving.requests import StrictModel
from rollouts.serving.structured import format_constraint, structured_constraint

Tokens = list[int]


class StreamOptions(StrictModel):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class JsonSchemaFormat(StrictModel):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None  # always: the text is bound while it is sampled


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(StrictModel):
    """vLLM's ``structured_outputs``; exactly one is set."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=1024)
    grammar: str | None = None


class SamplingRequest(StrictModel):
    """What both kinds of completion share. Fields set to null count as absent, as OpenAI has it."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's and SGLang's
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # Accepted and without effect: they describe the caller, not the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    def sampling(self) -> dict[str, Any]:
        """The arguments of ``SamplingParams`` that this request sets, but for ``max_tokens`` and log-probs.

        Raises:
            RequestError: a field cannot be honored.
        """
        bound = format_constraint(self.response_format), structured_constraint(self.structured_outputs)
        if all(bound):
            raise RequestError("structured_outputs: response_format binds the text already", "structured_outputs")
        given = {
            "n": self.n,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "temperature": self.temperature,
            "top_k": max(self.top_k, 0) if self.top_k is not None else None,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": token_biases(self.logit_bias),
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            **bound[0],
            **bound[1],
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def constraint_names(self) -> dict[str, str]:
        """Which field of the request each constraint of ``SamplingParams`` comes from."""
        field = "response_format" if self.structured_outputs is None else "structured_outputs"
        return dict.fromkeys(("json_schema", "regex", "grammar"), field)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``; a prompt may be token ids."""

    prompt: str | list[str] | Tokens | list[Tokens]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0)  # vLLM's
    add_special_tokens: bool | None = None


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    name: str
    arguments: str


class MessageToolCall(StrictModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(StrictModel):
    """One message of a conversation, as a client sends it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None


class Function(StrictModel):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    name: str


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None  # SGLang's: false leaves <think> blocks in the content
    chat_template_kwargs: dict[str, bool | str | int] | None = None


def token_biases(given: dict[str, float] | None) -> dict[int, float] | None:
    """Biases by token id; JSON's keys are strings. Raises RequestError."""
    if given is None:
        return None
    if not all(key.isascii() and key.isdecimal() and len(key) <= 9 for key in given):
        raise RequestError("logit_bias: keys are token ids, written as decimal numbers", "logit_bias")
    return {int(key): bias for key, bias in given.items()}
