"""`rollouts tokenizer`: train a byte-level BPE tokenizer on files of text or conversations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.cli.common import add_recipe_arguments, resolve_recipe
from rollouts.errors import UserError

if TYPE_CHECKING:
    from rollouts.recipes.schema import DataSpec


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a tokenizer",
        description="Train a byte-level BPE tokenizer with a chat template, saved as a Hugging Face folder. "
        "Give a recipe, or --data, --vocab-size and --out.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--data", nargs="+", metavar="FILE", help="short for data.train: files or folders to read")
    parser.add_argument("--vocab-size", metavar="N", help="short for tokenizer.vocab_size: tokens in all")
    parser.add_argument("--out", metavar="DIR", help="short for run_dir: the folder to write")


def run(args: argparse.Namespace) -> int:
    flags = {"data.train": args.data, "tokenizer.vocab_size": args.vocab_size, "run_dir": args.out}
    short = {key: json.dumps(value) for key, value in flags.items() if value is not None}  # JSON is YAML
    args.overrides = {**short, **args.overrides}
    recipe: Any = resolve_recipe("tokenizer", args)
    if recipe is None:
        return 0

    from rollouts.models.folders import check_free, new_folder
    from rollouts.models.tokenizer import save_tokenizer, train_tokenizer
    from rollouts.recipes.load import to_yaml

    check_free(recipe.run_dir)
    section = recipe.tokenizer
    tokenizer = train_tokenizer(read_texts(recipe.data.train), section.vocab_size, min_frequency=section.min_frequency)
    with new_folder(recipe.run_dir) as folder:
        save_tokenizer(tokenizer, folder)
        (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    print(f"{Path(recipe.run_dir)}: {len(tokenizer)} tokens")
    return 0


def read_texts(specs: Iterable[DataSpec]) -> Iterator[str]:
    """Every text of the sources, one after the other: documents, and what is said in conversations.

    Raises:
        UserError: a row cannot be read (file:line: reason), or a source has a share, which a vocabulary does not take.
    """
    from rollouts.training.datasets.rows import BadRow, canonical_row
    from rollouts.training.datasets.sources import DatasetSpec, read_rows

    for spec in specs:
        if spec.repeat != 1 or spec.weight is not None:
            raise UserError(f"data.train {spec.path}: repeat and weight have no effect on a tokenizer; leave them out")
        for count, row in enumerate(read_rows(DatasetSpec(**spec.model_dump()))):
            if count == spec.max_samples:
                break
            try:
                if row.error is not None:
                    raise BadRow(row.error)
                yield from texts_of(canonical_row(row.data, spec.text_field))
            except BadRow as reason:
                raise UserError(f"{row.where}: {reason}; `rollouts data check` lists every bad row") from None


def texts_of(conversation: dict[str, Any]) -> Iterator[str]:
    """The texts of one document or conversation; tools and tool calls as the JSON that a chat template writes."""
    if "text" in conversation:
        yield conversation["text"]
        return
    for tool in conversation.get("tools") or []:
        yield json.dumps(tool, ensure_ascii=False)
    for message in conversation["messages"]:
        for key in ("reasoning_content", "content"):
            if message.get(key):
                yield message[key]
        for call in message.get("tool_calls") or []:
            yield json.dumps(call["function"], ensure_ascii=False)
