"""Crops of an image, each of one class (method, section 8, the authors' form)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl_ext._autograd import exportable
from pglcl_ext._checks import (
    check_choice,
    check_class_labels,
    check_coverage,
    check_image,
    check_integer,
    check_patch_grid,
    per_dimension,
)
from pglcl_ext._precision import accumulate_dtype, without_autocast
from pglcl_ext.patch_statistics import patch_grid_arguments

__all__ = ["ClassPatches", "class_patches", "one_hot"]


@exportable
class ClassPatches(NamedTuple):
    """Crops, each of one class. Numbers have the dtype of the images.

    Attributes:
        images: (N, C, ``*P``), crops of the images, multiplied by the weight of the class.
        labels: (N,) int64, the class of each crop.
        coverage: (N,), the mean weight of the class in the crop.
        index: (N, 1 + dims) int64, the index of the image, then that of the crop's first pixel along each axis.
    """

    images: Tensor
    labels: Tensor
    coverage: Tensor
    index: Tensor  # type: ignore[assignment]


def class_patches(
    images: Tensor,
    labels: Tensor,
    patch_size: int | Sequence[int],
    num_classes: int,
    *,
    stride: int | Sequence[int] | None = None,
    coverage: float | Tensor | None = None,
    max_patches: int | None = None,
    output_size: int | Sequence[int] | None = None,
    mode: str = "resize",
) -> ClassPatches:
    """Multiplies images by the mask of each class and cuts out the patches that contain the class.

    This is the authors' form (method, section 8). Crops lie on a grid. The last row and the last column of the grid are
    moved inwards, so that they end at the border of the image. So every pixel is in a crop, for any patch size. At most
    `max_patches` crops of a class are taken from an image, evenly spread over it. Images do not influence each other.
    Coverage is counted from the mask, never from intensities. On a GPU the call waits, since the number of crops must
    be known.

    Args:
        images: (B, C, *S) floating point, two or three spatial dimensions.
        labels: (B, *S) int64, where a value outside [0, num_classes) belongs to no class; or floating-point weights
            (B, num_classes, *S), which are used as they are.
        patch_size: size of a crop, in pixels, an int or one per spatial dimension; at most the image.
        num_classes: K.
        stride: distance between crops, in pixels, an int or one per spatial dimension; at most `patch_size`, which is
            the default.
        coverage: a crop counts for class k when its mean weight exceeds this: a number, a tensor (K,), or None for 0.
            A crop without the class never counts.
        max_patches: largest number of crops of a class in an image; all by default.
        output_size: size of the returned crops, in pixels, an int or one per spatial dimension; `patch_size` by
            default.
        mode: how crops get that size: ``"resize"`` (linear interpolation) or ``"pad"`` (zeros around them).

    Returns:
        :class:`ClassPatches`, ordered by image, class and place; N may be 0. Gradients flow to `images`, and to
        `labels` if they are weights.

    Raises:
        ValueError: shapes or devices that do not fit, values out of range.
        TypeError: wrong dtypes, or arguments of the wrong type.
    """
    check_image("images", images, "C")
    num_classes = check_integer("num_classes", num_classes, least=1)
    check_class_labels(labels, images, num_classes)
    patch, step = _crop_grid(images, patch_size, stride)
    size = _output_size(output_size, patch, mode)
    threshold = check_coverage(coverage, num_classes, images)
    if max_patches is not None:
        max_patches = check_integer("max_patches", max_patches, least=1)
    weights = _class_weights(images, labels, num_classes)

    starts = [_starts(extent, p, s) for extent, p, s in zip(images.shape[2:], patch, step)]
    wide = accumulate_dtype(weights.dtype)  # 16 bits have no room for sums over a crop
    share = _mean_over(weights.to(wide), starts, patch)  # (B, K, *g)
    k_first = share.movedim(1, -1)
    present = ((k_first > threshold) & (k_first > 0)).movedim(-1, 1)
    crops, classes, shares, index = [], [], [], []
    for b in range(len(images)):
        for k in range(num_classes):
            for cell in _chosen(present[b, k].nonzero(), max_patches).tolist():
                first = [starts[d][c] for d, c in enumerate(cell)]
                place: Any = tuple(slice(f, f + p) for f, p in zip(first, patch))
                crops.append(images[(b, slice(None), *place)] * weights[(b, k, *place)])
                classes.append(k)
                shares.append(share[(b, k, *cell)])
                index.append([b, *first])
    label = torch.tensor(classes, dtype=torch.int64, device=images.device)
    where = torch.tensor(index, dtype=torch.int64, device=images.device).view(-1, images.dim() - 1)
    if not crops:
        none = images.new_zeros((0, images.shape[1], *size)) + images[:0].sum()  # still a part of the graph
        return ClassPatches(none, label, images.new_empty((0,)), where)
    with without_autocast(images):  # crops keep their dtype, which may be another than that of autocast
        coverages = torch.stack(shares).to(images.dtype)
        return ClassPatches(_to_size(torch.stack(crops), size, mode), label, coverages, where)


def _crop_grid(
    images: Tensor, patch_size: int | Sequence[int], stride: int | Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """The size of a crop and the distance between crops, for each spatial dimension."""
    patch, step = patch_grid_arguments(images, patch_size, stride)
    check_patch_grid(images.shape[2:], patch, step)
    if any(s > p for s, p in zip(step, patch)):
        raise ValueError(f"stride must not exceed patch_size, {patch}, or pixels would be left out, got {step}")
    return patch, step


def _output_size(output_size: int | Sequence[int] | None, patch: list[int], mode: str) -> list[int]:
    """The size of the returned crops, for each spatial dimension."""
    dims = len(patch)
    size = patch if output_size is None else per_dimension("output_size", output_size, dims)
    if len(size) != dims or min(size) < 1:
        raise ValueError(f"output_size must be positive, with one entry per spatial dimension ({dims}), got {size}")
    check_choice("mode", mode, ("resize", "pad"))
    if mode == "pad" and any(to < p for to, p in zip(size, patch)):
        raise ValueError(f"output_size must be at least patch_size, {patch}, to pad to it, got {size}")
    return size


def _class_weights(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    if labels.is_floating_point():
        return labels.to(images.dtype)
    return one_hot(labels, num_classes).to(images.dtype)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(B, *S) integer labels to (B, K, *S) bool; False for every class where a label is outside of [0, K)."""
    classes = torch.arange(num_classes, device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    return labels[:, None] == classes


def _starts(extent: int, patch: int, step: int) -> list[int]:
    last = extent - patch
    return sorted({*range(0, last + 1, step), last})


def _mean_over(weights: Tensor, starts: list[list[int]], patch: list[int]) -> Tensor:
    """Means of the weights over the crops, (B, K, *g), one dimension after the other."""
    for d, (firsts, size) in enumerate(zip(starts, patch)):
        sums = [weights.narrow(2 + d, first, size).sum(dim=2 + d) for first in firsts]
        weights = torch.stack(sums, dim=2 + d) / size
    return weights


def _chosen(cells: Tensor, most: int | None) -> Tensor:
    """At most `most` of the cells, which are in reading order: evenly spaced, with half a space at both ends."""
    if most is None or len(cells) <= most:
        return cells
    return cells[((torch.arange(most, device=cells.device) * 2 + 1) * len(cells)) // (2 * most)]


def _to_size(crops: Tensor, size: list[int], mode: str) -> Tensor:
    if list(crops.shape[2:]) == size:
        return crops
    if crops.shape[1] == 0:  # PyTorch resizes no image without channels
        return crops.new_empty((*crops.shape[:2], *size))
    if mode == "resize":
        return F.interpolate(crops, size, mode="bilinear" if crops.dim() == 4 else "trilinear", align_corners=False)
    around = []
    for to, now in zip(reversed(size), reversed(crops.shape[2:])):
        around += [(to - now) // 2, to - now - (to - now) // 2]
    return F.pad(crops, around)
