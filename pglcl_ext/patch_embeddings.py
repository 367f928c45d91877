"""One embedding for each class of each patch (method, section 8, the pooled form)."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pglcl_ext._autograd import exportable, readable
from pglcl_ext._checks import (
    check_coverage,
    check_device,
    check_image,
    check_integer,
    check_known_labels,
    check_labels,
    check_same_space,
    check_tensor,
    dtype_name,
)
from pglcl_ext._precision import accumulate_dtype, without_autocast
from pglcl_ext.patch_statistics import patch_grid_arguments, patch_statistics, pixel_entropy

__all__ = ["PatchBatch", "PatchRows", "patch_embeddings"]


@exportable
class PatchRows(NamedTuple):
    """Class-aware patches of a batch, before features are pooled. Every class of every patch is a row.

    Rows that qualify have their class as label. The others have `ignore_index`, and the losses and the queue leave them
    out. So the number of rows depends on shapes alone. Entropy and coverage have the dtype of the features.

    Attributes:
        labels: (N,) int64.
        entropy: (N,), in nats.
        coverage: (N,), the mean weight of the class in the patch.
        index: (N, 1 + dims) int64, the index of the image, then that of the patch in the grid, along each axis.
    """

    labels: Tensor
    entropy: Tensor
    coverage: Tensor
    index: Tensor  # type: ignore[assignment]

    def compact(self, ignore_index: int = -1) -> PatchRows:
        """Only the rows that qualify. On a GPU this waits, since the number of rows must be known.

        Args:
            ignore_index: label of rows that do not qualify: the one that :func:`patch_embeddings` was given.

        Raises:
            TypeError: `ignore_index` is not an int.
        """
        return PatchRows(*_qualifying(self, ignore_index))

    def limited(self, per_class: int, priority: Tensor, ignore_index: int = -1) -> PatchRows:
        """All rows, of which at most `per_class` of each class still qualify: those with the highest `priority`.

        Rows of equal priority are taken in their order. Without a limit, a mean over anchors is almost the mean over
        the background, which has most of the patches. With `entropy` as priority, the patches with the least certain
        prediction are kept; with random numbers, a random sample. The call does not wait for a GPU.

        Args:
            per_class: at least 0.
            priority: (N,) real numbers, one for each row; NaN is the lowest.
            ignore_index: label of rows that do not qualify, before and after. It must be the one that
                :func:`patch_embeddings` was given: rows do not keep it, and a row with another label counts as one of
                a class.

        Raises:
            ValueError: a priority of another shape or device, a negative `per_class`.
            TypeError: arguments of the wrong type.
        """
        return self._replace(labels=_limited(self.labels, per_class, priority, ignore_index))


@exportable
class PatchBatch(NamedTuple):
    """:class:`PatchRows` with their embeddings.

    Attributes:
        embeddings: (N, D).
        labels, entropy, coverage, index: as in :class:`PatchRows`.
    """

    embeddings: Tensor
    labels: Tensor
    entropy: Tensor
    coverage: Tensor
    index: Tensor  # type: ignore[assignment]

    def compact(self, ignore_index: int = -1) -> PatchBatch:
        """As :meth:`PatchRows.compact`."""
        return PatchBatch(*_qualifying(self, ignore_index))

    def limited(self, per_class: int, priority: Tensor, ignore_index: int = -1) -> PatchBatch:
        """As :meth:`PatchRows.limited`."""
        return self._replace(labels=_limited(self.labels, per_class, priority, ignore_index))


def _qualifying(rows: PatchRows | PatchBatch, ignore_index: int) -> tuple[Tensor, ...]:
    ignore_index = check_integer("ignore_index", ignore_index)
    places = (rows.labels != ignore_index).nonzero().squeeze(1)  # once: each call waits
    return tuple(column.index_select(0, places) for column in rows)


def _limited(labels: Tensor, per_class: int, priority: Tensor, ignore_index: int) -> Tensor:
    check_tensor("priority", priority)
    if priority.shape != labels.shape:
        raise ValueError(f"priority must have shape (N,) = {tuple(labels.shape)}, got {tuple(priority.shape)}")
    check_device("priority", priority, "labels", labels)
    if priority.is_complex():
        raise TypeError(f"priority must be real numbers, got {dtype_name(priority)}")
    per_class = check_integer("per_class", per_class, least=0)
    ignore_index = check_integer("ignore_index", ignore_index)
    if priority.is_floating_point():
        priority = priority.masked_fill(priority.isnan(), -math.inf)  # NaN would sort as the largest number
    order = priority.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]  # by class, and in a class by priority
    by_class = labels[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(by_class, by_class)
    keep = torch.zeros_like(labels, dtype=torch.bool).scatter(0, order, rank < per_class)
    return torch.where(keep, labels, ignore_index)


# Weights are multiplied by this before they are summed, so that the sums keep their digits where a class has hardly any
# probability. It is a power of two, which changes no digit of others.
WEIGHT_SCALE = 2.0**40


def _quotient(sums: Tensor, mass: Tensor) -> Tensor:
    """sums / mass, 0 where the mass is 0."""
    return torch.where(mass > 0, sums / torch.where(mass > 0, mass, 1), 0)


def _patch_sums(x: Tensor, patch: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(B, C, *g)"""
    windows = _windows(x, patch, stride)
    if max(patch) > 4:
        return windows.flatten(-len(patch)).sum(dim=-1)
    # On a CPU, the sum over so short a dimension takes sixteen times as long as adding its elements.
    for _ in patch:
        first, *others = windows.unbind(-1)
        windows = sum(others, first)
    return windows


def _windows(x: Tensor, patch: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(B, C, *g, *P) as a view."""
    dims = len(patch)
    if all(size == step for size, step in zip(patch, stride)):
        # Patches side by side are a reshape. So is its gradient, while that of unfold fills and adds.
        for d, size in enumerate(patch):
            cells = x.shape[2 + 2 * d] // size
            if cells * size < x.shape[2 + 2 * d]:
                x = x.narrow(2 + 2 * d, 0, cells * size)
            x = x.unflatten(2 + 2 * d, (cells, size))
        return x.permute(0, 1, *range(2, 2 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2))
    for d, (size, step) in enumerate(zip(patch, stride)):
        x = x.unfold(2 + d, size, step)
    return x


def patch_embeddings(
    features: Tensor,
    weights: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    coverage: float | Tensor | None = None,
    prediction: Tensor | None = None,
    select: Callable[[PatchRows], PatchRows] | None = None,
    ignore_index: int = -1,
) -> PatchBatch:
    r"""One embedding for each class of each patch, pooled from a feature map.

    With class weights :math:`p_k` at the resolution of the feature map `f`, the embedding of class k in patch j is
    (method, section 8, the pooled form: our choice)

    .. math:: e_{jk} = \frac{\sum_{x \in j} p_k(x) f(x)}{\sum_{x \in j} p_k(x)}.

    Its label is k, and its entropy is the class entropy :math:`H_{jk}` of section 2. One pass over the features serves
    all classes.

    Args:
        features: (B, D, *S) floating point, two or three spatial dimensions; gradients flow to them.
        weights: (B, K, *S) floating point, at least 0, with K >= 2: probabilities, or a one-hot mask. They decide which
            patches qualify; no gradient flows to them.
        patch_size, stride: in pixels of the feature map, as in :func:`patch_statistics`. Overlapping patches copy the
            features as often as they overlap.
        coverage: class k counts as present in a patch when its mean weight there, c_jk, exceeds this: a number, a
            tensor (K,), such as that of a :class:`CoverageThreshold`, or None for 0. A patch with c_jk = 0 never
            qualifies.
        prediction: (B, K', *S) floating-point probabilities; no gradient flows to them. Their entropy, averaged with
            the class weights, replaces the entropy of the weights, which is 0 for a one-hot mask.
        select: a function that gets all :class:`PatchRows` and returns the rows to pool, such as
            ``lambda rows: rows.limited(64, rows.entropy).compact()``. The cost of pooling then depends on these rows,
            not on the feature map.
        ignore_index: label of rows that do not qualify.

    Returns:
        :class:`PatchBatch` with one row for each image, each patch of the grid and each class, in this order; or the
        selected rows. Numbers have the dtype of `features`; sums are kept in float32 or wider, also under autocast.

    Raises:
        ValueError: shapes or devices that do not fit. On the CPU also: `select` returns a label that is no class, or an
            index outside the batch or the grid.
        TypeError: wrong dtypes, arguments of the wrong type, or `select` does not return :class:`PatchRows`.
    """
    check_image("features", features, "D")
    check_image("weights", weights, "K")
    check_same_space("weights", weights, "features", features)
    if weights.shape[1] < 2:
        raise ValueError(f"weights must have at least two classes (dimension 1), got {tuple(weights.shape)}")
    patch, step = patch_grid_arguments(weights, patch_size, stride)
    threshold = check_coverage(coverage, weights.shape[1], weights)
    ignore_index = check_integer("ignore_index", ignore_index)
    if select is not None and not callable(select):
        raise TypeError(f"select must be a function of PatchRows, or None, got {type(select).__name__}")
    wide = accumulate_dtype(features.dtype)
    weights = weights.detach().to(wide)
    statistics = patch_statistics(weights, patch, step, probabilities=True)
    share = statistics.confidence
    if prediction is None:
        entropy = statistics.class_entropy
    else:
        check_image("prediction", prediction, "K'")
        check_same_space("prediction", prediction, "features", features)
        h = pixel_entropy(prediction.detach().to(wide)).unsqueeze(1)
        entropy = _quotient(
            _patch_sums(weights * WEIGHT_SCALE * h, patch, step), _patch_sums(weights * WEIGHT_SCALE, patch, step)
        )

    batch, k, *cells = share.shape
    rows = share.movedim(1, -1).reshape(-1, k)
    present = (rows > threshold) & (rows > 0)
    classes = torch.arange(k, device=share.device).expand_as(rows)
    ranges = [torch.arange(size, device=share.device) for size in (batch, *cells)]
    index = torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).reshape(-1, 1 + len(cells))
    found = PatchRows(
        torch.where(present, classes, ignore_index).flatten(),
        entropy.movedim(1, -1).flatten().to(features.dtype),
        rows.flatten().to(features.dtype),
        index.repeat_interleave(k, dim=0),
    )
    if select is None:
        embeddings = _weighted_means(features, weights, patch, step)
        return PatchBatch(embeddings.flatten(0, -2), *found)
    chosen = _checked_rows(select(found), (batch, *cells), k, ignore_index)
    known = chosen.labels != ignore_index
    return PatchBatch(_means_of_rows(features, weights, patch, step, chosen, known), *chosen)


def _checked_rows(rows: Any, grid: tuple[int, ...], classes: int, ignore_index: int) -> PatchRows:
    """The result of `select`, after checks. `grid` is the number of images, and of cells in each dimension."""
    if not isinstance(rows, PatchRows):
        raise TypeError(f"select must return PatchRows, got {type(rows).__name__}")
    for name, column in zip(rows._fields, rows):
        check_tensor(f"{name} of select", column)
    if any(column.shape[:1] != rows.labels.shape[:1] for column in rows):
        got = ", ".join(f"{name} {tuple(c.shape)}" for name, c in zip(rows._fields, rows))
        raise ValueError(f"select must return tensors with the same number of rows, got {got}")
    check_labels("labels of select", rows.labels, "N", "index", rows.index)
    if rows.index.dtype != torch.int64:
        raise TypeError(f"index of select must be int64, got {dtype_name(rows.index)}")
    if rows.index.dim() != 2 or rows.index.shape[1] != len(grid):
        raise ValueError(f"index of select must have shape (N, {len(grid)}), got {tuple(rows.index.shape)}")
    if readable(rows.labels):
        check_known_labels(rows.labels, classes, ignore_index)
        outside = (rows.index < 0) | (rows.index >= rows.index.new_tensor(grid))
        if outside.any():
            bad = rows.index[outside.any(dim=1)][0].tolist()
            raise ValueError(f"index of select must lie in the grid of patches, {list(grid)}, got {bad}")
    return rows


def _means_of_rows(
    x: Tensor, weights: Tensor, patch: list[int], step: list[int], rows: PatchRows, known: Tensor
) -> Tensor:
    """sum w_k x / sum w_k over the patches of some rows, (N, channels); 0 where `known` (N,) bool is False."""
    offsets = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in patch)).view(-1, len(patch))
    pixel = rows.index.new_zeros(len(rows.index), len(offsets))
    for d, size in enumerate(x.shape[2:]):
        pixel = pixel * size + rows.index[:, 1 + d, None] * step[d] + offsets[:, d]
    image, label = rows.index[:, :1], torch.where(known, rows.labels, 0)[:, None]
    w = torch.where(known[:, None], weights.flatten(2)[image, label, pixel] * WEIGHT_SCALE, 0)
    inside = x.flatten(2).movedim(1, -1)[image, pixel]  # (N, pixels, channels)
    sums = (inside * w[..., None]).sum(dim=1)
    return torch.where(known[:, None], _quotient(sums, w.sum(dim=1, keepdim=True)), 0).to(x.dtype)


def _weighted_means(x: Tensor, weights: Tensor, patch: list[int], step: list[int]) -> Tensor:
    """sum w_k x / sum w_k over the patches, (B, *g, K, channels); 0 where the weights are 0."""
    dims = len(patch)
    g, q = string.ascii_uppercase[:dims], string.ascii_uppercase[dims : 2 * dims]
    w = weights * WEIGHT_SCALE
    with without_autocast(x):  # 16 bits have no room for sums over a patch
        sums = torch.einsum(
            f"bd{g}{q},bk{g}{q}->b{g}kd", _windows(x.to(w.dtype), patch, step), _windows(w, patch, step)
        )
    return _quotient(sums, _patch_sums(w, patch, step).movedim(1, -1).unsqueeze(-1)).to(x.dtype)
