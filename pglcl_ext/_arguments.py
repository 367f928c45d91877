"""What the ops take and return, each list once, in the order of the schema."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "BoundsArguments",
    "Choice",
    "ContrastArguments",
    "ContrastNumbers",
    "ContrastOutputs",
    "GaussianArguments",
    "Side",
    "StatisticsArguments",
]


class Side(NamedTuple):
    """The anchors, or the keys."""

    embeddings: Tensor  # (N, D)
    labels: Tensor  # (N,) int64
    descriptors: Tensor | None = None  # (N,) or (N, C); without them the labels alone decide


class Choice(NamedTuple):
    """What chooses the positives and negatives of each anchor, where numbers do not."""

    positive_bounds: Tensor | None = None  # (N,)
    negative_bounds: Tensor | None = None  # (N,)
    positive_mask: Tensor | None = None  # (N, M) bool
    negative_mask: Tensor | None = None  # (N, M) bool


class ContrastNumbers(NamedTuple):
    temperature: float
    positive_bound: float
    negative_bound: float
    negative_weight: float
    ignore_index: int
    self_offset: int  # key i + self_offset is anchor i itself; -1 where there is no such key
    reduction: int  # one of REDUCTIONS
    allow_tf32: bool  # float32 products on a GPU may round their factors to TF32


class ContrastArguments(NamedTuple):
    """What ``patch_contrast`` takes, and ``patch_contrast_backward`` after the results of the former."""

    anchors: Side
    keys: Side | None  # None: the anchors
    choice: Choice
    numbers: ContrastNumbers

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of :meth:`flat` before the first number."""
        return (*self.anchors, *(self.keys or (None,) * len(Side._fields)), *self.choice)

    def flat(self) -> tuple[Any, ...]:
        """As the op takes them."""
        return (*self.tensors(), *self.numbers)

    @classmethod
    def nested(cls, flat: Iterable[Any]) -> ContrastArguments:
        """The inverse of :meth:`flat`."""
        rest = iter(flat)
        anchors, keys, choice, numbers = (
            tuple(islice(rest, len(part._fields))) for part in (Side, Side, Choice, ContrastNumbers)
        )
        has_keys = any(t is not None for t in keys)
        return cls(Side(*anchors), Side(*keys) if has_keys else None, Choice(*choice), ContrastNumbers(*numbers))


class ContrastOutputs(NamedTuple):
    """What ``patch_contrast`` returns. The logarithm of an anchor's denominator is max_logit + log_sum."""

    loss: Tensor  # scalar, or (N,)
    max_logit: Tensor  # (N,) float64
    log_sum: Tensor  # (N,)
    positive_logit: Tensor  # (N,), the mean over the positives
    num_positives: Tensor  # (N,) int32
    num_valid: Tensor  # scalar int64, the anchors that have a positive

    def for_backward(self) -> tuple[Tensor, ...]:
        """Those that the backward op takes after the gradient of the loss."""
        return self.max_logit, self.log_sum, self.num_positives, self.num_valid


class GaussianArguments(NamedTuple):
    """What ``gaussian_contrast`` takes."""

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


class BoundsArguments(NamedTuple):
    """What ``disparity_bounds`` takes: bounds that keep `wanted` positives or negatives of each anchor, and ties."""

    descriptors: Tensor  # (N,) or (N, C)
    labels: Tensor  # (N,) int64
    key_descriptors: Tensor  # (M,) or (M, C)
    key_labels: Tensor  # (M,) int64
    wanted: int  # at least 1
    positives: bool  # the wanted-th smallest disparity of the label, or the largest of others
    ignore_index: int  # patches with this label take no part
    self_offset: int  # key i + self_offset is anchor i itself and does not count; -1 where there is no such key


class StatisticsArguments(NamedTuple):
    """What ``patch_statistics`` takes."""

    input: Tensor
    patch_size: list[int]  # one entry per spatial dimension
    stride: list[int]
    probabilities: bool
    normalize: bool
