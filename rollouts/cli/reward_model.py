"""``rollouts reward-model``: training a judge of answers."""

from __future__ import annotations

import argparse
from typing import Any

from rollouts.cli.train import add_train_parser, run_training


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    add_train_parser(
        subparsers,
        "reward-model",
        help="train a reward model on preferences between answers",
        description="Reward-model training: a score that is higher for the chosen answers of pairs. What it writes is "
        "a sequence classifier with one label. Running it again in the same run folder resumes it.",
    )


def run(args: argparse.Namespace) -> int:
    return run_training("reward-model", args)
