"""What binds the text of an answer: a response format, vLLM's structured outputs, or tools that must be called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rollouts.serving.errors import RequestError
from rollouts.serving.tool_calls import CLOSE, OPEN

if TYPE_CHECKING:
    from rollouts.serving.openai_schema import Function, ResponseFormat, StructuredOutputs

ANY_OBJECT: dict[str, Any] = {"type": "object"}


def format_constraint(response_format: ResponseFormat | None) -> dict[str, Any]:
    """The argument of ``SamplingParams`` that ``response_format`` asks for, if any. Raises RequestError."""
    if response_format is None or response_format.type == "text":
        return {}
    if response_format.type == "json_object":
        return {"json_schema": ANY_OBJECT}
    given = response_format.json_schema
    if given is None:
        raise RequestError("response_format.json_schema: say which schema", "response_format.json_schema")
    return {"json_schema": ANY_OBJECT if given.schema_ is None else given.schema_}


def structured_constraint(outputs: StructuredOutputs | None) -> dict[str, Any]:
    """The same of vLLM's ``structured_outputs``. Raises RequestError unless exactly one of its fields is set."""
    if outputs is None:
        return {}
    given = {name: value for name, value in outputs.model_dump(by_alias=True).items() if value is not None}
    if len(given) != 1:
        raise RequestError(
            "structured_outputs: set one of json, json_object, regex, choice, grammar", "structured_outputs"
        )
    name, value = given.popitem()
    if name == "json_object":
        return {"json_schema": ANY_OBJECT} if value else {}
    if name == "choice":
        return {"grammar": "start: " + " | ".join(map(_text, value))}
    return {{"json": "json_schema"}.get(name, name): value}


def tool_grammar(
    functions: Sequence[Function], parallel: bool, tags_are_tokens: bool, answer: object | None = None
) -> str:
    """A Lark grammar of one call, or of one and more, in the form that ``ToolCallSplitter`` reads.

    Args:
        tags_are_tokens: each tag is one token of the vocabulary; a grammar names those without quotation marks.
        answer: the JSON schema of an answer that may come in place of calls.
    """
    opening, closing = (OPEN, CLOSE) if tags_are_tokens else (_text(OPEN), _text(CLOSE))
    line = _text("\n")
    call = f"{opening} {line} call {line} {closing}"
    rules = [
        "start: calls" if answer is None else "start: calls | answer",
        f"calls: {call} ({line} {call})*" if parallel else f"calls: {call}",
        "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
    ]
    if answer is not None:
        rules.append(f"answer: %json {json.dumps(answer)}")
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, "arguments": '
        schema = {**(function.parameters or {}), "type": "object"}  # arguments are an object, said or not
        rules += [f"call_{i}: {_text(head)} args_{i} {_text('}')}", f"args_{i}: %json {json.dumps(schema)}"]
    return "\n".join(rules)


def _text(text: str) -> str:
    """A literal of Lark, which writes strings as JSON does."""
    return json.dumps(text, ensure_ascii=False)
