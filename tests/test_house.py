"""The house: imports point one way, between folders and between files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import rollouts

PACKAGE = Path(rollouts.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, inside functions too; not what only a type checker reads."""

    def read(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rollouts"):
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in MODULES else str(node.module)
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        for child in ast.iter_child_nodes(node):
            yield from read(child)

    yield from read(ast.parse(path.read_text()))


def folder_of(module: str) -> str:
    """The first folder beneath the package, or the file that lies beside the folders."""
    return ".".join(module.split(".")[:2])


GRAPH = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}


def test_no_file_imports_one_that_imports_it() -> None:
    assert len(GRAPH) > 100
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_folders_import_downwards() -> None:
    folders: dict[str, set[str]] = {}
    for module, imported in GRAPH.items():
        folders.setdefault(folder_of(module), set()).update(map(folder_of, imported))
    TopologicalSorter({folder: below - {folder, "rollouts"} for folder, below in folders.items()}).prepare()
    assert not folders["rollouts.training"] & {"rollouts.cli", "rollouts.recipes", "rollouts.pipeline"}
    assert not folders["rollouts.inference"] & {"rollouts.training", "rollouts.serving", "rollouts.providers"}
