"""Does the contrast help? Trains networks on few labels that differ only in the method, and scores them on new volumes.

    python -m benchmarks segmentation --data DATA --runs FOLDER [--only acdc-6000/supervised/0] [--jobs 2]

DATA holds ACDC/, Task04_Hippocampus/ and Histology_nuclei/. Each run is a process of ``pglcl train`` with its own
folder. Interrupted runs are resumed. A run that has ended, in FOLDER or in the committed results, is not run again
unless its options have changed since. So the runs may take days, on more than one machine. The table shows the runs
that have ended, and names those that have not.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import markdown


@dataclass(frozen=True)
class DataSet:
    """A data set on which methods are compared, and the budget of the runs.

    folder: in DATA. patients: number of all patients. options: of every run. base: the semi-supervised method to which
    the contrast is added. seeds: of every run. pieces: whether the parts of base and contrast are measured one by one.
    """

    title: str
    folder: str
    patients: int
    options: dict[str, Any]
    base: str = "copy-paste"
    seeds: tuple[int, ...] = (0, 1, 2)
    pieces: bool = False


# The test part is that of README: patients 041-050 of ACDC, the last 40 volumes of Hippocampus, the last 15 images of
# Histology. The first patients are labelled.
HEARTS = {"labelled": 4, "test": 10, "validation": 5, "slices": "crop"}
DATASETS: dict[str, DataSet] = {
    "acdc": DataSet("ACDC", "ACDC", 50, {**HEARTS, "steps": 1500}, seeds=(0, 1, 2, 3), pieces=True),
    "acdc-6000": DataSet("ACDC", "ACDC", 50, {**HEARTS, "steps": 6000}),
    "acdc-8": DataSet("ACDC", "ACDC", 50, {**HEARTS, "labelled": 8, "steps": 1500}),
    "acdc-8-6000": DataSet("ACDC", "ACDC", 50, {**HEARTS, "labelled": 8, "steps": 6000}),
    "hippocampus": DataSet(
        "Hippocampus",
        "Task04_Hippocampus",
        160,
        {"labelled": 3, "test": 40, "validation": 10, "spatial_dims": 3, "steps": 1000, "batch_size": 4},
        base="weak-to-strong",
    ),
    "histology": DataSet(
        "Histology",
        "Histology_nuclei",
        70,
        {"labelled": 5, "test": 15, "validation": 5, "slices": "whole", "steps": 1000},
    ),
}
BASES = ("mean-teacher", "weak-to-strong", "copy-paste")
# Each part of a base, and of the contrast on ACDC's base, switched off or changed alone.
BASE_PIECES: dict[str, dict[str, Any]] = {
    "copy-paste, warm-up without pasting": {"consistency": "copy-paste", "mix_warmup": False},
    "copy-paste, pseudo-labels as they are": {"consistency": "copy-paste", "clean_pseudo_labels": "none"},
    "weak-to-strong, one strong view": {"consistency": "weak-to-strong", "strong_views": 1},
    "weak-to-strong, no feature dropout": {"consistency": "weak-to-strong", "feature_dropout": 0.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "annotated anchors": {"anchors": "labelled"},
    "anchors of every pixel": {"anchors": "all"},
    "anchors hard for the teacher": {"anchor_order": "teacher"},
    "anchors at random": {"anchor_order": "random"},
    "mixed patches left out": {"mixed_patches": "leave-out"},
    "mixed patches as others": {"mixed_patches": "together"},
    "constant weight": {"contrast_schedule": "constant"},
    "unguided": {"guidance": False},
    "gaussian": {"loss": "gaussian"},
}


def methods(dataset: str) -> dict[str, dict[str, Any]]:
    """The rows of a data set's table, each with the options that set it apart."""
    asked = DATASETS[dataset]
    rows: dict[str, dict[str, Any]] = {"supervised": {"method": "supervised"}}
    for base in BASES if asked.pieces else (asked.base,):
        rows[base] = {"method": "semi", "consistency": base}
        rows[f"{base} + patchcl"] = {"method": "patchcl", "consistency": base}
    if asked.pieces:
        rows |= {name: {"method": "semi", **options} for name, options in BASE_PIECES.items()}
        best = f"{asked.base} + patchcl"
        rows |= {f"{best}, {variant}": {**rows[best], **options} for variant, options in VARIANTS.items()}
    # None: as many labelled patients as there are for training.
    return rows | {"fully supervised": {"method": "supervised", "labelled": None}}


def base_of(method: str) -> str:
    """The base that a method is compared with: the one that it builds on, or of which it lacks a part."""
    return method.split(" + ")[0].split(", ")[0]


@dataclass(frozen=True)
class Run:
    dataset: str
    method: str
    seed: int

    def folder(self, runs: Path) -> Path:
        return runs / self.dataset / f"{self.method.replace(' ', '_').replace(',', '')}_{self.seed}"

    def options(self) -> dict[str, Any]:
        asked = DATASETS[self.dataset]
        options = {**asked.options, **methods(self.dataset)[self.method], "seed": self.seed}
        if options["labelled"] is None:
            options["labelled"] = asked.patients - options["test"] - options["validation"]
        return options

    def flags(self) -> list[str]:
        flags = []
        for name, value in self.options().items():
            flag = name.replace("_", "-")
            flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return flags


def matrix(only: str = "") -> Iterator[Run]:
    """Every run. First come the most important ones: supervision with few and with all labels, the base, ours."""
    runs = [
        Run(dataset, method, seed)
        for seed in range(max(len(asked.seeds) for asked in DATASETS.values()))
        for dataset, asked in DATASETS.items()
        for method in methods(dataset)
        if seed in asked.seeds
    ]

    def later(run: Run) -> bool:
        base = DATASETS[run.dataset].base
        return run.method not in ("supervised", "fully supervised", base, f"{base} + patchcl")

    return (run for run in sorted(runs, key=later) if only in f"{run.dataset}/{run.method}/{run.seed}")


def execute(run: Run, data: Path, runs: Path, threads: int) -> str:
    folder = run.folder(runs)
    root = data / DATASETS[run.dataset].folder
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    pglcl = [sys.executable, "-W", "ignore", "-m", "pglcl"]
    start = time.perf_counter()
    train = [*pglcl, "train", str(root), "--output", str(folder), "--threads", str(threads), "--workers", "0"]
    resume = ["--resume"] if (folder / "config.json").exists() else []
    for command in ([*train, "--quiet", *resume, *run.flags()], [*pglcl, "evaluate", str(folder), str(root)]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            return f"{run}: {result.stderr.strip().splitlines()[-1] if result.stderr.strip() else result.returncode}"
    return f"{run.dataset}, {run.method}, seed {run.seed}: {time.perf_counter() - start:.0f} s"


Record = dict[str, Any]


def recorded(run: Run, runs: Path) -> Record | None:
    """The scores of a run, from its folder; None while it has not ended, or if it was trained with other options.

    For each test patient: Dice and HD95, means over volumes and classes. For each class, and for all of them: the means
    over patients. Over all test volumes and classes: the numbers of missed classes, and of pieces that touch no truth.
    """
    folder = run.folder(runs)
    if not (folder / "scores_test.json").exists():
        return None
    trained = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if any(trained.get(name) != value for name, value in run.options().items()):
        return None
    content = json.loads((folder / "scores_test.json").read_text(encoding="utf-8"))
    values: dict[str, dict[str, list[float]]] = {"dice": {}, "hd95": {}}
    for score in content["scores"]:
        for metric, patients in values.items():
            if score[metric] is not None and not math.isnan(score[metric]):
                patients.setdefault(score["patient"], []).append(score[metric])
    means = {metric: {p: float(np.mean(v)) for p, v in patients.items()} for metric, patients in values.items()}
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return {
        **asdict(run),
        "options": run.options(),
        "commit": environment["git"]["commit"][:7] if environment["git"] else None,
        "processor": environment["processor"],
        "validation_dice": validation_dice(folder),
        "patients": means,
        "per_class": {row["class"]: (row["dice"], row["hd95"]) for row in content["summary"]},
        "counts": {name: content["summary"][-1][name] for name in ("missed", "stray")},
    }


def validation_dice(folder: Path) -> float | None:
    """The last Dice of the validation patients, by which defaults are chosen."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [row["validation_dice"] for row in map(json.loads, lines) if "validation_dice" in row]
    return values[-1] if values else None


class Records:
    """The runs that have ended: those of a folder, and those of other machines in the committed results."""

    def __init__(self, runs: Path, committed: Sequence[Record] = ()) -> None:
        self.runs = runs
        self.committed = {(r["dataset"], r["method"], r["seed"]): r for r in committed}

    def of(self, run: Run) -> Record | None:
        """The record of a run; None if it has not ended with its present options."""
        own = recorded(run, self.runs)
        if own is not None:
            return own
        found = self.committed.get((run.dataset, run.method, run.seed))
        return found if found is not None and found["options"] == run.options() else None

    def all(self) -> list[Record]:
        return [record for run in matrix() if (record := self.of(run)) is not None]


def paired_interval(a: list[dict[str, float]], b: list[dict[str, float]]) -> tuple[float, float, float]:
    """The mean of a minus b over test patients (each averaged over seeds), with its bootstrap 95 % interval."""
    patients = sorted(a[0])
    difference = np.array([np.mean([x[p] for x in a]) - np.mean([y[p] for y in b]) for p in patients])
    random = np.random.default_rng(0)
    means = difference[random.integers(0, len(difference), (10000, len(difference)))].mean(axis=1)
    return (float(difference.mean()), *(float(v) for v in np.percentile(means, [2.5, 97.5])))


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A summary of each data set and method with a run that has ended; it holds the scores of each seed."""
    results: list[dict[str, Any]] = []
    for dataset in DATASETS:
        ended: dict[str, dict[int, Record]] = {method: {} for method in methods(dataset)}
        for record in records:
            if record["dataset"] == dataset:
                ended[record["method"]][record["seed"]] = record
        for method, by_seed in ended.items():
            if not by_seed:
                continue
            base = base_of(method)
            common = [seed for seed in by_seed if base != method and seed in ended[base]]
            compared = {}
            for metric in ("dice", "hd95") if common else ():
                ours, theirs = ([ended[m][seed]["patients"][metric] for seed in common] for m in (method, base))
                compared[metric] = paired_interval(ours, theirs)
            own = list(by_seed.values())
            values = {metric: [list(r["patients"][metric].values()) for r in own] for metric in ("dice", "hd95")}
            results.append(
                {
                    "dataset": dataset,
                    "method": method,
                    "seeds": list(by_seed),
                    "validation_dice": [r["validation_dice"] for r in own],
                    "dice": [100 * float(np.mean(v)) for v in values["dice"]],
                    "hd95": [float(np.mean(v)) for v in values["hd95"]],
                    "hd95_median": [float(np.median(v)) for v in values["hd95"]],
                    "counts": [r["counts"] for r in own],
                    "per_class": [r["per_class"] for r in own],
                    "minus_base": compared or None,
                }
            )
    return results


def spread(values: Sequence[float]) -> str:
    """Mean and, over more than one seed, standard deviation."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def signed(change: float) -> str:
    """With its sign; what rounds to 0 is +0.0."""
    return f"{round(change, 1) + 0.0:+.1f}"


def share(result: dict[str, Any], low: dict[str, Any], high: dict[str, Any]) -> float:
    """The closed share of the gap between supervision with few labels and with all labels."""
    few, every = float(np.mean(low["dice"])), float(np.mean(high["dice"]))
    return (float(np.mean(result["dice"])) - few) / (every - few)


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    """A line for each goal: the score, and whether the goal is met; "not measured" without the runs."""
    found = {(r["dataset"], r["method"]): r for r in results}
    long = {method: found.get(("acdc-6000", method)) for method in methods("acdc-6000")}
    ours, few, every = (long[m] for m in ("copy-paste + patchcl", "supervised", "fully supervised"))
    title = "ACDC, 4 labelled, 6000 steps"
    lines = []
    if ours is None or few is None or every is None:
        lines.append(f"{title}: not measured")
    else:
        dice, hd95, closed = np.mean(ours["dice"]), np.mean(ours["hd95"]), share(ours, few, every)
        lines.append(f"{title}: Dice at least 83: {_met(dice >= 83)} ({dice:.1f})")
        lines.append(f"{title}: HD95 at most 4 voxels: {_met(hd95 <= 4)} ({hd95:.1f})")
        lines.append(f"{title}: at least 70 % of the gap closed: {_met(closed >= 0.7)} ({100 * closed:.0f} %)")
    ahead, behind, measured = [], [], []
    for name in ("acdc-6000", "hippocampus", "histology"):
        record = found.get((name, f"{DATASETS[name].base} + patchcl"))
        if record is None or record["minus_base"] is None:
            continue
        measured.append(DATASETS[name].title)
        gain, low, _ = record["minus_base"]["dice"]
        ahead += [DATASETS[name].title] if gain >= 0.01 and low > 0 else []
        behind += [DATASETS[name].title] if record["minus_base"]["hd95"][0] > 0 else []
    two, none = (
        "a point of Dice ahead of its base, interval above 0, on two of three data sets",
        "not behind its base in HD95 on any",
    )
    if not measured:
        return [*lines, f"{two}: not measured", f"{none}: not measured"]
    left = 3 - len(measured)
    of = f"measured on {', '.join(measured)}"
    reached = True if len(ahead) >= 2 else None if len(ahead) + left >= 2 else False
    lines.append(f"{two}: {_met(reached)} (ahead on {', '.join(ahead) or 'none'}, {of})")
    reached = False if behind else None if left else True
    lines.append(f"{none}: {_met(reached)} (behind on {', '.join(behind) or 'none'}, {of})")
    return lines


def _met(reached: Any) -> str:
    """Whether a goal is met, in words; None: this depends on runs that have not ended."""
    return "not decided yet" if reached is None else "met" if reached else "missed"


def budget_of(dataset: str) -> str:
    asked = DATASETS[dataset]
    return f"{asked.title}, {asked.options['labelled']} labelled, {asked.options['steps']} steps"


def table(records: Sequence[Record]) -> str:
    """Two tables for each data set: the methods, and the methods by class."""
    texts, results = [], summarise(records)
    for dataset in DATASETS:
        own = {r["method"]: r for r in results if r["dataset"] == dataset}
        if not own:
            continue
        rows, by_class = [], []
        classes = [c for c in next(iter(own.values()))["per_class"][0] if c != "mean"]
        for method in methods(dataset):
            if method not in own:
                rows.append([method, "not run", *["-"] * 9])
                continue
            r = own[method]
            tuned = [100 * v for v in r["validation_dice"] if v is not None]
            ends: Any = own.get("supervised"), own.get("fully supervised")
            closed = "-" if None in ends else f"{100 * share(r, *ends):.0f} %"
            seeds = ", ".join(map(str, r["seeds"]))
            validation = spread(tuned) if tuned else "-"
            hd95 = [spread(r["hd95"]), spread(r["hd95_median"])]
            counts = [spread([c[name] for c in r["counts"]]) for name in ("missed", "stray")]
            gains = [compared(r["minus_base"], metric, unit) for metric, unit in (("dice", 100), ("hd95", 1))]
            rows.append([method, seeds, validation, spread(r["dice"]), *hd95, *counts, *gains, closed])
            dice, distance = ([[seed[c][i] for seed in r["per_class"]] for c in classes] for i in (0, 1))
            by_class.append([method, *(spread([100 * v for v in d]) for d in dice), *(spread(d) for d in distance)])
        head = [
            "method", "seeds", "validation Dice [%]", "test Dice [%]", "HD95", "median HD95", "missed", "stray",
            "Dice minus its base", "HD95 minus its base", "of the gap",
        ]  # fmt: skip
        split = ["method", *(f"Dice {c}" for c in classes), *(f"HD95 {c}" for c in classes)]
        texts.append(f"**{budget_of(dataset)}**\n\n{markdown(head, rows)}")
        texts.append(f"**{budget_of(dataset)}**, by class\n\n{markdown(split, by_class)}")
    note = (
        "Mean ± standard deviation over seeds, of the mean over test patients and classes; median HD95 is that over "
        "patients. HD95 in the units of the headers (ACDC's have no spacing: voxels; Histology: pixels). Missed: "
        "classes that were there and not predicted; stray: components that touch no truth; both over all test volumes. "
        "Minus its base: with the 95 % bootstrap interval over test patients, each averaged over the seeds that both "
        "have. "
        f"The runs are of commits {listed(records, 'commit')}, on {listed(records, 'processor')}."
    )
    goals = "Goals:\n" + "\n".join(f"- {line}" for line in verdicts(results))
    return "\n\n".join([note, goals, *texts]) if texts else ""


def listed(records: Sequence[Record], name: str) -> str:
    return ", ".join(sorted({str(record[name]) for record in records}))


def compared(minus_base: dict[str, tuple[float, float, float]] | None, metric: str, unit: float) -> str:
    if minus_base is None:
        return "-"
    return "{} ({} to {})".format(*(signed(unit * v) for v in minus_base[metric]))


def run(
    data: str, runs: str, *, only: str, jobs: int, threads: int, minutes: float, committed: Sequence[Record] = ()
) -> tuple[list[Record], str]:
    end = time.monotonic() + 60 * minutes
    records = Records(Path(runs), committed)

    def one(item: Run) -> str:
        if time.monotonic() > end or records.of(item) is not None:
            return ""
        return execute(item, Path(data), Path(runs), threads)

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(one, matrix(only)):
            if line:
                print(line, flush=True)
    return records.all(), table(records.all())
