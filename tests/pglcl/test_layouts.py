"""Which files become which cases, in data folders and for predict."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pglcl.cases import distance_unit, split_patients
from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder, labels_of, propose, warnings_of
from pglcl.labels import LabelMap, parse_labels
from pglcl.layouts import group_files, group_inputs, open_folder
from pglcl.volumes import read_label

from tests.pglcl.folders import (
    STRAIGHT,
    acdc,
    decathlon,
    describe,
    dicom,
    kits,
    nnunet,
    pictures,
    plain,
    save,
    ssl4mis,
    tiny,
    volume,
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
def test_the_rule(names: tuple[str, ...]) -> None:
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
    ("a.nii", "a.nii.gz"): "a.nii.gz: has the name of there/a.nii",
    ("a_0000.nii", "a_0000.nii.gz"): "has the name of",
    ("a.nii.gz", "a.nii.gz"): "is given twice",
    ("a.png", "a.jpg"): "has the name of",
    ("._a.nii.gz",): "hidden file",
    (".partial-12-a.nii.gz",): "hidden file",
    (".nii.gz",): "hidden file",
    ("a.gif",): "there/a.gif: not found",
}


@pytest.mark.parametrize("names", REFUSED, ids=lambda n: " ".join(n))
def test_what_breaks_the_rule(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=REFUSED[names]):
        group_files(paths(*names))


def test_channels_of_a_case_lie_in_one_folder() -> None:
    with pytest.raises(UserError, match="must lie in one folder"):
        group_files([Path("a/x_0000.nii"), Path("b/x_0001.nii")])


def test_labels_say_what_a_number_is() -> None:
    files = paths("case_0000", "case_0001", "case_0002")
    assert set(group_files(files, ["case_0000", "case_0002"])) == {"case_0000", "case_0001", "case_0002"}
    assert set(group_files(files, ["case"])) == {"case"}
    with pytest.raises(UserError, match="all of one kind"):
        group_files(files, ["case", "case_0001"])
    with pytest.raises(UserError, match="case_0000: is it of a case of its own"):
        group_files(files, ["case_0000"])


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


def test_suffixes_are_compared_without_case(tmp_path: Path) -> None:
    root = plain(tmp_path)
    (root / "images" / "case00.nii.gz").rename(root / "images" / "case00.NII.GZ")
    (root / "labels" / "case01.nii.gz").rename(root / "labels" / "case01.Nii.Gz")
    cases = open_folder(root).cases
    assert [case.name for case in cases] == [f"case{i:02d}" for i in range(8)]
    assert all(case.label is not None for case in cases[:6])


def test_two_labels_of_one_name(tmp_path: Path) -> None:
    root = plain(tmp_path)
    (root / "labels" / "case00.nii").write_bytes(b"")
    with pytest.raises(UserError, match=r"case00\.nii\.gz: has the name of .*case00\.nii;"):
        open_folder(root)


def test_inputs_of_predict(tmp_path: Path) -> None:
    root = plain(tmp_path)
    image = root / "images" / "case00.nii.gz"
    with pytest.raises(UserError, match="is given twice"):
        group_inputs([image, image])
    with pytest.raises(UserError, match="is given twice"):
        group_inputs([image, root / "images"])
    with pytest.raises(UserError, match="no image in this folder"):
        group_inputs([root])
    with pytest.raises(UserError, match="has the name of"):
        group_inputs([root / "images", root / "labels"])
    assert [case.name for case in group_inputs([image])] == ["case00"]


# --- layouts --------------------------------------------------------------------------------------------------------


def test_nnunet(tmp_path: Path) -> None:
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


def test_nnunet_in_another_format(tmp_path: Path) -> None:
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


def test_nnunet_whose_names_do_not_fit(tmp_path: Path) -> None:
    root = nnunet(tmp_path, channels=2)
    (root / "imagesTr" / "heart_003_0001.nii.gz").unlink()
    with pytest.raises(UserError, match="heart_003 must have the channels of the others"):
        open_folder(root)
    describe(root)
    with pytest.raises(UserError, match=r"must end in _0000 to _0000, the channels that dataset\.json names"):
        open_folder(root)


def test_nnunet_labels_to_ignore(tmp_path: Path) -> None:
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
def test_names_that_say_what_a_value_is(
    declared: Callable[[Path, dict[str, str]], LabelMap | None], tmp_path: Path
) -> None:
    """What is called ignore is left out, not learned. The value 0 is the background, whatever its name."""
    save(tmp_path / "a.nii.gz", volume(0)[0])
    labels = declared(tmp_path, {"0": "air", "2": "organ", "7": "Ignore"})
    assert labels is not None
    assert (labels.values, labels.names, labels.ignore) == (((0,), (2,)), ("air", "organ"), (7,))
    with pytest.raises(UserError, match="the background must have the value 0, got 1"):
        declared(tmp_path, {"0": "organ", "1": "background"})
    with pytest.raises(UserError, match="the value 0 is the background, and cannot be ignored"):
        declared(tmp_path, {"0": "ignore", "1": "organ", "2": "tumour"})  # the organ would be the background


def test_two_values_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the labels 1, 2 have one name, 'organ'; without labels in the file"):
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
    with pytest.raises(UserError, match=r"have the values \[1, 2, 3\], regions_class_order \[1, 2\] must have all"):
        open_folder(root)


BAD_DESCRIPTIONS = {
    "3": "not a Decathlon description",
    "[1]": "not a Decathlon description",
    '{"channel_names": 3}': "not an nnU-Net description",
    '{"channel_names": {"0": "MR"}}': "not an nnU-Net description: KeyError",
    '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": -1}}': "labels must be whole numbers from 0",
    '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": true}}': "labels must be whole numbers from 0",
    '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 0}}': "have one value, 0",
    '{"channel_names": {"x": "MR"}, "labels": {}}': "not an nnU-Net description",
    '{"training": [{"image": 3}]}': "not a Decathlon description",
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


def test_decathlon_as_the_first_nnunet_wrote_it(tmp_path: Path) -> None:
    """dataset.json lists CASE.nii.gz, the files are CASE_0000.nii.gz."""
    root = decathlon(tmp_path, channels=1)
    for path in list((root / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    data = open_folder(root)
    assert [case.images[0].name for case in data.cases][:2] == ["brain_000_0000.nii.gz", "brain_001_0000.nii.gz"]
    assert not any(r.problems for r in inspect_folder(data))


def test_kits(tmp_path: Path) -> None:
    root = kits(tmp_path)
    (root / "case_00007" / "segmentation.nii.gz").unlink()
    data = open_folder(root)
    assert data.layout == "kits"
    assert [case.name for case in data.cases] == [f"case_{i:05d}" for i in range(8)]
    assert data.cases[7].label is None
    reports = inspect_folder(data)
    assert labels_of(data, reports, None).names == ("background", "kidney", "tumor")
    assert propose(data, reports)[-1].value == "ct"


def test_kits_whose_images_were_not_fetched(tmp_path: Path) -> None:
    """The labels come with the repository, the images by a program. A case must not be missing without a word."""
    root = kits(tmp_path, 3)
    (root / "case_00001" / "imaging.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_00001/segmentation\.nii\.gz: a label without its image"):
        open_folder(root)
    (root / "case_00001" / "segmentation.nii.gz").unlink()
    assert len(open_folder(root).cases) == 2


def test_files_that_a_description_names_twice(tmp_path: Path) -> None:
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


def test_ssl4mis(tmp_path: Path) -> None:
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


def test_ssl4mis_slices_without_their_volumes(tmp_path: Path) -> None:
    root = ssl4mis(tmp_path)
    (root / "data" / "patient001_frame01.h5").unlink()
    data = open_folder(root)
    slices = [case for case in data.cases if case.patient == "patient001"]
    assert len(slices) == 5
    assert inspect_folder(data)[0].shape == (30, 26, 1)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".jpg"])
def test_pictures(ending: str, tmp_path: Path) -> None:
    data = open_folder(pictures(tmp_path, ending=ending))
    reports = inspect_folder(data)
    assert not any(r.problems for r in reports)
    assert (reports[0].channels, reports[0].axes, reports[0].unit, distance_unit(data)) == (3, 2, "pixel", "pixel")
    labels = labels_of(data, reports, None)
    assert labels.values == ((0,), (85,), (170,))
    assert {p.option: p.value for p in propose(data, reports)} == {
        "--spatial-dims": "2", "--image-size": "48,32", "--normalise": "rgb",
    }  # fmt: skip


def test_dicom_folders_beside_labels(tmp_path: Path) -> None:
    for i in range(2):
        image, label = volume(i)
        dicom(tmp_path / "images" / f"scan{i}", image.astype(np.int16), STRAIGHT)
        save(tmp_path / "labels" / f"scan{i}.nii.gz", label, STRAIGHT)
    data = open_folder(tmp_path)
    assert [case.name for case in data.cases] == ["scan0", "scan1"]
    assert not any(r.problems for r in inspect_folder(data))
    assert [case.name for case in group_inputs([tmp_path / "images" / "scan0"])] == ["scan0"]
    assert [case.name for case in group_inputs([tmp_path / "images"])] == ["scan0", "scan1"]


def listed(root: Path) -> list[dict[str, str]]:
    rows = []
    for i in range(4):
        image, label = volume(i)
        for name, array in (("t1", image), ("t2", image * 2), ("seg", label)):
            save(root / "files" / f"p{i // 2}" / f"scan{i}" / f"{name}.nii.gz", array)
        folder = f"files/p{i // 2}/scan{i}"
        rows.append({"image": f"{folder}/t1.nii.gz", "channel_t2": f"{folder}/t2.nii.gz", "patient": f"p{i // 2}"})
        rows[-1]["label"] = f"{folder}/seg.nii.gz" if i < 3 else ""
    return rows


def test_a_list_as_csv_and_as_json(tmp_path: Path) -> None:
    rows = listed(tmp_path)
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "semicolons.csv").write_text("\n".join(lines).replace(",", ";"), encoding="utf-8-sig")
    (tmp_path / "tabs.csv").write_text("\r\n".join(lines).replace(",", "\t"))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "named.json").write_text(json.dumps({"cases": rows, "labels": {"background": 0, "a": 1, "b": 2}}))
    for name in ("list.csv", "semicolons.csv", "tabs.csv", "list.json", "named.json"):
        data = open_folder(tmp_path / name)
        assert data.layout == "list"
        assert data.patients == ["p0", "p1"]
        assert [case.label is None for case in data.cases] == [False, False, False, True]
        assert data.cases[0].name == "files_p0_scan0_t1"
        assert not any(r.problems or r.channels != 2 for r in inspect_folder(data))
    assert data.labels is not None
    assert data.labels.names == ("background", "a", "b")


def test_lists_that_are_refused(tmp_path: Path) -> None:
    rows = listed(tmp_path)
    for change, message in (
        ({"lable": "x"}, "entry 1: has 'lable'; columns are"),
        ({"image": ""}, "entry 1: must have an image"),
        ({"image": 3}, "entry 1: must have an image, and paths"),
        ({"image": "nowhere.nii.gz"}, "nowhere.nii.gz: not found"),
        ({"label": "nowhere.nii.gz"}, "nowhere.nii.gz: not found"),
        ({"name": "../a"}, "must be fit for a file"),
        ({"image": rows[1]["image"]}, "is listed 2 times"),
    ):
        (tmp_path / "list.json").write_text(json.dumps([{**rows[0], **change}, *rows[1:]]))
        with pytest.raises(UserError) as error:
            open_folder(tmp_path / "list.json")
        assert message in error.value.lines[0]
    for text in ("", "image\n", 'image\n"a', "image\na,b\n", "image,label,image\na,b,c\n"):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(UserError, match=r"list\.csv"):
            open_folder(tmp_path / "list.csv")
    for text in ("3", "[3]", '{"cases": 3}', '{"cases": [], "x": 1}'):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(UserError, match=r"list\.json"):
            open_folder(tmp_path / "list.json")


def test_every_entry_has_the_same_channels_in_the_same_order(tmp_path: Path) -> None:
    """Else one network input would be T2 in some volumes and FLAIR in others. JSON objects have no order."""
    rows = listed(tmp_path)
    for row in rows:
        row["channel_flair"] = row["image"].replace("t1", "flair")
        shutil.copy(tmp_path / row["image"], tmp_path / row["channel_flair"])
    turned = [dict(reversed(row.items())) if i % 2 else row for i, row in enumerate(rows)]
    (tmp_path / "list.json").write_text(json.dumps(turned))
    data = open_folder(tmp_path / "list.json")
    names = {tuple(path.name for path in case.images) for case in data.cases}
    assert names == {("t1.nii.gz", "t2.nii.gz", "flair.nii.gz")}
    assert data.columns == ("image", "channel_t2", "channel_flair")
    holes = "image,channel_t2,channel_flair\n{image},{channel_t2},\n".format(**rows[0])
    (tmp_path / "list.csv").write_text(holes + "{image},,{channel_flair}\n".format(**rows[1]))
    with pytest.raises(
        UserError, match="entry 2: must have the channels of the first entry, channel_t2, got channel_f"
    ):
        open_folder(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text(holes + ",,\n , ,\n")  # as spreadsheets leave them
    assert len(open_folder(tmp_path / "list.csv").cases) == 1


def test_patients_of_some_entries_alone(tmp_path: Path) -> None:
    """As a spreadsheet writes merged cells. The second scan of a patient could come into the test."""
    rows = listed(tmp_path)
    for number in (1, 3):
        rows[number]["patient"] = ""
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"list\.json: no patient in the entries 2, 4, while others have one"):
        open_folder(tmp_path / "list.json")
    for row in rows:
        row["patient"] = ""
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert len(open_folder(tmp_path / "list.json").patients) == 4


def test_descriptions_as_windows_writes_them(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "nnunet")
    (root / "dataset.json").write_text((root / "dataset.json").read_text(), encoding="utf-8-sig")
    assert len(open_folder(root).cases) == 8
    root = ssl4mis(tmp_path / "ssl4mis")
    (root / "test.list").write_text("patient008_frame01\r\n", encoding="utf-8-sig", newline="")
    assert open_folder(root).parts["test"] == ("patient008",)


def test_files_that_are_not_read_are_said(tmp_path: Path) -> None:
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
        f"{root / 'labels'}: case01.npz (1): not read, their format is not known by its suffix",
        f"{root / 'labels'}: more (1): not read, folders of images; images and labels must lie directly there",
    ]


def test_images_that_a_description_does_not_list_are_said(tmp_path: Path) -> None:
    root = decathlon(tmp_path, 5, 1)
    content = json.loads((root / "dataset.json").read_text())
    content["training"] = content["training"][:2]
    content["test"] = ["./imagesTr/brain_002.nii.gz", "./imagesTs/brain_900.nii.gz"]
    (root / "dataset.json").write_text(json.dumps(content))
    assert open_folder(root).notes == [
        f"{root / 'imagesTr'}: brain_003.nii.gz, brain_004.nii.gz (2): not read, dataset.json does not list them",
        f"{root / 'dataset.json'}: 1 of the images that it lists as test are not there",
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


def test_a_copy_of_the_image_is_no_label(tmp_path: Path) -> None:
    """An image of 8 bits has few enough values for a label."""
    root = pictures(tmp_path, 3, colour=False, unlabelled=0)
    shutil.copy(root / "images" / "cell00.png", root / "labels" / "cell00.png")
    found = [line for report in inspect_folder(open_folder(root)) for line in report.problems]
    assert found == [f"{root / 'labels' / 'cell00.png'}: has the voxels of its image; is it a copy of the image?"]


def test_a_name_that_json_gives_twice(tmp_path: Path) -> None:
    """Python would keep the last one: here, the class of value 1 would be gone."""
    root = nnunet(tmp_path)
    text = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(text.replace('"cube": 2', '"ball": 2'))
    with pytest.raises(UserError, match=r"dataset\.json: not readable as JSON: the name 'ball' is there twice"):
        open_folder(root)


def test_negative_label_values_need_a_meaning(tmp_path: Path) -> None:
    root = plain(tmp_path, 3, unlabelled=0)
    label = volume(1, (31, 26, 6))[1].astype(np.int16)
    label[label == 1] = -1
    save(root / "labels" / "case01.nii.gz", label)
    found = inspect_folder(open_folder(root))
    count = int((label == -1).sum())
    (line,) = (line for report in found for line in report.problems)
    assert line.endswith(
        f"case01.nii.gz: has negative values: -1 in {count} voxels; --labels says what they mean, such as 0,1,-1=ignore"
    )
    declared = parse_labels("0,1,2,-1=ignore")
    assert not any(report.problems for report in inspect_folder(open_folder(root), declared))


def test_numbers_of_objects_are_no_classes(tmp_path: Path) -> None:
    root = tmp_path
    for i in range(2):
        image = volume(i, (30, 26, 10))[0]
        save(root / "images" / f"case{i}.nii.gz", image)
        numbers = np.arange(200 * i, 200 * i + 200).repeat(39).reshape(30, 26, 10)
        save(root / "labels" / f"case{i}.nii.gz", numbers.astype(np.int16))
    data = open_folder(root)
    reports = inspect_folder(data)
    with pytest.raises(UserError, match="have 400 different values, there are at most 256 classes"):
        labels_of(data, reports, None)
    assert len(labels_of(data, reports, parse_labels("0,1-1000=cell"))) == 2


def test_labels_of_one_patient_or_blank_are_warned_of(tmp_path: Path) -> None:
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
    assert warnings_of(data, reports, labels)[0] == "5 of 6 labels are blank"


@pytest.mark.parametrize("place", ["images/case01.nii.gz", "labels/case01.nii.gz"])
def test_a_link_that_leads_nowhere_is_not_left_out(place: str, tmp_path: Path) -> None:
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


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    root = plain(tmp_path / "data")
    pipe = root / "images" / "case09.nii.gz"
    os.mkfifo(pipe)
    for read in (lambda: open_folder(root), lambda: group_inputs([pipe])):
        with pytest.raises(UserError, match=r"case09\.nii\.gz: must be a file, is something else"):
            read()


def test_folders_that_are_links(tmp_path: Path) -> None:
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
def test_parts_of_a_folder_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    """Otherwise all volumes would be unlabelled, or the folder would seem to have another layout."""
    root = plain(tmp_path / "data", 3)
    if (root / name).exists():
        (root / name).rename(tmp_path / "moved")
    (root / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{name}: must be a (file|folder), is a link to .*, where no (file|folder) is"):
        open_folder(root)


def test_a_list_of_patients_that_leads_nowhere(tmp_path: Path) -> None:
    """Otherwise, test patients would be used to train."""
    root = ssl4mis(tmp_path / "data")
    (root / "test.list").unlink()
    (root / "test.list").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"test\.list: must be a file, is a link to"):
        open_folder(root)


def test_labels_that_a_list_confuses(tmp_path: Path) -> None:
    root = plain(tmp_path / "data", 3, unlabelled=0)
    image, label = "images/case00.nii.gz", "labels/case00.nii.gz"
    for rows, message in (
        (f"{image},{image},a", "is listed as a label and as an image"),
        (f"{image},images/case01.nii.gz,a\nimages/case01.nii.gz,,b", "is listed as a label and as an image"),
        (f"{image},{label},a\nimages/case01.nii.gz,{label},b", "is listed as a label of a and of b"),
    ):
        (root / "list.csv").write_text(f"image,label,patient\n{rows}\n")
        with pytest.raises(UserError, match=message):
            open_folder(root / "list.csv")
    # Two images of one patient may share a label.
    (root / "list.csv").write_text(f"image,label,patient\n{image},{label},a\nimages/case01.nii.gz,{label},a\n")
    assert [case.label for case in open_folder(root / "list.csv").cases] == [root / label] * 2


def test_links_in_a_folder_of_patients(tmp_path: Path) -> None:
    root = acdc(tmp_path / "data", 2)
    path = root / "training" / "patient001" / "patient001_frame01_gt.nii.gz"
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(UserError, match=r"patient001_frame01_gt\.nii\.gz: must be a file, is a link to"):
        open_folder(root)


def test_names_that_look_like_volumes_of_one_patient(tmp_path: Path) -> None:
    """Only lists and ACDC tell patients from volumes. One volume could be trained on, and the other be the test."""
    image, label = volume(0)
    for number in (1, 2):
        for frame in (1, 12):
            for kind, data in (("images", image), ("labels", label)):
                save(tmp_path / kind / f"patient{number:03d}_frame{frame:02d}.nii.gz", data)
    assert open_folder(tmp_path).notes == [
        "patient001_frame01 and patient001_frame12 look like volumes of one patient, and count as two patients, of "
        "whom one may be trained on and the other scored (2 such names); a list with the column patient keeps them "
        "together"
    ]
    assert open_folder(acdc(tmp_path / "acdc", 2)).notes == []
    for path in [*(tmp_path / "images").iterdir(), *(tmp_path / "labels").iterdir()]:
        path.rename(path.with_name(path.name.replace("_frame", "_")))
    assert open_folder(tmp_path).notes == []


def test_units_of_files_of_several_kinds(tmp_path: Path) -> None:
    root = pictures(tmp_path, 2, unlabelled=0)
    save(root / "images" / "scan.nii.gz", volume(0)[0])
    data = open_folder(root)
    assert distance_unit(data) == "mm and pixel"
    assert distance_unit(data, data.cases[:2]) == "pixel"
