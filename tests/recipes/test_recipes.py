"""Recipes: what loads, what is refused and with which line, and where relative paths start."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.errors import UserError
from rollouts.recipes import schema
from rollouts.recipes.load import dotted_keys, load_recipe, nearest_key, to_yaml
from rollouts.recipes.schema import SFTRecipe

MINIMAL: dict[str, Any] = {"model": {"path": "org/model"}, "data": {"train": "rows.jsonl"}}


def write(folder: Path, values: Any, name: str = "recipe.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def error_of(path: Path | None, overrides: dict[str, str] | None = None, kind: str = "sft") -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(kind, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_fill_a_minimal_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("sft", write(tmp_path, MINIMAL))
    assert isinstance(recipe, SFTRecipe)
    assert (recipe.kind, recipe.seed, recipe.train.batch_size, recipe.optimizer.name) == ("sft", 0, 32, "adamw")


def test_relative_paths_start_at_the_recipe_and_overrides_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(tmp_path / "recipes", {**MINIMAL, "run_dir": "out", "data": {"train": ["a.jsonl", "../b.parquet"]}})
    recipe = load_recipe("sft", path, {"data.validation": "[c.jsonl, /d.csv]"})
    assert Path(recipe.run_dir) == tmp_path / "recipes" / "out"
    assert [Path(s.path).resolve() for s in recipe.data.train] == [tmp_path / "recipes/a.jsonl", tmp_path / "b.parquet"]
    assert [Path(s.path) for s in recipe.data.validation] == [here / "c.jsonl", Path("/d.csv")]


def test_run_dir_defaults_to_runs_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "elsewhere", MINIMAL, "gsm8k.yaml")
    assert Path(load_recipe("sft", path).run_dir) == tmp_path / "runs" / "gsm8k"


def test_a_hub_name_stays_a_name_unless_a_folder_of_that_name_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_recipe("sft", path).model.path == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert load_recipe("sft", path).model.path == str(tmp_path / "org" / "model")


def test_short_forms(tmp_path: Path) -> None:
    recipe = load_recipe("sft", write(tmp_path, {"model": "./base", "data": {"train": "x.jsonl"}}))
    assert recipe.model.path == str(tmp_path / "base")
    assert [s.path for s in recipe.data.train] == [str(tmp_path / "x.jsonl")]


def test_overrides_reach_into_sections_lists_and_short_forms(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": "org/model", "data": {"train": ["a.jsonl", {"path": "b.jsonl"}]}})
    recipe = load_recipe(
        "sft", path, {"data.train.0.repeat": "2", "model.precision": "float32", "optimizer.lr": "1e-3", "seed": "7"}
    )
    assert [s.repeat for s in recipe.data.train] == [2, 1]
    assert (recipe.model.path, recipe.model.precision) == ("org/model", "float32")
    assert (recipe.optimizer.lr, recipe.seed) == (1e-3, 7)


def test_an_override_does_not_need_a_file() -> None:
    recipe = load_recipe("sft", None, {"model": "org/model", "data.train": "rows.jsonl"})
    assert recipe.data.train[0].path == str(Path.cwd() / "rows.jsonl")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.bach_size", "train.batch_size"),
        ("train.lr", "optimizer.lr"),
        ("learning_rate", None),
        ("data.trian", "data.train"),
        ("model.init.hidden_sise", "model.init.hidden_size"),
        ("max_grad_norm", "train.max_grad_norm"),
    ],
)
def test_nearest_key(wrong: str, right: str | None) -> None:
    assert nearest_key(wrong, SFTRecipe) == right


def test_unknown_key_in_the_file_names_file_key_and_neighbor(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "train": {"bach_size": 3}})
    assert error_of(path) == f"{path}: train.bach_size is not a known key; did you mean train.batch_size?"


def test_unknown_key_on_the_command_line(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, MINIMAL), {"train.bach_size": "3"})
    assert message == "--train.bach_size is not a known key; did you mean --train.batch_size?"


def test_unknown_section_on_the_command_line(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, MINIMAL), {"optimiser.lr": "3"})
    assert message == "--optimiser is not a known key; did you mean --optimizer?"


def test_unknown_key_inside_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "data": {"train": [{"path": "a.jsonl", "repeats": 2}]}})
    assert error_of(path) == f"{path}: data.train.0.repeats is not a known key; did you mean data.train.repeat?"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"batch_size": 0}}, ["train.batch_size", "greater than or equal to 1"]),
        ({"train": {"batch_size": "many"}}, ["train.batch_size", "'many'", "integer"]),
        ({"train": {"num_steps": 5, "num_epochs": 1}}, ["train", "num_steps and num_epochs exclude one another"]),
        ({"model": {"path": "a/b", "init": {}, "tokenizer": "./t"}}, ["model", "path and init exclude one another"]),
        ({"model": {}}, ["model", "neither path nor init"]),
        ({"model": {"init": {}}}, ["model", "needs a tokenizer"]),
        ({"model": None}, ["model is null where a section of keys was expected"]),
        ({"data": {"train": [3]}}, ["data.train.0 is 3 where a section of keys was expected"]),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ["optimizer.betas.1 is 1.0", "less than 1"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr", "finite"]),
        ({"loggers": ["mlflow"]}, ["loggers.0", "'mlflow'", "tensorboard"]),
        ({"data": {}}, ["data.train is missing"]),
        ({"data": {"train": []}}, ["data.train", "at least 1 item"]),
        ({"kind": "pretrain"}, ["kind is pretrain", "rollouts pretrain"]),
        ({"kind": "stf"}, ["kind is stf", "sft"]),
        ({"seed": -1}, ["seed"]),
    ],
)
def test_refused_values(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path, {**MINIMAL, **change})
    message = error_of(path)
    assert message.startswith(f"{path}: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty"]),
        ("- a\n- b\n", ["holds a list"]),
        ("model: [\n", [":2: not valid YAML"]),
        ("seed: 1\ntrain:\n  log_every: 1\n  log_every: 2\n", [":4: not valid YAML", "'log_every' stands twice"]),
        ("model: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
    ],
)
def test_refused_files(tmp_path: Path, text: str, words: list[str]) -> None:
    message = error_of(write(tmp_path, text))
    assert all(word in message for word in words), message


def test_missing_file_folder_and_bad_encoding(tmp_path: Path) -> None:
    assert "no such recipe" in error_of(tmp_path / "none.yaml")
    assert "is a folder" in error_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    assert "not UTF-8" in error_of(tmp_path / "latin.yaml")


def test_override_outside_a_list(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, {**MINIMAL, "data": {"train": ["a.jsonl"]}}), {"data.train.3.repeat": "1"})
    assert "the list has 1 entries" in message


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "train": st.fixed_dictionaries(
                {"batch_size": st.integers(1, 10**6), "packing": st.booleans()},
                optional={"num_steps": st.integers(1, 10**9)},
            ),
            "optimizer": st.fixed_dictionaries(
                {"lr": st.floats(1e-12, 10), "name": st.sampled_from(["adamw", "muon"])}
            ),
            "run_dir": st.text(st.characters(codec="utf-8", exclude_characters="\0/~"), min_size=1, max_size=20),
        },
        optional={"seed": st.integers(0, 2**32 - 1), "loggers": st.lists(st.sampled_from(["jsonl", "console"]))},
    )
)
def test_the_resolved_recipe_loads_to_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    recipe = load_recipe("sft", write(folder, {**MINIMAL, **change}))
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), to_yaml(recipe))
    assert load_recipe("sft", elsewhere) == recipe


def test_the_documented_recipe_holds_every_key_and_its_default(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    documented = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    unlisted = ("model.path", "model.lora.", "data.validation.")  # in comments, or like data.train
    keys = {key for key in dotted_keys(SFTRecipe) if not key.startswith(unlisted)}
    assert {key.removeprefix(".") for key in keys_of(documented)} == keys
    recipe = load_recipe("sft", write(tmp_path, documented))
    minimal = {
        "run_dir": "runs/example",
        "model": {"init": {}, "tokenizer": "./tokenizer"},
        "data": {"train": "train.jsonl"},
    }
    assert recipe == load_recipe("sft", write(tmp_path, minimal))


def keys_of(values: Any, prefix: str = "") -> set[str]:
    if isinstance(values, list):
        return set().union(*(keys_of(v, prefix) for v in values))
    if not isinstance(values, dict):
        return set()
    return {f"{prefix}.{k}" for k in values}.union(*(keys_of(v, f"{prefix}.{k}") for k, v in values.items()))


SAME_FIELDS = [
    (schema.ModelInit, "rollouts.models.make", "ModelConfig"),
    (schema.Lora, "rollouts.models.lora", "LoRAConfig"),
    (schema.DataSpec, "rollouts.training.datasets.sources", "DatasetSpec"),
    (schema.Optimizer, "rollouts.training.backends.optimizers", "OptimizerConfig"),
    (schema.Schedule, "rollouts.training.backends.optimizers", "ScheduleConfig"),
]


@pytest.mark.parametrize(("section", "module", "name"), SAME_FIELDS)
def test_sections_repeat_the_librarys_fields_and_defaults(
    section: type[schema.Section], module: str, name: str
) -> None:
    configured = getattr(importlib.import_module(module), name)
    ours = {k: None if f.is_required() else f.default for k, f in section.model_fields.items()}
    theirs = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(configured)}
    if section is schema.Lora:  # one name may stand without a list there
        theirs["target_modules"] = [theirs["target_modules"]]
    assert ours == theirs


def test_train_repeats_the_fields_and_defaults_of_the_loop() -> None:
    from rollouts.training.types import SFTTrainingConfig

    ours = {k: f.default for k, f in schema.Train.model_fields.items()}
    for field in dataclasses.fields(SFTTrainingConfig):
        if field.name not in ("num_steps", "batch_size", "seed"):
            assert ours[field.name] == field.default, field.name


def test_speedrun_repeats_the_fields_and_defaults_of_its_pipeline() -> None:
    from rollouts.pipeline import stages

    for section, configured in (
        (schema.SpeedrunStage, stages.TrainingStage),
        (schema.SpeedrunRecipe, stages.SpeedrunConfig),
    ):
        theirs = {f.name: f for f in dataclasses.fields(configured)}
        assert section.model_fields.keys() - theirs.keys() <= {"kind", "run_dir"}
        assert theirs.keys() <= section.model_fields.keys()
        for name, field in theirs.items():
            ours = section.model_fields[name]
            if field.default_factory is not dataclasses.MISSING:
                assert ours.default.model_dump() == dataclasses.asdict(field.default_factory())
            elif field.default is not dataclasses.MISSING:
                assert ours.default == field.default, name
            else:
                assert ours.is_required()
