"""Chat tokenization with an exact loss mask: one rendering by the model's own template, assistant turns found in it.

Which characters learn. The conversation is rendered once by the tokenizer's chat template, then:

- A template with ``{% generation %}`` marks says so itself; an end token that follows a mark directly is added.
- Any other template is asked once, with a probe conversation, what it writes before an assistant's text (the header,
  ``<|im_start|>assistant\\n``) and after it (the end, ``<|im_end|>``). A turn is what stands between a header and the
  next end, the end included. Text of messages can never pass for a header or an end: where a message holds such a
  string, the rendering is made with a stand-in for it, which is replaced when the turns have been found.

A think block that the template inserts with nothing in it (Qwen3, minimind) is the template's text and does not learn,
unless the message itself wrote a think block. Reasoning that the template renders learns; reasoning that it strips from
earlier turns is not in the tokens at all. A token that spans a turn's edge (a header's newline merged with a text's
own) is partly template and does not learn.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rollouts.errors import UserError
from rollouts.training.datasets.rows import BadRow, Conversation, Message, canonical_row
from rollouts.training.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")
_BLANKS = re.compile(r"\s*")
_PROBE = ("probe-question-1", "probe-answer-1", "probe-question-2", "probe-answer-2")
_one_at_a_time = threading.Lock()


class _MarkedTemplate(str):
    """A chat template that transformers compiles, and caches, apart from the same text in a plain ``str``.

    A compiled template notes its ``{% generation %}`` blocks in one place that belongs to nobody: another rendering by
    it at the same time, in any thread and with or without marks, writes its own text there. So renderings with marks
    have a compiled template to themselves, and follow one another.
    """

    __slots__ = ()


@dataclass(frozen=True)
class TurnFormat:
    """What a chat template writes around an assistant's text.

    ``marked`` templates carry ``{% generation %}`` marks: ``header`` is unused and ``end`` may be empty (unknown).
    """

    header: str
    end: str
    marked: bool


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation and the character spans ``[start, end)`` in it that learn, ascending and disjoint."""

    text: str
    spans: tuple[Span, ...]


def turn_format(tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    """Ask a tokenizer's chat template, with a probe conversation, how it writes an assistant's turn.

    Raises:
        UserError: there is no chat template, it drops assistant turns, or its turns have no end that could be learned.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name}: has no chat template; add chat_template.jinja to its folder or use text rows"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {name}: is not a fast tokenizer, whose character offsets masks need; save tokenizer.json"
        )
    marked = _GENERATION.search(tokenizer.get_chat_template()) is not None
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, _PROBE, strict=True)]
    try:
        one, two, four = (_render_text(messages[:n], None, tokenizer) for n in (1, 2, 4))
    except BadRow as e:
        raise UserError(
            f"tokenizer {name}: its chat template cannot render a plain conversation ({e}); fix the template"
        ) from e
    missing = [i for i, text in enumerate(_PROBE) if text not in four]
    if missing:
        what = (
            "has no assistant turn" if missing == [1, 3] else f"drops message {missing[0] + 1} of a plain conversation"
        )
        raise UserError(f"tokenizer {name}: its chat template {what}; give it a template that renders every message")

    question = four.index(_PROBE[0]) + len(_PROBE[0])
    answer = four.index(_PROBE[1], question)
    after_question = one[one.index(_PROBE[0]) + len(_PROBE[0]) :] if _PROBE[0] in one else ""
    before_answer = four[question:answer]
    header = before_answer.removeprefix(after_question)
    header = (header if header.strip() else before_answer).split("<think>")[0]

    after_middle = four[answer + len(_PROBE[1]) : four.index(_PROBE[2])]
    after_last = two[two.index(_PROBE[1]) + len(_PROBE[1]) :] if _PROBE[1] in two else ""
    end = _common_prefix(after_middle, after_last).rstrip()
    if end != after_last.rstrip():  # the two continue differently: keep whole added tokens only
        end = end[: max((end.rfind(t) + len(t) for t in tokenizer.get_added_vocab() if t in end), default=0)]
    if marked:
        spans = _render_marked(messages, None, tokenizer)[1]
        if any(not any(a <= four.index(text) < b for a, b in spans) for text in (_PROBE[1], _PROBE[3])):
            raise UserError(
                f"tokenizer {name}: the {{% generation %}} marks of its template leave out an assistant turn; fix them"
            )
        return TurnFormat(header, end, marked=True)
    if not header.strip() or not end:
        what = "begins" if not header.strip() else "ends"
        raise UserError(
            f"tokenizer {name}: its chat template shows no text by which an assistant turn {what}; "
            "put {% generation %} and {% endgeneration %} around what the assistant says, end token included"
        )
    return TurnFormat(header, end, marked=False)


def _common_prefix(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))]


def render_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turns: TurnFormat | None = None
) -> Rendering:
    """Render a canonical conversation and find what its assistant said.

    Args:
        conversation: ``{"messages": [...], "tools": [...] or None}`` as ``canonical_row`` returns it.
        turns: ``turn_format(tokenizer)``, passed in when many conversations are rendered.

    Raises:
        BadRow: the template refuses the conversation or does not render an assistant message.
        UserError: the template cannot be used at all.
    """
    turns = turns or turn_format(tokenizer)
    messages, tools = conversation["messages"], conversation.get("tools")
    if turns.marked:
        text, spans = _render_marked(messages, tools, tokenizer)
        spans = [(a, b + len(turns.end) if turns.end and text.startswith(turns.end, b) else b) for a, b in spans]
    else:
        text, spans = _render_by_turns(messages, tools, tokenizer, turns)
    _check_all_learned(messages, text, spans)
    return Rendering(text, tuple(spans))


def _render_by_turns(
    messages: Sequence[Message], tools: Any, tokenizer: PreTrainedTokenizerBase, turns: TurnFormat
) -> tuple[str, list[Span]]:
    controls = (turns.header.strip(), turns.end.strip())
    control = re.compile("|".join(map(re.escape, controls)))
    stand_ins: dict[str, str] = {}
    if _find_string([messages, tools], control):
        for number, message in enumerate(messages, 1):
            if message["role"] == "assistant" and (found := _find_string(message, control)):
                raise BadRow(
                    f"message {number} (assistant) holds {found!r}, which is the chat template's own; remove it"
                )
        mark = _unused_character([messages, tools])
        stand_ins = {text: f"{mark}{i}{mark}" for i, text in enumerate(controls)}
        messages, tools = (
            _map_strings(x, lambda s: control.sub(lambda m: stand_ins[m.group()], s)) for x in (messages, tools)
        )

    text = _render_text(messages, tools, tokenizer)
    assistants = [m for m in messages if m["role"] == "assistant"]
    spans: list[Span] = []
    position = text.find(turns.header)
    while position >= 0:
        start = position + len(turns.header)
        end = text.find(turns.end, start)
        if end < 0:
            break
        if len(spans) < len(assistants) and not _wrote_thoughts(assistants[len(spans)]):
            inserted = _EMPTY_THINK.match(text, start, end)
            start = inserted.end() if inserted else start
        spans.append((start, end + len(turns.end)))
        position = text.find(turns.header, end)
    if len(spans) != len(assistants):
        raise BadRow(f"the chat template renders {len(spans)} assistant turns for {len(assistants)} assistant messages")
    if stand_ins:
        return _restore(text, spans, {v: k for k, v in stand_ins.items()})
    return text, spans


def _wrote_thoughts(message: Message) -> bool:
    return bool(message.get("reasoning_content", "").strip()) or "</think>" in message["content"]


def _check_all_learned(messages: Sequence[Message], text: str, spans: Sequence[Span]) -> None:
    """Every assistant message's visible text and tool calls stand, in order, in what is learned."""
    learned = "\0".join(text[a:b] for a, b in spans)
    position = 0
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        wanted = [message["content"].rpartition("</think>")[2].strip()]
        wanted += [call["function"]["name"] for call in message.get("tool_calls", ())]
        for piece in wanted:
            found = learned.find(piece, position)
            if found < 0:
                raise BadRow(f"the chat template does not render what message {number} (assistant) says")
            position = found + len(piece)


def _render_text(messages: Sequence[Message], tools: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    return _render(lambda: tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False))


def _render_marked(
    messages: Sequence[Message], tools: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """The rendering with the spans of its ``{% generation %}`` blocks, adjoining ones merged."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _MarkedTemplate(tokenizer.get_chat_template(tools=tools))
    with _one_at_a_time:
        texts, all_spans = _render(
            lambda: render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
        )
    spans: list[Span] = []
    for start, end in all_spans[0]:
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return texts[0], spans


def _render(render: Callable[[], Any]) -> Any:
    """Run a template; whatever it raises on this conversation (templates are programs) is the row's problem."""
    import jinja2

    try:
        return render()
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError) as e:
        raise BadRow(f"the chat template refuses it: {' '.join(str(e).split())[:200]}") from e


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(k): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(v, change) for v in value]
    return value


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _find_string(value: Any, pattern: re.Pattern[str]) -> str | None:
    return next((m.group() for m in map(pattern.search, _strings(value)) if m), None)


def _unused_character(value: Any) -> str:
    """A private-use character that no string in the value holds."""
    used = set().union(*map(set, _strings(value)))
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)


def _restore(text: str, spans: Sequence[Span], originals: Mapping[str, str]) -> tuple[str, list[Span]]:
    """Put the originals back for their stand-ins and move the spans along; no span holds a stand-in."""
    pieces, shifts, position, shift = [], [], 0, 0  # shifts: (end of a stand-in, characters gained up to there)
    for match in re.finditer("|".join(map(re.escape, originals)), text):
        pieces += [text[position : match.start()], originals[match.group()]]
        shift += len(originals[match.group()]) - len(match.group())
        shifts.append((match.end(), shift))
        position = match.end()
    moved = []
    for start, end in spans:
        by = next((gained for at, gained in reversed(shifts) if at <= start), 0)
        moved.append((start + by, end + by))
    return "".join([*pieces, text[position:]]), moved


def encode_renderings(
    renderings: Sequence[Rendering], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokenize renderings in one batch call: for each, tokens (int32 [len]) and loss mask (uint8 [len])."""
    encoded = tokenizer(
        [r.text for r in renderings], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    return [
        (np.array(ids, np.int32), _token_mask(r, np.array(offsets, np.int64).reshape(-1, 2)))
        for r, ids, offsets in zip(renderings, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _token_mask(rendering: Rendering, offsets: np.ndarray) -> np.ndarray:
    """1 for each token (character offsets [len, 2]) that lies inside a learned span.

    Some tokenizers let an end token swallow the blanks after it (Phi's ``rstrip``), so a token that begins in a span
    may reach over blanks beyond it. A token of no width at a span's first character belongs to what came before.
    """
    starts = np.array([a for a, _ in rendering.spans])  # [spans]
    ends = np.array([b for _, b in rendering.spans])
    reach = np.array([_BLANKS.match(rendering.text, b).end() for _, b in rendering.spans])  # type: ignore[union-attr]
    span = np.searchsorted(starts, offsets[:, 0], side="right") - 1  # the last span that starts at or before the token
    inside = (offsets[:, 1] > starts[span]) & (offsets[:, 0] < ends[span]) & (offsets[:, 1] <= reach[span])
    return ((span >= 0) & inside).astype(np.uint8)


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokenize plain texts, each followed by the end-of-sequence token; every token learns.

    A tokenizer that begins sequences with a token of its own (Llama's BOS) does so here too.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path}: has no eos_token to close plain texts with; set one")
    out = []
    for ids in tokenizer(list(texts))["input_ids"]:
        tokens = np.array(ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id], np.int32)
        out.append((tokens, np.ones(len(tokens), np.uint8)))
    return out


def tokenize_conversation(
    conversation: Conversation | Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[Span]]:
    """Tokens of a conversation, and the token spans ``[start, end)`` in it that carry no loss.

    The second value is everything that is not the assistant's: system and user turns, tool results, role headers, and
    the blanks between turns. ``compute_loss_mask`` turns the pair into a mask.

    Args:
        conversation: a list of messages, or any row that ``canonical_row`` takes.
        tools: tools offered in the conversation; a row's own tools are used when this is None.

    Raises:
        BadRow: the conversation cannot be rendered or holds no assistant message.
        UserError: the tokenizer's chat template cannot be used.
    """
    row: dict[str, Any] = dict(conversation) if isinstance(conversation, Mapping) else {"messages": list(conversation)}
    if tools is not None:
        row["tools"] = list(tools)
    tokens, mask = _encode_row(row, tokenizer)
    edges = np.flatnonzero(np.diff(np.concatenate([[1], mask, [1]]))).tolist()
    return tokens.tolist(), list(zip(edges[::2], edges[1::2], strict=True))


def compute_loss_mask(tokens: Sequence[int], user_spans: Iterable[Span]) -> list[int]:
    """1 for each token that learns: all but those in ``user_spans`` (token positions ``[start, end)``).

    >>> compute_loss_mask([5, 6, 7, 8], [(0, 2)])
    [0, 0, 1, 1]
    """
    mask = [1] * len(tokens)
    for start, end in user_spans:
        if not 0 <= start <= end <= len(tokens):
            raise ValueError(f"span ({start}, {end}) does not lie in {len(tokens)} tokens")
        mask[start:end] = [0] * (end - start)
    return mask


def prepare_sft_sample(
    row: Mapping[str, Any] | Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Sample:
    """One training sample from one row of any known format (or a list of messages).

    Raises:
        BadRow: the row cannot be used, or has more than ``max_length`` tokens; nothing is ever cut.
        UserError: the tokenizer cannot be used.
    """
    tokens, mask = _encode_row(row if isinstance(row, Mapping) else {"messages": list(row)}, tokenizer)
    if max_length is not None and len(tokens) > max_length:
        raise BadRow(f"has {len(tokens):,} tokens, more than max_length {max_length:,}")
    return Sample(tokens=tokens.tolist(), loss_mask=mask.tolist())


def _encode_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    conversation = canonical_row(row)
    if "text" in conversation:
        return encode_texts([conversation["text"]], tokenizer)[0]
    return encode_renderings([render_conversation(conversation, tokenizer)], tokenizer)[0]
