"""Keeps only the largest component of an organ: in predicted masks, and in pseudo-labels before they are learned.

An organ is a class, or several classes together, such as the parts of a heart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

Organ = tuple[int, ...]  # its classes
POSTPROCESS = ("auto", "none", "largest-component")
ONE_ORGAN = 0.99  # classes count as one organ if their largest components hold this share of their voxels


def each_class(num_classes: int) -> list[Organ]:
    """Every class from 1 on as an organ of its own."""
    return [(label,) for label in range(1, num_classes)]


def all_together(num_classes: int) -> Organ:
    """All classes from 1 on as one organ."""
    return tuple(range(1, num_classes))


def components(mask: Tensor, label: int) -> int:
    """The number of pieces of one class in a mask of any dimensions."""
    return len(_pieces(mask.numpy(), (label,))[1])


def stray_components(prediction: Tensor, truth: Tensor, label: int) -> int:
    """The number of predicted pieces of a class that touch none of its true voxels; masks (X, Y, Z)."""
    numbers, count = ndimage.label((prediction == label).numpy(), np.ones((3,) * prediction.dim(), dtype=bool))
    met = np.unique(numbers[(truth == label).numpy()])
    return int(count - np.count_nonzero(met))


def single_organs(masks: Iterable[Tensor], candidates: Sequence[Organ]) -> list[Organ]:
    """The candidates that are one organ: 99 % of their voxels lie in the largest component of their mask.

    Args:
        masks: slices (X, Y) or volumes (X, Y, Z), as the network sees them; -1 belongs to no class.
        candidates: sets of classes.
    """
    inside, every = np.zeros(len(candidates), dtype=np.int64), np.zeros(len(candidates), dtype=np.int64)
    for mask in masks:
        for place, organ in enumerate(candidates):
            sizes = _pieces(mask.numpy(), organ)[1]
            if len(sizes):
                inside[place] += sizes.max()
                every[place] += sizes.sum()
    return [organ for organ, n, all_of_it in zip(candidates, inside, every) if all_of_it and n >= ONE_ORGAN * all_of_it]


def clean(pseudo: Tensor, prediction: Tensor, organs: Iterable[Organ]) -> tuple[Tensor, Tensor]:
    """Keeps only the largest component of each of `organs` in every pseudo-label; the rest becomes background.

    Args:
        pseudo: (B, *S) int64.
        prediction: (B, K, *S), the teacher's probabilities.
        organs: sets of classes.

    Returns:
        The pseudo-labels, and the teacher's probability of each of them (B, *S).
    """
    organs = list(organs)
    kept = pseudo.clone()
    if organs:
        masks = pseudo.to("cpu", torch.int32)
        for image, mask in zip(kept, masks):
            image.copy_(keep_largest(mask, organs))
    return kept, prediction.gather(1, kept[:, None])[:, 0]


def keep_largest(mask: Tensor, organs: Iterable[Organ]) -> Tensor:
    """A copy of `mask`, of any dimensions, in which each of `organs`, one after the other, keeps its largest component.

    The rest becomes background. Voxels that share a face, an edge or a corner are connected. If components have the
    same size, the first one stays.
    """
    kept = mask.clone()
    for organ in organs:
        inside, sizes, numbers = _pieces(kept.numpy(), organ)
        if len(sizes) > 1:
            inside[(numbers > 0) & (numbers != 1 + sizes.argmax())] = 0
    return kept


def _pieces(array: np.ndarray, organ: Organ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box around an organ (a view), the sizes of its components, and each voxel's component, counted from 1."""
    own = array == organ[0] if len(organ) == 1 else np.isin(array, organ)
    box = ndimage.find_objects(own, max_label=1)[0]
    if box is None:
        return array[:0], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    numbers, _ = ndimage.label(own[box], np.ones((3,) * array.ndim, dtype=bool))
    return array[box], np.bincount(numbers.ravel())[1:], numbers
