"""A demonstration on an averaged brain MRI, without a download: nilearn's MNI152 template in slabs, two labelled."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console

from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.evaluate import evaluate_run
from pglcl.files import check_writable, read_json, replacing, write_json
from pglcl.report import write_report
from pglcl.train import Interrupted, Training

SLAB = 6  # slices; slabs of the brain take the place of patients
NAME = "MNI152 template in slabs (pglcl demo)"  # marks a folder of the demo
LABELLED, VALIDATION = (4, 10), (7,)
CLASSES = {0: "background", 1: "grey matter", 2: "white matter"}


def write_template(folder: Path) -> dict[str, list[str]]:
    """Writes a Decathlon folder of axial slabs, labelled with grey and white matter. Returns the split."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    t1 = load_mni152_template(resolution=2)
    grey, white = (load(resolution=2).get_fdata() for load in (load_mni152_gm_template, load_mni152_wm_template))
    image = t1.get_fdata().astype(np.float32)
    label = np.where(np.maximum(grey, white) < 0.5, 0, np.where(grey >= white, 1, 2)).astype(np.uint8)
    inside = np.flatnonzero((label > 0).any(axis=(0, 1)))
    first = int(inside[0])
    count = (int(inside[-1]) + 1 - first) // SLAB
    names = [f"slab{slab:02d}" for slab in range(count)]
    training = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names]
    # Written first, so that the folder of a demo that was killed is recognised.
    write_json(folder / "dataset.json", {"name": NAME, "labels": CLASSES, "training": training})
    for slab, name in enumerate(names):
        rows = slice(first + slab * SLAB, first + (slab + 1) * SLAB)
        affine = t1.affine.copy()
        affine[:3, 3] += affine[:3, 2] * rows.start
        for kind, data in (("imagesTr", image), ("labelsTr", label)):
            with replacing(folder / kind / f"{name}.nii.gz") as partial:
                nib.save(nib.Nifti1Image(np.ascontiguousarray(data[:, :, rows]), affine), partial)
    labelled, validation = [names[i] for i in LABELLED], [names[i] for i in VALIDATION]
    rest = [n for n in names if n not in {*labelled, *validation}]
    return {"labelled": labelled, "unlabelled": rest[::2], "validation": validation, "test": rest[1::2]}


def check_folder(output: Path) -> None:
    """Raises UserError for a folder that holds files and was not written by an earlier demo."""
    own = output / "data" / "dataset.json"
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: must be a folder, but is a file")
    if not output.is_dir() or not any(output.iterdir()):
        check_writable(output)
        return
    try:
        mine = read_json(own).get("name") == NAME
    except (UserError, AttributeError):
        mine = False
    if not mine:
        raise UserError(f"{output}: holds files that pglcl demo did not write; choose another --output")


def write_data(output: Path) -> Path:
    """Writes the slabs to ``output/data``, and their split to a JSON file. Returns the path of that file."""
    split_file = output / "split.json"
    write_json(split_file, write_template(output / "data"))
    return split_file


def training_options(split_file: Path, steps: int) -> dict[str, Any]:
    """The options that all runs on the slabs share."""
    return {
        "split_file": str(split_file),
        "steps": steps,
        "warmup": steps // 4,
        "image_size": "96",
        "slices": "whole",
        "validate_every": 0,
    }


def run_demo(output: Path, steps: int, *, quiet: bool = False) -> None:
    """Trains without and with contrast, and writes a report. The folder of an earlier demo is used again.

    Args:
        output: the folder of the data and of the two runs.
        steps: of each run.
        quiet: print nothing.

    Raises:
        UserError: `output` holds files that no demo wrote, or runs of other options.
    """
    check_folder(output)
    console = Console(quiet=quiet, highlight=False, soft_wrap=True, markup=False)
    start = time.perf_counter()
    console.print(
        "Data: the MNI152 T1 template (an average of 152 brains, part of nilearn), cut into slabs of six slices. Two "
        "slabs are labelled with grey and white matter. The others are unlabelled, or kept for validation and test. "
        "One average brain is a demonstration, not a benchmark."
    )
    data, split_file = output / "data", write_data(output)
    for method in ("supervised", "patchcl"):
        run = output / method
        config = TrainConfig(method=method, **training_options(split_file, steps))
        try:
            Training(data, run, config, resume=(run / "config.json").exists(), quiet=quiet).run()
        except Interrupted:  # the next demo in this folder goes on from there
            raise KeyboardInterrupt from None
        console.print("\n" + evaluate_run(run, data).table())
    report = write_report(output / "patchcl", data)
    console.print(f"\nReport: {report}")
    console.print(f"To predict masks: pglcl predict {output / 'patchcl'} {data / 'imagesTr'} --output masks")
    console.print(f"{time.perf_counter() - start:.0f} s")
