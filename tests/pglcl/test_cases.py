"""Layouts, splits, and the findings of inspect."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pglcl.cases import distance_unit, folds_of, split_patients
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder
from pglcl.labels import LabelMap
from pglcl.layouts import open_folder

from tests.conftest import data_folder
from tests.pglcl.folders import OBLIQUE, acdc, decathlon, plain, save, ssl4mis, tiny, volume


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


@pytest.mark.skipif(data_folder() is None, reason="no real volumes: neither PGLCL_DATA nor shared/data")
def test_real_folders_are_recognised_and_split() -> None:
    root = data_folder()
    assert root is not None
    hearts = open_folder(root / "ACDC")
    assert (hearts.layout, len(hearts.cases), len(hearts.patients)) == ("acdc", 100, 50)
    split = split_patients(hearts, tiny(labelled=4, test=10, validation=5))
    assert split.test == tuple(f"patient{i:03d}" for i in range(41, 51))
    assert len(open_folder(root / "Task04_Hippocampus").cases) == 160


def test_split_is_by_patient_and_reproducible(tmp_path: Path) -> None:
    data = open_folder(acdc(tmp_path))
    split = split_patients(data, tiny())
    parts = [split.labelled, split.unlabelled, split.validation, split.test]
    assert sorted(patient for part in parts for patient in part) == data.patients  # each patient in exactly one part
    assert split.labelled == ("patient001", "patient002")
    assert split.test == ("patient007", "patient008")
    shuffled = [split_patients(data, tiny(shuffle=True, seed=s)) for s in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]


def test_every_patient_is_in_one_fold(tmp_path: Path) -> None:
    data = open_folder(acdc(tmp_path, 11))  # two volumes of each patient
    splits = [split_patients(data, tiny(folds=5, fold=k, test=-1, validation=-1)) for k in range(5)]
    kept = [p for split in splits for p in split.validation]
    assert sorted(kept) == data.patients  # every patient is in one fold
    assert sorted(len(split.validation) for split in splits) == [2, 2, 2, 2, 3]
    for split in splits:
        assert split.test == ()
        assert not set(split.validation) & {*split.labelled, *split.unlabelled}
        assert sorted((*split.labelled, *split.unlabelled, *split.validation)) == data.patients
    other_seed = split_patients(data, tiny(folds=5, fold=2, test=-1, validation=-1, seed=7, labelled=3))
    assert other_seed.validation == splits[2].validation  # models of other seeds are compared on the same folds
    tested = [split_patients(data, tiny(folds=2, fold=k, test=3, validation=-1)) for k in (0, 1)]
    assert tested[0].test == tested[1].test == ("patient009", "patient010", "patient011")
    assert sorted((*tested[0].validation, *tested[1].validation)) == data.patients[:8]


def test_folds_are_those_of_nnunet() -> None:
    """The values are scikit-learn's: KFold(5, shuffle=True, random_state=12345) of 12 names."""
    names = [f"case_{i:02d}" for i in range(12)]
    expected = [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]
    assert [[int(name[-2:]) for name in fold] for fold in folds_of(reversed(names), 5)] == expected


def test_folds_keep_the_test_of_the_folder(tmp_path: Path) -> None:
    data = open_folder(ssl4mis(tmp_path))
    splits = [split_patients(data, tiny(folds=3, fold=k, test=-1, validation=-1)) for k in range(3)]
    assert {split.test for split in splits} == {data.parts["test"]}
    kept = [p for split in splits for p in split.validation]
    assert sorted(kept) == sorted(set(data.patients) - set(data.parts["test"]))


def test_more_folds_than_patients_are_refused(tmp_path: Path) -> None:
    data = open_folder(plain(tmp_path))  # six have labels
    split = split_patients(data, tiny(folds=6, fold=1, test=-1, validation=-1))
    assert len(split.validation) == 1
    assert {"case06", "case07"} <= set(split.unlabelled)
    with pytest.raises(UserError, match="--folds 7 needs a patient with labels for each fold, got 6 besides"):
        split_patients(data, tiny(folds=7, test=-1, validation=-1))
    with pytest.raises(UserError, match="--labelled 5, but its training part has 3 patients with labels"):
        split_patients(data, tiny(folds=2, labelled=5, test=-1, validation=-1))


def test_unlabelled_patients_are_never_for_test_or_validation(tmp_path: Path) -> None:
    split = split_patients(open_folder(plain(tmp_path)), tiny())
    assert {"case06", "case07"} <= set(split.unlabelled)


def test_a_split_file_gives_the_parts(tmp_path: Path) -> None:
    data = open_folder(plain(tmp_path / "data"))
    file = tmp_path / "split.json"
    parts = {"labelled": ["case01"], "unlabelled": ["case06"], "validation": [], "test": ["case00"]}
    file.write_text(json.dumps(parts))
    assert split_patients(data, tiny(split_file=str(file))).as_dict() == parts
    for change, message in (
        ({"test": ["case09"]}, "which is not a patient"),
        ({"test": ["case01"]}, "is in labelled and in test"),
        ({"labelled": ["case07"]}, "without a label file"),
        ({"labelled": []}, "labelled is empty"),
        ({"labelled": ["case01", "case01"]}, "'case01' is twice in labelled"),
        ({"other": []}, "must be an object with the lists"),
    ):
        file.write_text(json.dumps({**parts, **change}))
        with pytest.raises(UserError, match=message):
            split_patients(data, tiny(split_file=str(file)))
    file.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        split_patients(data, tiny(split_file=str(file)))


def test_a_fold_that_names_a_patient_twice_is_refused(tmp_path: Path) -> None:
    """Otherwise --labelled 2 would train on one patient."""
    data, file = open_folder(plain(tmp_path / "data")), tmp_path / "splits_final.json"
    for part in ("train", "val"):
        fold = {"train": ["case00"], "val": ["case02"]}
        fold[part] *= 2
        file.write_text(json.dumps([fold]))
        with pytest.raises(UserError, match=f"{fold[part][0]}' is twice in {part} of fold 0"):
            split_patients(data, tiny(split_file=str(file), validation=-1, test=-1))


def test_a_split_of_too_few_volumes_is_refused(tmp_path: Path) -> None:
    data = open_folder(plain(tmp_path))
    with pytest.raises(UserError, match="ask for 8 patients with labels, but only 6 have labels"):
        split_patients(data, tiny(labelled=5))
    for label in (tmp_path / "labels").iterdir():
        label.unlink()
    with pytest.raises(UserError, match="no labelled volume"):
        split_patients(open_folder(tmp_path), tiny())


def test_folders_without_a_known_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no volumes found"):
        open_folder(tmp_path)
    (tmp_path / "dataset.json").write_text('{"training": [3]}')
    with pytest.raises(UserError, match="not a Decathlon description"):
        open_folder(tmp_path)


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def with_nan(path: Path) -> None:
    image = nib.load(path)
    data = image.get_fdata().astype(np.float32)
    data[0, 0, 0] = np.nan
    save(path, data)


def spoil_image(change) -> None:
    def spoil(root: Path) -> None:
        change(root / "images" / "case01.nii.gz")

    return spoil


def spoil_label(data, affine=OBLIQUE):
    def spoil(root: Path) -> None:
        _, label = volume(1, (31, 26, 6))
        save(root / "labels" / "case01.nii.gz", data(label), affine)

    return spoil


BAD = {
    "truncated or damaged": spoil_image(truncated),
    "not readable as NIfTI": spoil_image(lambda p: p.write_text("hello")),
    "1 voxels that are NaN or infinite": spoil_image(with_nan),
    "is a constant image: every voxel is 7": spoil_image(lambda p: save(p, np.full((31, 26, 6), 7, np.float32))),
    "has values that are not labels: 5 in 156 voxels; labels are 0,1,2": spoil_label(
        lambda y: np.concatenate([np.full_like(y[:1], 5), y[1:]])
    ),
    "labels must be whole numbers": spoil_label(lambda y: y + 0.5),
    "must have the shape of its image": spoil_label(lambda y: y[1:]),
    "must have the affine of its image": spoil_label(lambda y: y, np.eye(4)),
}


@pytest.mark.parametrize("message", BAD)
def test_inspect_names_every_problem(message: str, tmp_path: Path) -> None:
    root = plain(tmp_path)
    assert not any(r.problems for r in inspect_folder(open_folder(root), LabelMap.of_values([1, 2])))
    BAD[message](root)
    problems = [line for r in inspect_folder(open_folder(root), LabelMap.of_values([1, 2])) for line in r.problems]
    assert len(problems) == 1
    assert message in problems[0]
    assert "case01.nii.gz" in problems[0]


def test_inspect_notes_an_empty_label(tmp_path: Path) -> None:
    root = plain(tmp_path)
    spoil_label(lambda y: 0 * y)(root)
    notes = [line for r in inspect_folder(open_folder(root)) for line in r.notes]
    assert len(notes) == 1
    assert "is an empty label" in notes[0]


def test_a_label_without_an_image_is_refused(tmp_path: Path) -> None:
    root = plain(tmp_path)
    (root / "images" / "case00.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case00\.nii\.gz: is a label without an image"):
        open_folder(root)
