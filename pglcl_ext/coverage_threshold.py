"""The coverage that a patch must exceed to qualify for its class (method, section 8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pglcl_ext._checks import check_device, check_floating, check_integer, check_labels, check_number, check_positive
from pglcl_ext.patch_embeddings import PatchBatch, PatchRows

__all__ = ["CoverageThreshold"]


def _below_one(like: Tensor) -> float:
    """The largest threshold, which a coverage of 1 exceeds."""
    return 1 - torch.finfo(like.dtype).eps


class CoverageThreshold(nn.Module):
    r"""A threshold of coverage for each class. It moves until a target share of the patches lies above it.

    A patch qualifies for a class if its coverage is above the threshold of the class. Every update makes a
    Robbins-Monro step for each class that the batch holds (method, section 8):
    :math:`\theta_k \leftarrow clip(\theta_k + \gamma_n (share_n - target), 0, 1)`, where :math:`share_n` is the
    fraction of the batch's patches of class k with coverage above :math:`\theta_k`, and
    :math:`\gamma_n = gain / n^{2/3}` (our choice) for the n-th batch with that class. The threshold stays below 1. So a
    patch that its class fills always qualifies. The state is in buffers. No call waits for a GPU.

    Args:
        num_classes: K.
        initial: threshold at the start, in [0, 1].
        target: share of the patches that should qualify, in (0, 1).
        gain: factor of the step sizes, > 0.
        ignore_index: patches with this label, or one outside [0, K), are not counted.

    Attributes:
        value: (K,) float32, the thresholds, for the argument `coverage` of :func:`patch_embeddings`.
        updates: (K,) int64, the number of batches with each class so far.

    Raises:
        ValueError: values out of range.
        TypeError: arguments that are not numbers, or not ints for `num_classes` and `ignore_index`.
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
        self.num_classes = check_integer("num_classes", num_classes, least=1)
        self.initial = float(check_number("initial", initial))
        self.target = float(check_number("target", target))
        self.gain = float(check_positive("gain", gain))
        self.ignore_index = check_integer("ignore_index", ignore_index)
        if not 0 <= self.initial <= 1:
            raise ValueError(f"initial must lie in [0, 1], got {initial}")
        if not 0 < self.target < 1:
            raise ValueError(f"target must lie in (0, 1), got {target}")
        self.register_buffer("value", torch.empty(self.num_classes, dtype=torch.float32))
        self.register_buffer("updates", torch.empty(self.num_classes, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Goes back to the start. PyTorch calls it by this name for modules that were made on the meta device."""
        self.value.fill_(min(self.initial, _below_one(self.value)))
        self.updates.zero_()

    @torch.no_grad()
    def update(self, coverage: Tensor, labels: Tensor) -> None:
        """Moves the threshold by one step. It counts the patches that hold their class, whether they qualify or not.

        Args:
            coverage: (N,) floating point in [0, 1]; patches with 0 do not hold their class and are not counted.
            labels: (N,) int64, the class of each coverage.

        Raises:
            ValueError: shapes that do not fit, or another device than that of the threshold.
            TypeError: wrong dtypes.
        """
        check_floating("coverage", coverage)
        if coverage.dim() != 1:
            raise ValueError(f"coverage must have shape (N,), got {tuple(coverage.shape)}")
        check_labels("labels", labels, "N", "coverage", coverage)
        check_device("coverage", coverage, "the threshold", self.value)
        k = self.num_classes
        counted = (labels != self.ignore_index) & (labels >= 0) & (labels < k) & (coverage > 0)
        classes = torch.where(counted, labels, k)
        above = counted & (coverage > torch.cat([self.value, self.value.new_zeros(1)])[classes])
        # Counted as integers, whose sum does not depend on the order.
        present, qualified = (
            torch.zeros(k + 1, dtype=torch.int64, device=labels.device).scatter_add_(0, classes, mask.long())[:k]
            for mask in (counted, above)
        )
        self.updates.add_((present > 0).long())
        share = qualified / present.clamp(min=1)
        step = self.gain / self.updates.clamp(min=1).to(self.value.dtype) ** (2 / 3)
        moved = (self.value + step * (share - self.target)).clamp(0, _below_one(self.value))
        self.value.copy_(torch.where(present > 0, moved, self.value))

    def coverage_and_classes(self, batch: PatchRows | PatchBatch) -> tuple[Tensor, Tensor]:
        """The arguments of :meth:`update`, from all rows of :func:`patch_embeddings`, also those that do not qualify.

        Args:
            batch: N rows. A row with a label has that class, in any order of the rows. Rows without a label must be in
                the order of :func:`patch_embeddings`, in which the classes of a patch follow one another.

        Returns:
            Coverage (N,), in the dtype of the batch, and classes (N,) int64.

        Raises:
            TypeError: `batch` is neither a :class:`PatchRows` nor a :class:`PatchBatch`.
        """
        if not isinstance(batch, (PatchRows, PatchBatch)):
            raise TypeError(f"batch must be PatchRows or a PatchBatch, got {type(batch).__name__}")
        k, labels = self.num_classes, batch.labels
        in_order = torch.arange(len(labels), device=labels.device) % k
        known = (labels != self.ignore_index) & (labels >= 0) & (labels < k)
        return batch.coverage, torch.where(known, labels, in_order)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, target={self.target}, gain={self.gain}"
