"""class_patches: the places of crops, the crops that count for a class, and errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pglcl_ext import class_patches


@pytest.mark.parametrize("patch", [1, 2, 3, 5, 8, 11, [3, 7], [11, 4]])
@pytest.mark.parametrize("stride", [None, 1, 2])
def test_every_border_position_is_cut_at_its_place(patch, stride: int | None) -> None:
    size = [patch] * 2 if isinstance(patch, int) else patch
    if stride and stride > min(size):
        pytest.skip("pixels would be left out")
    image = torch.arange(1.0, 11 * 12 + 1).reshape(1, 1, 11, 12)
    for corner in itertools.product((0, 5, 10), (0, 6, 11)):
        labels = torch.full((1, 11, 12), -1)
        labels[0, corner[0], corner[1]] = 1
        found = class_patches(image, labels, patch, 2, stride=stride)
        assert len(found.labels) >= 1
        assert found.labels.unique().tolist() == [1]
        for crop, index in zip(found.images, found.index, strict=True):
            first = index[1:].tolist()
            assert all(0 <= f <= extent - s for f, s, extent in zip(first, size, (11, 12), strict=True))
            assert list(crop.shape[1:]) == size
            expected = torch.zeros(size)
            expected[corner[0] - first[0], corner[1] - first[1]] = image[0, 0, corner[0], corner[1]]
            assert torch.equal(crop[0], expected)


def test_crops_cover_the_image() -> None:
    image = torch.ones(1, 1, 13, 17)
    found = class_patches(image, torch.zeros(1, 13, 17).long(), [5, 4], 1)
    seen = torch.zeros(13, 17)
    for _, y, x in found.index.tolist():
        seen[y : y + 5, x : x + 4] += 1
    assert seen.min() >= 1
    assert torch.all(found.coverage == 1)


def test_crops_of_volumes_have_the_output_size() -> None:
    image, labels = torch.randn(2, 1, 6, 7, 8), torch.randint(0, 3, (2, 6, 7, 8))
    found = class_patches(image, labels, 3, 3, output_size=4)
    assert found.images.shape[1:] == (1, 4, 4, 4)
    assert set(found.labels.tolist()) == {0, 1, 2}


def test_background_is_spread_over_the_image() -> None:
    found = class_patches(torch.ones(1, 1, 64, 64), torch.zeros(1, 64, 64).long(), 8, 2, max_patches=8)
    assert len(found.labels) == 8
    rows = found.index[:, 1]
    assert rows.min() < 16
    assert rows.max() >= 48
    assert len(rows.unique()) >= 4


def test_images_do_not_suppress_each_other() -> None:
    image, labels = torch.randn(1, 1, 24, 24), torch.zeros(1, 24, 24, dtype=torch.int64)
    labels[:, 8:16, 8:16] = 1
    alone = class_patches(image, labels, 8, 2, max_patches=3)
    both = class_patches(image.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1), 8, 2, max_patches=3)
    for b in range(2):
        own = both.index[:, 0] == b
        assert torch.equal(both.index[own][:, 1:], alone.index[:, 1:])
        assert torch.equal(both.images[own], alone.images)


def test_coverage_counts_the_mask_not_intensities() -> None:
    image, labels = torch.zeros(1, 1, 8, 8), torch.ones(1, 8, 8).long()
    image[..., :4] = -3
    found = class_patches(image, labels, 4, 2)
    assert len(found.labels) == 4
    assert torch.all(found.coverage == 1)


def test_pad_adds_zeros_and_resize_interpolates() -> None:
    image = torch.ones(1, 1, 8, 8)
    padded = class_patches(image, torch.zeros(1, 8, 8).long(), 4, 1, output_size=[7, 6], mode="pad")
    assert padded.images.shape == (4, 1, 7, 6)
    assert torch.all(padded.images.sum(dim=(1, 2, 3)) == 16)
    resized = class_patches(image, torch.zeros(1, 8, 8).long(), 4, 1, output_size=9).images
    torch.testing.assert_close(resized, torch.ones(4, 1, 9, 9))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("patch_size must not exceed", {"patch_size": 9}),
        ("labels must have shape", {"labels": torch.zeros(1, 8, 7).long()}),
        ("labels must have shape", {"labels": torch.zeros(1, 3, 8, 8)}),
        ("stride must not exceed", {"stride": 5}),
        ("mode must be one of resize, pad, got 'crop'", {"mode": "crop"}),
        ("num_classes must be at least 1, got 0", {"num_classes": 0}),
        ("num_classes must be an int, got float", {"num_classes": 2.0}),
        ("images must be a tensor, got list", {"images": [[0.0]]}),
        ("images must be float64", {"images": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}),
        ("images must have shape", {"images": torch.zeros(8, 8)}),
        ("labels must be a tensor, got list", {"labels": [0]}),
        ("labels must be int64, or weights in floating point, got uint8", {"labels": torch.zeros(1, 8, 8).byte()}),
        ("labels must be on the device of images", {"labels": torch.zeros(1, 8, 8, device="meta").long()}),
        ("patch_size must be positive", {"patch_size": 0}),
        ("patch_size must be an int", {"patch_size": 4.0}),
        ("stride must be positive", {"stride": 0}),
        ("output_size must be positive", {"output_size": 0}),
        ("output_size must be positive, with one entry per spatial dimension", {"output_size": [4, 4, 4]}),
        ("output_size must be at least patch_size", {"output_size": 3, "mode": "pad"}),
        ("coverage must be a number or have shape", {"coverage": torch.zeros(3)}),
        ("max_patches must be at least 1, got 0", {"max_patches": 0}),
    ],
)
def test_bad_arguments_are_refused_by_name(message: str, change: dict) -> None:
    call = {"images": torch.zeros(1, 1, 8, 8), "labels": torch.zeros(1, 8, 8).long(), "patch_size": 4, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        class_patches(**{"num_classes": 2, **call})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_coverage_of_long_crops_is_exact_in_16_bits(dtype: torch.dtype) -> None:
    labels = torch.zeros(1, 70_000, 2, dtype=torch.int64)
    labels[0, :17_500] = 1
    crops = class_patches(torch.ones(1, 1, 70_000, 2, dtype=dtype), labels, (70_000, 2), 2)
    assert crops.coverage.tolist() == [0.75, 0.25]


def test_sizes_of_numpy_count_as_ints() -> None:
    """In eight bits, two times 200 is 144."""
    image, labels = torch.ones(1, 1, 300, 2), torch.zeros(1, 300, 2).long()
    found = class_patches(image, labels, np.uint8(1), np.uint8(1), max_patches=np.uint8(200))
    assert torch.equal(found.index, class_patches(image, labels, 1, 1, max_patches=200).index)


@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_images_without_channels_give_empty_crops(mode: str) -> None:
    found = class_patches(torch.ones(2, 0, 8, 8), torch.zeros(2, 8, 8).long(), 4, 1, output_size=6, mode=mode)
    assert found.images.shape == (8, 0, 6, 6)
    assert torch.all(found.coverage == 1)


def test_a_result_without_crops_stays_in_the_graph() -> None:
    images = torch.full((2, 1, 8, 8), torch.inf, requires_grad=True)
    found = class_patches(images, torch.full((2, 8, 8), -1), 4, 2, output_size=6)
    assert found.images.shape == (0, 1, 6, 6)
    found.images.sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, torch.zeros_like(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16], ids=str)
def test_crops_keep_their_dtype_under_autocast(dtype: torch.dtype, other: torch.dtype) -> None:
    images, labels = torch.randn(1, 2, 8, 8).to(dtype), torch.randint(0, 2, (1, 8, 8))
    plain = class_patches(images, labels, 4, 2, output_size=6)
    with torch.autocast("cpu", other):
        found = class_patches(images, labels, 4, 2, output_size=6)
    assert found.images.dtype == found.coverage.dtype == dtype
    assert torch.equal(found.images, plain.images)
