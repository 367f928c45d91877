"""Data folders of each layout, and what is refused in them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pglcl.cases import distance_unit, split_patients
from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder, labels_of, propose, warnings_of
from pglcl.labels import parse_labels
from pglcl.layouts import group_inputs, open_folder

from tests.pglcl.folders import (
    STRAIGHT,
    acdc,
    dicom,
    kits,
    pictures,
    plain,
    save,
    ssl4mis,
    tiny,
    volume,
)  # fmt: skip


def test_hidden_files_of_a_folder_are_not_read(tmp_path: Path) -> None:
    root = acdc(tmp_path / "acdc", 3)
    folder = root / "training" / "patient001"
    for name in ("._patient001_frame01.nii.gz", ".partial-7-patient001_frame09.nii.gz"):
        (folder / name).write_bytes(b"")
    (root / "training" / ".Trash").mkdir()
    (root / "training" / ".Trash" / "patient009_frame01.nii.gz").write_bytes(b"")
    assert len(open_folder(root).cases) == 6
    root = plain(tmp_path / "plain")
    for part in ("images", "labels"):
        (root / part / "._case00.nii.gz").write_bytes(b"")
        (root / part / ".partial-9-case77.nii.gz").write_bytes(b"")
    assert len(open_folder(root).cases) == 8
    assert len(group_inputs([root / "images"])) == 8


def test_kits_folders_are_read(tmp_path: Path) -> None:
    root = kits(tmp_path)
    (root / "case_00007" / "segmentation.nii.gz").unlink()
    data = open_folder(root)
    assert data.layout == "kits"
    assert [case.name for case in data.cases] == [f"case_{i:05d}" for i in range(8)]
    assert data.cases[7].label is None
    reports = inspect_folder(data)
    assert labels_of(data, reports, None).names == ("background", "kidney", "tumor")
    assert propose(data, reports)[-1].value == "ct"


def test_a_kits_label_without_its_image_is_refused(tmp_path: Path) -> None:
    """The labels come with the repository, the images by a program. A case must not be missing without a word."""
    root = kits(tmp_path, 3)
    (root / "case_00001" / "imaging.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_00001/segmentation\.nii\.gz: is a label without its image"):
        open_folder(root)
    (root / "case_00001" / "segmentation.nii.gz").unlink()
    assert len(open_folder(root).cases) == 2


def test_ssl4mis_folders_are_read(tmp_path: Path) -> None:
    root = ssl4mis(tmp_path)
    data = open_folder(root)
    assert data.layout == "ssl4mis"
    assert [case.name for case in data.cases] == [f"patient{i:03d}_frame01" for i in range(1, 9)]
    reports = inspect_folder(data)
    assert not any(r.problems for r in reports)
    assert reports[0].shape == (30, 26, 5)  # slices last
    split = split_patients(data, tiny(labelled=2, validation=-1, test=-1))
    assert split.as_dict() == {
        "labelled": ["patient001", "patient002"],
        "unlabelled": ["patient003", "patient004", "patient005"],
        "validation": ["patient006"],
        "test": ["patient007", "patient008"],
    }
    (root / "test.list").write_text("patient001_frame01\n")
    with pytest.raises(UserError, match="lists of train and test share the patient 'patient001'"):
        open_folder(root)


def test_ssl4mis_slices_are_read_if_their_volume_is_missing(tmp_path: Path) -> None:
    root = ssl4mis(tmp_path)
    (root / "data" / "patient001_frame01.h5").unlink()
    data = open_folder(root)
    slices = [case for case in data.cases if case.patient == "patient001"]
    assert len(slices) == 5
    assert inspect_folder(data)[0].shape == (30, 26, 1)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".jpg"])
def test_folders_of_pictures_are_read(ending: str, tmp_path: Path) -> None:
    data = open_folder(pictures(tmp_path, ending=ending))
    reports = inspect_folder(data)
    assert not any(r.problems for r in reports)
    assert (reports[0].channels, reports[0].axes, reports[0].unit, distance_unit(data)) == (3, 2, "pixel", "pixel")
    labels = labels_of(data, reports, None)
    assert labels.values == ((0,), (85,), (170,))
    assert {p.option: p.value for p in propose(data, reports)} == {
        "--spatial-dims": "2", "--image-size": "48,32", "--normalise": "rgb",
    }  # fmt: skip


def test_dicom_folders_are_paired_with_label_files(tmp_path: Path) -> None:
    for i in range(2):
        image, label = volume(i)
        dicom(tmp_path / "images" / f"scan{i}", image.astype(np.int16), STRAIGHT)
        save(tmp_path / "labels" / f"scan{i}.nii.gz", label, STRAIGHT)
    data = open_folder(tmp_path)
    assert [case.name for case in data.cases] == ["scan0", "scan1"]
    assert not any(r.problems for r in inspect_folder(data))
    assert [case.name for case in group_inputs([tmp_path / "images" / "scan0"])] == ["scan0"]
    assert [case.name for case in group_inputs([tmp_path / "images"])] == ["scan0", "scan1"]


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    """A label among them would make its image count as unlabelled."""
    root = plain(tmp_path, 4, unlabelled=1)
    assert open_folder(root).notes == []
    label = (root / "labels" / "case01.nii.gz").read_bytes()
    for name in ("case01.npz", ".hidden", "more/case03.nii.gz", "empty/readme.txt"):
        (root / "labels" / name).parent.mkdir(exist_ok=True)
        (root / "labels" / name).write_bytes(label)
    for name in ("scan.mhd", "scan.raw"):
        (root / "images" / name).write_text("ElementDataFile = scan.raw\n")
    assert open_folder(root).notes == [
        f"{root / 'labels'}: case01.npz (1): not read, unknown suffix",
        f"{root / 'labels'}: more (1): not read, folders of images; images and labels must not lie in folders below",
    ]


@pytest.mark.parametrize("shape", [(20, 20, 20), (16, 16, 5), (12, 300, 3), (70, 40, 17), (1, 20, 20)])
def test_proposals_are_options_that_a_training_takes(shape: tuple[int, ...], tmp_path: Path) -> None:
    image, _ = volume(0, (30, 30, 30))
    small = np.resize(image, shape)
    save(tmp_path / "images" / "a.nii.gz", small, np.eye(4))
    data = open_folder(tmp_path)
    chosen = {p.option[2:].replace("-", "_"): p.value for p in propose(data, inspect_folder(data))}
    dims = int(chosen.pop("spatial_dims"))
    assert TrainConfig(spatial_dims=dims, **chosen).size


def test_a_label_that_is_a_copy_of_its_image_is_a_problem(tmp_path: Path) -> None:
    """An image of 8 bits has few enough values for a label."""
    root = pictures(tmp_path, 3, colour=False, unlabelled=0)
    shutil.copy(root / "images" / "cell00.png", root / "labels" / "cell00.png")
    found = [line for report in inspect_folder(open_folder(root)) for line in report.problems]
    assert found == [f"{root / 'labels' / 'cell00.png'}: has the same voxels as its image; is it a copy of the image?"]


def test_negative_label_values_need_a_meaning(tmp_path: Path) -> None:
    root = plain(tmp_path, 3, unlabelled=0)
    label = volume(1, (31, 26, 6))[1].astype(np.int16)
    label[label == 1] = -1
    save(root / "labels" / "case01.nii.gz", label)
    found = inspect_folder(open_folder(root))
    count = int((label == -1).sum())
    (line,) = (line for report in found for line in report.problems)
    assert line.endswith(
        f"case01.nii.gz: has negative values: -1 in {count} voxels; say with --labels what they mean, for example "
        "--labels 0,1,-1=ignore"
    )
    declared = parse_labels("0,1,2,-1=ignore")
    assert not any(report.problems for report in inspect_folder(open_folder(root), declared))


def test_too_many_label_values_are_refused(tmp_path: Path) -> None:
    root = tmp_path
    for i in range(2):
        image = volume(i, (30, 26, 10))[0]
        save(root / "images" / f"case{i}.nii.gz", image)
        numbers = np.arange(200 * i, 200 * i + 200).repeat(39).reshape(30, 26, 10)
        save(root / "labels" / f"case{i}.nii.gz", numbers.astype(np.int16))
    data = open_folder(root)
    reports = inspect_folder(data)
    with pytest.raises(UserError, match="have 400 different values, but at most 256 classes"):
        labels_of(data, reports, None)
    assert len(labels_of(data, reports, parse_labels("0,1-1000=cell"))) == 2


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


@pytest.mark.parametrize("place", ["images/case01.nii.gz", "labels/case01.nii.gz"])
def test_a_link_that_leads_nowhere_is_refused(place: str, tmp_path: Path) -> None:
    """Data may have been moved, or never fetched. Otherwise, a labelled volume would count as unlabelled."""
    root = plain(tmp_path / "data")
    path = root / place
    elsewhere = path.rename(tmp_path / "elsewhere.nii.gz")
    path.symlink_to(elsewhere)
    assert len(open_folder(root).cases) == 8
    elsewhere.unlink()
    with pytest.raises(
        UserError, match=r"case01\.nii\.gz: must be a file, is a link to .*elsewhere\.nii\.gz, where no"
    ):
        open_folder(root)
    with pytest.raises(UserError, match="must be a file, is a link to"):
        group_inputs([path])


def test_a_pipe_is_refused_as_an_image(tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    root = plain(tmp_path / "data")
    pipe = root / "images" / "case09.nii.gz"
    os.mkfifo(pipe)
    for read in (lambda: open_folder(root), lambda: group_inputs([pipe])):
        with pytest.raises(UserError, match=r"case09\.nii\.gz: must be a file, is something else"):
            read()


def test_links_to_folders_are_followed_without_endless_loops(tmp_path: Path) -> None:
    """A selection of patients is often a folder of links. A link to a folder above must not lead to an endless loop."""
    root, chosen = acdc(tmp_path / "data", 3), tmp_path / "chosen"
    chosen.mkdir()
    for patient in ("patient001", "patient003"):
        (chosen / patient).symlink_to(root / "training" / patient)
    (chosen / "again").symlink_to(chosen)
    assert open_folder(chosen).patients == ["patient001", "patient003"]
    (chosen / "patient003").unlink()
    (chosen / "patient003").symlink_to(root / "patient003")
    with pytest.raises(UserError, match=r"patient003: is a link to .*, where nothing is"):
        open_folder(chosen)


@pytest.mark.parametrize("name", ["labels", "images", "dataset.json"])
def test_a_folder_whose_part_is_a_dead_link_is_refused(name: str, tmp_path: Path) -> None:
    """Otherwise all volumes would be unlabelled, or the folder would seem to have another layout."""
    root = plain(tmp_path / "data", 3)
    if (root / name).exists():
        (root / name).rename(tmp_path / "moved")
    (root / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{name}: must be a (file|folder), is a link to .*, where no (file|folder) is"):
        open_folder(root)


def test_a_list_of_patients_that_is_a_dead_link_is_refused(tmp_path: Path) -> None:
    """Otherwise, test patients would be used to train."""
    root = ssl4mis(tmp_path / "data")
    (root / "test.list").unlink()
    (root / "test.list").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"test\.list: must be a file, is a link to"):
        open_folder(root)


def test_a_dead_link_in_a_folder_of_patients_is_refused(tmp_path: Path) -> None:
    root = acdc(tmp_path / "data", 2)
    path = root / "training" / "patient001" / "patient001_frame01_gt.nii.gz"
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(UserError, match=r"patient001_frame01_gt\.nii\.gz: must be a file, is a link to"):
        open_folder(root)


def test_names_that_look_like_volumes_of_one_patient_are_noted(tmp_path: Path) -> None:
    """Only lists and ACDC tell patients from volumes. One volume could be trained on, and the other be the test."""
    image, label = volume(0)
    for number in (1, 2):
        for frame in (1, 12):
            for kind, data in (("images", image), ("labels", label)):
                save(tmp_path / kind / f"patient{number:03d}_frame{frame:02d}.nii.gz", data)
    assert open_folder(tmp_path).notes == [
        "patient001_frame01 and patient001_frame12 look like volumes of one patient, but count as two patients, so "
        "one may be used for training and the other for the scores (2 such names); a list with the column "
        "patient keeps them together"
    ]
    assert open_folder(acdc(tmp_path / "acdc", 2)).notes == []
    for path in [*(tmp_path / "images").iterdir(), *(tmp_path / "labels").iterdir()]:
        path.rename(path.with_name(path.name.replace("_frame", "_")))
    assert open_folder(tmp_path).notes == []


def test_the_unit_names_all_units_of_mixed_files(tmp_path: Path) -> None:
    root = pictures(tmp_path, 2, unlabelled=0)
    save(root / "images" / "scan.nii.gz", volume(0)[0])
    data = open_folder(root)
    assert distance_unit(data) == "mm and pixel"
    assert distance_unit(data, data.cases[:2]) == "pixel"
