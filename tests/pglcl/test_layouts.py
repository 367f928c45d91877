"""Data folders of each layout, and what is refused in them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from pglcl.cases import distance_unit, split_patients
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder, labels_of
from pglcl.labels import LabelMap
from pglcl.layouts import group_inputs, open_folder
from pglcl.proposals import propose

from tests.pglcl.folders import (
    STRAIGHT,
    acdc,
    decathlon,
    dicom,
    kits,
    pictures,
    plain,
    save,
    ssl4mis,
    tiny,
    volume,
)  # fmt: skip


def test_plain_folders_are_read(tmp_path: Path) -> None:
    data = open_folder(plain(tmp_path))
    assert data.layout == "plain"
    assert [case.label is None for case in data.cases] == [False] * 6 + [True] * 2
    assert distance_unit(data) == "mm"


def test_channels_in_files_of_their_own_are_one_case(tmp_path: Path) -> None:
    image, label = volume(0)
    for channel in (0, 1):
        save(tmp_path / "images" / f"a_{channel:04d}.nii.gz", image)
    save(tmp_path / "labels" / "a.nii.gz", label)
    (case,) = open_folder(tmp_path).cases
    assert [p.name for p in case.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert inspect_folder(open_folder(tmp_path))[0].channels == 2


def test_acdc_folders_are_read(tmp_path: Path) -> None:
    data = open_folder(acdc(tmp_path, 3))
    assert data.layout == "acdc"
    assert len(data.cases) == 6
    assert data.patients == ["patient001", "patient002", "patient003"]
    assert all(case.label is not None for case in data.cases)
    assert distance_unit(data) == "voxel"  # every header says 1 mm


def test_decathlon_folders_are_read(tmp_path: Path) -> None:
    data = open_folder(decathlon(tmp_path))
    assert data.layout == "decathlon"
    assert data.labels == LabelMap.of_values([1, 2], {1: "ball", 2: "cube"})
    assert inspect_folder(data)[0].channels == 2


def test_folders_without_a_known_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no volumes found"):
        open_folder(tmp_path)
    (tmp_path / "dataset.json").write_text('{"training": [3]}')
    with pytest.raises(UserError, match="not a Decathlon description"):
        open_folder(tmp_path)


def test_a_label_without_an_image_is_refused(tmp_path: Path) -> None:
    root = plain(tmp_path)
    (root / "images" / "case00.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case00\.nii\.gz: is a label without an image"):
        open_folder(root)


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
