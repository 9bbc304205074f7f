"""The entry point of the ``rollouts`` command: finds the verb, splits off recipe overrides, reports bad input."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import rollouts
from rollouts.errors import RunError, UserError
from rollouts.providers.errors import ProviderError

# In the order in which a newcomer meets them; each is a module of rollouts.cli with add_parser() and run().
VERBS = tuple("speedrun tokenizer pretrain sft dpo reward-model rl sft+rl data export serve chat".split())

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the command; flags are not shortened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over here, where the verb's own flags are known, rather than in the parser above."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            flag = next((a.partition("=")[0] for a in left if a.startswith("-")), "")
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(left)}" + (f"; did you mean {near[0]}?" if near else ""))
        return found, left


def build_parser() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and each verb's own parser by name."""
    parser = Parser(
        prog="rollouts",
        description="Post-training of language models.",
        epilog="Recipes are YAML files; any key of one can be set on the command line: --train.batch_size 16. "
        "`rollouts VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"rollouts {rollouts.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in VERBS:
        verb_module(verb).add_parser(subparsers)
    return parser, dict(subparsers.choices)


def verb_module(verb: str) -> Any:
    return importlib.import_module(f"rollouts.cli.{verb.replace('-', '_').replace('+', '_')}")


def split_overrides(argv: Sequence[str], flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate recipe overrides (``--train.batch_size 16`` or ``--train.batch-size=16``) from the verb's own ``flags``.

    argparse alone would take an override's value for the recipe's path when it comes first.

    Returns:
        The arguments left for argparse, and the overrides by dotted key. The last of a repeated key wins.

    Raises:
        UserError: an override has no value.
    """
    left: list[str] = []
    overrides: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if not name.startswith("--") or name == "--" or name in flags:
            left.append(token)
            continue
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise UserError(f"{name} has no value; write {name} VALUE")
        overrides[name.removeprefix("--").replace("-", "_")] = value
    return left, overrides


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Parse a whole command line; None when there is no verb. ``overrides`` holds the recipe keys that were set."""
    parser, verbs = build_parser()
    if not argv:
        parser.print_help()
        return None
    verb = argv[0]
    overrides: dict[str, str] = {}
    if verb in verbs and verbs[verb].get_default("takes_overrides"):
        rest, overrides = split_overrides(argv[1:], list(verbs[verb]._option_string_actions))
        argv = [verb, *rest]
    elif verb not in verbs and not verb.startswith("-"):
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(verbs)}"
        raise UserError(f"{verb!r} is not a verb of rollouts; {hint}")
    args = parser.parse_args(argv)
    args.overrides = overrides
    return args


def set_up_logging() -> None:
    """Send the package's messages to stderr as plain lines; ranks other than the first show warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("rollouts")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


# What the machine refuses, whoever asks: no mistake of the program, so no traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Returns:
        The exit code: 0 done, 1 failed on the way (one line on stderr), 2 bad input (one line), 130 interrupted.
    """
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args is None:
            return 0
        set_up_logging()
        return verb_module(args.verb).run(args)
    except RunError as error:  # first, for a checkpoint that could not be written is a UserError too
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (ProviderError, FloatingPointError) as error:  # a server that failed; gradients that are no numbers
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left: `rollouts data check FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; mend that, and give the same command again", file=sys.stderr)
        return 1
