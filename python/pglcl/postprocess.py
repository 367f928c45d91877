"""What is done to a mask after the network: of each class the largest component is kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage
from torch import Tensor

POSTPROCESS = ("none", "largest-component")


def keep_largest(mask: Tensor, labels: Iterable[int]) -> Tensor:
    """A copy of `mask` (X, Y, Z) in which each of `labels` keeps its largest component; the rest becomes background.

    Voxels that share a face, an edge or a corner are connected. Of components of the same size the first one stays.
    """
    kept = mask.clone()
    array = kept.numpy()
    structure = np.ones((3,) * array.ndim, dtype=bool)
    for label in labels:
        boxes = ndimage.find_objects(array == label, max_label=1)
        if not boxes or boxes[0] is None:
            continue
        inside = array[boxes[0]]
        components, count = ndimage.label(inside == label, structure)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            inside[(components > 0) & (components != sizes.argmax())] = 0
    return kept
