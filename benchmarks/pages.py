"""Writes the pages that come from benchmarks/results: the tables beside the JSON files, and the sections of README and
docs between `<!-- benchmarks: name -->` and `<!-- end -->`. A test compares the pages with the committed results.

A figure that was measured on several processors is quoted from the processor where it is least favourable.

    python -m benchmarks.pages
"""

from __future__ import annotations

import importlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.runner import RESULTS, find, headed, markdown, mebibytes, median, name_of, ratio, replace, significant
from benchmarks.scaling import slopes

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "figures.md", ROOT / "docs" / "segmentation.md")
MEASURED = ("loss", "statistics", "gaussian", "scaling", "peers")
ASKED = ("limits", "memory")  # also for each processor, but answered only when asked for by name
QUESTIONS = (*MEASURED, *ASKED, "segmentation")
UNRECORDED = ("pairs",)  # answered when asked; no results are committed, so no page shows any
SHOWN = ("pglcl_ext", "pytorch-metric-learning", "plain SupCon", "eager reference", "torch.mm alone")
BOTH = "forward+backward"


def results(question: str) -> list[dict[str, Any]]:
    """The rows of a question whose answer does not depend on the processor; none if it is not answered."""
    path = RESULTS / f"{question}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


def records(question: str) -> dict[Path, dict[str, Any]]:
    """The results of each processor: their folder, and the content of <question>.json."""
    paths = sorted(RESULTS.glob(f"*/{question}.json"))
    return {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def measured(question: str) -> list[list[dict[str, Any]]]:
    """The rows of each processor."""
    return [record["results"] for record in records(question).values()]


def peers() -> str:
    """A table for each processor."""

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "-"
        if "problem" in row:
            return row["problem"]
        return f"{significant(1e3 * median(row['seconds']))} ms, {mebibytes(row['bytes'])} MiB"

    tables = []
    for record in records("peers").values():
        own = [r for r in record["results"] if r["D"] == 128 and r["dtype"] == "float32" and r["passes"] == BOTH]
        sizes = list(dict.fromkeys(r["N"] for r in own))[1:]
        rows = [[str(n), *(cell(find(own, N=n, contender=c)) for c in SHOWN)] for n in sizes]
        tables.append(headed(record["machine"], markdown(["N", *SHOWN], rows)))
    return "\n\n".join(tables)


def commands() -> str:
    """A table for each processor: the peak memory of the commands on a large volume."""
    return "\n\n".join(table_of("memory", record) for record in records("memory").values())


def segmentation() -> str:
    """The table of segmentation, without its classes and without methods that have not been run."""
    if not results("segmentation"):
        return "No run has ended yet with the training scheme of this version."
    blocks = (RESULTS / "segmentation.md").read_text(encoding="utf-8").strip().split("\n\n")
    note, goals, tables = blocks[0], blocks[1], list(zip(blocks[2::2], blocks[3::2], strict=True))
    kept = [f"{title}\n\n{body}" for title, body in tables if not title.endswith("by class")]
    lines = "\n\n".join([goals, *kept, note]).splitlines()
    return "\n".join(line for line in lines if "| not run |" not in line)


def faster(question: str, contender: str, passes: str, **case: Any) -> str:
    """How many times faster than a contender the op is, on the processor where that is least."""
    ratios = [ratio(own, contender, "pglcl_ext", passes, **case) for own in measured(question)]
    known = [value for value in ratios if value is not None]
    return f"{significant(min(known))}x" if known else "-"


def gain_of_threads(own: list[dict[str, Any]]) -> float:
    """How many times faster two threads are than one."""
    one, two = (find(own, question="threads", threads=n, passes=BOTH) for n in (1, 2))
    assert one is not None
    assert two is not None
    return median(one["seconds"]) / median(two["seconds"])


def links(question: str) -> str:
    """Links to the table of each processor."""
    return ", ".join(
        f"[{name_of(record['machine'])}](../benchmarks/results/{folder.name}/{question}.md)"
        for folder, record in records(question).items()
    )


def figures() -> str:
    """The table of the main figures, each from the processor where it is least favourable."""
    loss = {"N": 4096, "D": 128, "keys": False, "dtype": "float32"}
    pixels = {"shape": [16, 4, 256, 256], "stride": 16, "dtype": "float32"}
    gauss = {"N": 512, "D": 128, "dtype": "float32"}
    ours = [find(own, contender="pglcl_ext", passes="forward", **gauss) for own in measured("gaussian")]
    same = "the same value" if all(row and row["values"][0]["same"] for row in ours) else "ANOTHER VALUE"
    time, memory = (max(values) for values in zip(*(slopes(own) for own in measured("scaling")), strict=True))
    threads = min(gain_of_threads(own) for own in measured("scaling"))
    eager, theirs = "eager reference", "authors' formulas"
    rows = [
        [
            "guided loss against eager PyTorch, N = 4096, D = 128",
            f"{faster('loss', eager, 'forward', **loss)} forward, {faster('loss', eager, BOTH, **loss)} both passes",
            "loss",
        ],
        [
            "the same against `torch.compile`",
            f"{faster('loss', 'torch.compile', 'forward', **loss)}, {faster('loss', 'torch.compile', BOTH, **loss)}",
            "loss",
        ],
        [
            "patch statistics against eager PyTorch, 16x4x256x256, patch 16",
            f"{faster('statistics', eager, 'forward', **pixels)}, {faster('statistics', eager, BOTH, **pixels)}",
            "statistics",
        ],
        [
            "Gaussian loss against the authors' formulas, N = 512, K = 4, D = 128",
            f"{faster('gaussian', theirs, 'forward', **gauss)}, {faster('gaussian', theirs, BOTH, **gauss)}, {same}",
            "gaussian",
        ],
        [
            "growth with N, on a log-log plot from 2048 patches on",
            f"time {time:.2f}, memory {memory:.2f}",
            "scaling",
        ],
        ["two threads against one, N = 4096, both passes", f"{significant(threads)}x", "scaling"],
        ["all peers, D = 64 to 256, float32 and bfloat16", "", "peers"],
    ]
    rows = [[*row[:2], links(row[2])] for row in rows]
    if results("segmentation"):
        rows.append(["segmentation", "", "[segmentation](../benchmarks/results/segmentation.md)"])
    return markdown(["question", "answer, where it is least favourable", "tables"], rows)


def memory() -> str:
    """A sentence about the memory of the loss and of its best-known peer at the largest size."""
    case = {"D": 128, "dtype": "float32", "passes": BOTH}
    every = [row for own in measured("peers") for row in own if all(row[k] == v for k, v in case.items())]
    own = [row for row in every if row["contender"] == "pglcl_ext"]
    largest = max(own, key=lambda row: (row["N"], row["bytes"]))
    peers = [r for r in every if r["contender"] == "pytorch-metric-learning" and r["N"] == largest["N"]]
    fits = [row["bytes"] for row in peers if "problem" not in row]
    theirs = f"takes {mebibytes(min(fits))} MiB" if fits else "runs out of 12 GiB"
    return paragraph(
        f"For {largest['N']:,} embeddings of length 128 the fused loss takes {mebibytes(largest['bytes'])} MiB, "
        f"forward and backward; pytorch-metric-learning {theirs}."
    )


def verdict() -> str:
    """A sentence on what the contrast, at its defaults, changes of its base: the worst and the best change, or the only
    one."""
    from benchmarks.segmentation import signed, summarise

    summary = [r for r in summarise(results("segmentation")) if r["minus_base"] is not None]
    found = [r for r in summary if r["method"].endswith(" + patchcl")]
    if not found:
        return "That is not measured yet with the training scheme of this version."
    changes = [100 * record["minus_base"]["dice"][0] for record in found]
    seeds = [len(record["seeds"]) for record in found]
    change = f"between {signed(min(changes))} and {signed(max(changes))}" if len(found) > 1 else signed(changes[0])
    runs = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else str(seeds[0])
    return paragraph(
        f"On patients never used in training, the contrast changed the Dice of its base method by {change} points, "
        f"with {runs} {'seed' if max(seeds) == 1 else 'seeds'} each ([all methods, data sets and intervals]"
        "(docs/segmentation.md))."
    )


def paragraph(text: str) -> str:
    """The text in lines of at most 120 columns."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


SECTIONS = {
    "peers": peers,
    "segmentation": segmentation,
    "figures": figures,
    "memory": memory,
    "verdict": verdict,
    "commands": commands,
}


def rendered(text: str) -> str:
    """The page with its sections made again from the results."""

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- benchmarks: (\w+) -->).*?<!-- end -->", section, text, flags=re.DOTALL)


def table_of(question: str, content: dict[str, Any]) -> str:
    """The page beside the JSON, with a heading that names the processor or GPU."""
    return headed(content["machine"], importlib.import_module(f"benchmarks.{question}").table(content["results"]))


def write() -> None:
    """Writes every table and the pages again, from the committed results."""
    if results("segmentation"):
        segmentation_table = importlib.import_module("benchmarks.segmentation").table
        replace(RESULTS / "segmentation.md", segmentation_table(results("segmentation")) + "\n")
    for question in (*MEASURED, *ASKED):
        for folder, content in records(question).items():
            replace(folder / f"{question}.md", table_of(question, content) + "\n")
    for page in PAGES:
        replace(page, rendered(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    write()
