"""Does the contrast help? Networks trained on few labels, alike but for the method, scored on volumes never seen.

    python -m benchmarks segmentation --data DATA --runs FOLDER [--only acdc/supervised/0] [--jobs 2]

DATA holds ACDC/ and Task04_Hippocampus/. Each run is a process of ``pglcl train``, and its folder is its memory: what
has ended is not run again, what was interrupted is resumed. The table is of the runs that have ended, and says which
have not.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import markdown

SEEDS = (0, 1, 2)
# The budget of every run on a data set. The split is that of README: ACDC tests on patients 041-050, Hippocampus on the
# last 40 volumes; the labelled ones are the first.
DATASETS: dict[str, tuple[str, dict[str, Any]]] = {
    "acdc": ("ACDC", {"labelled": 4, "test": 10, "validation": 5, "steps": 1500, "warmup": 400}),
    "hippocampus": (
        "Task04_Hippocampus",
        {
            "labelled": 10,
            "test": 40,
            "validation": 10,
            "spatial_dims": 3,
            "steps": 1000,
            "warmup": 250,
            "batch_size": 4,
            "contrast_weight": 0.1,
        },
    ),
}
BASES = ("mean-teacher", "weak-to-strong", "copy-paste")
# The base on which each data set's variants of the contrast are measured, its best. On Hippocampus the validation
# volumes set no two bases 0.1 apart but copy-paste, which falls behind.
BEST_BASE = {"acdc": "copy-paste", "hippocampus": "weak-to-strong"}
VARIANTS: dict[str, dict[str, Any]] = {
    "gaussian": {"loss": "gaussian"},
    "unguided": {"guidance": False, "hard_anchors": False},
    "no queue": {"queue_length": 0},
    "crops": {"patches": "crop", "patch_size": 16, "crops_per_class": 2},
    "anchors of pseudo-labels": {"anchors": "all"},
}


def methods(dataset: str) -> dict[str, dict[str, Any]]:
    """The rows of a data set's table, each with the options that set it apart."""
    rows: dict[str, dict[str, Any]] = {"supervised": {"method": "supervised"}}
    for base in BASES:
        rows[base] = {"method": "semi", "consistency": base}
        rows[f"{base} + patchcl"] = {"method": "patchcl", "consistency": base}
    best = f"{BEST_BASE[dataset]} + patchcl"
    rows |= {f"{best}, {variant}": {**rows[best], **options} for variant, options in VARIANTS.items()}
    # All training patients labelled: as many as there are.
    return rows | {"fully supervised": {"method": "supervised", "labelled": None}}


@dataclass(frozen=True)
class Run:
    dataset: str
    method: str
    seed: int

    def folder(self, runs: Path) -> Path:
        return runs / self.dataset / f"{self.method.replace(' ', '_').replace(',', '')}_{self.seed}"

    def options(self) -> dict[str, Any]:
        options = {**DATASETS[self.dataset][1], **methods(self.dataset)[self.method], "seed": self.seed}
        if options["labelled"] is None:
            patients = {"acdc": 50, "hippocampus": 160}[self.dataset]
            options["labelled"] = patients - options["test"] - options["validation"]
        return options

    def flags(self) -> list[str]:
        flags = []
        for name, value in self.options().items():
            flag = name.replace("_", "-")
            flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return flags


def matrix(only: str = "") -> Iterator[Run]:
    """Every run, what the comparison rests on first: supervision with few and with all labels, the best base, ours."""
    runs = [Run(dataset, method, seed) for seed in SEEDS for dataset in DATASETS for method in methods(dataset)]

    def later(run: Run) -> bool:
        best = BEST_BASE[run.dataset]
        return run.method not in ("supervised", "fully supervised", best, f"{best} + patchcl")

    return (run for run in sorted(runs, key=later) if only in f"{run.dataset}/{run.method}/{run.seed}")


def execute(run: Run, data: Path, runs: Path, threads: int) -> str:
    folder = run.folder(runs)
    if (folder / "scores_test.json").exists():
        return ""
    root = data / DATASETS[run.dataset][0]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    pglcl = [sys.executable, "-W", "ignore", "-m", "pglcl"]
    start = time.perf_counter()
    train = [
        *pglcl,
        "train",
        str(root),
        "--output",
        str(folder),
        "--threads",
        str(threads),
        "--workers",
        "0",
        "--quiet",
    ]
    resume = ["--resume"] if (folder / "config.json").exists() else []
    for command in ([*train, *resume, *run.flags()], [*pglcl, "evaluate", str(folder), str(root)]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            return f"{run}: {result.stderr.strip().splitlines()[-1] if result.stderr.strip() else result.returncode}"
    return f"{run.dataset}, {run.method}, seed {run.seed}: {time.perf_counter() - start:.0f} s"


def per_patient(run: Run, runs: Path) -> dict[str, dict[str, float]] | None:
    """Dice and HD95 of each test patient, over volumes and classes; None while the run has not ended."""
    path = run.folder(runs) / "scores_test.json"
    if not path.exists():
        return None
    values: dict[str, dict[str, list[float]]] = {"dice": {}, "hd95": {}}
    for score in json.loads(path.read_text())["scores"]:
        for metric, patients in values.items():
            if score[metric] is not None and not math.isnan(score[metric]):
                patients.setdefault(score["patient"], []).append(score[metric])
    return {metric: {p: float(np.mean(v)) for p, v in patients.items()} for metric, patients in values.items()}


def per_class(run: Run, runs: Path) -> dict[str, tuple[float, float]]:
    summary = json.loads((run.folder(runs) / "scores_test.json").read_text())["summary"]
    return {row["class"]: (row["dice"], row["hd95"]) for row in summary}


def commit(run: Run, runs: Path) -> str | None:
    state = json.loads((run.folder(runs) / "environment.json").read_text())["git"]
    return state["commit"][:7] if state else None


def validation_dice(run: Run, runs: Path) -> float | None:
    """The last one, of the validation patients: what defaults are chosen by."""
    lines = (run.folder(runs) / "metrics.jsonl").read_text().splitlines()
    values = [row["validation_dice"] for row in map(json.loads, lines) if "validation_dice" in row]
    return values[-1] if values else None


def paired_interval(a: list[dict[str, float]], b: list[dict[str, float]]) -> tuple[float, float, float]:
    """Mean of a minus b over test patients (each averaged over seeds), with its bootstrap 95 % interval."""
    patients = sorted(a[0])
    difference = np.array([np.mean([x[p] for x in a]) - np.mean([y[p] for y in b]) for p in patients])
    random = np.random.default_rng(0)
    means = difference[random.integers(0, len(difference), (10000, len(difference)))].mean(axis=1)
    return (float(difference.mean()), *(float(v) for v in np.percentile(means, [2.5, 97.5])))


def summarise(runs: Path) -> tuple[list[dict], str]:
    results, texts = [], []
    for dataset, (name, budget) in DATASETS.items():
        finished: dict[str, list[dict[str, dict[str, float]]]] = {}
        for method in methods(dataset):
            done = [(s, per_patient(Run(dataset, method, s), runs)) for s in SEEDS]
            for seed, scores in done:
                if scores is not None:
                    finished.setdefault(method, []).append({"seed": {"seed": seed}, **scores})
        if not finished:
            continue

        def mean_dice(method: str, finished: Any = finished) -> float:
            return float(np.mean([np.mean(list(r["dice"].values())) for r in finished[method]]))

        rows = []
        classes: list[str] = []
        for method in methods(dataset):
            if method not in finished:
                rows.append([method, "not run", *["-"] * 6])
                continue
            seeds = [int(r["seed"]["seed"]) for r in finished[method]]
            dice = [100 * float(np.mean(list(r["dice"].values()))) for r in finished[method]]
            hd95 = [float(np.mean(list(r["hd95"].values()))) for r in finished[method]]
            by_class = [per_class(Run(dataset, method, s), runs) for s in seeds]
            classes = [c for c in by_class[0] if c != "mean"]
            share = "-"
            if {"supervised", "fully supervised"} <= set(finished):
                low, high = mean_dice("supervised"), mean_dice("fully supervised")
                share = f"{100 * (mean_dice(method) - low) / (high - low):.0f} %"
            base = method.split(" + ")[0]
            gain = "-"
            compared = None
            if base != method and base in finished:
                common = [s for s in seeds if s in [int(r["seed"]["seed"]) for r in finished[base]]]
                pick = {m: [r["dice"] for r in finished[m] if int(r["seed"]["seed"]) in common] for m in (method, base)}
                if common:
                    compared = paired_interval(pick[method], pick[base])
                    gain = f"{100 * compared[0]:+.1f} ({100 * compared[1]:+.1f} to {100 * compared[2]:+.1f})"
            spread = f" ± {np.std(dice, ddof=1):.1f}" if len(dice) > 1 else ""
            each = " / ".join(f"{100 * float(np.mean([b[c][0] for b in by_class])):.1f}" for c in classes)
            distance = f"{np.mean(hd95):.1f}" + (f" ± {np.std(hd95, ddof=1):.1f}" if len(hd95) > 1 else "")
            found = [validation_dice(Run(dataset, method, s), runs) for s in seeds]
            tuned = [100 * v for v in found if v is not None]
            rows.append(
                [
                    f"{method} (seeds {', '.join(map(str, seeds))})",
                    f"{np.mean(tuned):.1f}" if tuned else "-",
                    f"{np.mean(dice):.1f}{spread}",
                    each,
                    distance,
                    gain,
                    share,
                ]
            )
            results.append(
                {
                    "dataset": name, "method": method, "seeds": seeds, "dice": dice, "hd95": hd95,
                    "per_class": by_class, "minus_base": compared, "options": Run(dataset, method, seeds[0]).options(),
                    "commits": sorted({str(commit(Run(dataset, method, s), runs)) for s in seeds}),
                    "validation_dice": found,
                    "patients": [{k: v for k, v in r.items() if k != "seed"} for r in finished[method]],
                }
            )  # fmt: skip
        head = [
            "method",
            "validation Dice [%]",
            "test Dice [%]",
            f"test, by class ({' / '.join(classes)})",
            "HD95",
            "minus its base (95 %)",
            "share of the gap",
        ]
        steps = f"{budget['labelled']} labelled, {budget['steps']} steps"
        texts.append(f"{name}, {steps}\n\n" + markdown(head, rows))
    return results, "\n\n".join(texts)


def run(data: str, runs: str, *, only: str, jobs: int, threads: int, minutes: float) -> tuple[list[dict], str]:
    end = time.monotonic() + 60 * minutes

    def one(item: Run) -> str:
        return execute(item, Path(data), Path(runs), threads) if time.monotonic() < end else ""

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(one, matrix(only)):
            if line:
                print(line, flush=True)
    return summarise(Path(runs))
