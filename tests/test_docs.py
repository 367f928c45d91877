"""The pages of docs/ do what they say: code runs, and tests that they name exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "NOTES.md"]
OTHERS = {
    "--help",
    "--nnodes",
    "--nproc-per-node",
    "--rdzv-backend",
    "--rdzv-endpoint",
}  # of every program, of torchrun
GONE = {"--hard-anchors"}  # the changelog has its new name


def blocks_of(page: Path, language: str) -> list[str]:
    """The blocks of code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def run_page(name: str) -> dict[str, Any]:
    """Runs the Python blocks of a page one after the other. Returns the variables that they leave."""
    names: dict[str, Any] = {"__name__": name}
    for block in blocks_of(ROOT / name, "python"):
        exec(compile(block, name, "exec"), names)
    return names


def test_the_code_of_a_page_is_run_by_one_of_these_tests() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for page in PAGES:
        if blocks_of(page, "python"):
            assert f'run_page("{page.relative_to(ROOT)}")' in tests, page.name


def test_the_code_of_the_first_page_runs() -> None:
    names = run_page("README.md")
    assert names["value"] > 0
    assert names["embeddings"].grad.isfinite().all()


def test_the_code_of_training_loop_runs() -> None:
    names = run_page("docs/training_loop.md")
    assert torch.isfinite(names["loss"])
    assert names["queue"].counts.min() > 0
    text = (ROOT / "docs" / "training_loop.md").read_text(encoding="utf-8")
    marks = [int(mark) for mark in re.findall(r"  # (\d+)$", text, flags=re.MULTILINE)]
    assert marks == list(range(1, 11))  # ten lines, as the page says


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_metric_learning") is None, reason="pytorch-metric-learning is not installed"
)
def test_the_code_of_from_supcon_runs() -> None:
    names = run_page("docs/from_supcon.md")
    assert names["before"].isfinite()


def test_differences_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 15
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{function}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert all("::" in row for row in rows)


def test_docstrings_cite_sections_that_the_method_has() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^## (\d+)\. ", text, flags=re.MULTILINE)]
    assert numbers == list(range(1, 11))
    sources = [path for folder in ("pglcl_ext", "python", "csrc") for path in (ROOT / folder).rglob("*.*")]
    cited = {
        int(number)
        for path in sources
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
        for pair in re.findall(r"method,\s+sections?\s+(\d+)(?:\s+and\s+(\d+))?", path.read_text(encoding="utf-8"))
        for number in pair
        if number
    }
    assert len(cited) >= 7
    assert cited <= set(numbers)


def test_every_page_is_in_the_index() -> None:
    listed = set((ROOT / "docs" / "index.md").read_text(encoding="utf-8").split())
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - listed == {"index"}


def test_links_of_the_first_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def options_of_pglcl() -> set[str]:
    from pglcl.cli import app
    from typer.main import get_command

    group: Any = get_command(app)
    parameters = [*group.params, *(p for command in group.commands.values() for p in command.params)]
    return {option for p in parameters for option in (*p.opts, *p.secondary_opts)}


def options_of_scripts() -> set[str]:
    """The options of the parsers of benchmarks and tests, and of the programs that the Makefile calls."""
    files = [path for name in ("benchmarks", "tests") for path in (ROOT / name).rglob("*.py")]
    added = r"add(?:_argument|option)\(\s*\"(--[a-z-]+)\""
    found = {option for path in files for option in re.findall(added, path.read_text(encoding="utf-8"))}
    return found | set(re.findall(r"--[a-z][a-z-]+", (ROOT / "Makefile").read_text(encoding="utf-8")))


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="the command line is not installed")
def test_commands_that_the_pages_show_exist() -> None:
    from pglcl.cli import app
    from typer.main import get_command

    group: Any = get_command(app)
    shown = [name for page in PAGES for block in blocks_of(page, "sh") for name in re.findall(r"\bpglcl (\w+)", block)]
    assert len(shown) >= 5
    assert set(shown) <= set(group.commands)


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="the command line is not installed")
def test_options_that_the_pages_name_exist() -> None:
    known = options_of_pglcl() | options_of_scripts() | OTHERS | GONE
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.name}: {sorted(named - known)}"


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        codes = re.findall(r"`(?:\w+=\S+ )*make ([^`]+)`", page.read_text(encoding="utf-8"))
        lines = [line.partition("#")[0] for block in blocks_of(page, "sh") for line in block.splitlines()]
        codes += [line.removeprefix("make ") for line in lines if line.startswith("make ")]
        for code in codes:
            named = {word for word in code.split() if "=" not in word}
            assert named <= targets, f"{page.name}: make {code}"


def test_files_of_the_sources_that_the_pages_name_exist() -> None:
    folders = "benchmarks|csrc|docs|pglcl_ext|python|tests|tools"
    for page in PAGES:
        for path in re.findall(rf"`((?:{folders})/[\w./-]+)(?:::\w+)?`", page.read_text(encoding="utf-8")):
            if "my_op" not in path:  # an example
                assert (ROOT / path).exists(), f"{page.name}: {path}"
