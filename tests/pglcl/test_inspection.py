"""What inspection finds in a folder, and the checks before a training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pglcl import inspection
from pglcl.errors import UserError
from pglcl.inspection import inspect_folder, labels_of, survey
from pglcl.labels import LabelMap, parse_labels
from pglcl.layouts import open_folder
from pglcl.progress import Progress
from pglcl.proposals import warnings_of
from pglcl.training_data import load_training_data

from tests.pglcl.folders import OBLIQUE, acdc, decathlon, kits, nnunet, pictures, plain, save, tiny, volume


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


def test_a_label_that_is_a_copy_of_its_image_is_a_problem(tmp_path: Path) -> None:
    """An image of 8 bits has few enough values for a label."""
    root = pictures(tmp_path, 3, colour=False, unlabelled=0)
    shutil.copy(root / "images" / "cell00.png", root / "labels" / "cell00.png")
    found = [line for report in inspect_folder(open_folder(root)) for line in report.problems]
    assert found == [f"{root / 'labels' / 'cell00.png'}: has the same voxels as its image; is it a copy of the image?"]


def test_negative_label_values_need_a_meaning(tmp_path: Path) -> None:
    root = plain(tmp_path, 3, unlabelled=0)
    label = volume(1, (31, 26, 6))[1].astype(np.int16)
    label[label == 1] = -1
    save(root / "labels" / "case01.nii.gz", label)
    found = inspect_folder(open_folder(root))
    count = int((label == -1).sum())
    (line,) = (line for report in found for line in report.problems)
    assert line.endswith(
        f"case01.nii.gz: has negative values: -1 in {count} voxels; say with --labels what they mean, for example "
        "--labels 0,1,-1=ignore"
    )
    declared = parse_labels("0,1,2,-1=ignore")
    assert not any(report.problems for report in inspect_folder(open_folder(root), declared))


def test_too_many_label_values_are_refused(tmp_path: Path) -> None:
    root = tmp_path
    for i in range(2):
        image = volume(i, (30, 26, 10))[0]
        save(root / "images" / f"case{i}.nii.gz", image)
        numbers = np.arange(200 * i, 200 * i + 200).repeat(39).reshape(30, 26, 10)
        save(root / "labels" / f"case{i}.nii.gz", numbers.astype(np.int16))
    data = open_folder(root)
    reports = inspect_folder(data)
    with pytest.raises(UserError, match="have 400 different values, but at most 256 classes"):
        labels_of(data, reports, None)
    assert len(labels_of(data, reports, parse_labels("0,1-1000=cell"))) == 2


# --- checks before the training -------------------------------------------------------------------------------------


def checked(root: Path, **changes: Any) -> inspection.Survey:
    return survey(open_folder(root), tiny(**changes))


@pytest.mark.parametrize("name", ["case00", "case02", "case03", "case05"])  # labelled, unlabelled, validation, test
def test_volumes_of_every_part_are_checked(name: str, tmp_path: Path) -> None:
    root = plain(tmp_path)
    path = root / "images" / f"{name}.nii.gz"
    data = nib.load(path)
    save(path, np.stack([np.asarray(data.dataobj)] * 2, axis=-1), data.affine)
    with pytest.raises(UserError, match=rf"{name}\.nii\.gz: has 2 channels, the others have 1"):
        checked(root)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"{name}\.nii\.gz: truncated or damaged"):
        checked(root)


def test_train_names_a_class_that_no_labelled_volume_has(tmp_path: Path) -> None:
    root = plain(tmp_path)
    for i in range(2):
        path = root / "labels" / f"case{i:02d}.nii.gz"
        image = nib.load(path)
        label = np.asarray(image.dataobj).copy()
        label[label == 2] = 0
        save(path, label, image.affine)
    notes = checked(root).notes
    assert notes[0] == "class 2 (label 2, value 2): no labelled volume has it; it cannot be learned"
    for i in range(2):
        path = root / "labels" / f"case{i:02d}.nii.gz"
        image = nib.load(path)
        save(path, np.zeros(image.shape, np.uint8), image.affine)
    with pytest.raises(UserError, match="the labels of all 2 labelled volumes are empty"):
        checked(root)


def test_sizes_beyond_the_memory_are_refused(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    with pytest.raises(UserError, match=r"a step takes at least .* --image-size 1048576x1048576"):
        checked(root, image_size="1048576")
    with pytest.raises(UserError, match="memory are free; --cache DIR keeps them on the disk"):
        checked(root, spatial_dims=3, image_size="16", spacing="0.01")


def test_two_dimensional_images_need_two_dimensions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cell00\.png: is a 2-D image; --spatial-dims 3 needs volumes"):
        checked(pictures(tmp_path), spatial_dims=3, image_size="32,32,16")


def test_train_names_volumes_with_slices_across_another_axis(tmp_path: Path) -> None:
    root = plain(tmp_path)
    assert not any("--slice-axis" in note for note in checked(root).notes)
    image, label = volume(4, (5, 26, 31))
    save(root / "images" / "case04.nii.gz", image, np.eye(4))
    save(root / "labels" / "case04.nii.gz", label, np.eye(4))
    (note,) = (note for note in checked(root).notes if "--slice-axis" in note)
    assert note.startswith(
        "slices are taken across axis 2, which has the fewest voxels of the first labelled volume; 1 volumes"
    )
    assert "another axis: case04;" in note
    assert not any("--slice-axis sets the axis" in note for note in checked(root, slice_axis=2).notes)


def test_train_names_an_image_that_two_patients_share(tmp_path: Path) -> None:
    """The score of the second says nothing about new patients."""
    root = plain(tmp_path)
    for name in ("images", "labels"):  # labelled, and of the test; another name, and other bytes
        image = nib.load(root / name / "case01.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), root / name / "case05.nii.gz")
    said = "case01 (labelled) and case05 (test) have the same voxels, but count as two patients"
    assert said in checked(root).notes
    folder = open_folder(root)
    found = inspection.inspect_folder(folder)
    lines = warnings_of(folder, found, inspection.labels_of(folder, found, None))
    assert "case01 and case05 have the same voxels, but count as two patients" in lines
    assert inspection.same_images(inspection.inspect_folder(open_folder(acdc(tmp_path / "acdc", 2)))) == []


def test_ct_is_measured_on_training_cases_alone(tmp_path: Path) -> None:
    root = kits(tmp_path)
    first = checked(root).intensity
    assert [channel.kind for channel in first.channels] == ["ct"]
    for name in ("case_00006", "case_00007"):  # of the test
        image = nib.load(root / name / "imaging.nii.gz")
        save(root / name / "imaging.nii.gz", np.asarray(image.dataobj) + 500, image.affine)
    assert checked(root).intensity == first
    assert checked(root, window="40,400").intensity.channels[0].kind == "window"


def test_train_says_that_frames_are_channels(tmp_path: Path) -> None:
    root = decathlon(tmp_path, 6)
    assert "images have 2 channels, along the fourth axis of their files" in checked(root).notes
    for path in (root / "imagesTr").iterdir():
        image = nib.load(path)
        film = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
        film.header.set_xyzt_units("mm", "sec")
        nib.save(film, path)
    said = "images have 2 channels, along the fourth axis of their files, which their headers call time: the network"
    assert any(note.startswith(said) for note in checked(root).notes)
    assert any(note == "images have 3 channels" for note in checked(pictures(tmp_path / "colour")).notes)
    assert not any("channels" in note for note in checked(plain(tmp_path / "grey")).notes)


def test_images_without_an_orientation_beside_others_are_said(tmp_path: Path) -> None:
    root = plain(tmp_path)
    paths = sorted((root / "images").iterdir())
    said = f"{paths[1]}: does not say which way its axes point"
    for path in paths:
        image = nib.Nifti1Image(np.asarray(nib.load(path).dataobj), np.diag([2.0, 2.0, 5.0, 1.0]))
        if path == paths[1]:
            image.set_qform(None)
            image.set_sform(None)
        nib.save(image, path)
    reports = inspect_folder(open_folder(root))
    assert [note for report in reports for note in report.notes if said in note] == [reports[1].notes[0]]
    assert len([note for report in reports for note in report.notes]) == 1


def test_a_number_of_cases_other_than_described_is_said(tmp_path: Path) -> None:
    """A label file that is missing makes its image an unlabelled one."""
    root = nnunet(tmp_path / "nnunet")
    assert not any("numTraining" in note for note in open_folder(root).notes)
    (root / "labelsTr" / "heart_002.nii.gz").unlink()
    said = f"{root / 'dataset.json'}: says numTraining 6, but 5 images have labels; are some missing?"
    assert said in open_folder(root).notes
    root = decathlon(tmp_path / "decathlon", 6)
    file = root / "dataset.json"
    for count, expected in ((6, 0), (7, 1)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "numTraining": count}))
        assert sum("numTraining" in note for note in open_folder(root).notes) == expected


def test_images_with_and_without_a_voxel_size_are_said(tmp_path: Path) -> None:
    root = plain(tmp_path, 8)
    assert not any("units of length" in note for note in checked(root).notes)
    pictures(tmp_path / "other", 1, colour=False)
    shutil.copy(tmp_path / "other" / "images" / "cell00.png", root / "images" / "case99.png")
    said = "the training images have different units of length, mm and pixel: only some files say how large"
    assert any(note.startswith(said) for note in checked(root).notes)


def test_volumes_that_take_no_part_are_said(tmp_path: Path) -> None:
    root = acdc(tmp_path / "data")
    assert not any("take no part" in note for note in checked(root).notes)
    for patient in ("patient001", "patient003", "patient007"):  # labelled, unlabelled, of the test
        (root / "training" / patient / f"{patient}_frame12_gt.nii.gz").unlink()
    said = (
        "2 volumes take no part, since they have no label, and their patients are labelled or held out: "
        "patient001_frame12, patient007_frame12"
    )
    assert [note for note in checked(root).notes if "take no part" in note] == [said]
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"labelled": ["patient002"], "unlabelled": ["patient003"]}))
    notes = checked(root, split_file=str(file), labelled=1).notes
    (note,) = (note for note in notes if "take no part" in note)
    assert note.startswith("12 volumes take no part, since the split does not name their patients: patient001_frame01,")


def test_a_class_that_vanishes_when_slices_are_shrunk_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = plain(tmp_path / "data", shape=(150, 140, 5))
    for i in range(6):
        path = root / "labels" / f"case{i:02d}.nii.gz"
        label = np.asarray(nib.load(path).dataobj).copy()
        label[label == 2] = 0
        label[76, 71, 2] = 2  # between the voxels that are kept
        save(path, label)
    config = tiny(labelled=2, slices="whole")
    load_training_data(root, config, progress=Progress(8))
    said = capsys.readouterr().err.replace("\n", " ")
    assert "slices are shrunk 4.7 times along each side, to --image-size 32x32; a larger one, or --slices crop," in said
    assert (
        "class 2 (label 2): its 2 labelled voxels vanish when volumes are brought to --image-size 32x32; it cannot be "
        "learned"
    ) in said
    load_training_data(plain(tmp_path / "small"), config, progress=Progress(8))
    said = capsys.readouterr().err
    assert "shrunk" not in said
    assert "voxels vanish" not in said
    load_training_data(root, tiny(labelled=2), progress=Progress(8))
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.search(r"the network sees 32x32 pixels of slices of 14\dx15\d at a time; a larger --image-size", said)
    assert "voxels vanish" not in said
    load_training_data(root, tiny(labelled=2, image_size="160"), progress=Progress(8))
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.search(r"slices of 14\dx15\d pixels are padded to --image-size 160x160; a smaller one saves time", said)
    load_training_data(root, tiny(labelled=2, image_size="160", spacing="0.9,0.9"), progress=Progress(8))
    said = capsys.readouterr().err.replace("\n", " ")
    assert "--image-size" not in said
    # --slices whole would be refused with --spacing.
    for size, spacing, words in (
        ("32", "0.9,0.9", "a larger --image-size or a coarser --spacing shows it more of what lies around"),
        ("160", "2,2", "are padded to --image-size 160x160; a smaller one saves time"),
    ):
        load_training_data(root, tiny(labelled=2, image_size=size, spacing=spacing), progress=Progress(8))
        said = capsys.readouterr().err.replace("\n", " ")
        assert words in said
        assert "--slices whole" not in said
