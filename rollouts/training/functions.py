"""Functions named in a recipe: a registered name, a dotted path to a module, or a file and a name in it."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rollouts.errors import UserError

Function = Callable[..., Any]


def load_function(spec: str | Function, registry: Mapping[str, Function] | None = None, what: str = "reward") -> Any:
    """The function that ``spec`` names.

    Args:
        spec: a callable, given back as it is; a name of ``registry``; ``pkg.mod:fn`` or ``pkg.mod.fn``; or
            ``path/to/file.py:fn`` (relative to the current folder). ``fn`` may be dotted: ``Class.method``.
        registry: the functions known by name.
        what: the kind of function, for messages.

    Raises:
        UserError: there is no such function (naming the nearest registered name, the missing module or the missing
            attribute), its module fails to import, or what is there cannot be called.
    """
    registry = registry or {}
    if callable(spec):
        return spec
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"{what} function {spec!r}: give a name, pkg.module:function or file.py:function")
    if spec in registry:
        return registry[spec]
    place, colon, attribute = spec.rpartition(":")
    if not colon:
        place, _, attribute = spec.rpartition(".")
    if not place or not attribute or spec.endswith(".py"):
        raise UserError(_unknown(spec, registry, what))
    if place.endswith(".py"):
        module = _load_file(place, spec, what)
    elif colon or _importable(place):
        module = _import(place, spec, what)
    else:
        raise UserError(_unknown(spec, registry, what))
    found = _attribute(module, attribute, spec, place, what)
    if not callable(found):
        raise UserError(f"{what} function {spec}: {attribute} is a {type(found).__name__}, not a function")
    return found


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """ " (did you mean 'x'?)" for the known name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def file_of_module(name: str) -> str | None:
    """The file a module was loaded from by ``load_function("file.py:fn")``; None for any other module."""
    return _FILES.get(name)


def load_file_module(file: str | Path) -> ModuleType:
    """Import a Python file as a module of its own; the same file, unchanged, gives the same module.

    The file's folder is not put on ``sys.path``: its imports are those that work anywhere else.
    """
    path = Path(file).resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:12]
    name = f"_rollouts_function_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None, f"{path} has no loader: is it a .py file?"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # before it runs, so that its dataclasses and pickles find their module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _FILES[name] = str(path)
    return module


_FILES: dict[str, str] = {}  # name of a module loaded from a file -> the file


def _load_file(place: str, spec: str, what: str) -> ModuleType:
    if not Path(place).is_file():
        raise UserError(f"{what} function {spec}: there is no file {place}; paths start at {Path.cwd()}")
    try:
        return load_file_module(place)
    except (Exception, SystemExit) as e:
        raise UserError(f"{what} function {spec}: {place} fails to load ({_reason(e)})") from e


def _import(place: str, spec: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as e:
        # A module that exists may itself import one that does not: name the one that is missing.
        why = "imported by it " if e.name and not f"{place}.".startswith(f"{e.name}.") else ""
        raise UserError(f"{what} function {spec}: there is no module {e.name!r} {why}on sys.path") from e
    except (Exception, SystemExit) as e:
        raise UserError(f"{what} function {spec}: module {place} fails to import ({_reason(e)})") from e


def _importable(place: str) -> bool:
    """True when the first part of a dotted path is a module, so that "no such module" is about a part after it."""
    first = place.partition(".")[0]
    try:
        return first in sys.modules or importlib.util.find_spec(first) is not None
    except (ImportError, ValueError):
        return False


def _attribute(module: ModuleType, attribute: str, spec: str, place: str, what: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise UserError(f"{what} function {spec}: {place} has no {attribute!r}{nearest(part, public)}")
        found = getattr(found, part)
    return found


def _unknown(spec: str, registry: Mapping[str, Any], what: str) -> str:
    names = f"known names are {', '.join(sorted(registry))}; " if registry else ""
    problem = f"no {what} function {spec!r}{nearest(spec, registry)}"
    return f"{problem}; {names}or give pkg.module:function or file.py:function"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
