"""`rollouts data check FILE`: every bad row by file and line, length statistics, and what would be learned."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("data", help="look at a data set before training on it")
    verbs = parser.add_subparsers(dest="data_verb", metavar="check", required=True)
    check = verbs.add_parser(
        "check",
        help="report bad rows, lengths, and one sample with what learns marked",
        description="Read every row as training would. Exit code 2 when a row is bad, unless --on-bad-row skip.",
    )
    check.add_argument("file", metavar="FILE", help="a data file, a folder of them, or the name of a hub data set")
    check.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer or model folder: count tokens, render its template"
    )
    check.add_argument("--max-length", type=int, metavar="N", help="report samples with more tokens as too long")
    check.add_argument(
        "--on-bad-row", choices=("fail", "skip"), default="fail", help="fail: exit 2 on bad rows (default)"
    )
    check.add_argument("--text-field", metavar="NAME", help="read this field of every row as plain text")
    check.add_argument("--subset", metavar="NAME", help="configuration of a hub data set")
    check.add_argument("--split", default="train", metavar="NAME", help="split of a hub data set (default: train)")


def run(args: argparse.Namespace) -> int:
    """Print the report to stdout. Returns 0, or 2 when rows are bad and not to be skipped."""
    from rollouts.training.datasets.check import check_file, summary_lines
    from rollouts.training.datasets.sources import DatasetSpec

    tokenizer = None
    if args.tokenizer is not None:
        from rollouts.models.load import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
    spec = DatasetSpec(args.file, text_field=args.text_field, subset=args.subset, split=args.split)
    result = check_file(spec, tokenizer, max_length=args.max_length, on_problem=print)
    for line in summary_lines(result, color=sys.stdout.isatty()):
        print(line)
    if result.report.bad_rows and args.on_bad_row == "fail":
        bad = f"{len(result.report.bad_rows):,} bad rows in {args.file}"
        hint = "fix them, or leave them out with on_bad_row: skip (--on-bad-row skip)"
        print(f"error: {bad}; {hint}", file=sys.stderr)
        return 2
    return 0
