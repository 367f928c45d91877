"""The documentation as a site: `make docs`. Its sources are the whole repository, so that links work in both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "pglcl"
author = "the authors of pglcl"
copyright = author
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "benchmarks/NOTES.md",
    "benchmarks/results/**.md",
]
exclude_patterns = [".*", "build", "dist", "csrc", "pglcl_ext", "python", "tests", "tools"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
suppress_warnings = ["myst.header"]  # a page of results has tables under headings of the second level alone

html_theme = "furo"
html_title = "pglcl"
html_extra_path = ["site"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


def sections_of_the_method() -> dict[str, str]:
    """The place of each numbered section on the page of the method."""
    headings = re.findall(
        r"^## (\d+)\. (.+)$", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    return {number: nodes.make_id(title) for number, title in headings}


def escape_shapes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write shapes such as (B, K, *g) as they are in code; the star begins no emphasis."""
    for i, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [re.sub(r"(?<!\\)\*(?=[Sg]\b)", r"\\*", part) for part in parts[::2]]
        lines[i] = "``".join(parts)


def link_the_method(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings cite "method, section 5"; on the site that is a link."""
    places = sections_of_the_method()
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"method, sections? (\d+)", lambda m: f"`{m[0]} <method.html#{places[m[1]]}>`__", line)


def title_the_results(app: Sphinx, name: str, source: list[str]) -> None:
    """The tables that the benchmarks write have no heading."""
    if not name.startswith("benchmarks/results/") or source[0].startswith("# "):
        return
    *processor, question = name.removeprefix("benchmarks/results/").split("/")
    title = ", ".join([question.replace("_", " "), *processor])
    source[0] = f"# Results: {title}\n\n{source[0]}"


def inline_math(translator: Any, node: Any) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(translator: Any, node: Any) -> None:
    text = node.astext()
    lines = [text] if r"\begin" in text else re.split(r"\\\\(?:\s|$)|\n\s*\n", text)
    for line in filter(str.strip, lines):
        translator.body.append(f'<div style="padding: 0.4em 0">{convert(line, display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))  # browsers show it without a script
    app.connect("autodoc-process-docstring", escape_shapes)
    app.connect("autodoc-process-docstring", link_the_method)
    app.connect("source-read", title_the_results)
