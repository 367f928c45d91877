"""Keeps only the largest component of a class: in predicted masks, and in pseudo-labels before they are learned."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

POSTPROCESS = ("auto", "none", "largest-component")
ONE_ORGAN = 0.99  # a class counts as one organ if its largest components hold this share of its voxels


def components(mask: Tensor, label: int) -> int:
    """The number of pieces of one class in a mask of any dimensions."""
    return len(_pieces(mask.numpy(), label)[1])


def stray_components(prediction: Tensor, truth: Tensor, label: int) -> int:
    """The number of predicted pieces of a class that touch none of its true voxels; masks (X, Y, Z)."""
    numbers, count = ndimage.label((prediction == label).numpy(), np.ones((3,) * prediction.dim(), dtype=bool))
    met = np.unique(numbers[(truth == label).numpy()])
    return int(count - np.count_nonzero(met))


def single_organs(masks: Iterable[Tensor], num_classes: int) -> list[int]:
    """The classes from 1 on that are one organ: 99 % of their voxels lie in the largest component of their mask.

    Args:
        masks: slices (X, Y) or volumes (X, Y, Z), as the network sees them; -1 belongs to no class.
        num_classes: K, with background.
    """
    inside, every = np.zeros(num_classes, dtype=np.int64), np.zeros(num_classes, dtype=np.int64)
    for mask in masks:
        for label in range(1, num_classes):
            sizes = _pieces(mask.numpy(), label)[1]
            if len(sizes):
                inside[label] += sizes.max()
                every[label] += sizes.sum()
    return [label for label in range(1, num_classes) if every[label] and inside[label] >= ONE_ORGAN * every[label]]


def clean(pseudo: Tensor, prediction: Tensor, labels: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Keeps only the largest component of each of `labels` in every pseudo-label; the rest becomes background.

    Args:
        pseudo: (B, *S) int64.
        prediction: (B, K, *S), the teacher's probabilities.
        labels: classes.

    Returns:
        The pseudo-labels, and the teacher's probability of each of them (B, *S).
    """
    labels = list(labels)
    kept = pseudo.clone()
    if labels:
        masks = pseudo.to("cpu", torch.int32)
        for image, mask in zip(kept, masks):
            image.copy_(keep_largest(mask, labels))
    return kept, prediction.gather(1, kept[:, None])[:, 0]


def keep_largest(mask: Tensor, labels: Iterable[int]) -> Tensor:
    """A copy of `mask`, of any dimensions, in which each of `labels` keeps its largest component.

    The rest becomes background. Voxels that share a face, an edge or a corner are connected. If components have the
    same size, the first one stays.
    """
    kept = mask.clone()
    for label in labels:
        inside, sizes, numbers = _pieces(kept.numpy(), label)
        if len(sizes) > 1:
            inside[(numbers > 0) & (numbers != 1 + sizes.argmax())] = 0
    return kept


def _pieces(array: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box around a class (a view), the sizes of its components, and each voxel's component, counted from 1."""
    own = array == label
    box = ndimage.find_objects(own, max_label=1)[0]
    if box is None:
        return array[:0], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    numbers, _ = ndimage.label(own[box], np.ones((3,) * array.ndim, dtype=bool))
    return array[box], np.bincount(numbers.ravel())[1:], numbers
