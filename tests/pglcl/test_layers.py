"""The modules of pglcl import each other in the order of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "python" / "pglcl"
MODULES = {path.stem for path in PACKAGE.glob("*") if path.suffix == ".py" or (path / "__init__.py").exists()}
ENTRIES = {"__init__", "__main__"}


def layers() -> dict[str, int]:
    """The number of each module's layer on the page, from 0 on."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"^python/pglcl/ .*\n((?:  .*\n)+)", page, re.MULTILINE)
    found: dict[str, int] = {}
    layer = -1
    for line in re.sub(r"\([^)]*\)", lambda words: re.sub(r"[^\n ]", " ", words[0]), block).splitlines():
        name, modules = line[:25], line[25:]
        layer += bool(name.strip())
        for module in re.findall(r"[a-z_]+", modules):
            assert module not in found, f"{module} stands twice"
            found[module] = layer
    return found


def imported(path: Path) -> set[str]:
    """The modules of pglcl that a file imports, at its beginning or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *rest = node.module.split(".")
            if package == "pglcl":
                found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found & MODULES


def test_every_module_has_a_layer() -> None:
    assert set(layers()) == MODULES - ENTRIES


def test_no_module_imports_from_a_later_layer() -> None:
    layer = layers()
    backwards = [
        f"{module} imports {other}"
        for module in sorted(MODULES - ENTRIES)
        for path in (
            [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else PACKAGE.glob(f"{module}/*.py")
        )
        for other in sorted(imported(path) - ENTRIES)
        if layer[other] > layer[module]
    ]
    assert not backwards


def test_no_modules_import_each_other() -> None:
    graph = {path.stem: imported(path) - ENTRIES - {path.stem} for path in PACKAGE.glob("*.py")}
    TopologicalSorter(graph).prepare()  # fails with the names of a cycle
