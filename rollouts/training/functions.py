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

MADE_MODULES: dict[str, tuple[str, bytes]] = {}  # name of a module made from a file -> the file's path and text


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


def make_module(name: str, path: str, source: bytes) -> ModuleType:
    """Run the text of a Python file as module ``name``; the module there is, if it was made before.

    The file's folder is not put on ``sys.path``: its imports are those that work anywhere else.
    """
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # before it runs, so that its dataclasses and pickles find their module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    MADE_MODULES[name] = (path, source)
    return module


def _load_file(place: str, spec: str, what: str) -> ModuleType:
    if not Path(place).is_file():
        raise UserError(f"{what} function {spec}: there is no file {place}; paths start at {Path.cwd()}")
    path = Path(place).resolve()
    try:
        source = path.read_bytes()
        digest = hashlib.sha256(bytes(path) + b"\0" + source).hexdigest()[:12]
        return make_module(f"_rollouts_function_{path.stem}_{digest}", str(path), source)
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
    names = f"known names are {', '.join(sorted(registry))}; or " if registry else ""
    problem = f"no {what} function {spec!r}{nearest(spec, registry)}"
    return f"{problem}; {names}give pkg.module:function or file.py:function"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
