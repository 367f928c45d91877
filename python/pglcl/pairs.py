"""The pairs of patches that the contrast of a run chooses in one image, for the picture of the report."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pglcl.config import TrainConfig
from pglcl.contrast import Guidance, entropy_of_crops, halved
from pglcl.model import SegmentationNetwork
from pglcl_ext import PatchRows, class_patches, patch_embeddings, reference
from pglcl_ext.class_patches import one_hot


class Pairs(NamedTuple):
    """An anchor and the keys of its image. A row is one class of one patch; `index` holds the patch's first pixel.

    Attributes:
        anchor: one row.
        keys: N rows.
        positive, negative: (N,) bool, the keys that the loss takes as the anchor's positives and negatives.
    """

    anchor: PatchRows
    keys: PatchRows
    positive: Tensor
    negative: Tensor


def rows_of_patches(config: TrainConfig, p: Tensor, counts: Tensor) -> PatchRows:
    """A row for each class that each patch holds, by the pseudo-labels of a prediction, as in training.

    Args:
        config: the options of the run.
        p: (1, K, *S), probabilities; each side is even and at least the patch size.
        counts: (1, *S), how much a pixel counts for the class of its pseudo-label.

    Returns:
        The rows, with the first pixel of each patch in `index`.
    """
    size, classes = config.patch_size, p.shape[1]
    weights = one_hot(p.argmax(dim=1), classes) * counts[:, None]
    if config.patches == "crop":
        crops = class_patches(weights, weights, size, classes)
        return PatchRows(crops.labels, entropy_of_crops(crops, weights, p, size), crops.coverage, crops.index)
    weights = halved(weights)
    cell = size // SegmentationNetwork.feature_stride
    pooled = patch_embeddings(weights, weights, cell, prediction=halved(p)).compact()
    corner = torch.cat([pooled.index[:, :1], pooled.index[:, 1:] * size], dim=1)
    return PatchRows(pooled.labels, pooled.entropy, pooled.coverage, corner)


def qualifying(rows: PatchRows, share: float) -> PatchRows:
    """The given share of the rows of each class, those of the largest coverage: where the threshold comes to rest."""
    keep = torch.zeros_like(rows.labels, dtype=torch.bool)
    for k in rows.labels.unique():
        own = (rows.labels == k).nonzero().flatten()
        order = rows.coverage[own].argsort(descending=True, stable=True)
        keep[own[order[: math.ceil(share * len(own))]]] = True
    return PatchRows(*(column[keep] for column in rows))


def pairs_of_prediction(config: TrainConfig, p: Tensor) -> Pairs:
    """The pairs of the least certain foreground patch of an image without annotations.

    As in training, keys count each pixel by the certainty of its pseudo-label. So do anchors, except that
    ``anchors="certain"`` counts only pixels of at least `anchor_confidence`.

    Args:
        config: the options of the run.
        p: (1, K, *S), probabilities; each side is even and at least the patch size.
    """
    certainty = p.amax(dim=1)
    keys = qualifying(rows_of_patches(config, p, certainty), config.coverage_target)
    anchors = keys
    if config.anchors == "certain":
        certain = (certainty >= config.anchor_confidence).to(p.dtype)
        anchors = qualifying(rows_of_patches(config, p, certain), config.coverage_target)
    return choose_pairs(Guidance(config, p.shape[1]), anchors if len(anchors.labels) else keys, keys)


def choose_pairs(guidance: Guidance, anchors: PatchRows, keys: PatchRows) -> Pairs:
    """The anchor of the highest entropy, and the keys of the same image that the loss pairs with it.

    The anchor is one of the foreground if there is any, and one that the rule does not leave out if there is any.
    """
    own, own_as_keys = (guidance.descriptors(anchors.entropy, anchors.coverage, keys=keys) for keys in (False, True))
    paired = (own == own_as_keys).all(dim=1)  # a patch that is left out differs from itself
    foreground = anchors.labels > 0
    candidates = next((m for m in (foreground & paired, foreground) if m.any()), torch.ones_like(paired))
    at = int(torch.where(candidates, anchors.entropy, -math.inf).argmax())
    anchor = PatchRows(*(column[at : at + 1] for column in anchors))
    positive, negative, _ = reference.guided_masks(
        anchor.labels,
        own[at : at + 1],
        keys.labels,
        guidance.descriptors(keys.entropy, keys.coverage, keys=True),
        **guidance.bounds,
    )
    itself = (keys.labels == anchor.labels) & (keys.index == anchor.index).all(dim=1)
    return Pairs(anchor, keys, positive[0] & ~itself, negative[0])
