"""The arguments and results of the ops. Each list is defined here once, in the order of the schema."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from pglcl_ext._autograd import exportable

__all__ = [
    "BoundsArguments",
    "Choice",
    "ContrastArguments",
    "ContrastNumbers",
    "ContrastOptions",
    "ContrastOutputs",
    "GaussianArguments",
    "GaussianOutputs",
    "Side",
    "StatisticsArguments",
]


@exportable
class Side(NamedTuple):
    """The anchors of a contrastive loss, or the keys that they are compared with.

    Attributes:
        embeddings: (N, D).
        labels: (N,) int64; rows that take no part have the `ignore_index` of the loss.
        descriptors: (N,) or (N, C), such as entropies; None: labels alone decide.
    """

    embeddings: Tensor
    labels: Tensor
    descriptors: Tensor | None = None


class ContrastOptions(NamedTuple):
    """The options of :func:`pglcl_ext.patch_contrast_loss`, which says what they mean."""

    temperature: float
    max_positive_disparity: float | Tensor | None
    min_negative_disparity: float | Tensor | None
    num_positives: int | None
    num_negatives: int | None
    positive_mask: Tensor | None
    negative_mask: Tensor | None
    negative_weight: float
    ignore_index: int
    reduction: str
    group: Any
    gather: str


class Choice(NamedTuple):
    """The tensors that choose the positives and negatives of each anchor, in place of numbers."""

    positive_bounds: Tensor | None = None  # (N,)
    negative_bounds: Tensor | None = None  # (N,)
    positive_mask: Tensor | None = None  # (N, M) bool
    negative_mask: Tensor | None = None  # (N, M) bool


class ContrastNumbers(NamedTuple):
    """The arguments of ``patch_contrast`` that are not tensors."""

    temperature: float
    positive_bound: float
    negative_bound: float
    negative_weight: float
    ignore_index: int
    self_offset: int  # key i + self_offset is anchor i itself; -1 if no key is an anchor
    reduction: int  # one of REDUCTIONS
    allow_tf32: bool  # float32 products on a GPU may round their factors to TF32


class ContrastArguments(NamedTuple):
    """The arguments of ``patch_contrast``. ``patch_contrast_backward`` takes them after results of the forward op."""

    anchors: Side
    keys: Side | None  # None: the anchors
    choice: Choice
    numbers: ContrastNumbers

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, which :meth:`flat` has before the numbers."""
        return (*self.anchors, *(self.keys or (None,) * len(Side._fields)), *self.choice)

    def flat(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
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
    """The results of ``patch_contrast``. The logarithm of an anchor's denominator is max_logit + log_sum."""

    loss: Tensor  # scalar, or (N,)
    max_logit: Tensor  # (N,) float64
    log_sum: Tensor  # (N,)
    positive_logit: Tensor  # (N,), the mean over the positives
    num_positives: Tensor  # (N,) int32
    num_valid: Tensor  # scalar int64, the anchors that have a positive

    def for_backward(self) -> tuple[Tensor, ...]:
        """The results that the backward op takes, after the gradient of the loss."""
        return self.max_logit, self.log_sum, self.num_positives, self.num_valid


class GaussianArguments(NamedTuple):
    """The arguments of ``gaussian_contrast``."""

    anchors: Tensor  # (N, D)
    labels: Tensor  # (N,) int64
    means: Tensor  # (K, D) or (K, K, D)
    covariances: Tensor  # (K, D, D) or (K, K, D, D)
    counts: Tensor  # (K,) int64
    temperature: float
    covariance_scale: float
    negative_weight: float
    ignore_index: int
    reduction: int  # one of REDUCTIONS
    needs_gradients: bool  # whether to return d loss_i / d anchor_i as well


class GaussianOutputs(NamedTuple):
    """The results of ``gaussian_contrast``."""

    loss: Tensor  # scalar, or (N,)
    gradients: Tensor  # (N, D), d loss_i / d anchor_i; (0, D) unless asked for
    num_valid: Tensor  # scalar int64, the anchors that count


class BoundsArguments(NamedTuple):
    """The arguments of ``disparity_bounds``, which finds a bound for each anchor.

    The bound keeps `wanted` positives or negatives, and those that tie with the last of them.
    """

    descriptors: Tensor  # (N,) or (N, C)
    labels: Tensor  # (N,) int64
    key_descriptors: Tensor  # (M,) or (M, C)
    key_labels: Tensor  # (M,) int64
    wanted: int  # at least 1
    positives: bool  # True: wanted-th smallest disparity in the anchor's class; False: wanted-th largest in others
    ignore_index: int  # patches with this label are left out
    self_offset: int  # key i + self_offset is anchor i itself and does not count; -1 if no key is an anchor


class StatisticsArguments(NamedTuple):
    """The arguments of ``patch_statistics``."""

    input: Tensor  # (B, K, *S)
    patch_size: list[int]  # one entry per spatial dimension
    stride: list[int]
    probabilities: bool
    normalize: bool
