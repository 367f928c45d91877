"""Lists of files, as CSV and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder
from pglcl.layouts import open_folder

from tests.pglcl.folders import (
    plain,
    save,
    volume,
)  # fmt: skip


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


def test_csv_and_json_lists_give_the_same_cases(tmp_path: Path) -> None:
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
        ({"image": 3}, "entry 1: must have an image; paths"),
        ({"image": "nowhere.nii.gz"}, "nowhere.nii.gz: not found"),
        ({"label": "nowhere.nii.gz"}, "nowhere.nii.gz: not found"),
        ({"name": "../a"}, "must be usable as a file name"),
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


def test_a_list_with_some_patients_missing_is_refused(tmp_path: Path) -> None:
    """As a spreadsheet writes merged cells. The second scan of a patient could come into the test."""
    rows = listed(tmp_path)
    for number in (1, 3):
        rows[number]["patient"] = ""
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"list\.json: the entries 2, 4 have no patient, while others have one"):
        open_folder(tmp_path / "list.json")
    for row in rows:
        row["patient"] = ""
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert len(open_folder(tmp_path / "list.json").patients) == 4


def test_a_list_that_uses_a_file_twice_is_refused(tmp_path: Path) -> None:
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
