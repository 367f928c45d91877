"""The options that `pglcl inspect` proposes, and its warnings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pglcl.config import TrainConfig
from pglcl.inspection import inspect_folder, labels_of
from pglcl.layouts import open_folder
from pglcl.proposals import propose, warnings_of

from tests.pglcl.folders import plain, save, volume


@pytest.mark.parametrize("shape", [(20, 20, 20), (16, 16, 5), (12, 300, 3), (70, 40, 17), (1, 20, 20)])
def test_proposals_are_options_that_a_training_takes(shape: tuple[int, ...], tmp_path: Path) -> None:
    image, _ = volume(0, (30, 30, 30))
    small = np.resize(image, shape)
    save(tmp_path / "images" / "a.nii.gz", small, np.eye(4))
    data = open_folder(tmp_path)
    chosen = {p.option[2:].replace("-", "_"): p.value for p in propose(data, inspect_folder(data))}
    dims = int(chosen.pop("spatial_dims"))
    assert TrainConfig(spatial_dims=dims, **chosen).size


def test_whole_slices_are_proposed_where_parts_show_little(tmp_path: Path) -> None:
    for name, shape in (("large", (1300, 900, 2)), ("small", (600, 900, 2))):
        save(
            tmp_path / name / "images" / "a.nii.gz", np.zeros(shape, np.uint8) + np.arange(2, dtype=np.uint8), np.eye(4)
        )
        data = open_folder(tmp_path / name)
        said = {p.option: p.value for p in propose(data, inspect_folder(data))}
        assert said.get("--slices") == ("whole" if name == "large" else None)


def test_one_size_of_pixels_is_proposed_where_they_differ_much(tmp_path: Path) -> None:
    for i, size in enumerate((0.5, 1.0, 1.25)):
        shape = (round(100 / size), round(80 / size), 4)
        save(tmp_path / "images" / f"{i}.nii.gz", np.resize(volume(0)[0], shape), np.diag([size, size, 8, 1]))
    data = open_folder(tmp_path)
    said = {p.option: p.value for p in propose(data, inspect_folder(data))}
    assert (said["--spatial-dims"], said["--spacing"], said["--image-size"]) == ("2", "1,1", "96,80")
    assert "--slices" not in said
    (tmp_path / "images" / "0.nii.gz").unlink()
    assert "--spacing" not in {p.option for p in propose(open_folder(tmp_path), inspect_folder(open_folder(tmp_path)))}


def test_empty_labels_and_classes_of_one_patient_give_a_warning(tmp_path: Path) -> None:
    root = plain(tmp_path)
    for i in range(1, 6):
        label = volume(i, (30 + i % 3, 26, 5 + i % 2))[1]
        label[label == 2] = 0
        save(root / "labels" / f"case{i:02d}.nii.gz", label)
    data = open_folder(root)
    reports = inspect_folder(data)
    labels = labels_of(data, reports, None)
    assert warnings_of(data, reports, labels) == ["class 2 (label 2, value 2): only one labelled patient has it"]
    for i in range(1, 6):
        save(root / "labels" / f"case{i:02d}.nii.gz", np.zeros((30 + i % 3, 26, 5 + i % 2), np.uint8))
    reports = inspect_folder(data)
    assert warnings_of(data, reports, labels)[0] == "5 of 6 labels are empty"
