"""python -m benchmarks.step [--threads 2]: how long a step of training takes, compared with a bare pass of its network.

A bare pass is only the student's forward and backward pass on the same number of images. The volumes are synthetic:
discs in noise, at the default size of 128 x 128. Batches are prepared as in a run, by the number of workers that it
chooses, on the same cores. Blocks of steps and of bare passes take turns. The times are medians over the rounds; the
figures in bare passes are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from pglcl.batches import StepBatches, loader
from pglcl.config import TrainConfig
from pglcl.learner import Learner
from pglcl.memory import keep_freed_memory
from pglcl.progress import Progress
from pglcl.ranks import Ranks
from pglcl.record import Profile
from pglcl.training_data import load_training_data
from pglcl.workers import choose_workers

from benchmarks.runner import machine, markdown

STEPS, ROUNDS, PATIENTS = 1000, 5, 6
BLOCK, UNTIMED = 22, 6  # steps in a row, and those of them that fill the pipeline
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


class Steps:
    """Steps of a run, with the number of workers that it chooses. Its teacher already finds the discs a little."""

    def __init__(self, root: Path, options: dict[str, Any]) -> None:
        config = TrainConfig(labelled=2, test=1, validation=1, steps=STEPS, warmup=0, seed=0, **options)
        data = load_training_data(root, config)
        self.learner = Learner(config, data, Ranks(), Profile(torch.device("cpu"), False))
        self.batches = StepBatches(data.labelled, data.unlabelled, config)
        quiet = Progress(STEPS, quiet=True)
        self.workers = choose_workers(self.batches, self.learner.student, torch.device("cpu"), 1, quiet)

    def __call__(self, first: int) -> float:
        """Seconds of a step, in a block that begins with step `first`."""
        source = loader(self.batches, first, self.workers)
        for step in range(first, first + BLOCK):
            if step == first + UNTIMED:
                start = time.perf_counter()
            self.learner.step(next(source), step)
        return (time.perf_counter() - start) / (BLOCK - UNTIMED)


def run(threads: int) -> tuple[list[dict[str, Any]], str]:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as a run does
    seconds: dict[str, list[float]] = {"bare pass": [], **{name: [] for name in METHODS}}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        steps = {name: Steps(Path(folder), options) for name, options in METHODS.items()}
        learner = steps["supervised"].learner
        images = torch.randn(learner.config.batch_size, 1, 128, 128)

        def bare() -> float:
            start = time.perf_counter()
            for _ in range(BLOCK):
                learner.student(images).square().mean().backward()
            return (time.perf_counter() - start) / BLOCK

        for number in range(ROUNDS):
            first = STEPS // 2 + number * BLOCK  # the weight of the contrast is at its largest
            seconds["bare pass"].append(bare())
            for name, block in steps.items():
                seconds[name].append(block(first))
    results = [{"step": name, "threads": threads, "seconds": values} for name, values in seconds.items()]
    rows = []
    for name, values in seconds.items():
        passes = statistics.median(own / pass_ for own, pass_ in zip(values, seconds["bare pass"], strict=True))
        workers = str(steps[name].workers) if name in steps else ""
        rows.append([name, workers, f"{1e3 * statistics.median(values):.0f}", f"{passes:.2f}"])
    return results, markdown(["step", "workers", "ms", "bare passes"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{machine()['processor']}, {arguments.threads} threads\n\n{run(arguments.threads)[1]}")
