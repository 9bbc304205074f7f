"""``rollouts sft``: supervised fine-tuning."""

from __future__ import annotations

import argparse
from typing import Any

from rollouts.cli.train import add_train_parser, run_training


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    add_train_parser(
        subparsers,
        "sft",
        help="fine-tune a model on conversations",
        description="Supervised fine-tuning: learn the assistant's turns of conversations. "
        "Running it again in the same run folder resumes it.",
    )


def run(args: argparse.Namespace) -> int:
    return run_training("sft", args)
