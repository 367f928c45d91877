"""Images whose intensities clearly lie elsewhere than those of the training are named, where the network sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pglcl.cli import main
from pglcl.files import load_tensors, save_tensors
from pglcl.inspection import inspect_folder
from pglcl.intensity import Channel, Intensity, few_values
from pglcl.layouts import open_folder
from pglcl.levels import Levels, apart_from_most, levels_of
from pglcl.train import Training

from tests.pglcl.folders import STRAIGHT, decathlon, kits, plain, save, tiny, volume

Trained = tuple[Path, Path]
CT, PERCENTILE = Intensity((Channel("ct", -100, 200, 50, 50),), ""), Intensity((Channel("percentile"),), "")


def torso(seed: int, *, air: float = 0.4) -> np.ndarray:
    """(1, 40, 40, 10) in Hounsfield units: a share of air, then fat, organs and some bone."""
    random = np.random.default_rng(seed)
    fat, organs = random.normal(-100, 10, 2000), random.normal(50, 20, 13400)
    image = np.concatenate([np.full(round(16000 * air), -1000.0), fat, organs, np.full(600, 900.0)])[:16000]
    return image.reshape(1, 40, 40, 10).astype(np.float32)


def test_a_shift_and_a_factor_are_told_from_another_field_of_view() -> None:
    known = Levels.of([levels_of(torso(seed, air=0.3 + 0.1 * seed)) for seed in range(3)])
    assert Levels.from_state(json.loads(json.dumps(known.state()))) == known
    for image in (torso(7), torso(8, air=0.06), torso(9, air=0), torso(9, air=0.8), torso(9).clip(-200, 200)):
        assert known.problem(levels_of(image), CT) == ""
    same = torso(7)
    for other in (same + 1024, same - 1024, (same + 1024) / 2048, (same + 1024) / 16, same * 16):
        assert "(percentiles 5 and 95); the training images have values from -1000 to" in known.problem(
            levels_of(other), CT
        )
        assert known.problem(levels_of(other), PERCENTILE) == ""  # the network sees the same


def test_channels_are_compared_one_by_one() -> None:
    two = Intensity((Channel("none"), Channel("none")), "")
    image = np.concatenate([torso(0), torso(1) + 5000])
    known = Levels.of([levels_of(image)])
    assert known.problem(levels_of(image), two) == ""
    assert known.problem(levels_of(image[::-1]), two).startswith("channel 0 has values from 4000 to")


def test_images_without_a_spread_say_nothing() -> None:
    """A mostly empty image has two equal percentiles, and so no measure of what is far."""
    empty = np.zeros((1, 9, 9, 9), np.float32)
    empty[0, 4, 4, 4] = 1
    assert Levels.of([levels_of(empty)]).problem(levels_of(torso(0)), CT) == ""
    assert Levels.of([levels_of(torso(0))]).problem(levels_of(empty), CT) == ""


def test_every_column_of_a_large_image_is_looked_at() -> None:
    image = np.zeros((1, 1024, 512, 1), np.float32)
    image[:, :, 1:] = np.arange(511)[:, None]
    low, high = levels_of(image)[0]
    assert (low, high) == pytest.approx((25, 485), abs=5)


def test_predict_and_evaluate_name_a_shifted_ct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run, masks = kits(tmp_path / "data", 5), tmp_path / "run", tmp_path / "masks"
    shifted = save(tmp_path / "shifted.nii.gz", (volume(0)[0] + 124).round().astype(np.int16), STRAIGHT)
    Training(root, run, tiny(steps=4, test=1), quiet=True).run()
    assert main(["predict", str(run), str(root / "case_00004" / "imaging.nii.gz"), "-o", str(masks / "own")]) == 0
    assert "(percentiles 5 and 95)" not in capsys.readouterr().err
    assert main(["predict", str(run), str(shifted), "-o", str(masks / "other")]) == 0
    said = capsys.readouterr().err
    assert f"{shifted}: it has values from" in said
    assert "its mask may be wrong" in said
    other = Path(shutil.copytree(root, tmp_path / "other"))
    shutil.copy(shifted, other / "case_00004" / "imaging.nii.gz")
    assert main(["evaluate", str(run), str(root)]) == 0
    assert "OTHER VOXELS OR INTENSITIES" not in capsys.readouterr().out
    assert main(["evaluate", str(run), str(other), "-o", str(tmp_path / "scores")]) == 0
    shown = capsys.readouterr()
    assert "1 WITH OTHER VOXELS OR INTENSITIES THAN THE TRAINING: case_00004" in shown.out
    assert "pglcl: case_00004: it has values from" in shown.err
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--data", str(other), "-o", str(page)]) == 0
    assert "case_00004: it has values from" in page.read_text()
    state = load_tensors(run / "model.pt")
    del state["levels"]  # as an older version wrote it
    save_tensors(run / "model.pt", state)
    assert main(["predict", str(run), str(shifted), "-o", str(masks / "older")]) == 0
    assert "percentiles" not in capsys.readouterr().err


def test_images_that_are_standardised_one_by_one_are_not_compared(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained[1], tmp_path / "run"))
    shifted = save(tmp_path / "shifted.nii.gz", volume(0)[0] * 7 + 1024)
    assert main(["predict", str(run), str(shifted), "-o", str(tmp_path / "masks")]) == 0
    assert "percentiles" not in capsys.readouterr().err


def test_held_out_volumes_of_other_intensities_are_said_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = plain(tmp_path / "data")
    save(root / "images" / "case05.nii.gz", volume(5, (32, 26, 6))[0] + 1024)
    Training(root, tmp_path / "run", tiny(steps=4, normalise="none")).run()
    assert "case05.nii.gz: it has values from" in capsys.readouterr().err.replace("\n", " ")


def test_a_constant_image_is_named(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training refuses it. A mask is made of it, since blank slices are common, and is said to be doubtful."""
    root, run = (
        Path(shutil.copytree(trained[0], tmp_path / "data")),
        Path(shutil.copytree(trained[1], tmp_path / "run")),
    )
    blank = save(tmp_path / "blank.nii.gz", np.full((30, 26, 5), 7, np.int16))
    assert main(["predict", str(run), str(blank), str(root / "images"), "-o", str(tmp_path / "masks")]) == 0
    said = capsys.readouterr().err
    assert f"pglcl: {blank}: is a constant image: every voxel is 7; its mask may be wrong\n" in said
    assert said.count("is a constant") == 1
    assert (tmp_path / "masks" / "blank.nii.gz").exists()
    shape = nib.load(root / "images" / "case05.nii.gz").shape
    save(root / "images" / "case05.nii.gz", np.zeros(shape, np.int16))  # of the test
    assert main(["evaluate", str(run), str(root)]) == 0
    shown = capsys.readouterr()
    assert "case05: is a constant image: every voxel is 0" in shown.err
    assert "1 WITH OTHER VOXELS OR INTENSITIES THAN THE TRAINING: case05" in shown.out


def test_a_constant_channel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zeros stand for a missing modality; the network then sees another kind of image."""
    root, run = decathlon(tmp_path / "data", 6), tmp_path / "run"
    name = root / "imagesTr" / "brain_001.nii.gz"
    image = nib.load(name)
    both = np.asarray(image.dataobj).copy()
    both[..., 1] = 3
    save(name, both, image.affine)
    Training(root, run, tiny(steps=4, test=1)).run()
    said = f"{name}: channel 1 is constant: every voxel is 3"
    assert capsys.readouterr().err.replace("\n", " ").count(said) == 1
    assert main(["predict", str(run), str(name), "-o", str(tmp_path / "masks")]) == 0
    assert f"pglcl: {said}; its mask may be wrong" in capsys.readouterr().err
    for path in sorted((root / "imagesTr").iterdir()):
        image = nib.load(path)
        save(path, np.asarray(image.dataobj) * np.array([1, 0], np.float32), image.affine)
    Training(root, tmp_path / "other", tiny(steps=4, test=1)).run()
    said = capsys.readouterr().err.replace("\n", " ")
    assert "channel 1 is constant in 6 of 6 images" in said
    assert "every voxel" not in said
    assert main(["predict", str(tmp_path / "other"), str(name), "-o", str(tmp_path / "other_masks")]) == 0
    assert "constant" not in capsys.readouterr().err


def test_few_values_are_counted_in_the_whole_image() -> None:
    label = np.zeros((1, 300, 300, 30), np.float32)
    label[0, 100:200, 100:200, 10:20] = 2
    assert few_values(label) == 2
    assert few_values(label[:, :50]) == 0  # a constant image
    label[0, 150, 150, 10:18] = np.arange(3, 11)  # few voxels, which a sample would miss
    assert few_values(label) == 0
    assert few_values(torso(0)) == 0


def test_a_label_in_the_place_of_an_image_is_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = plain(tmp_path / "data"), tmp_path / "run"
    label = root / "labels" / "case00.nii.gz"
    assert main(["predict", str(trained[1]), str(root / "images"), "-o", str(tmp_path / "masks"), "-q"]) == 0
    assert main(["predict", str(trained[1]), str(label), "-o", str(tmp_path / "labels")]) == 0
    said = "has only 3 different values; is it a label?"
    assert capsys.readouterr().err == f"pglcl: {label}: {said}; its mask may be wrong\n"
    image = root / "images" / "case07.nii.gz"
    shutil.copy(label, image)
    Training(root, run, tiny(steps=4)).run()
    shown = capsys.readouterr().err.replace("\n", " ")
    assert f"{image}: {said}" in shown
    assert shown.count("different values") == 1
    for i in range(1, 7):
        shutil.copy(label, root / "images" / f"case{i:02d}.nii.gz")
        shutil.copy(root / "labels" / "case00.nii.gz", root / "labels" / f"case{i:02d}.nii.gz")
    notes = [note for report in inspect_folder(open_folder(root)) for note in report.notes]
    assert [n for n in notes if "values" in n] == ["7 of 8 images have at most 8 different values; are they labels?"]


def test_a_training_image_that_lies_apart_from_most_is_found() -> None:
    images = [torso(seed, air=0.1 * seed) for seed in range(9)]
    assert apart_from_most([levels_of(image) for image in images], CT) == {}
    for change in (lambda x: x + 1024, lambda x: x - 1024, lambda x: (x + 1024) / 2048, lambda x: x * 16):
        # Two of nine, which would hide each other if each were compared with the range of the others.
        others = [change(image) if i in (3, 4) else image for i, image in enumerate(images)]
        found = apart_from_most([levels_of(image) for image in others], CT)
        assert list(found) == [3, 4]
        assert "most training images have values from -1000 to" in found[3]
        assert apart_from_most([levels_of(image) for image in others], PERCENTILE) == {}
    two = Intensity((Channel("none"), Channel("none")), "")
    both = [np.concatenate([image, image + 5000 * (i == 2)]) for i, image in enumerate(images)]
    found = apart_from_most([levels_of(image) for image in both], two)
    assert list(found) == [2]
    assert found[2].startswith("channel 1 has values from 4000 to")
    assert apart_from_most([levels_of(np.ones((1, 4, 4, 4)))] * 3, CT) == {}


def test_train_names_a_training_ct_that_begins_at_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = kits(tmp_path / "data", 8)
    Training(root, tmp_path / "run", tiny(steps=4)).run()
    assert "most training images" not in capsys.readouterr().err
    for name in ("case_00001", "case_00003"):  # labelled, and unlabelled
        path = root / name / "imaging.nii.gz"
        image = nib.load(path)
        save(path, np.asarray(image.dataobj) + np.int16(1024), image.affine)
    Training(root, tmp_path / "other", tiny(steps=4)).run()
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.count("most training images have values") == 2
    assert "case_00001/imaging.nii.gz: it has values from" in said
