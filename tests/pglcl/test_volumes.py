"""Reading, canonical axes, resampling, and the restored resolution."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from pglcl import formats
from pglcl.errors import UserError
from pglcl.intensity import Channel, Intensity
from pglcl.labels import LabelMap
from pglcl.layouts import Case
from pglcl.prepare import choose_slice_axis, prepare
from pglcl.volumes import (
    read_label,
    read_label_values,
    read_volume,
    resize_image,
    resize_label,
    resized_shape,
    write_like,
)

from tests.pglcl.folders import OBLIQUE, save, tiny, volume

LABELS = LabelMap.of_values([1, 2])
INTENSITY = Intensity((Channel("percentile"),), "")
AXES = [
    np.diag((*signs, 1)) @ np.eye(4)[[*order, 3]]
    for signs in ((1.0, 1.0, 1.0), (-1.0, 1.0, -1.0))
    for order in itertools.permutations(range(3))
]


@pytest.mark.parametrize("affine", [OBLIQUE, *AXES], ids=lambda a: "".join(nib.aff2axcodes(a)))
def test_a_result_has_the_voxels_and_affine_of_its_source(affine: np.ndarray, tmp_path: Path) -> None:
    data = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    path = save(tmp_path / "a.nii.gz", data, affine)
    read = read_volume([path])
    write_like(read.data[0], read.source, tmp_path / "b.nii.gz")
    back = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), data)
    np.testing.assert_array_equal(back.affine, nib.load(path).affine)
    for name in ("qform_code", "sform_code", "pixdim", "xyzt_units"):
        np.testing.assert_allclose(back.header[name], nib.load(path).header[name], rtol=1e-6)
    # In canonical axes, for any axes of the file, the same voxel is at the same place in the body.
    canonical = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(read.data[0], np.asarray(canonical.dataobj))
    np.testing.assert_allclose(read.spacing, canonical.header.get_zooms(), rtol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            volume(0)[0].astype(np.float64) + 1e9,
            "has values from 1000000061.01 to 1000000246.93, between which float32",
        ),
        (np.round(volume(0)[0]).astype(np.int32) + 2**30, "between which float32 has steps of 1.3e+02: store it with"),
        (np.round(volume(0)[0]).astype(np.int64) + 2**60, "between which float32 has steps of 1.4e+11"),
        (np.round(volume(0)[0]).astype(np.uint64) + np.uint64(2**63), "between which float32 has steps of 1.1e+12"),
        (volume(0)[0].astype(np.float64) * 1e-300, "between which float32 has steps of 1.4e-45"),
        (volume(0)[0].astype(np.float64) * 1e300, "has 3900 voxels beyond the range of float32, 3.4e+38"),
    ],
)
def test_values_that_float32_cannot_tell_apart_are_refused(data: np.ndarray, message: str, tmp_path: Path) -> None:
    """The network would see another image, with a few grey values."""
    nib.save(nib.Nifti1Image(data, OBLIQUE, dtype=data.dtype), tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=re.escape(message)):
        read_volume([tmp_path / "a.nii.gz"])


@pytest.mark.parametrize(
    "data",
    [
        np.round(volume(0)[0]).astype(np.int64) * 2**40,
        np.round(volume(0)[0]).astype(np.int64) * 2**7 + 2**30,  # few steps, but each value is exact
        volume(0)[0].astype(np.float64) + 1000,
        np.full(volume(0)[0].shape, 0.1),
        np.where(volume(0)[1] > 0, -1e30, volume(0)[0].astype(np.float64)),
    ],
)
def test_values_of_64_bits_that_float32_holds_are_read(data: np.ndarray, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(data, np.eye(4), dtype=data.dtype), tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_volume([tmp_path / "a.nii.gz"]).data[0], data, rtol=1e-7)


def test_a_label_in_other_axes_is_read_like_one_in_the_axes_of_its_image(tmp_path: Path) -> None:
    image, label = volume(0)
    path = save(tmp_path / "i.nii.gz", image, OBLIQUE)
    expected = read_label(save(tmp_path / "a.nii.gz", label, OBLIQUE), path, LABELS)
    turned = nib.Nifti1Image(label, OBLIQUE).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nib.save(turned, tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read_label(tmp_path / "b.nii.gz", path, LABELS), expected)
    flipped = save(tmp_path / "c.nii.gz", np.asarray(turned.dataobj)[::-1], turned.affine)
    assert not np.array_equal(read_label(flipped, path, LABELS), expected)
    for shift in (0.05, 1.0):
        moved = OBLIQUE.copy()
        moved[2, 3] += shift
        save(tmp_path / "d.nii.gz", label, moved)
        if shift > 0.1:
            with pytest.raises(
                UserError, match=r"must have the affine of its image i\.nii\.gz: corners lie up to 1 mm"
            ):
                read_label(tmp_path / "d.nii.gz", path, LABELS)
        else:
            np.testing.assert_array_equal(read_label(tmp_path / "d.nii.gz", path, LABELS), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"slices": "whole", "image_size": "32"},
        {"slices": "crop", "image_size": "32"},
        {"slices": "crop", "image_size": "32", "spacing": "1,1.5"},
        {"spatial_dims": 3, "image_size": "32,32,16", "spacing": "1,1.5,3"},
    ],
)
@pytest.mark.parametrize("shape", [(30, 26, 5), (17, 41, 9), (64, 33, 3), (5, 70, 66)])
def test_a_mask_is_nearly_the_same_after_the_networks_resolution(
    shape: tuple[int, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    image, label = volume(0, shape)
    path, truth = save(tmp_path / "i.nii.gz", image), save(tmp_path / "l.nii.gz", label)
    config = tiny(**options)
    axis = choose_slice_axis(config, read_volume([path]).data.shape[1:])
    prepared = prepare(Case("i", "i", (path,), truth), config, axis, INTENSITY, LABELS)
    assert prepared.label is not None
    assert prepared.image.shape[1:] == prepared.label.shape
    size = prepared.image.shape[1:]
    assert all(n >= s for n, s in zip(size[: len(config.size)], config.size, strict=True))
    # The truth as the network would predict it, restored to the resolution of the volume.
    known = torch.nn.functional.one_hot(prepared.label.long().clamp(min=0), 3).movedim(-1, 0).float()
    if axis is not None:
        known = known.movedim(-1, axis + 1)
    back = prepared.geometry.restore(known).argmax(dim=0)
    expected = torch.from_numpy(read_label(truth, path, LABELS))
    assert back.shape == expected.shape
    for k in (1, 2):
        if (expected == k).sum() > 30:
            overlap = 2 * ((back == k) & (expected == k)).sum() / ((back == k).sum() + (expected == k).sum())
            assert overlap > (0.85 if (expected == k).sum() > 400 else 0.5)


def test_resizing_keeps_means_and_labels() -> None:
    x = torch.rand(2, 9, 10, 11)
    torch.testing.assert_close(resize_image(x, (3, 5, 11)).mean(), x.mean(), atol=0.02, rtol=0)
    assert torch.equal(resize_image(x, (9, 10, 11)), x)
    halves = x.double()[:, :8].unflatten(1, (4, 2)).unflatten(3, (5, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(resize_image(x[:, :8], (4, 5, 11)).double(), halves, atol=1e-6, rtol=0)
    # One axis shrinks, another one grows.
    wide = torch.nn.functional.interpolate(halves[None], (4, 5, 22), mode="trilinear")[0]
    torch.testing.assert_close(resize_image(x[:, :8], (4, 5, 22)).double(), wide, atol=1e-6, rtol=0)
    y = torch.randint(0, 3, (4, 5, 6))
    assert torch.equal(resize_label(resize_label(y, (8, 10, 12)), (4, 5, 6)), y)


def test_resized_shape_fits_the_size_or_the_spacing() -> None:
    assert resized_shape((200, 256, 10), (1, 1, 8), slice_axis=2, size=(128, 128), target=None) == (100, 128, 10)
    assert resized_shape((10, 100, 50), (8, 1, 1), slice_axis=0, size=(32, 64), target=None) == (10, 32, 16)
    volume = {"shape": (10, 20, 30), "spacing": (3.0, 1.0, 0.5), "size": None}
    assert resized_shape(**volume, slice_axis=None, target=(1, 1, 1)) == (30, 20, 15)
    assert resized_shape(**volume, slice_axis=1, target=(1.5, 1)) == (20, 20, 15)
    assert resized_shape(**volume, slice_axis=0, target=None) == (10, 20, 30)


@pytest.mark.parametrize("replaced", ["image.nii", "label.nii"])
def test_a_file_that_changes_its_shape_while_it_is_read_is_refused(
    replaced: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header was checked before it changed. Voxels of another shape must not be used."""
    for name in ("image.nii", "label.nii"):
        save(tmp_path / name, np.zeros((8, 6, 4), np.float32))
    read = formats.read

    def replace_then_read(path: Path, *, label: bool = False) -> tuple[formats.Source, np.ndarray]:
        save(tmp_path / replaced, np.zeros((8, 6, 5), np.float32))
        return read(path, label=label)

    monkeypatch.setattr(formats, "read", replace_then_read)
    image, label = tmp_path / "image.nii", tmp_path / "label.nii"
    with pytest.raises(UserError, match=rf"{replaced}: was changed while it was read"):
        read_volume([image]) if replaced == image.name else read_label_values(label, image)
