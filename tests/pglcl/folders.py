"""Small data folders of each layout: bright balls and cubes in noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pglcl.config import TrainConfig
from pglcl.formats.itk import locale_kept

SHAPE = (30, 26, 5)
# Small enough for a test, large enough for every part to run.
TINY: dict[str, Any] = {
    "labelled": 2, "validation": 1, "test": 2, "image_size": "32", "channels": "4,8,8", "steps": 8, "warmup": 3,
    "batch_size": 4, "patch_size": 8, "queue_length": 16, "embedding_dim": 8, "workers": 0, "checkpoint_every": 3,
    "validate_every": 0, "device": "cpu",
}  # fmt: skip
# Axes at right angles, as ITK requires, but none of them along an axis of the body.
STRAIGHT = np.array([[0.0, 1.84, 0.96, -20], [-1.4, 0, 0, 30], [0, 0.48, -3.68, 12], [0, 0, 0, 1]])
OBLIQUE = np.array([[0.0, 1.9, 0.4, -20], [-1.4, 0.1, 0.2, 30], [0.1, 0.3, -4.8, 12], [0, 0, 0, 1]])


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, **changes})


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels 0, 1 (ball), 2 (cube)."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    centre = np.array([n * random.uniform(0.3, 0.4) for n in shape])[:, None, None, None]
    corner = np.array([n * random.uniform(0.55, 0.65) for n in shape])[:, None, None, None]
    scale = np.array([1.0, 1.0, shape[0] / shape[2]])[:, None, None, None]
    label = np.zeros(shape, np.uint8)
    label[(((grid - centre) * scale) ** 2).sum(axis=0) < (shape[0] / 5) ** 2] = 1
    label[(np.abs(grid - corner) * scale).max(axis=0) < shape[0] / 7] = 2
    image = 100 + 60.0 * label + 10 * random.standard_normal(shape)
    return image.astype(np.float32), label


def save(path: Path, data: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def plain(root: Path, count: int = 8, *, unlabelled: int = 2, shape: tuple[int, ...] = SHAPE) -> Path:
    """images/ and labels/; the last ones have no label file. Each volume has a shape of its own."""
    for i in range(count):
        image, label = volume(i, (shape[0] + i % 3, shape[1], shape[2] + i % 2))
        save(root / "images" / f"case{i:02d}.nii.gz", image)
        if i < count - unlabelled:
            save(root / "labels" / f"case{i:02d}.nii.gz", label)
    return root


def acdc(root: Path, patients: int = 8) -> Path:
    for i in range(1, patients + 1):
        for frame in (1, 12):
            image, label = volume(10 * i + frame)
            folder = root / "training" / f"patient{i:03d}"
            save(folder / f"patient{i:03d}_frame{frame:02d}.nii.gz", image, np.eye(4))
            save(folder / f"patient{i:03d}_frame{frame:02d}_gt.nii.gz", label, np.eye(4))
        save(folder / f"patient{i:03d}_4d.nii.gz", np.zeros((*SHAPE, 3), np.float32), np.eye(4))
    return root


def decathlon(root: Path, count: int = 8, channels: int = 2) -> Path:
    training = []
    for i in range(count):
        image, label = volume(i, (20, 24, 18))
        save(root / "imagesTr" / f"brain_{i:03d}.nii.gz", np.stack([image * (c + 1) for c in range(channels)], axis=-1))
        save(root / "labelsTr" / f"brain_{i:03d}.nii.gz", label)
        training.append({"image": f"./imagesTr/brain_{i:03d}.nii.gz", "label": f"./labelsTr/brain_{i:03d}.nii.gz"})
    labels = {"0": "background", "1": "ball", "2": "cube"}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": training, "test": []}))
    return root


def nnunet(root: Path, count: int = 8, *, unlabelled: int = 2, channels: int = 1, ending: str = ".nii.gz") -> Path:
    """nnU-Net v2: imagesTr/CASE_0000.ext, labelsTr/CASE.ext, labels by name, and a test folder that is not read."""
    for i in range(count):
        image, label = volume(i)
        for c in range(channels):
            write(root / "imagesTr" / f"heart_{i:03d}_{c:04d}{ending}", image * (c + 1))
        if i < count - unlabelled:
            write(root / "labelsTr" / f"heart_{i:03d}{ending}", label)
    write(root / "imagesTs" / f"heart_900_0000{ending}", volume(90)[0])
    describe(root, channel_names={str(c): f"MR{c}" for c in range(channels)}, file_ending=ending)
    return root


def describe(root: Path, **changes: Any) -> None:
    """dataset.json of nnU-Net v2."""
    content = {
        "channel_names": {"0": "MR"}, "labels": {"background": 0, "ball": 1, "cube": 2}, "numTraining": 6,
        "file_ending": ".nii.gz",
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps({**content, **changes}))


def write(path: Path, data: np.ndarray, affine: np.ndarray = STRAIGHT) -> Path:
    """Writes (X, Y, Z) with nibabel; in formats that nibabel does not know, with SimpleITK."""
    if ".nii" in path.name:
        return save(path, data, affine)
    sitk = pytest.importorskip("SimpleITK")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), True)
    return path


def kits(root: Path, count: int = 8) -> Path:
    for i in range(count):
        image, label = volume(i)
        save(root / f"case_{i:05d}" / "imaging.nii.gz", (image - 900).round().astype(np.int16), STRAIGHT)
        save(root / f"case_{i:05d}" / "segmentation.nii.gz", label, STRAIGHT)
    return root


def ssl4mis(root: Path, patients: int = 8) -> Path:
    """Volumes (slices, rows, columns) of all patients, slices of those for training, and the lists."""
    h5py = pytest.importorskip("h5py")

    def keep(path: Path, image: np.ndarray, label: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file.create_dataset("image", data=image, compression="gzip")
            file.create_dataset("label", data=label, compression="gzip")

    names = [f"patient{i:03d}_frame01" for i in range(1, patients + 1)]
    slices = []
    for i, name in enumerate(names):
        image, label = (array.transpose(2, 0, 1) for array in volume(i))
        keep(root / "data" / f"{name}.h5", image, label)
        for z in range(len(image) if i < patients - 3 else 0):
            slices.append(f"{name}_slice_{z + 1}")
            keep(root / "data" / "slices" / f"{slices[-1]}.h5", image[z], label[z])
    for part, listed in {"train_slices": slices, "val": names[-3:-2], "test": names[-2:]}.items():
        (root / f"{part}.list").write_text("\n".join(listed) + "\n")
    return root


def pictures(root: Path, count: int = 8, *, ending: str = ".png", colour: bool = True, unlabelled: int = 2) -> Path:
    """2-D images of 8 bits, with masks of 0, 85 and 170 (PNG, whatever the images are)."""
    image_of = pytest.importorskip("PIL.Image").fromarray
    for i in range(count):
        label = volume(i, (40 + i % 3, 34, 5))[1].max(axis=2)
        grey = (60 + 50 * label + np.random.default_rng(i).integers(0, 20, label.shape)).astype(np.uint8)
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        stacked = np.stack([grey, 255 - grey, grey // 2], axis=-1) if colour else grey
        image_of(stacked).save(root / "images" / f"cell{i:02d}{ending}")
        if i < count - unlabelled:
            image_of(label * np.uint8(85)).save(root / "labels" / f"cell{i:02d}.png")
    return root


@locale_kept()
def dicom(
    folder: Path, data: np.ndarray, affine: np.ndarray = STRAIGHT, *, slope: float = 1, intercept: float = 0
) -> Path:
    """A series of slices with names in another order: (X, Y, Z) int16, stored as (x - intercept) / slope."""
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
    rows, columns = (lps[:3, 0] / spacing[0]), (lps[:3, 1] / spacing[1])
    order = np.random.default_rng(0).permutation(data.shape[2])
    for number, z in enumerate(order):
        image = sitk.GetImageFromArray(np.ascontiguousarray(data[..., z].T))
        image.SetSpacing(spacing[:2].tolist())
        place = lps[:3, 3] + lps[:3, 2] * z
        tags = {
            "0008|0008": "DERIVED\\SECONDARY", "0008|0060": "CT", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": f"1.2.826.0.1.3680043.2.1125.{len(folder.name)}.2",
            "0020|0032": "\\".join(f"{x:.6f}" for x in place),
            "0020|0037": "\\".join(f"{x:.6f}" for x in (*rows, *columns)),
            "0020|0013": str(number), "0018|0050": f"{spacing[2]:.6f}",
            "0028|1052": str(intercept), "0028|1053": str(slope), "0028|0103": "1",
        }  # fmt: skip
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(image)
    return folder
