"""``rollouts pretrain``: pre-training on documents."""

from __future__ import annotations

import argparse
from typing import Any

from rollouts.cli.train import add_train_parser, run_training


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    add_train_parser(
        subparsers,
        "pretrain",
        help="train a model on plain text",
        description="Pre-training: learn every token of documents, packed into blocks. "
        "Running it again in the same run folder resumes it.",
    )


def run(args: argparse.Namespace) -> int:
    return run_training("pretrain", args)
