"""``rollouts speedrun``: the whole pipeline on data made by code, from nothing to a report of what changed."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.cli.common import add_recipe_arguments, resolve_recipe

if TYPE_CHECKING:
    from rollouts.pipeline.stages import SpeedrunConfig
    from rollouts.recipes.schema import SpeedrunRecipe

DEFAULT_RECIPE = Path(__file__).parents[1] / "recipes" / "speedrun.yaml"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "speedrun",
        help="train a tokenizer, a base model and a chat model from nothing, in minutes on a CPU",
        description="Make data, train a tokenizer and a base model, fine-tune it on conversations, let it learn from "
        "its own answers, evaluate all three and write a report. "
        "Running it again in the same run folder goes on where it stopped.",
    )
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    args.recipe = args.recipe or DEFAULT_RECIPE
    recipe: Any = resolve_recipe("speedrun", args)
    if recipe is None:
        return 0

    from rollouts.recipes.run_folder import RunState, create_run, inspect_run

    folder = Path(recipe.run_dir)
    state = inspect_run(recipe)

    from rollouts.models import parse_device
    from rollouts.pipeline.speedrun import run_speedrun

    config = build_config(recipe)
    parse_device(config.device)  # before anything is written
    if state is RunState.NEW:
        create_run(recipe)
    try:
        report = run_speedrun(folder, config, startup_seconds=time.perf_counter() - started)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on in {folder}", file=sys.stderr)
        return 130
    print(summarize(report, folder))
    return 0


def build_config(recipe: SpeedrunRecipe) -> SpeedrunConfig:
    """The recipe as the pipeline's own objects."""
    from rollouts.models import ModelConfig
    from rollouts.pipeline.stages import RLStage, SpeedrunConfig, TrainingStage
    from rollouts.training.backends.optimizers import OptimizerConfig, ScheduleConfig

    values = recipe.model_dump(exclude={"kind", "run_dir"})
    for name, kind in (("base", TrainingStage), ("sft", TrainingStage), ("rl", RLStage)):
        stage = values[name]
        stage["optimizer"] = OptimizerConfig(**stage["optimizer"])
        stage["schedule"] = ScheduleConfig(**stage["schedule"])
        values[name] = kind(**stage)
    return SpeedrunConfig(**values | {"model": ModelConfig(**values["model"])})


def summarize(report: dict[str, Any], folder: Path) -> str:
    """What came out, where it lies, and what to try next, as the last lines a person reads."""
    from rollouts.progress import format_duration

    command = "rollouts" if shutil.which("rollouts") else f"{Path(sys.executable).parent / 'rollouts'}"
    accuracy = report["accuracy"]
    lines = ["", f"{'held-out problems':<20}{'BASE':>8}{'SFT':>8}{'RL':>8}   95% interval of RL"]
    for family, rl in accuracy["rl"].items():
        reached = "".join(f"{accuracy[model][family]['accuracy']:>8.1%}" for model in ("base", "sft", "rl"))
        lines.append(f"{family:<20}{reached}   {rl['low']:.0%} to {rl['high']:.0%}")
    return "\n".join(
        [
            *lines,
            "",
            f"Done in {format_duration(report['seconds'])}.",
            f"Report:  {folder / 'report.html'} (also report.md, report.json)",
            f"Model:   {folder / 'rl' / 'final'} (Hugging Face layout)",
            "Talk to it:",
            f"  {command} chat {folder / 'rl'}       in the terminal",
            f"  {command} serve {folder / 'rl'}      in the browser",
            "Try next:",
            f"  {command} speedrun --seed 1 --run_dir runs/seed1     how much of this is luck",
            f"  {command} export {folder / 'rl'} OUT --dtype bfloat16",
        ]
    )
