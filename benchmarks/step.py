"""python -m benchmarks.step [--threads 2]: how long a step of training takes, compared with a bare pass of its network.

A bare pass is only the student's forward and backward pass on the same number of images. The volumes are synthetic:
discs in noise, at the default size of 128 x 128. Batches are prepared in this process, so their time counts. Steps of
the methods and bare passes take turns. The figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from pglcl.batches import StepBatches
from pglcl.config import TrainConfig
from pglcl.ranks import Ranks
from pglcl.record import Profile
from pglcl.train import Learner
from pglcl.training_data import load_training_data

from benchmarks.runner import machine, markdown

STEPS, ROUNDS, PATIENTS = 1000, 12, 6
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"method": "supervised"},
    "copy-paste": {"method": "semi"},
    "copy-paste + patchcl": {"method": "patchcl"},
    "weak-to-strong": {"method": "semi", "consistency": "weak-to-strong"},
    "weak-to-strong + patchcl": {"method": "patchcl", "consistency": "weak-to-strong"},
}


def write_folder(root: Path) -> None:
    """Writes three nested discs in noise, as a plain folder of images and labels."""
    random = np.random.default_rng(0)
    far = np.hypot(*np.meshgrid(np.arange(128) - 64, np.arange(128) - 64, indexing="ij"))
    for patient in range(PATIENTS):
        label = sum((far < radius + 3 * patient).astype(np.uint8) for radius in (30, 20, 10))
        label = np.repeat(np.asarray(label)[..., None], 8, axis=2)
        image = (label + random.normal(0, 0.5, label.shape)).astype(np.float32)
        for kind, volume in (("images", image), ("labels", label)):
            (root / kind).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), root / kind / f"p{patient}.nii.gz")


def steps_of(root: Path, options: dict[str, Any]) -> tuple[Learner, Callable[[int], None]]:
    """A learner whose teacher already finds the discs a little, and a function that takes a step with its batch."""
    config = TrainConfig(labelled=2, test=1, validation=1, steps=STEPS, warmup=0, workers=0, seed=0, **options)
    data = load_training_data(root, config)
    learner = Learner(config, data, Ranks(), Profile(torch.device("cpu"), False))
    batches = StepBatches(data.labelled, data.unlabelled, config)

    def step(number: int) -> None:
        learner.step(batches[number], number)

    return learner, step


def run(threads: int) -> tuple[list[dict[str, Any]], str]:
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {"bare pass": [], **{name: [] for name in METHODS}}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        learners = {name: steps_of(Path(folder), options) for name, options in METHODS.items()}
        network = learners["supervised"][0].student
        images = torch.randn(learners["supervised"][0].config.batch_size, 1, 128, 128)

        def bare(_: int) -> None:
            network(images).square().mean().backward()

        calls = {"bare pass": bare, **{name: step for name, (_, step) in learners.items()}}
        for number in range(STEPS // 2, STEPS // 2 + ROUNDS):  # the weight of the contrast is at its largest
            for name, call in calls.items():
                start = time.perf_counter()
                call(number)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    results = [{"step": name, "threads": threads, "seconds": values} for name, values in seconds.items()]
    rows = [[name, f"{1e3 * m:.0f}", f"{m / medians['bare pass']:.2f}"] for name, m in medians.items()]
    return results, markdown(["step", "ms", "bare passes"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{machine()['processor']}, {arguments.threads} threads\n\n{run(arguments.threads)[1]}")
