"""Decathlon and nnU-Net folders, which dataset.json describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder
from pglcl.labels import LabelMap
from pglcl.layouts import open_folder
from pglcl.volumes import read_label

from tests.pglcl.folders import (
    STRAIGHT,
    decathlon,
    describe,
    nnunet,
    pictures,
    save,
    ssl4mis,
    volume,
)  # fmt: skip


def test_nnunet_folders_are_read(tmp_path: Path) -> None:
    root = nnunet(tmp_path, channels=2)
    data = open_folder(root)
    assert data.layout == "nnunet"
    assert data.modalities == ("MR0", "MR1")
    assert data.labels == LabelMap.of_values([1, 2], {1: "ball", 2: "cube"})
    assert [case.name for case in data.cases] == [f"heart_{i:03d}" for i in range(8)]  # imagesTs is not read
    assert [len(case.images) for case in data.cases] == [2] * 8
    assert [case.label is None for case in data.cases] == [False] * 6 + [True] * 2
    for c in range(2):
        save(root / "imagesUn" / f"more_{c:04d}.nii.gz", volume(50)[0])
    assert [case.name for case in open_folder(root).cases if case.label is None] == ["heart_006", "heart_007", "more"]
    assert not any(r.problems for r in inspect_folder(data))


def test_nnunet_files_must_have_the_declared_ending(tmp_path: Path) -> None:
    data = open_folder(nnunet(tmp_path, 3, unlabelled=1, ending=".nrrd"))
    assert [report.problems for report in inspect_folder(data)] == [[], [], []]
    describe(tmp_path, file_ending=".nii.gz")
    with pytest.raises(UserError, match=r"heart_000_0000\.nrrd: must end in \.nii\.gz, as dataset\.json says"):
        open_folder(tmp_path)


def test_nnunet_keeps_the_colours_of_a_picture_in_one_file(tmp_path: Path) -> None:
    root = pictures(tmp_path)
    for old, new in (("images", "imagesTr"), ("labels", "labelsTr")):
        (root / old).rename(root / new)
    for path in (root / "imagesTr").iterdir():
        path.rename(path.with_name(f"{path.stem}_0000.png"))
    colours = {"0": "R", "1": "G", "2": "B"}
    labels = {"background": 0, "cell": 85, "nucleus": 170}
    describe(root, channel_names=colours, file_ending=".png", labels=labels)
    data = open_folder(root)
    assert [case.images[0].name for case in data.cases][:2] == ["cell00_0000.png", "cell01_0000.png"]
    assert {report.channels for report in inspect_folder(data)} == {3}
    assert not [line for report in inspect_folder(data) for line in report.problems]
    describe(root, channel_names={"0": "R", "1": "G"}, file_ending=".png", labels=labels)
    with pytest.raises(UserError, match=r"cell00_0000\.png: must have 2 channel files, got 1"):
        open_folder(root)


def test_nnunet_names_with_wrong_channels_are_refused(tmp_path: Path) -> None:
    root = nnunet(tmp_path, channels=2)
    (root / "imagesTr" / "heart_003_0001.nii.gz").unlink()
    with pytest.raises(UserError, match="heart_003 must have the channels of the others"):
        open_folder(root)
    describe(root)
    with pytest.raises(UserError, match=r"must end in _0000 to _0000, the channels that dataset\.json names"):
        open_folder(root)


def test_nnunet_voxels_called_ignore_do_not_count(tmp_path: Path) -> None:
    root = nnunet(tmp_path, 3, unlabelled=0)
    describe(root, labels={"background": 0, "ball": 1, "cube": 2, "ignore": 3})
    image, label = volume(0)
    label[:3] = 3
    save(root / "labelsTr" / "heart_000.nii.gz", label, STRAIGHT)
    data = open_folder(root)
    assert data.labels is not None
    assert data.labels.ignore == (3,)
    case = data.cases[0]
    assert case.label is not None
    classes = read_label(case.label, case.images[0], data.labels)
    assert (classes == -1).sum() == 3 * image.shape[1] * image.shape[2]
    assert len(data.labels) == 3


def declared_by_decathlon(root: Path, labels: dict[str, str]) -> LabelMap | None:
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "test": ["a.nii.gz"]}))
    return open_folder(root).labels


def declared_by_a_list(root: Path, labels: dict[str, str]) -> LabelMap | None:
    by_name = {name: int(value) for value, name in labels.items()}
    (root / "list.json").write_text(json.dumps({"cases": [{"image": "a.nii.gz"}], "labels": by_name}))
    return open_folder(root / "list.json").labels


@pytest.mark.parametrize("declared", [declared_by_decathlon, declared_by_a_list])
def test_labels_called_ignore_and_background_have_their_meaning(
    declared: Callable[[Path, dict[str, str]], LabelMap | None], tmp_path: Path
) -> None:
    """A class named ignore is left out, not learned. The value 0 is the background, whatever its name."""
    save(tmp_path / "a.nii.gz", volume(0)[0])
    labels = declared(tmp_path, {"0": "air", "2": "organ", "7": "Ignore"})
    assert labels is not None
    assert (labels.values, labels.names, labels.ignore) == (((0,), (2,)), ("air", "organ"), (7,))
    with pytest.raises(UserError, match="the background must have the value 0, got 1"):
        declared(tmp_path, {"0": "organ", "1": "background"})
    with pytest.raises(UserError, match="the value 0 is the background and cannot be ignored"):
        declared(tmp_path, {"0": "ignore", "1": "organ", "2": "tumour"})  # the organ would be the background


def test_two_label_values_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the labels 1, 2 have the same name, 'organ'; give each its own name"):
        declared_by_decathlon(tmp_path, {"0": "background", "1": "organ", "2": "organ"})


def test_nnunet_regions_become_exclusive_classes(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    describe(root, labels=regions, regions_class_order=[1, 2])
    data = open_folder(root)
    assert data.labels == LabelMap.of_values([1, 2], {1: "whole alone", 2: "core alone"})
    assert data.notes == ["regions are trained as exclusive classes: value 1 is whole alone, value 2 is core alone"]
    describe(root, labels=regions)
    with pytest.raises(UserError, match=r"regions.* need regions_class_order"):
        open_folder(root)
    describe(root, labels={**regions, "whole": [1, 2, 3]}, regions_class_order=[1, 2])
    with pytest.raises(
        UserError, match=r"regions_class_order must have all values of regions, \[1, 2, 3\], got \[1, 2\]"
    ):
        open_folder(root)


BAD_DESCRIPTIONS = {
    "3": "not a Decathlon description",
    "[1]": "not a Decathlon description",
    '{"channel_names": 3}': "not an nnU-Net description",
    '{"channel_names": {"0": "MR"}}': 'not an nnU-Net description: has no entry "labels"',
    '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": -1}}': "labels must be whole numbers from 0",
    '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": true}}': "labels must be whole numbers from 0",
    '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 0}}': "have the same value, 0",
    '{"channel_names": {"x": "MR"}, "labels": {}}': "not an nnU-Net description",
    '{"training": [{"image": 3}]}': "not a Decathlon description",
    '{"training": [{"image": "a.nii"}]}': 'not a Decathlon description: has no entry "label"',
    "[" * 100_000: "not readable as JSON",
    '{"a": ' * 100_000: "not readable as JSON",
}


@pytest.mark.parametrize("text", BAD_DESCRIPTIONS, ids=lambda t: t[:30])
def test_descriptions_that_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    assert BAD_DESCRIPTIONS[text] in error.value.lines[0]
    assert "dataset.json" in error.value.lines[0]


def test_folders_of_the_first_nnunet_are_read(tmp_path: Path) -> None:
    """dataset.json lists CASE.nii.gz, the files are CASE_0000.nii.gz."""
    root = decathlon(tmp_path, channels=1)
    for path in list((root / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    data = open_folder(root)
    assert [case.images[0].name for case in data.cases][:2] == ["brain_000_0000.nii.gz", "brain_001_0000.nii.gz"]
    assert not any(r.problems for r in inspect_folder(data))


def test_files_that_a_description_names_twice_are_refused(tmp_path: Path) -> None:
    root = decathlon(tmp_path / "decathlon", 3, 1)
    content = json.loads((root / "dataset.json").read_text())
    for other, message in (
        (content["training"][0]["label"], "brain_000.nii.gz is listed as a label of brain_000 and of brain_001"),
        (content["training"][0]["image"], "is listed as a label and as an image"),
    ):
        content["training"][1]["label"] = other
        (root / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            open_folder(root)
    root = nnunet(tmp_path / "nnunet", 2, unlabelled=0)
    image = ["imagesTr/heart_000_0000.nii.gz"]
    describe(
        root,
        dataset={n: {"images": image, "label": f"labelsTr/heart_00{i}.nii.gz"} for i, n in enumerate(("x", "y"))},
    )
    with pytest.raises(UserError, match=r"heart_000_0000\.nii\.gz is listed 2 times"):
        open_folder(root)


def test_descriptions_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "nnunet")
    (root / "dataset.json").write_text((root / "dataset.json").read_text(), encoding="utf-8-sig")
    assert len(open_folder(root).cases) == 8
    root = ssl4mis(tmp_path / "ssl4mis")
    (root / "test.list").write_text("patient008_frame01\r\n", encoding="utf-8-sig", newline="")
    assert open_folder(root).parts["test"] == ("patient008",)


def test_images_that_a_description_does_not_list_are_noted(tmp_path: Path) -> None:
    root = decathlon(tmp_path, 5, 1)
    content = json.loads((root / "dataset.json").read_text())
    content["training"] = content["training"][:2]
    content["test"] = ["./imagesTr/brain_002.nii.gz", "./imagesTs/brain_900.nii.gz"]
    (root / "dataset.json").write_text(json.dumps(content))
    assert open_folder(root).notes == [
        f"{root / 'imagesTr'}: brain_003.nii.gz, brain_004.nii.gz (2): not read, since dataset.json does not list them",
        f"{root / 'dataset.json'}: 1 of the test images that it lists do not exist",
    ]


def test_json_with_a_repeated_name_is_refused(tmp_path: Path) -> None:
    """Python would keep the last one: here, the class of value 1 would be gone."""
    root = nnunet(tmp_path)
    text = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(text.replace('"cube": 2', '"ball": 2'))
    with pytest.raises(UserError, match=r"dataset\.json: not readable as JSON: the name 'ball' occurs twice"):
        open_folder(root)
