"""Images whose voxels are clearly larger or smaller than those of the training are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pglcl.cli import main
from pglcl.files import load_tensors, save_tensors
from pglcl.formats import nifti, read_source
from pglcl.model import load_model
from pglcl.resolution import Resolution, sizes_seen
from pglcl.train import Training

from tests.pglcl.folders import pictures, plain, save, tiny, volume

Trained = tuple[Path, Path]


def of_spacing(path: Path, *spacing: float, shape: tuple[int, ...] = (64, 48, 6)) -> Path:
    return save(path, volume(0, shape)[0], np.diag([*spacing, 1.0]))


def test_voxel_sizes_are_those_that_the_network_sees(tmp_path: Path) -> None:
    """Whole slices are scaled to the size of the network, so their extent counts.

    Parts of slices and volumes keep their voxels, or get those of --spacing.
    """
    source = read_source(of_spacing(tmp_path / "a.nii.gz", 1.5, 2.0, 8.0))
    whole = tiny(image_size="32", slices="whole")
    assert sizes_seen(source, whole, 2) == pytest.approx((3.0, 4.0))
    assert sizes_seen(source, whole, 0) == pytest.approx((3.0, 12.0))  # 6 pixels become 4
    assert sizes_seen(source, tiny(), 2) == (1.5, 2.0)
    assert sizes_seen(source, tiny(), 0) == (2.0, 8.0)
    assert sizes_seen(source, tiny(spacing="3,1"), 2) == pytest.approx((3.0, 1.0))
    volumes = {"spatial_dims": 3, "image_size": "16,16,16"}
    assert sizes_seen(source, tiny(**volumes), None) == (1.5, 2.0, 8.0)
    assert sizes_seen(source, tiny(**volumes, spacing="2"), None) == pytest.approx((2, 2, 2))
    turned = save(tmp_path / "b.nii.gz", np.zeros((6, 64, 48), np.float32), np.eye(4)[[1, 2, 0, 3]] * [8, 1.5, 2, 1])
    assert sizes_seen(read_source(turned), tiny(**volumes), None) == (1.5, 2.0, 8.0)


def test_voxel_sizes_beyond_a_factor_of_1_5_are_reported(tmp_path: Path) -> None:
    config = tiny(spatial_dims=3, image_size="16,16,16")
    sources = [read_source(of_spacing(tmp_path / f"{s}.nii.gz", s, s, 2)) for s in (1.0, 1.2)]
    known = Resolution.of(sources, config, None)
    assert Resolution.from_state(json.loads(json.dumps(known.state()))) == known
    assert known.describe() == "1 x 1 x 2 to 1.2 x 1.2 x 2 mm"
    for spacing, differs in (((0.7, 1.7, 2), False), ((1, 1, 3.1), True), ((0.6, 1, 2), True), ((1, 1.9, 2), True)):
        source = read_source(of_spacing(tmp_path / "other.nii.gz", *spacing))
        assert bool(known.problem(source, config, None)) == differs, spacing
    words = "its voxels are 1 x 1.9 x 2 mm as the network sees them, in the training 1 x 1 x 2 to 1.2 x 1.2 x 2 mm"
    assert known.problem(source, config, None) == words


def test_files_without_voxel_sizes_are_told_from_files_with_them(tmp_path: Path) -> None:
    picture = read_source(sorted((pictures(tmp_path, 1) / "images").iterdir())[0])
    scan = read_source(of_spacing(tmp_path / "a.nii.gz", 1, 1, 2))
    config = tiny()
    of_pictures, of_scans = (Resolution.of([source], config, 2) for source in (picture, scan))
    assert of_pictures.problem(picture, config, 2) == of_scans.problem(scan, config, 2) == ""
    assert "says how large its voxels are, unlike" in of_pictures.problem(scan, config, 2)
    assert "does not say how large its voxels are, unlike" in of_scans.problem(picture, config, 2)
    assert Resolution.of([picture, scan], config, 2).units == ("mm", "pixel")
    assert of_pictures.describe() == "of unknown size"


def test_predict_names_images_that_do_not_say_how_they_lie(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    scan = root / "images" / "case00.nii.gz"
    known = load_model(run).resolution
    assert known is not None
    assert known.directed
    image = nib.load(scan)
    image.header["sform_code"] = image.header["qform_code"] = 0
    bare = tmp_path / "bare.nii.gz"
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, image.header), bare)
    assert not nifti.says_orientation(read_source(bare))
    words = "does not say which way its axes point, unlike the training images"
    for path, named in ((scan, False), (bare, True)):
        assert main(["predict", str(run), str(path), "-o", str(tmp_path / "masks")]) == 0
        assert (words in capsys.readouterr().err.replace("\n", " ")) == named
    older = Resolution.from_state({name: value for name, value in known.state().items() if name != "directed"})
    assert older.direction_problem(read_source(bare)) == ""
    assert Resolution.of([read_source(bare)], load_model(run).config, 2).direction_problem(read_source(bare)) == ""


def finer(root: Path, to: Path) -> Path:
    """The same folder, with voxels a third as large."""
    for kind in ("images", "labels"):
        for path in (root / kind).iterdir():
            image, label = volume(int(path.name[4:6]), read_source(path).shape)
            save(to / kind / path.name, image if kind == "images" else label, np.diag([0.5, 0.5, 2, 1]))
    return to


def test_predict_and_evaluate_name_images_with_other_voxels(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained[0], Path(shutil.copytree(trained[1], tmp_path / "run"))
    other, masks = finer(root, tmp_path / "other"), tmp_path / "masks"
    scan, scores = other / "images" / "case00.nii.gz", tmp_path / "scores"
    assert main(["predict", str(run), str(root / "images" / "case00.nii.gz"), "-o", str(masks / "same")]) == 0
    assert main(["evaluate", str(run), str(root)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "OTHER VOXELS" not in shown.out
    assert main(["predict", str(run), str(scan), "-o", str(masks / "other")]) == 0
    words = "mm as the network sees them, in the training"
    assert f"pglcl: {scan}: its voxels are 0.5 x 0.5 {words}" in capsys.readouterr().err
    assert main(["evaluate", str(run), str(other), "-o", str(scores)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count(words) == 2
    assert "2 WITH OTHER VOXELS OR INTENSITIES THAN THE TRAINING: case04, case05" in shown.out
    assert list(json.loads((scores / "scores_test.json").read_text())["subject"]["unlike"]) == ["case04", "case05"]
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--data", str(other), "-o", str(page)]) == 0
    assert "case04: its voxels are" in page.read_text()


def test_a_model_without_voxel_sizes_says_so(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained[0], Path(shutil.copytree(trained[1], tmp_path / "run"))
    state = load_tensors(run / "model.pt")
    del state["resolution"], state["description"]
    save_tensors(run / "model.pt", state)
    model = load_model(run)
    assert (model.resolution, model.description) == (None, None)
    assert main(["predict", str(run), str(root / "images" / "case00.nii.gz"), "-o", str(tmp_path / "masks")]) == 0
    assert f"{run}: does not know the voxel size of its training images" in capsys.readouterr().err
    assert main(["evaluate", str(run), str(root)]) == 0
    assert "does not know the voxel size of its training images" in capsys.readouterr().err
    torch.testing.assert_close(model.network.state_dict(), load_model(trained[1]).network.state_dict())


def test_train_names_held_out_volumes_with_other_voxels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain(tmp_path / "data")
    image, label = volume(5)
    for kind, data in (("images", image), ("labels", label)):
        save(root / kind / "case05.nii.gz", data, np.diag([0.5, 0.5, 2, 1]))
    Training(root, tmp_path / "run", tiny(steps=4)).run()
    assert "case05.nii.gz: its voxels are" in capsys.readouterr().err.replace("\n", "")
    save(root / "images" / "case06.nii.gz", image, np.diag([0.5, 0.5, 2, 1]))  # unlabelled: part of the training
    config = tiny(steps=4, spatial_dims=3, image_size="16,16,8")
    Training(root, tmp_path / "run3d", config).run()
    assert "--spacing resamples them to one size" in capsys.readouterr().err.replace("\n", "")
