"""python -m benchmarks.picture: the picture of README, one slice of a test volume with the outlines of three methods.

Networks that differ only in the method are trained on the data of ``pglcl demo`` (the MNI152 template in slabs, two of
them labelled). The picture shows the volume with the median Dice of the base. Runs that have ended are used again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from pglcl.cases import Case, cases_of
from pglcl.config import TrainConfig
from pglcl.demo import training_options, write_data
from pglcl.evaluate import evaluate_run
from pglcl.files import read_json
from pglcl.layouts import open_folder
from pglcl.train import Training

from benchmarks.plots import outlines
from benchmarks.runner import RESULTS

METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"method": "supervised"},
    "copy-paste": {"method": "semi", "consistency": "copy-paste"},
    "copy-paste + patchcl": {"method": "patchcl", "consistency": "copy-paste"},
}


def dice_of_patients(run: Path) -> dict[str, float]:
    """Mean Dice over volumes and classes of each test patient."""
    values: dict[str, list[float]] = {}
    for score in read_json(run / "scores_test.json")["scores"]:
        if score["dice"] is not None:
            values.setdefault(score["patient"], []).append(score["dice"])
    return {patient: float(np.mean(found)) for patient, found in values.items()}


def draw(folder: Path, path: Path, steps: int) -> None:
    split_file = write_data(folder)
    data, found = folder / "data", {}
    for title, options in METHODS.items():
        run = folder / title.replace(" ", "_")
        if not (run / "scores_test.json").exists():
            config = TrainConfig(**training_options(split_file, steps), **options)
            Training(data, run, config, resume=(run / "config.json").exists()).run()
            evaluate_run(run, data)
        found[title] = run
    dice = {title: dice_of_patients(run) for title, run in found.items()}
    by_base = sorted(dice["copy-paste"], key=dice["copy-paste"].__getitem__)
    patient = by_base[len(by_base) // 2]
    case: Case = cases_of(open_folder(data), [patient], with_label=True)[0]
    outlines(path, case, {f"{title}, Dice {100 * dice[title][patient]:.0f}": run for title, run in found.items()})
    for title, scores in dice.items():
        print(f"{title}: Dice {100 * np.mean(list(scores.values())):.1f}, of {patient} {100 * scores[patient]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/picture"), help="data and runs (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of each run (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "picture.png")
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.output, arguments.steps)


if __name__ == "__main__":
    main()
