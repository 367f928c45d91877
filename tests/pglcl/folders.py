"""Small data folders of each layout: bright balls and cubes on a noisy ground."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pglcl.config import TrainConfig

SHAPE = (30, 26, 5)
# Small enough for a test, large enough for every part to run.
TINY: dict[str, Any] = {
    "labelled": 2, "validation": 1, "test": 2, "image_size": "32", "channels": "4,8,8", "steps": 8, "warmup": 3,
    "batch_size": 4, "patch_size": 8, "queue_length": 16, "embedding_dim": 8, "workers": 0, "checkpoint_every": 3,
    "validate_every": 0, "device": "cpu",
}  # fmt: skip
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
