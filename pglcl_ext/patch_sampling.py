"""Class-aware patches (method, section 8): which patch is one of which class, and what stands for it."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pglcl_ext._checks import check_integer
from pglcl_ext.patch_statistics import patch_grid_arguments, patch_statistics

__all__ = ["ClassPatches", "CoverageThreshold", "PatchBatch", "PatchRows", "class_patches", "patch_embeddings"]


class PatchRows(NamedTuple):
    """Class-aware patches of a batch, before anything is pooled: every class of every patch is a row.

    Rows that qualify have their class as label, the others `ignore_index`, which the losses and the queue leave out. So
    the shape depends on no value.
    """

    labels: Tensor  # (N,) int64
    entropy: Tensor  # (N,), in nats
    coverage: Tensor  # (N,)
    index: Tensor  # type: ignore[assignment]  # (N, 1 + dims) int64, the image and the cell of the patch grid

    def compact(self, ignore_index: int = -1) -> PatchRows:
        """Only the rows that qualify; how many there are is asked of the device, which waits for it."""
        keep = self.labels != ignore_index
        return PatchRows(*(t[keep] for t in self))

    def limited(self, per_class: int, priority: Tensor, ignore_index: int = -1) -> PatchRows:
        """As :meth:`PatchBatch.limited`."""
        return self._replace(labels=_limited(self.labels, per_class, priority, ignore_index))


class PatchBatch(NamedTuple):
    """:class:`PatchRows` with their embeddings."""

    embeddings: Tensor  # (N, D)
    labels: Tensor  # (N,) int64
    entropy: Tensor  # (N,), in nats
    coverage: Tensor  # (N,)
    index: Tensor  # type: ignore[assignment]  # (N, 1 + dims) int64, the image and the cell of the patch grid

    def compact(self, ignore_index: int = -1) -> PatchBatch:
        """Only the rows that qualify; how many there are is asked of the device, which waits for it."""
        keep = self.labels != ignore_index
        return PatchBatch(*(t[keep] for t in self))

    def limited(self, per_class: int, priority: Tensor, ignore_index: int = -1) -> PatchBatch:
        """At most `per_class` rows of each class qualify: those of the highest `priority`, ties in order.

        Background has as many patches as all else together, several times over; a mean over anchors is its mean. With
        `batch.entropy` as priority the patches that the prediction is least sure of are kept, with random numbers a
        fair sample. Nothing waits for the device.

        Args:
            per_class: at least 0.
            priority: (N,), of each row.
            ignore_index: label of rows that do not qualify, and of those that no longer do.

        Raises:
            ValueError: a priority of another shape, a negative `per_class`.
        """
        return self._replace(labels=_limited(self.labels, per_class, priority, ignore_index))


def _limited(labels: Tensor, per_class: int, priority: Tensor, ignore_index: int) -> Tensor:
    if priority.shape != labels.shape:
        raise ValueError(f"priority must have shape (N,) = {tuple(labels.shape)}, got {tuple(priority.shape)}")
    per_class = check_integer("per_class", per_class, least=0)
    order = priority.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]  # by class, and in a class by priority
    by_class = labels[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(by_class, by_class)
    keep = torch.zeros_like(labels, dtype=torch.bool).scatter(0, order, rank < per_class)
    return torch.where(keep, labels, ignore_index)


def _windows(x: Tensor, patch: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(B, C, *g, *P) as a view."""
    dims = len(patch)
    if all(size == step for size, step in zip(patch, stride)):
        # Patches side by side are a reshape, whose gradient is one, too; that of unfold fills and adds.
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
    r"""One embedding for each class of each patch, pooled from one feature map.

    With class weights :math:`p_k` at the resolution of the feature map `f` (method, section 8, the pooled form: our
    choice)

    .. math:: e_{jk} = \frac{\sum_{x \in j} p_k(x) f(x)}{\sum_{x \in j} p_k(x)},

    label k, and as entropy the class entropy :math:`H_{jk}` of section 2. One pass over the features serves all
    classes; weights stay soft.

    Args:
        features: (B, D, *S) floating point, two or three spatial dimensions; gradients flow to them.
        weights: (B, K, *S) floating point, at least 0: probabilities, or a one-hot mask. Their coverage selects; no
            gradient flows to them.
        patch_size, stride: in pixels of the feature map, as in :func:`patch_statistics`. Overlapping patches copy the
            features as often as they overlap.
        coverage: class k counts as present in a patch when its mean weight there, c_jk, exceeds this: a number, a
            tensor (K,), e.g. that of a :class:`CoverageThreshold`, or None for 0. A patch without its class is no patch
            of it.
        prediction: (B, K', *S) probabilities whose entropy, averaged with the class weights, is taken instead of the
            weights' own: a one-hot mask has none.
        select: is given all :class:`PatchRows` before anything is pooled, and returns those to pool, e.g.
            ``lambda rows: rows.limited(64, rows.entropy).compact()``. Pooling then costs what they are, not what the
            feature map is.
        ignore_index: label of rows that do not qualify.

    Returns:
        :class:`PatchBatch` with N = B * cells * K rows, ordered by image, cell, class; or those selected.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: not floating point.
    """
    patch, step = patch_grid_arguments(weights, patch_size, stride)
    _check_like("weights", weights, "features", features)
    weights = weights.detach().to(features.dtype)
    statistics = patch_statistics(weights, patch, step, probabilities=True)
    share = statistics.confidence
    if prediction is None:
        entropy = statistics.class_entropy
    else:
        _check_like("prediction", prediction, "features", features)
        p = prediction.detach()
        h = -torch.special.xlogy(p, p).sum(dim=1, keepdim=True).to(features.dtype)
        inside = _windows(weights * h, patch, step).flatten(-len(patch)).mean(dim=-1)
        entropy = torch.where(share > 0, inside / torch.where(share > 0, share, 1), 0)

    batch, k, *cells = share.shape
    rows, entropy = share.movedim(1, -1).reshape(-1, k), entropy.movedim(1, -1).reshape(-1)
    threshold: Any = 0.0 if coverage is None else coverage
    if isinstance(threshold, Tensor) and threshold.shape not in ((), (k,)):
        raise ValueError(f"coverage must be a number or have shape (K,) = ({k},), got {tuple(threshold.shape)}")
    present = (rows > threshold) & (rows > 0)
    classes = torch.arange(k, device=share.device).expand_as(rows)
    ranges = [torch.arange(size, device=share.device) for size in (batch, *cells)]
    index = torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).reshape(-1, 1 + len(cells))
    found = PatchRows(
        torch.where(present, classes, ignore_index).flatten(),
        entropy,
        rows.flatten(),
        index.repeat_interleave(k, dim=0),
    )
    if select is None:
        embeddings = _weighted_means(features, weights, patch, step, share)
        return PatchBatch(embeddings.reshape(-1, features.shape[1]), *found)
    chosen = select(found)
    known = chosen.labels != ignore_index
    return PatchBatch(_means_of_rows(features, weights, patch, step, chosen, known), *chosen)


def _means_of_rows(
    x: Tensor, weights: Tensor, patch: list[int], step: list[int], rows: PatchRows, known: Tensor
) -> Tensor:
    """sum w_k x / sum w_k over the patches of some rows, (N, channels); 0 where no class is known."""
    offsets = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in patch)).view(-1, len(patch))
    pixel = rows.index.new_zeros(len(rows.index), len(offsets))
    for d, size in enumerate(x.shape[2:]):
        pixel = pixel * size + rows.index[:, 1 + d, None] * step[d] + offsets[:, d]
    image, label = rows.index[:, :1], torch.where(known, rows.labels, 0)[:, None]
    w = weights.flatten(2)[image, label, pixel]
    inside = x.flatten(2).movedim(1, -1)[image, pixel]  # (N, pixels, channels)
    mass = torch.where(known, w.sum(dim=1), 1)
    return torch.where(known[:, None], (inside * w[..., None]).sum(dim=1) / mass[:, None], 0)


def _weighted_means(x: Tensor, weights: Tensor, patch: list[int], step: list[int], share: Tensor) -> Tensor:
    """sum w_k x / sum w_k over the patches, (B, *g, K, channels); 0 where no weight is."""
    dims = len(patch)
    g, q = string.ascii_uppercase[:dims], string.ascii_uppercase[dims : 2 * dims]
    sums = torch.einsum(f"bd{g}{q},bk{g}{q}->b{g}kd", _windows(x, patch, step), _windows(weights, patch, step))
    size = 1
    for extent in patch:
        size *= extent
    mass = share.movedim(1, -1).unsqueeze(-1) * size
    return torch.where(mass > 0, sums / torch.where(mass > 0, mass, 1), 0).to(x.dtype)


def _check_like(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.dim() != like.dim() or t.shape[0] != like.shape[0] or t.shape[2:] != like.shape[2:]:
        expected = f"({like.shape[0]}, K, {', '.join(map(str, like.shape[2:]))})"
        raise ValueError(f"{name} must have the batch and space of {like_name}, {expected}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {t.device}")


class ClassPatches(NamedTuple):
    """Crops, each of one class.

    Attributes:
        images: (N, C, ``*P``), the image times the class weight.
        labels: (N,) int64.
        coverage: (N,), mean class weight of the crop.
        index: (N, 1 + dims) int64, the image and the first pixel of the crop.
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
    """The authors' form: for each class, the image times its mask, cropped to patches that contain the class.

    From the method, section 8. Crops lie on a grid whose last row and column are moved inwards to end with the image,
    so that every pixel is in one, at every border and corner and for any patch size. Of the crops of a class in an
    image at most `max_patches` are taken, evenly spread over the image; images do not influence each other. Coverage is
    counted from the mask, never from intensities. How many crops there are is asked of the device, which waits for it.

    Args:
        images: (B, C, *S) floating point, two or three spatial dimensions.
        labels: (B, *S) int64, where a value outside [0, num_classes) belongs to no class; or soft weights
            (B, num_classes, *S), which stay soft.
        patch_size: of a crop, in pixels; not larger than the image.
        num_classes: K.
        stride: distance of the crops, at most `patch_size`, which is its default.
        coverage: a crop counts for class k when its mean weight exceeds this: a number, a tensor (K,), or None for 0.
        max_patches: per class and image; all by default.
        output_size: of the returned crops; `patch_size` by default.
        mode: how they get there: ``"resize"`` (linear interpolation) or ``"pad"`` (zeros around them).

    Returns:
        :class:`ClassPatches`, ordered by image, class and place; N may be 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    dims = images.dim() - 2
    if dims not in (2, 3):
        raise ValueError(f"images must have shape (B, C, H, W) or (B, C, D, H, W), got {tuple(images.shape)}")
    weights = _class_weights(images, labels, num_classes)
    patch, step = patch_grid_arguments(images, patch_size, stride)
    if any(s > p for s, p in zip(step, patch)):
        raise ValueError(f"stride must not exceed patch_size, {patch}, or pixels would be left out, got {step}")
    for p, extent in zip(patch, images.shape[2:]):
        if not 0 < p <= extent:
            raise ValueError(f"patch_size must not exceed the image, {tuple(images.shape[2:])}, got {patch}")
    size = patch if output_size is None else patch_grid_arguments(images, output_size, None)[0]
    if mode not in ("resize", "pad"):
        raise ValueError(f"mode must be resize or pad, got {mode!r}")
    if mode == "pad" and any(to < p for to, p in zip(size, patch)):
        raise ValueError(f"output_size must be at least patch_size, {patch}, to pad to it, got {size}")
    threshold: Any = 0.0 if coverage is None else coverage

    starts = [_starts(extent, p, s) for extent, p, s in zip(images.shape[2:], patch, step)]
    share = _mean_over(weights, starts, patch)  # (B, K, *g)
    k_first = share.movedim(1, -1)
    present = ((k_first > threshold) & (k_first > 0)).movedim(-1, 1)
    crops, classes, shares, index = [], [], [], []
    for b in range(len(images)):
        for k in range(num_classes):
            cells = present[b, k].nonzero()
            if max_patches is not None and len(cells) > max_patches:
                cells = cells[_spread(len(cells), max_patches, cells.device)]
            for cell in cells.tolist():
                first = [starts[d][c] for d, c in enumerate(cell)]
                place: Any = tuple(slice(f, f + p) for f, p in zip(first, patch))
                crops.append(images[(b, slice(None), *place)] * weights[(b, k, *place)])
                classes.append(k)
                shares.append(share[(b, k, *cell)])
                index.append([b, *first])
    label = torch.tensor(classes, dtype=torch.int64, device=images.device)
    where = torch.tensor(index, dtype=torch.int64, device=images.device).view(-1, 1 + dims)
    if not crops:
        return ClassPatches(images.new_empty(0, images.shape[1], *size), label, share.new_empty(0), where)
    return ClassPatches(_to_size(torch.stack(crops), size, mode), label, torch.stack(shares), where)


def _class_weights(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    batch, space = images.shape[0], tuple(images.shape[2:])
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if labels.is_floating_point():
        if labels.shape != (batch, num_classes, *space):
            expected = (batch, num_classes, *space)
            raise ValueError(f"labels must have shape (B, K, *S) = {expected} as weights, got {tuple(labels.shape)}")
        return labels.to(images.dtype)
    if labels.shape != (batch, *space):
        raise ValueError(f"labels must have shape (B, *S) = {(batch, *space)}, got {tuple(labels.shape)}")
    classes = torch.arange(num_classes, device=labels.device).view(-1, *[1] * len(space))
    return (labels[:, None] == classes).to(images.dtype)


def _starts(extent: int, patch: int, step: int) -> list[int]:
    last = extent - patch
    return sorted({*range(0, last + 1, step), last})


def _mean_over(weights: Tensor, starts: list[list[int]], patch: list[int]) -> Tensor:
    """Means of the weights over the crops, (B, K, *g), one dimension after the other."""
    for d, (firsts, size) in enumerate(zip(starts, patch)):
        sums = [weights.narrow(2 + d, first, size).sum(dim=2 + d) for first in firsts]
        weights = torch.stack(sums, dim=2 + d) / size
    return weights


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """`wanted` of `count` places in reading order, evenly apart and away from the ends by half of that."""
    return ((torch.arange(wanted, device=device) * 2 + 1) * count) // (2 * wanted)


def _to_size(crops: Tensor, size: list[int], mode: str) -> Tensor:
    if list(crops.shape[2:]) == size:
        return crops
    if mode == "resize":
        return F.interpolate(crops, size, mode="bilinear" if crops.dim() == 4 else "trilinear", align_corners=False)
    around = []
    for to, now in zip(reversed(size), reversed(crops.shape[2:])):
        around += [(to - now) // 2, to - now - (to - now) // 2]
    return F.pad(crops, around)


class CoverageThreshold(nn.Module):
    r"""Per-class coverage above which a patch qualifies, moved until a target share of the patches does.

    A Robbins-Monro step for each class that the batch holds (method, section 8):
    :math:`\theta_k \leftarrow clip(\theta_k + \gamma_n (share_n - target), 0, 1)`, where :math:`share_n` is the
    fraction of the batch's patches of class k with coverage above :math:`\theta_k`, and
    :math:`\gamma_n = gain / n^{2/3}` (our choice) for the n-th batch with that class. 1 itself is left out of the
    range, so that a patch covered whole always qualifies. The state is in buffers; nothing waits for a GPU.

    Args:
        num_classes: K.
        initial: threshold at the start, in [0, 1].
        target: share of the patches that shall qualify, in (0, 1).
        gain: of the steps.
        ignore_index: patches with this label, or one outside [0, K), are not counted.

    Attributes:
        value: (K,), the thresholds; what :func:`patch_embeddings` takes as `coverage`.
    """

    value: Tensor
    updates: Tensor

    def __init__(
        self,
        num_classes: int,
        initial: float = 0.5,
        target: float = 0.8,
        *,
        gain: float = 0.5,
        ignore_index: int = -1,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 <= initial <= 1:
            raise ValueError(f"initial must lie in [0, 1], got {initial}")
        if not 0 < target < 1:
            raise ValueError(f"target must lie in (0, 1), got {target}")
        if not gain > 0:
            raise ValueError(f"gain must be positive, got {gain}")
        self.num_classes = num_classes
        self.target = target
        self.gain = gain
        self.ignore_index = ignore_index
        self.register_buffer("value", torch.full((num_classes,), float(initial)))
        self.register_buffer("updates", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, coverage: Tensor, labels: Tensor) -> None:
        """One step from the patches of a batch that hold their class, qualified or not.

        Args:
            coverage: (N,) in [0, 1]; patches with 0 do not hold their class and are not counted.
            labels: (N,) int64, the class that each coverage is of.
        """
        if coverage.shape != labels.shape or coverage.dim() != 1:
            shapes = f"{tuple(coverage.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"coverage and labels must have the same shape (N,), got {shapes}")
        k = self.num_classes
        counted = (labels != self.ignore_index) & (labels >= 0) & (labels < k) & (coverage > 0)
        classes = torch.where(counted, labels, k)
        above = counted & (coverage > torch.cat([self.value, self.value.new_zeros(1)])[classes])
        # Counted as integers: the sum has no order.
        present, qualified = (
            torch.zeros(k + 1, dtype=torch.int64, device=labels.device).scatter_add_(0, classes, mask.long())[:k]
            for mask in (counted, above)
        )
        self.updates.add_((present > 0).long())
        share = qualified / present.clamp(min=1)
        step = self.gain / self.updates.clamp(min=1).to(self.value.dtype) ** (2 / 3)
        moved = (self.value + step * (share - self.target)).clamp(0, 1 - torch.finfo(self.value.dtype).eps)
        self.value.copy_(torch.where(present > 0, moved, self.value))

    def coverage_and_classes(self, batch: PatchRows | PatchBatch) -> tuple[Tensor, Tensor]:
        """Of all rows that :func:`patch_embeddings` makes, qualified or not, as :meth:`update` takes them."""
        k = self.num_classes
        classes = torch.arange(k, device=batch.coverage.device).repeat(len(batch.coverage) // k)
        return batch.coverage, classes

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, target={self.target}, gain={self.gain}"
