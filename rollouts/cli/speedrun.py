"""``rollouts speedrun``: the whole pipeline on data made by code, from nothing to a report of what changed."""

from __future__ import annotations

import argparse
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
        description="Make data, train a tokenizer and a base model, fine-tune it, evaluate both and write a report. "
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
    from rollouts.pipeline.stages import SpeedrunConfig, TrainingStage
    from rollouts.training.backends.optimizers import OptimizerConfig, ScheduleConfig

    values = recipe.model_dump(exclude={"kind", "run_dir"})
    for name in ("base", "sft"):
        stage = values[name]
        stage["optimizer"] = OptimizerConfig(**stage["optimizer"])
        stage["schedule"] = ScheduleConfig(**stage["schedule"])
        values[name] = TrainingStage(**stage)
    return SpeedrunConfig(**values | {"model": ModelConfig(**values["model"])})


def summarize(report: dict[str, Any], folder: Path) -> str:
    """What came out, where it lies, and what to try next, as the last lines a person reads."""
    from rollouts.progress import format_duration

    base, sft = report["accuracy"]["base"], report["accuracy"]["sft"]
    lines = ["", f"{'held-out problems':<20}{'BASE':>8}{'SFT':>8}   95% interval"]
    for family in sft:
        interval = f"{sft[family]['low']:.0%} to {sft[family]['high']:.0%}"
        lines.append(f"{family:<20}{base[family]['accuracy']:>8.1%}{sft[family]['accuracy']:>8.1%}   {interval}")
    return "\n".join(
        [
            *lines,
            "",
            f"Done in {format_duration(report['seconds'])}.",
            f"Report:  {folder / 'report.html'} (also report.md, report.json)",
            f"Model:   {folder / 'sft' / 'final'} (Hugging Face layout)",
            "Try next:",
            "  rollouts speedrun --seed 1 --run_dir runs/seed1     how much of this is luck",
            f"  rollouts data check {folder / 'data' / 'conversations.jsonl'} --tokenizer {folder / 'tokenizer'}",
            f"  rollouts export {folder / 'sft'} OUT --dtype bfloat16",
        ]
    )
