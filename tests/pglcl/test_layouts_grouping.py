"""The rule by which files become cases, in data folders and for predict."""

from __future__ import annotations

from pathlib import Path

import pytest
from pglcl.errors import UserError
from pglcl.layouts import group_files, group_inputs, open_folder

from tests.pglcl.folders import (
    plain,
)  # fmt: skip


def paths(*names: str) -> list[Path]:
    return [Path("there") / (name if "." in name else f"{name}.nii.gz") for name in names]


GROUPS = {
    ("a", "b"): {"a": 1, "b": 1},
    ("a_0000", "a_0001", "b_0001", "b_0000"): {"a": 2, "b": 2},
    ("a_0000", "b_0000"): {"a": 1, "b": 1},
    # Numbers that do not start at 0000 belong to the name.
    tuple(f"case_{i:04d}" for i in range(1, 7)): {f"case_{i:04d}": 1 for i in range(1, 7)},
    tuple(f"scan_{i}" for i in range(2015, 2022)): {f"scan_{i}": 1 for i in range(2015, 2022)},
    ("0001_0000", "0001_0001"): {"0001": 2},
    ("scan_00000", "scan_00001", "scan_1"): {"scan_00000": 1, "scan_00001": 1, "scan_1": 1},
    ("x.v2.NII.GZ", "y.Nii", "z.PNG"): {"x.v2": 1, "y": 1, "z": 1},
    ("a_0000.NRRD", "a_0001.nrrd"): {"a": 2},
    ("_0000", "_0001"): {"_0000": 1, "_0001": 1},
}


@pytest.mark.parametrize("names", GROUPS, ids=lambda n: n[0])
def test_files_are_grouped_by_their_channel_numbers(names: tuple[str, ...]) -> None:
    for order in (names, tuple(reversed(names))):
        groups = group_files(paths(*order))
        assert {name: len(files) for name, files in groups.items()} == GROUPS[names]
        assert all([*files] == sorted(files) for files in groups.values())


REFUSED = {
    ("a_0000", "a_0002"): "numbered from 0000 without a gap, got 0000, 0002",
    ("a_0000", "a_0001", "b_0000", "b_0001", "c_0000"): "c must have the channels of the others, 0000, 0001, got 0000",
    ("a_0000", "b_0001"): "channels of b must be numbered from 0000",
    ("a_0000", "b"): "b.nii.gz: has no channel number",
    ("a_0000", "b_2015"): "channels of b must be numbered from 0000",
    ("a.nii", "a.nii.gz"): "a.nii.gz: has the same name as there/a.nii",
    ("a_0000.nii", "a_0000.nii.gz"): "has the same name as",
    ("a.nii.gz", "a.nii.gz"): "is given twice",
    ("a.png", "a.jpg"): "has the same name as",
    ("._a.nii.gz",): "hidden file",
    (".partial-12-a.nii.gz",): "hidden file",
    (".nii.gz",): "hidden file",
    ("a.gif",): "there/a.gif: not found",
}


@pytest.mark.parametrize("names", REFUSED, ids=lambda n: " ".join(n))
def test_names_that_break_the_rule_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=REFUSED[names]):
        group_files(paths(*names))


def test_channels_of_a_case_lie_in_one_folder() -> None:
    with pytest.raises(UserError, match="must lie in one folder"):
        group_files([Path("a/x_0000.nii"), Path("b/x_0001.nii")])


def test_label_names_decide_whether_a_number_is_a_channel() -> None:
    files = paths("case_0000", "case_0001", "case_0002")
    assert set(group_files(files, ["case_0000", "case_0002"])) == {"case_0000", "case_0001", "case_0002"}
    assert set(group_files(files, ["case"])) == {"case"}
    with pytest.raises(UserError, match="all of one kind"):
        group_files(files, ["case", "case_0001"])
    with pytest.raises(UserError, match="case_0000: it is not clear whether"):
        group_files(files, ["case_0000"])


def test_suffixes_are_compared_without_case(tmp_path: Path) -> None:
    root = plain(tmp_path)
    (root / "images" / "case00.nii.gz").rename(root / "images" / "case00.NII.GZ")
    (root / "labels" / "case01.nii.gz").rename(root / "labels" / "case01.Nii.Gz")
    cases = open_folder(root).cases
    assert [case.name for case in cases] == [f"case{i:02d}" for i in range(8)]
    assert all(case.label is not None for case in cases[:6])


def test_two_labels_of_one_name_are_refused(tmp_path: Path) -> None:
    root = plain(tmp_path)
    (root / "labels" / "case00.nii").write_bytes(b"")
    with pytest.raises(UserError, match=r"case00\.nii\.gz: has the same name as .*case00\.nii;"):
        open_folder(root)


def test_wrong_inputs_of_predict_are_refused(tmp_path: Path) -> None:
    root = plain(tmp_path)
    image = root / "images" / "case00.nii.gz"
    with pytest.raises(UserError, match="is given twice"):
        group_inputs([image, image])
    with pytest.raises(UserError, match="is given twice"):
        group_inputs([image, root / "images"])
    with pytest.raises(UserError, match="this folder has no image"):
        group_inputs([root])
    with pytest.raises(UserError, match="has the same name as"):
        group_inputs([root / "images", root / "labels"])
    assert [case.name for case in group_inputs([image])] == ["case00"]
