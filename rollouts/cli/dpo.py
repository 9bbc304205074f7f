"""``rollouts dpo``: learning from preferences."""

from __future__ import annotations

import argparse
from typing import Any

from rollouts.cli.train import add_train_parser, run_training


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    add_train_parser(
        subparsers,
        "dpo",
        help="train a model on preferences between answers",
        description="Preference training: make the chosen answers of pairs likelier than the rejected ones, by DPO, "
        "IPO, KTO, SimPO or ORPO (preference.name). Running it again in the same run folder resumes it.",
    )


def run(args: argparse.Namespace) -> int:
    return run_training("dpo", args)
