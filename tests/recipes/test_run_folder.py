"""A run's folder: new, resumed, finished or refused, and never half-made."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollouts.errors import UserError
from rollouts.recipes.load import load_recipe
from rollouts.recipes.run_folder import RunState, create_run, inspect_run
from rollouts.recipes.schema import Recipe


def recipe_for(run_dir: Path, **overrides: str) -> Recipe:
    values = {"model": "org/model", "data.train": "/rows.jsonl", "run_dir": str(run_dir)}
    return load_recipe("sft", None, values | {k.replace("__", "."): v for k, v in overrides.items()})


def test_the_life_of_a_run(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "runs" / "a")
    assert inspect_run(recipe) is RunState.NEW
    folder = create_run(recipe)
    assert load_recipe("sft", folder / "recipe.yaml") == recipe
    assert inspect_run(recipe) is RunState.RESUME
    (folder / "final").mkdir()
    assert inspect_run(recipe) is RunState.FINISHED


def test_inspecting_makes_nothing(tmp_path: Path) -> None:
    inspect_run(recipe_for(tmp_path / "runs" / "a"))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_become_a_run_and_one_with_files_may_not(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "a")
    (tmp_path / "a").mkdir()
    assert inspect_run(recipe) is RunState.NEW
    create_run(recipe)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds no run"):
        inspect_run(recipe_for(tmp_path / "b"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train__batch_size", "5"),
        ("seed", "1"),
        ("optimizer__lr", "0.5"),
        ("data__train__0__repeat", "2"),
        ("model__path", "org/other"),
        ("train__num_steps", "7"),
    ],
)
def test_a_changed_key_that_matters_is_named(tmp_path: Path, key: str, value: str) -> None:
    create_run(recipe_for(tmp_path / "a"))
    with pytest.raises(UserError) as caught:
        inspect_run(recipe_for(tmp_path / "a", **{key: value}))
    message = str(caught.value)
    assert f"holds a run with {key.replace('__', '.')} " in message and "--fork-from" in message
    assert "\n" not in message


def test_keys_that_only_say_where_and_how_may_change(tmp_path: Path) -> None:
    create_run(recipe_for(tmp_path / "a"))
    changed = recipe_for(
        tmp_path / "a",
        device="cpu",
        loggers="[console]",
        train__log_every="1",
        train__checkpoint_every="3",
        distributed__strategy="none",
        model__compile="true",
    )
    assert inspect_run(changed) is RunState.RESUME


def test_a_run_that_cannot_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "checkpoints").mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        create_run(recipe_for(tmp_path / "a"), fill)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = recipe_for(tmp_path / "file" / "run")
    for attempt in (inspect_run, create_run):
        with pytest.raises(UserError, match="cannot be made"):
            attempt(recipe)
