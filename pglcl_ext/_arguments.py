"""The arguments of the ops, each list once, in the order of the schema."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["ContrastArguments", "GaussianArguments", "Side", "StatisticsArguments"]


class Side(NamedTuple):
    """One side of the contrast: the anchors, or the keys.

    embeddings: (N, D). labels: (N,) int64. descriptors: (N,) or (N, C), or None where the labels alone decide. All
    three are None on the side of the keys where the anchors are the keys.
    """

    embeddings: Tensor | None
    labels: Tensor | None
    descriptors: Tensor | None = None


NO_KEYS = Side(None, None, None)


class ContrastArguments(NamedTuple):
    """What ``pglcl_ext::patch_contrast`` takes, and its backward op after what the forward op returned.

    positive_bounds, negative_bounds: (N,), in place of the numbers. self_offset: key ``i + self_offset`` is anchor i
    itself; -1 where there is no such key. reduction: one of :data:`REDUCTIONS`, by number.
    """

    anchors: Side
    keys: Side
    positive_bounds: Tensor | None
    negative_bounds: Tensor | None
    positive_mask: Tensor | None
    negative_mask: Tensor | None
    temperature: float
    positive_bound: float
    negative_bound: float
    negative_weight: float
    ignore_index: int
    self_offset: int
    reduction: int

    def flat(self) -> tuple[Any, ...]:
        """As the op takes them."""
        return (*self.anchors, *self.keys, *self[2:])

    @classmethod
    def of(cls, flat: Any) -> ContrastArguments:
        """The inverse of :meth:`flat`."""
        return cls(Side(*flat[:3]), Side(*flat[3:6]), *flat[6:])


class GaussianArguments(NamedTuple):
    """What ``pglcl_ext::gaussian_contrast`` takes. needs_gradients: its gradients are wanted, too."""

    anchors: Tensor
    labels: Tensor
    means: Tensor
    covariances: Tensor
    counts: Tensor
    temperature: float
    covariance_scale: float
    negative_weight: float
    ignore_index: int
    reduction: int
    needs_gradients: bool


class StatisticsArguments(NamedTuple):
    """What ``pglcl_ext::patch_statistics`` takes, patch and stride with one entry per spatial dimension."""

    input: Tensor
    patch_size: list[int]
    stride: list[int]
    probabilities: bool
    normalize: bool
