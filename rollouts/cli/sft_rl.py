"""``rollouts sft+rl``: fine-tune on conversations, then go on by reinforcement learning, from one recipe."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from rollouts.cli import rl
from rollouts.cli.common import add_recipe_arguments, resolve_recipe
from rollouts.cli.train import run_in_turn, train_on_data
from rollouts.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "sft+rl",
        help="fine-tune, then reinforcement learning from the model that comes out",
        description="Supervised fine-tuning, then reinforcement learning from its model: the sections sft and rl of "
        "one recipe, as two runs in RUN/sft and RUN/rl. Running it again in the same run folder goes on.",
    )
    add_recipe_arguments(parser)
    parser.epilog = "Every key of the recipe is a flag too, for example --sft.train.batch_size 16 --rl.algorithm dapo."


def run(args: argparse.Namespace) -> int:
    """Run both stages. What is wrong with the rewards and prompts of the second is found before the first begins."""
    recipe: Any = resolve_recipe("sft+rl", args)
    if recipe is None:
        return 0

    from rollouts.recipes import build, build_rl
    from rollouts.recipes.run_folder import RunState, create_run, inspect_run

    is_new = inspect_run(recipe) is RunState.NEW and os.environ.get("RANK", "0") == "0"
    build.require_loggers(recipe.rl)
    build_rl.load_data(recipe.rl, build_rl.load_functions(recipe.rl))
    if is_new:
        create_run(recipe)
    try:
        return run_in_turn([(recipe.sft, train_on_data), (recipe.rl, rl.train)])
    except UserError:
        folder = Path(recipe.run_dir)
        if is_new and [p.name for p in folder.iterdir()] == ["recipe.yaml"]:  # nothing has been done in it
            shutil.rmtree(folder)
        raise
