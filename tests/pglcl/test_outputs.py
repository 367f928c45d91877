"""No file is lost: neither inputs, nor existing files, nor outputs of the same name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pglcl.errors import UserError
from pglcl.outputs import check_outputs, check_outside_data

from tests.pglcl.folders import acdc, decathlon, plain


def spellings(folder: Path) -> list[Path]:
    """Paths to folder/scan.nii.gz, each spelled in another way."""
    (folder / "links").mkdir()
    target = folder / "scan.nii.gz"
    (folder / "symbolic.nii.gz").symlink_to(target)
    os.link(target, folder / "hard.nii.gz")
    (folder / "through").symlink_to(folder)
    return [target, folder / "links" / ".." / "scan.nii.gz", folder / "symbolic.nii.gz", folder / "hard.nii.gz",
            folder / "through" / "scan.nii.gz"]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_is_read_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    scan.write_text("voxels")
    for path in spellings(tmp_path):
        for output, read in ((path, scan), (scan, path)):
            with pytest.raises(UserError, match="would be replaced, but this command reads it"):
                check_outputs([output], inputs=[read], overwrite=overwrite)
    assert scan.read_text() == "voxels"


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    old, new, dangling = tmp_path / "old.txt", tmp_path / "new.txt", tmp_path / "dangling"
    old.write_text("text")
    dangling.symlink_to(tmp_path / "nowhere")
    check_outputs([new])
    assert not new.exists()
    for path in (old, dangling):
        with pytest.raises(UserError, match=r"exists; add --overwrite"):
            check_outputs([new, path])
        check_outputs([new, path], overwrite=True)
    check_outputs([old], renewed=lambda path: True)
    with pytest.raises(UserError, match="exists"):  # a link may lead to any file
        check_outputs([dangling], renewed=lambda path: True)
    assert old.read_text() == "text"


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mask.nii.gz").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_outputs([tmp_path / "mask.nii.gz"], overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a folder, but is a file"):
        check_outputs([tmp_path / "file" / "deeper" / "mask.nii.gz"])


def test_two_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    for first, second in (("a.nii.gz", "a.nii.gz"), ("A.nii.gz", "a.nii.gz"), ("\u00e9.nii", "e\u0301.nii")):
        with pytest.raises(UserError, match="written twice"):
            check_outputs([tmp_path / first, tmp_path / second], overwrite=True)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "mask.nii.gz"):
        with pytest.raises(UserError, match="too long"):
            check_outputs([path])


def test_a_message_counts_the_files_that_it_does_not_name(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.txt" for i in range(12)]
    for path in paths:
        path.write_text("")
    with pytest.raises(UserError) as caught:
        check_outputs(paths)
    assert len(caught.value.lines) == 6
    assert caught.value.lines[-1] == "and 7 more files"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        check_outputs([tmp_path / "mask.nii.gz"])


def test_outputs_inside_the_data_folder_are_refused(tmp_path: Path) -> None:
    folders = {
        plain(tmp_path / "plain", 3): (["images", "labels", "labels/new"], ["masks", "../masks"]),
        decathlon(tmp_path / "decathlon", 2): (["imagesTr", "labelsTr", "labelsTs"], ["predictions"]),
        acdc(tmp_path / "acdc", 2): (["", "training", "masks"], ["../masks"]),
    }
    for root, (inside, outside) in folders.items():
        for name in inside:
            with pytest.raises(UserError, match="lies in the data folder"):
                check_outside_data(root / name, root)
        for name in outside:
            check_outside_data(root / name, root)
    check_outside_data(tmp_path / "anywhere", tmp_path / "data that is gone")
