"""Preference data: two answers to one prompt of which one is better, or one answer that is good or bad.

Shapes: len = tokens of one whole sequence, prompt and answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from rollouts.errors import UserError
from rollouts.training.datasets.dataset_loaders import LoadReport, Problem, Source, judge, mixture, source_specs
from rollouts.training.datasets.rows import BadRow, Message, canonical_row, check_json, plain_json, prompt_and_answer
from rollouts.training.datasets.sft import Rendering, encode_renderings, render_conversation, turn_format
from rollouts.training.datasets.sources import Row, read_rows
from rollouts.training.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, whole sequences whose ``loss_mask`` is 1 on the answer alone.

    One of them is None where a single answer was judged (KTO's rows with a label).
    """

    id: str
    chosen: Sample | None
    rejected: Sample | None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        """The answers there are, the chosen one first."""
        return [s for s in (self.chosen, self.rejected) if s is not None]

    def __len__(self) -> int:
        return sum(len(s) for s in self.samples)


@dataclass
class PreferenceDataset(Sequence[PreferencePair]):
    """Pairs in memory, and what became of the rows they were read from."""

    pairs: list[PreferencePair]
    report: LoadReport

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: Any) -> Any:
        return self.pairs[i]


def load_preference_dataset(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    on_bad_row: str = "fail",
    seed: int = 0,
) -> PreferenceDataset:
    """Pairs to learn preferences from, rendered by the tokenizer's chat template.

    Rows are those of ``preference_row``. The answer learns, with the token that ends its turn; earlier turns of the
    assistant belong to the prompt.

    Args:
        sources, on_bad_row, seed: as ``load_sft_dataset`` has them.
        max_length: pairs in which a sequence has more tokens are left out whole, counted and named; never cut.

    Raises:
        UserError: a source that is missing or empty; bad rows with "fail"; an unusable tokenizer.
    """
    specs = source_specs(sources)
    report = LoadReport()
    found: list[list[PreferencePair]] = []
    for spec in specs:
        found.append([])
        rows = read_rows(spec)
        while batch := list(islice(rows, _ROWS_AT_ONCE)):
            for pair in _encode_rows(batch, tokenizer, max_length, report):
                found[-1].append(pair)
            if spec.max_samples is not None and len(found[-1]) >= spec.max_samples:
                del found[-1][spec.max_samples :]
                break
    report.samples = sum(map(len, found))
    judge(report, on_bad_row, max_length)
    for spec, pairs in zip(specs, found, strict=True):
        if not pairs:
            raise UserError(f"{spec.path}: holds no usable preference pairs; check the file")
    flat = [pair for pairs in found for pair in pairs]
    return PreferenceDataset([flat[i] for i in mixture(specs, [len(pairs) for pairs in found], seed)], report)


def preference_row(data: Any) -> dict[str, Any]:
    """A row as ``{"prompt": messages, "chosen": messages or None, "rejected": messages or None, "tools", "rest"}``.

    The formats of the field:

    - ``prompt``, ``chosen``, ``rejected``: texts or lists of messages (TRL; ``instruction`` and ``input``, or
      ``system`` and ``question``, will do for the prompt);
    - ``chosen``, ``rejected`` as whole conversations with a common beginning (UltraFeedback's binarized form);
    - ``chosen``, ``rejected`` as texts of ``\\n\\nHuman:`` and ``\\n\\nAssistant:`` turns (Anthropic's HH);
    - ``prompt``, ``completion`` and ``label``, true for a good answer (KTO).

    Raises:
        BadRow: none of these, or two answers that are the same or answer different prompts.
    """
    if not isinstance(data, Mapping):
        raise BadRow("a row must be an object with named fields")
    fields = {k: v for k, v in data.items() if v is not None}
    if "label" in fields and "chosen" not in fields:
        return _labelled(fields)
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise BadRow(f"has no {name}: expected prompt, chosen and rejected, or prompt, completion and label")
    chosen, rejected = (_answer(fields, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    prompt, chosen, rejected = _split_common(fields, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **_others(fields)}


def _labelled(fields: Mapping[str, Any]) -> dict[str, Any]:
    label = fields["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise BadRow(f"label must be true or false, got {label!r:.40}")
    messages = canonical_row({k: v for k, v in fields.items() if k != "label"}).get("messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("has a label but no answer of the assistant to judge")
    prompt, answer = _at_last_user(messages)
    both = (answer, None) if label else (None, answer)
    return {"prompt": prompt, "chosen": both[0], "rejected": both[1], **_others(fields)}


def _answer(fields: Mapping[str, Any], name: str) -> list[Message]:
    """An answer's messages: the answer alone, or the whole conversation it ends."""
    value = fields[name]
    messages: Any = value
    if isinstance(value, str):
        is_dialogue = _HH_TURN.match(value) and "prompt" not in fields
        messages = _hh_messages(value, name) if is_dialogue else [{"role": "assistant", "content": value}]
    elif isinstance(value, Mapping):
        messages = [value]
    try:
        found = canonical_row({"messages": messages})["messages"]
    except BadRow as e:
        raise BadRow(f"{name}: {e}") from None
    if found[-1]["role"] != "assistant":
        raise BadRow(f"{name} ends with a message of the {found[-1]['role']}, not of the assistant")
    return found


def _hh_messages(text: str, name: str) -> list[Message]:
    pieces = _HH_TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2])]
    if empty := [i for i, m in enumerate(messages, 1) if not m["content"]]:
        raise BadRow(f"{name}: turn {empty[0]} of the dialogue is empty")
    return messages


def _split_common(
    fields: Mapping[str, Any], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    whole = [any(m["role"] == "user" for m in answer) for answer in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise BadRow("one of chosen and rejected is a whole conversation, the other an answer alone")
    if not whole[0]:
        return _prompt(fields), chosen, rejected
    (prompt, chosen), (other, rejected) = _at_last_user(chosen), _at_last_user(rejected)
    if prompt != other:
        raise BadRow("chosen and rejected answer different prompts")
    if "system" in fields and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": fields["system"]}, *prompt]
    return prompt, chosen, rejected


def _prompt(fields: Mapping[str, Any]) -> list[Message]:
    text = fields.get("prompt")
    if isinstance(text, str) and _HH_TURN.match(text):
        return _hh_messages(text.rstrip().removesuffix("\n\nAssistant:"), "prompt")
    answers = ("chosen", "rejected", "completion", "response", "output", "answer")
    try:
        return prompt_and_answer({k: v for k, v in fields.items() if k not in answers})[0]
    except BadRow as e:
        raise BadRow(f"the prompt of chosen and rejected: {e}") from None


def _at_last_user(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation divided after its last user message."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    if last < 0:
        raise BadRow("has no user message: nothing to answer")
    return messages[: last + 1], messages[last + 1 :]


def _others(fields: Mapping[str, Any]) -> dict[str, Any]:
    used = {"prompt", "chosen", "rejected", "completion", "response", "label", "messages", "conversations", "question"}
    used |= {"instruction", "input", "output", "system", "tools"}
    rest = {k: plain_json(v) for k, v in fields.items() if k not in used}
    check_json(rest, "row")
    return {"tools": fields.get("tools"), "rest": rest}


def _encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None, report: LoadReport
) -> Iterator[PreferencePair]:
    turns = turn_format(tokenizer)
    ready: list[tuple[Row, dict[str, Any], list[str]]] = []
    renderings: list[Rendering] = []
    for row in rows:
        report.rows += 1
        try:
            if row.error:
                raise BadRow(row.error)
            found = preference_row(row.data)
            names = [name for name in ("chosen", "rejected") if found[name] is not None]
            rendered = []
            for name in names:
                conversation = canonical_row({"messages": found["prompt"] + found[name], "tools": found["tools"]})
                whole = render_conversation(conversation, tokenizer, turns)
                spoken = sum(m["role"] == "assistant" for m in found[name])
                rendered.append(Rendering(whole.text, whole.spans[-spoken:]))
            renderings += rendered
            ready.append((row, found, names))
        except BadRow as e:
            report.bad_rows.append(Problem(row.file, row.line, str(e)))
    encoded = iter(encode_renderings(renderings, tokenizer) if renderings else ())
    for row, found, names in ready:
        samples: dict[str, Sample] = {}
        for name in names:
            tokens, mask = next(encoded)
            samples[name] = Sample(
                tokens=tokens.tolist(), loss_mask=mask.tolist(), id=f"{row.where} {name}", group_id=row.where
            )
        longest = max(len(s) for s in samples.values())
        if max_length is not None and longest > max_length:
            reason = f"has {longest:,} tokens, more than max_length {max_length:,}"
            report.too_long.append(Problem(row.file, row.line, reason))
        elif not all(s.num_loss_tokens for s in samples.values()):
            report.bad_rows.append(Problem(row.file, row.line, "has an answer without a token that could be learned"))
        else:
            yield PreferencePair(row.where, samples.get("chosen"), samples.get("rejected"), found["rest"])
