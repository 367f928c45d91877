"""What is done to a mask after the network: of each class the largest component is kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage
from torch import Tensor

POSTPROCESS = ("none", "largest-component")


def components(mask: Tensor, label: int) -> int:
    """How many pieces of one class there are in a mask (X, Y, Z)."""
    return len(_pieces(mask.numpy(), label)[1])


def keep_largest(mask: Tensor, labels: Iterable[int]) -> Tensor:
    """A copy of `mask` (X, Y, Z) in which each of `labels` keeps its largest component; the rest becomes background.

    Voxels that share a face, an edge or a corner are connected. Of components of the same size the first one stays.
    """
    kept = mask.clone()
    for label in labels:
        inside, sizes, numbers = _pieces(kept.numpy(), label)
        if len(sizes) > 1:
            inside[(numbers > 0) & (numbers != 1 + sizes.argmax())] = 0
    return kept


def _pieces(array: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box around a class (a view), the sizes of its components, and the number of each voxel's, from 1."""
    own = array == label
    box = ndimage.find_objects(own, max_label=1)[0]
    if box is None:
        return array[:0], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    numbers, _ = ndimage.label(own[box], np.ones((3,) * array.ndim, dtype=bool))
    return array[box], np.bincount(numbers.ravel())[1:], numbers
