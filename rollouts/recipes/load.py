"""From a YAML file and command-line overrides to a validated recipe, with errors that name the key and its neighbor."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rollouts.errors import UserError
from rollouts.recipes import preference_schema, rl_schema, sft_rl_schema  # noqa: F401  (they add to KINDS)
from rollouts.recipes.schema import KINDS, CommandLineText, Recipe


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice: plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_recipe(kind: str, path: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read, merge and validate one recipe.

    Args:
        kind: the verb's kind, a key of ``KINDS``.
        path: the YAML file; None builds the recipe from the overrides alone. Relative paths in it start at its folder.
        overrides: dotted keys to YAML values as typed; relative paths in them start at the current folder.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown, a value does not fit, two keys exclude
            one another.
    """
    overrides = overrides or {}
    values = read_yaml_mapping(Path(path)) if path is not None else {}
    found = values.setdefault("kind", kind)
    if found != kind:
        known = f"run it with `rollouts {found}`" if found in KINDS else f"the kinds are {', '.join(KINDS)}"
        raise UserError(f"{path}: kind is {found}, not {kind}; {known}")
    for key, text in overrides.items():
        set_override(values, key, text)
    if not values.get("run_dir"):
        values["run_dir"] = CommandLineText(f"runs/{Path(path).stem if path else kind}")
    base = Path(path).parent.absolute() if path is not None else Path.cwd()
    try:
        return KINDS[kind].model_validate(values, context={"base": base})
    except ValidationError as error:
        raise UserError(describe_error(error, KINDS[kind], path, overrides)) from None


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UserError naming the file, and the line where the YAML is broken."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give the path of a YAML file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the path of a recipe's YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{where}: not valid YAML: {problem or 'unreadable character'}; correct that line") from None
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise UserError(f"{path}: {what} where a mapping of keys was expected; see docs/recipes.md for a first recipe")
    return values


def set_override(values: dict[str, Any], key: str, text: str) -> None:
    """Set a dotted key (``data.train.0.repeat``) in nested ``values`` to ``text`` read as YAML.

    A section that the recipe gives in its short form, such as ``model: FOLDER``, is widened first.
    """
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        value = text  # for example a path with a colon and a space
    names = key.split(".")
    place: Any = values
    for depth, (name, following) in enumerate(zip(names, names[1:], strict=False), start=1):
        child = _get(place, name)
        if following.isdigit() and isinstance(child, str | dict):
            child = [child]
        elif isinstance(child, str):
            child = {"path": child}
        elif not isinstance(child, dict | list):
            child = {}
        _set(place, name, child, ".".join(names[:depth]))
        place = child
    _set(place, names[-1], _mark(value), key)


def _get(place: Any, name: str) -> Any:
    if isinstance(place, list):
        return place[int(name)] if name.isdigit() and int(name) < len(place) else None
    return place.get(name)


def _set(place: Any, name: str, value: Any, key: str) -> None:
    if isinstance(place, list):
        if not name.isdigit() or int(name) >= len(place):
            raise UserError(f"--{key}: the list has {len(place)} entries, so {name!r} is none of them; count from 0")
        place[int(name)] = value
    else:
        place[name] = value


def _mark(value: Any) -> Any:
    """Every text in ``value`` as CommandLineText."""
    if isinstance(value, str):
        return CommandLineText(value)
    if isinstance(value, list):
        return [_mark(v) for v in value]
    if isinstance(value, dict):
        return {k: _mark(v) for k, v in value.items()}
    return value


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe as a dotted name; keys inside a list have no index: ``data.train.path``."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for section in _sections(info.annotation):
            yield from dotted_keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def nearest_key(key: str, model: type[BaseModel]) -> str | None:
    """The key that ``key`` most likely means: a similar name in the same section, else the same name elsewhere."""
    keys = list(dotted_keys(model))
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return siblings[near[0]]
    elsewhere = [k for k in keys if k.rpartition(".")[2] == name]
    return next(iter(elsewhere or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)), None)


def describe_error(
    error: ValidationError, model: type[BaseModel], path: str | Path | None, overrides: Mapping[str, str]
) -> str:
    """One line for the first thing that is wrong, and how many more there are."""
    problems = error.errors(include_url=False)
    # Unknown keys first: a misspelled key often makes the right one look missing.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc = [str(part) for part in problem["loc"]]
    key = ".".join(loc)
    typed = any(f"{key}.".startswith(f"{o}.") or o.startswith(f"{key}.") for o in overrides)
    where, prefix = ("", "--") if typed else (f"{path}: " if path else "", "")
    if problem["type"] == "extra_forbidden":
        near = nearest_key(".".join(p for p in loc if not p.isdigit()), model)
        hint = f"did you mean {prefix}{near}?" if near else "see docs/recipes.md for the keys"
        text = f"{prefix}{key} is not a known key; {hint}"
    elif problem["type"] == "missing":
        text = f"{prefix}{key} is missing; add it to the recipe or give --{key} VALUE"
    elif problem["type"] == "model_type":
        text = f"{prefix}{key} is {_short(problem['input'])} where a section of keys was expected; see docs/recipes.md"
    elif problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        text = f"{prefix}{key} {message}" if key else message
    else:
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        text = f"{prefix}{key} is {_short(problem['input'])}; {message}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return where + text + more


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads to an equal recipe; keys without a value are left out if they can be."""
    values = recipe.model_dump(mode="json", exclude_none=not recipe.keep_nulls)
    return yaml.safe_dump(values, sort_keys=False, width=120)  # ASCII: PyYAML loses some characters otherwise
