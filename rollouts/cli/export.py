"""`rollouts export`: turn a run or a checkpoint into a Hugging Face folder of weights and tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rollouts.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a run's model as a Hugging Face folder",
        description="Write the model of a run (its newest good checkpoint), of a checkpoint step or of any other model "
        "folder as a Hugging Face folder that transformers, vLLM and SGLang load as is.",
    )
    parser.add_argument("source", metavar="RUN_OR_STEP", help="run folder, checkpoint step or model folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: as stored)")
    parser.add_argument("--merge-lora", action="store_true", help="add a LoRA adapter into its base model's weights")


def run(args: argparse.Namespace) -> int:
    from rollouts.models.export import export_checkpoint

    source = find_source(Path(args.source).expanduser())
    export_checkpoint(source, args.out, dtype=args.dtype, merge_lora=args.merge_lora)
    print(f"{args.out}: exported from {source}")
    return 0


def find_source(folder: Path) -> Path:
    """The folder that holds the weights: of a run, its newest step that verifies, else ``final/``.

    Raises:
        UserError: no such folder, a run without a model or with several, or a step that is damaged or sharded.
    """
    from rollouts.training.checkpoints import MANIFEST, find_latest, verify_checkpoint

    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}; give a run folder or one of its checkpoint steps")
    final = folder / "final"
    if (folder / MANIFEST).is_file():
        verify_checkpoint(folder)
        step: Path | None = folder
    elif (folder / "checkpoints").is_dir() or final.is_dir():
        step = find_latest(folder / "checkpoints")
    elif stages := sorted(str(stage.parent) for stage in folder.glob("*/final")):  # of a speedrun, or of sft+rl
        raise UserError(f"{folder} holds several runs; give one of them: {', '.join(stages)}")
    else:
        return folder
    if step is not None and not (step / "shards").is_dir():
        return step
    if final.is_dir():
        return final
    if step is None:
        raise UserError(f"the run in {folder} has no checkpoint yet; let it reach one first")
    raise UserError(f"{step} is sharded, which only a run can read; let the run finish, then export its folder")
