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
from collections.abc import Iterator, Sequence
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
    "unguided": {"guidance": False, "anchor_order": "random"},
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
    for score in json.loads(path.read_text(encoding="utf-8"))["scores"]:
        for metric, patients in values.items():
            if score[metric] is not None and not math.isnan(score[metric]):
                patients.setdefault(score["patient"], []).append(score[metric])
    return {metric: {p: float(np.mean(v)) for p, v in patients.items()} for metric, patients in values.items()}


def per_class(run: Run, runs: Path) -> dict[str, tuple[float, float]]:
    summary = json.loads((run.folder(runs) / "scores_test.json").read_text(encoding="utf-8"))["summary"]
    return {row["class"]: (row["dice"], row["hd95"]) for row in summary}


def commit(run: Run, runs: Path) -> str | None:
    state = json.loads((run.folder(runs) / "environment.json").read_text(encoding="utf-8"))["git"]
    return state["commit"][:7] if state else None


def validation_dice(run: Run, runs: Path) -> float | None:
    """The last one, of the validation patients: what defaults are chosen by."""
    lines = (run.folder(runs) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [row["validation_dice"] for row in map(json.loads, lines) if "validation_dice" in row]
    return values[-1] if values else None


def paired_interval(a: list[dict[str, float]], b: list[dict[str, float]]) -> tuple[float, float, float]:
    """Mean of a minus b over test patients (each averaged over seeds), with its bootstrap 95 % interval."""
    patients = sorted(a[0])
    difference = np.array([np.mean([x[p] for x in a]) - np.mean([y[p] for y in b]) for p in patients])
    random = np.random.default_rng(0)
    means = difference[random.integers(0, len(difference), (10000, len(difference)))].mean(axis=1)
    return (float(difference.mean()), *(float(v) for v in np.percentile(means, [2.5, 97.5])))


def summarise(runs: Path) -> list[dict[str, Any]]:
    """A record per data set and method of which a run has ended, with what each seed reached."""
    results: list[dict[str, Any]] = []
    for dataset, (name, _) in DATASETS.items():
        finished: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
        for method in methods(dataset):
            scores = {seed: per_patient(Run(dataset, method, seed), runs) for seed in SEEDS}
            finished[method] = {seed: found for seed, found in scores.items() if found is not None}
        for method, by_seed in finished.items():
            if not by_seed:
                continue
            base = method.split(" + ")[0]
            common = [seed for seed in by_seed if base != method and seed in finished[base]]
            compared = None
            if common:
                ours, theirs = ([finished[m][seed]["dice"] for seed in common] for m in (method, base))
                compared = paired_interval(ours, theirs)
            own = [Run(dataset, method, seed) for seed in by_seed]
            results.append(
                {
                    "dataset": name,
                    "method": method,
                    "options": own[0].options(),
                    "seeds": list(by_seed),
                    "commits": sorted({str(commit(run, runs)) for run in own}),
                    "validation_dice": [validation_dice(run, runs) for run in own],
                    "dice": [100 * float(np.mean(list(found["dice"].values()))) for found in by_seed.values()],
                    "hd95": [float(np.mean(list(found["hd95"].values()))) for found in by_seed.values()],
                    "per_class": [per_class(run, runs) for run in own],
                    "minus_base": compared,
                    "patients": list(by_seed.values()),
                }
            )
    return results


def spread(values: Sequence[float]) -> str:
    """Mean and, over more than one seed, standard deviation."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def share(result: dict[str, Any], low: dict[str, Any], high: dict[str, Any]) -> float:
    """Of the gap between supervision with few labels and with all of them."""
    few, every = float(np.mean(low["dice"])), float(np.mean(high["dice"]))
    return (float(np.mean(result["dice"])) - few) / (every - few)


def goal(best: str, own: dict[str, dict[str, Any]]) -> str:
    """Whether the contrast is a point of Dice ahead of the best base, its interval above 0, and the best method with it
    closes half of the gap to full supervision."""
    ours = own.get(f"{best} + patchcl")
    ends: Any = own.get("supervised"), own.get("fully supervised")
    if ours is None or ours["minus_base"] is None or None in ends:
        return "not measured"
    gain, low, _ = ours["minus_base"]
    closed = max(share(r, *ends) for m, r in own.items() if "+ patchcl" in m)
    ahead = "met" if gain >= 0.01 and low > 0 else "missed"
    half = "met" if closed >= 0.5 else "missed"
    return (
        f"a point of Dice ahead of {best}, the interval above 0: {ahead} ({100 * gain:+.1f}); "
        f"half of the gap closed by the best with patchcl: {half} ({100 * closed:.0f} %)"
    )


def table(results: list[dict[str, Any]]) -> str:
    """Two of each data set: the methods, and the same by class."""
    texts = []
    for dataset, (name, budget) in DATASETS.items():
        own = {r["method"]: r for r in results if r["dataset"] == name}
        if not own:
            continue
        rows, by_class = [], []
        classes = [c for c in next(iter(own.values()))["per_class"][0] if c != "mean"]
        for method in methods(dataset):
            if method not in own:
                rows.append([method, "not run", *["-"] * 5])
                continue
            r = own[method]
            compared = r["minus_base"]
            gain = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in compared)) if compared else "-"
            tuned = [100 * v for v in r["validation_dice"] if v is not None]
            ends: Any = own.get("supervised"), own.get("fully supervised")
            closed = "-" if None in ends else f"{100 * share(r, *ends):.0f} %"
            seeds = ", ".join(map(str, r["seeds"]))
            validation = spread(tuned) if tuned else "-"
            rows.append([method, seeds, validation, spread(r["dice"]), spread(r["hd95"]), gain, closed])
            dice, hd95 = ([[seed[c][i] for seed in r["per_class"]] for c in classes] for i in (0, 1))
            by_class.append([method, *(spread([100 * v for v in d]) for d in dice), *(spread(d) for d in hd95)])
        head = ["method", "seeds", "validation Dice [%]", "test Dice [%]", "HD95", "minus its base", "of the gap"]
        split = ["method", *(f"Dice {c}" for c in classes), *(f"HD95 {c}" for c in classes)]
        title = f"**{name}**, {budget['labelled']} labelled, {budget['steps']} steps. Goals: "
        texts.append(f"{title}{goal(BEST_BASE[dataset], own)}.\n\n{markdown(head, rows)}")
        texts.append(f"**{name}**, by class\n\n{markdown(split, by_class)}")
    note = (
        "Mean ± standard deviation over seeds, of the mean over test patients and classes; HD95 in the units of the "
        "headers (ACDC's have no spacing: voxels). Minus its base: of Dice, with the 95 % bootstrap interval over test "
        "patients, each averaged over the seeds that both have."
    )
    return "\n\n".join([note, *texts]) if texts else ""


def run(data: str, runs: str, *, only: str, jobs: int, threads: int, minutes: float) -> tuple[list[dict], str]:
    end = time.monotonic() + 60 * minutes

    def one(item: Run) -> str:
        return execute(item, Path(data), Path(runs), threads) if time.monotonic() < end else ""

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(one, matrix(only)):
            if line:
                print(line, flush=True)
    results = summarise(Path(runs))
    return results, table(results)
