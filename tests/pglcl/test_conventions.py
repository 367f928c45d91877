"""Label values that are probably not classes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pglcl.conventions import maybe_ignored, smoothed_edges, two_conventions, unusual_background
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder, survey
from pglcl.labels import LabelMap
from pglcl.layouts import open_folder
from pglcl.proposals import warnings_of

from tests.pglcl.folders import pictures, plain, save, tiny, volume


def found(*files: list[int]) -> tuple[tuple[int, ...], tuple[int, ...], bool] | None:
    """The values of both conventions and whether they are certain; each file also has background."""
    answer = two_conventions({Path(f"case{i:03d}.png"): [0, *values] for i, values in enumerate(files)})
    return answer and (answer.small, answer.large, answer.certain)


@pytest.mark.parametrize(
    ("files", "small", "large"),
    [
        (([1], [255]), (1,), (255,)),
        (([255], [], [1], [255]), (1,), (255,)),
        (([1, 2], [128, 255], [127 + 1]), (1, 2), (128, 255)),
        (([1, 2], [127, 255]), (1, 2), (127, 255)),
        (([1], [2], [128], [255]), (1, 2), (128, 255)),  # no file has more than one class
        (([1, 3], [2, 3], [85, 170], [170, 255]), (1, 2, 3), (85, 170, 255)),
        (([1], [65535]), (1,), (65535,)),
        ((list(range(1, 11)), [round(25.5 * k) for k in range(1, 11)]), tuple(range(1, 11)), None),
    ],
)
def test_the_same_classes_spread_to_white_are_certain(
    files: tuple[list[int], ...], small: tuple[int, ...], large: tuple[int, ...] | None
) -> None:
    answer = found(*files)
    assert answer is not None
    assert (answer[0], answer[2]) == (small, True)
    assert large is None or answer[1] == large


@pytest.mark.parametrize("files", [([1], [100]), ([1, 2], [255]), ([1, 2, 3], [85]), ([1], [128, 255]), ([2], [255])])
def test_much_larger_values_of_their_own_files_are_suspicious(files: tuple[list[int], ...]) -> None:
    answer = found(*files)
    assert answer is not None
    assert not answer[2]


@pytest.mark.parametrize(
    "files",
    [
        (),
        ([], []),
        ([1], [2]),  # an organ may be absent
        ([1], [2], [3], [4], [5], [6], [7], [8], [9], [10], [11], [12]),
        ([1], [3]),
        ([85, 170], [170, 255]),
        ([1], [1, 255], [255]),  # one file has both
        (list(range(1, 60)), list(range(90, 118))),  # the organs of a trunk, and those of a head
        ([1, 2, 3], [1, 2, 4]),
    ],
)
def test_absent_organs_are_not_suspicious(files: tuple[list[int], ...]) -> None:
    assert found(*files) is None


def test_files_and_options_are_named() -> None:
    answer = two_conventions({Path("a.png"): [0, 2], Path("b.png"): [0, 128, 255], Path("c.png"): [1, 2]})
    assert answer is not None
    assert answer.describe() == (
        "label values 1, 2 in 2 files (a.png, c.png), but 128, 255 in 1 file (b.png), and no file has both: the same "
        "classes in two conventions; --labels 0,1+128,2+255 makes them the same classes, --labels 0,1,2,128,255 keeps "
        "them apart"
    )
    answer = two_conventions({Path("a.png"): [1, 2], Path("b.png"): [255]})
    assert answer is not None
    assert "--labels joins values of one class with +, --labels 0,1,2,255 keeps" in answer.describe()


def test_rare_values_between_frequent_ones_are_said() -> None:
    edges = {0: 90_000, 255: 10_000, 254: 60, 253: 40, 1: 55, 2: 20, 128: 3}
    assert "6 values besides 0, each a class of its own, and 3 of them together have 0.62%" in smoothed_edges(edges)
    assert smoothed_edges({0: 1, **{value: 10 for value in range(1, 255)}, 255: 10_000}) == ""  # no rarer half
    assert smoothed_edges({0: 1, **{value: 1 for value in range(1, 255)}, 255: 10_000}) != ""
    assert smoothed_edges({0: 9, 1: 1000, 2: 1, 3: 900, 4: 1, 5: 2, 6: 1000}) == ""  # numbered classes
    assert smoothed_edges({0: 9, 1: 10_000, 2: 1, 4: 1}) == ""  # a small lesion


def test_a_background_other_than_0_and_255_beside_numbers_are_said() -> None:
    assert "for example --labels 1,2" in unusual_background({1: 900, 2: 100})
    assert unusual_background({0: 1, 1: 900, 2: 100}) == unusual_background({}) == ""
    assert "255 beside 1, 2 counts as a class" in maybe_ignored({0: 9, 1: 5, 2: 5, 255: 3})
    assert "--labels 0,1,2,255=ignore" in maybe_ignored({0: 9, 1: 5, 2: 5, 255: 3})
    for values in ([255], [1, 2, 3], [85, 170, 255], [1, 3, 255], [1, 254], list(range(1, 255))):
        assert maybe_ignored(dict.fromkeys([0, *values], 5)) == ""


# --- in a folder ----------------------------------------------------------------------------------------------------


def relabel(root: Path, names: list[str], values: list[int]) -> None:
    """Gives the values 0, 1 and 2 of label files other values."""
    for name in names:
        path = root / "labels" / f"{name}.nii.gz"
        image = nib.load(path)
        save(path, np.array(values, np.uint8)[np.asarray(image.dataobj)], image.affine)


def test_inspect_and_train_refuse_labels_in_two_conventions(tmp_path: Path) -> None:
    """They would silently be twice as many classes."""
    root = plain(tmp_path)
    relabel(root, ["case01", "case04"], [0, 128, 255])
    (problem,) = (line for report in inspect_folder(open_folder(root)) for line in report.problems)
    assert "case01.nii.gz" in problem
    assert "--labels 0,1+128,2+255 makes them the same classes" in problem
    with pytest.raises(UserError, match=r"--labels 0,1\+128,2\+255 makes them the same classes"):
        survey(open_folder(root), tiny())
    assert len(survey(open_folder(root), tiny(labels="0,1+128,2+255")).labels) == 3
    assert len(survey(open_folder(root), tiny(labels="0,1,2,128,255")).labels) == 5


def test_inspect_and_train_say_what_may_be_two_conventions(tmp_path: Path) -> None:
    root = plain(tmp_path)
    relabel(root, ["case01", "case04"], [0, 100, 200])
    data = open_folder(root)
    reports = inspect_folder(data)
    assert not any(report.problems for report in reports)
    said = "if these are the same classes in two conventions, they count as different classes"
    assert sum(said in note for report in reports for note in report.notes) == 1
    assert sum(said in note for note in survey(data, tiny()).notes) == 1
    assert not any(said in note for note in survey(data, tiny(labels="0,1,2,100,200")).notes)
    assert not any(said in line for line in warnings_of(data, reports, LabelMap.of_values([1, 2])))


def test_a_picture_of_one_bit_beside_one_of_eight(tmp_path: Path) -> None:
    """White is 1 in the first, and 255 in the second."""
    image_module = pytest.importorskip("PIL.Image")
    root = pictures(tmp_path, colour=False, unlabelled=0)
    for i in range(8):
        path = root / "labels" / f"cell{i:02d}.png"
        mask = np.asarray(image_module.open(path)) > 0
        image_module.fromarray(mask if i == 3 else mask * np.uint8(255)).save(path)
    (problem,) = (line for report in inspect_folder(open_folder(root)) for line in report.problems)
    assert "label values 1 in 1 file" in problem
    assert "--labels 0,1+255 makes them the same classes" in problem


def test_train_says_which_classes_it_found_and_which_labels_are_empty(tmp_path: Path) -> None:
    root = plain(tmp_path, 10)
    for i in range(2, 8):
        relabel(root, [f"case{i:02d}"], [0, 0, 0])
    data = open_folder(root)
    notes = survey(data, tiny(labelled=5)).notes
    assert "labels: 0,1,2; a class for each value that the label files have" in notes
    assert "labels: 0,1=ball,2; --labels" in survey(data, tiny(labels="0,1=ball,2")).notes
    empty = [note for note in notes if "is an empty label" in note]
    assert len(empty) == 4
    assert empty[-1].startswith("and 3 more files: is an empty label")


def test_a_folder_without_background_and_one_with_white_voxels_are_said(tmp_path: Path) -> None:
    names = [f"case{i:02d}" for i in range(6)]
    for values, said in (([1, 2, 3], "no label file has the value 0"), ([0, 1, 255], "if it marks voxels to be left")):
        root = plain(tmp_path / str(values[0]))
        relabel(root, names, values)
        data = open_folder(root)
        assert sum(said in note for report in inspect_folder(data) for note in report.notes) == 1
        assert sum(said in note for note in survey(data, tiny()).notes) == 1


def test_a_label_whose_voxels_are_all_ignored_is_said(tmp_path: Path) -> None:
    """Its scores are empty."""
    root = plain(tmp_path)
    relabel(root, ["case05"], [9, 9, 9])
    notes = survey(open_folder(root), tiny(labels="0,1,2,9=ignore")).notes
    said = f"{root / 'labels' / 'case05.nii.gz'}: has no voxel that counts: all are to be ignored"
    assert [note for note in notes if "counts" in note] == [said]


def test_one_label_of_two_images_is_said(tmp_path: Path) -> None:
    """A file that was copied by mistake trains the network on wrong outlines."""
    root = plain(tmp_path)
    image, label = volume(0, (32, 26, 6))  # another image of the same size, and its label
    save(root / "images" / "case00.nii.gz", image)
    save(root / "labels" / "case00.nii.gz", label)
    data = open_folder(root)
    assert not any("same label" in note for note in survey(data, tiny()).notes)
    save(root / "labels" / "case05.nii.gz", label.astype(np.int16))
    said = "case00 and case05 have the same label, but different images. One label may be a copy by mistake"
    assert said in survey(data, tiny()).notes
    assert said in warnings_of(data, inspect_folder(data), LabelMap.of_values([1, 2]))
    for name in ("case00", "case05"):  # empty labels say nothing
        relabel(root, [name], [0, 0, 0])
    assert not any("same label" in note for note in survey(data, tiny()).notes)
