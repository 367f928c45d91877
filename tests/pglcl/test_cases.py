"""Splits of the patients, and the unit of distances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pglcl.cases import distance_unit, folds_of, split_patients, without_effect
from pglcl.errors import UserError
from pglcl.inspection import survey
from pglcl.layouts import open_folder

from tests.conftest import data_folder
from tests.pglcl.folders import acdc, pictures, plain, save, ssl4mis, tiny, volume


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


def test_the_unit_names_all_units_of_mixed_files(tmp_path: Path) -> None:
    root = pictures(tmp_path, 2, unlabelled=0)
    save(root / "images" / "scan.nii.gz", volume(0)[0])
    data = open_folder(root)
    assert distance_unit(data) == "mm and pixel"
    assert distance_unit(data, data.cases[:2]) == "pixel"


def test_options_that_a_split_file_overrides_are_named(tmp_path: Path) -> None:
    data = open_folder(plain(tmp_path))
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"labelled": ["case00", "case01", "case02"], "unlabelled": ["case06"]}))

    def said(**changes: Any) -> list[str]:
        config = tiny(**{"validation": -1, "test": -1, "labelled": 3, "split_file": str(path), **changes})
        return without_effect(data, config, split_patients(data, config))

    assert said() == said(labelled=4) == []  # the default may not have been given
    assert said(test=2, validation=0, shuffle=True, labelled=2) == [
        f"{option} has no effect: --split-file {path} decides"
        for option in ("--validation 0", "--test 2", "--shuffle", "--labelled 2")
    ]
    notes = survey(data, tiny(validation=-1, labelled=3, split_file=str(path))).notes
    assert said(test=2) == [note for note in notes if "no effect" in note]
    path.write_text(json.dumps([{"train": ["case00", "case01", "case02", "case03"], "val": ["case05"]}]))
    assert said(labelled=2) == []
    path.unlink()
    assert said(split_file="", test=1, shuffle=True, labelled=2) == []


def test_lists_of_a_folder_leave_nothing_to_shuffle(tmp_path: Path) -> None:
    data = open_folder(ssl4mis(tmp_path))
    config = tiny(validation=-1, test=-1, shuffle=True)
    said = [f"--shuffle has no effect: the lists of {tmp_path} decide"]
    assert without_effect(data, config, split_patients(data, config)) == said
    config = tiny(shuffle=True)
    assert without_effect(data, config, split_patients(data, config)) == []


def test_patients_whose_names_hardly_differ_are_named(tmp_path: Path) -> None:
    """Volumes of one patient may otherwise be in training and test."""
    plain(tmp_path, 4, unlabelled=0)
    rows = [f"images/case{i:02d}.nii.gz,labels/case{i:02d}.nii.gz,{{}}" for i in range(4)]
    alike = "'P 1' and 'p1' count as 2 patients, though only case, spaces or leading zeros differ (1 such names)"
    zeros = alike.replace("'P 1' and 'p1'", "'001' and '1'")
    for names, expected in (
        (("P 1", "p1", "P2", "p\u00e9"), [alike]),
        (("001", "1", "10", "100"), [zeros]),
        (("a", "b", "c", "d"), []),
        (("a", "a", "b", "c"), []),
        (("1_01", "1_10", "101", "11"), []),
    ):
        lines = [row.format(name) for row, name in zip(rows, names, strict=True)]
        (tmp_path / "list.csv").write_text("\n".join(["image,label,patient", *lines]), encoding="utf-8")
        notes = open_folder(tmp_path / "list.csv").notes
        assert [note for note in notes if "count as" in note] == expected
