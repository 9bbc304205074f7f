"""A run's folder: whether it is new, to be resumed or finished, and how it comes to be, all at once or not at all.

runs/example/
  recipe.yaml     the resolved recipe; a folder that has one holds a run
  metrics.jsonl   one object a step
  checkpoints/    step_000050/ ..., latest
  final/          the trained model; a run that has one is finished
  report.html     what came out; also report.md and report.json
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from rollouts.errors import UserError
from rollouts.models.folders import check_place
from rollouts.recipes.load import load_recipe, to_yaml
from rollouts.recipes.schema import Recipe

# Keys that may change when a run goes on: they say where and how it computes and reports, not what it learns.
FREE_KEYS = (
    "run_dir",
    "device",
    "loggers",
    "distributed",
    "data.cache_dir",
    "model.activation_checkpointing",
    "model.compile",
    "train.max_tokens_per_micro_batch",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "engine",
    "base.log_every",
    "sft.log_every",
    "rl.log_every",
)


class RunState(StrEnum):
    """What a run's folder says about the run."""

    NEW = "new"
    RESUME = "resume"
    FINISHED = "finished"


def inspect_run(recipe: Recipe) -> RunState:
    """Look at ``recipe.run_dir`` without changing anything.

    Raises:
        UserError: the folder holds a run of another recipe (the first key that differs is named), or something else, or
            cannot be made.
    """
    folder = Path(recipe.run_dir)
    saved = folder / "recipe.yaml"
    if saved.is_file():
        refuse_changes(recipe, saved)
        return RunState.FINISHED if (folder / "final").is_dir() else RunState.RESUME
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and holds no run (no recipe.yaml); choose another with --run_dir FOLDER")
    check_place(folder)
    return RunState.NEW


def refuse_changes(recipe: Recipe, saved: Path) -> None:
    """Raise UserError when ``recipe`` would not continue the run whose recipe was saved, naming the first key."""
    before, now = _flatten(load_recipe(recipe.kind, saved).model_dump()), _flatten(recipe.model_dump())
    for key in dict.fromkeys([*now, *before]):
        names = (key, re.sub(r"^(sft|rl)\.", "", key))  # a stage of sft+rl is as free as a run of its own
        if before.get(key) != now.get(key) and not any(f"{n}.".startswith(f"{f}.") for n in names for f in FREE_KEYS):
            raise UserError(
                f"{saved.parent}: holds a run with {key} {before.get(key)!r}, now it is {now.get(key)!r}; set it back, "
                f"or start a new run from this one with --run_dir FOLDER --fork-from {saved.parent}"
            )


def create_run(recipe: Recipe, fill: Callable[[Path], None] | None = None) -> Path:
    """Make the run's folder with ``recipe.yaml`` in it; ``fill`` may add to it before it appears under its name.

    Raises:
        UserError: the folder cannot be made there.
    """
    folder = Path(recipe.run_dir)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another with --run_dir FOLDER") from error
    try:
        if fill is not None:
            fill(partial)
        (partial / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        partial.rename(folder)  # replaces an empty folder, never one with files
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted keys."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple) and value:
        items = enumerate(value)
    else:
        return {key: value}
    return {k: v for name, child in items for k, v in _flatten(child, f"{key}.{name}".lstrip(".")).items()}
