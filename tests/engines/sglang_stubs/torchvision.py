"""Stands in for torchvision, which SGLang imports for models that see: every submodule and name exists, empty."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.0.0"
__path__: list[str] = []


class _Named(type):
    """A class whose attributes are there as well, for ``InterpolationMode.BICUBIC`` and the like."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


for _parts in ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional", "io", "ops",
               "ops.boxes", "models"):  # fmt: skip
    _name = f"torchvision.{_parts}"
    _module = _Empty(_name)
    _module.__path__ = []
    _module.__spec__ = ModuleSpec(_name, None, is_package=True)
    sys.modules[_name] = _module
    _parent, _, _child = _name.rpartition(".")
    setattr(sys.modules[_parent], _child, _module)
