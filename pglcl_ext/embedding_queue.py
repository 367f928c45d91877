"""A queue of embeddings for each class, since a batch is too small to hold enough keys."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pglcl_ext._arguments import Side
from pglcl_ext._autograd import readable
from pglcl_ext._checks import (
    check_device,
    check_embeddings,
    check_floating,
    check_integer,
    check_labels,
    dtype_name,
)
from pglcl_ext._precision import accumulate_dtype, without_autocast
from pglcl_ext.distributed import SharedGroup, gather_rows

__all__ = ["EmbeddingQueue"]


class EmbeddingQueue(nn.Module):
    """A ring buffer of embeddings for each class, in registered buffers.

    The newest `length` keys of each class are kept, in float32 by default (the dtype of the module). No call waits for
    a GPU, and no key carries a gradient. The state (keys, write positions, counts) is saved, restored and moved with
    the module. The authors queue 4096 keys of each class (method, sections 6 and 9).

    A key that is not finite, or whose descriptor is not finite, would make every later loss NaN. It is left out and
    counted in `num_refused`. On the CPU, where reading that number takes no time, there is also a warning.

    Args:
        num_classes: K.
        embedding_dim: D.
        length: number of keys kept of each class.
        descriptor_dim: C, the size of the descriptor kept beside each key, for example its entropy; 0 keeps none.
        ignore_index: keys with this label, or one outside [0, K), are not queued.
        process_group: a ``torch.distributed`` process group, or None. The keys of all its ranks are queued on every
            rank, in the order of the ranks, so that the queues stay equal. Then :meth:`enqueue` waits for the GPU,
            since ranks exchange the number of their keys. A copy of the queue shares the group; a queue with a group
            cannot be pickled. Without a group, each rank has its own queue. If DistributedDataParallel wraps the
            queue, it then replaces each of them by that of rank 0 in every forward pass (``broadcast_buffers``).

    Attributes:
        counts: (K,) int64, the number of keys held of each class.
        num_refused: int64 scalar, the number of keys that were left out since they were not finite. It is not saved,
            and is 0 after a state is loaded. Reading it on a GPU waits.

    Raises:
        TypeError: sizes that are not ints, or a `process_group` of another type.
        ValueError: sizes that are too small.
    """

    counts: Tensor
    num_refused: Tensor
    positions: Tensor
    storage: Tensor
    descriptor_storage: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        length: int = 4096,
        *,
        descriptor_dim: int = 0,
        ignore_index: int = -1,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.num_classes = check_integer("num_classes", num_classes, least=1)
        self.embedding_dim = check_integer("embedding_dim", embedding_dim, least=1)
        self.length = check_integer("length", length, least=1)
        self.descriptor_dim = check_integer("descriptor_dim", descriptor_dim, least=0)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self._group = SharedGroup(process_group)
        num_classes, length, descriptor_dim = self.num_classes, self.length, self.descriptor_dim
        # One row more than there are slots. Rows that are not kept are written there, and then erased.
        self.register_buffer("storage", torch.zeros(num_classes * length + 1, self.embedding_dim))
        self.register_buffer("descriptor_storage", torch.zeros(num_classes * length + 1, descriptor_dim))
        self.register_buffer("positions", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("num_refused", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Empties the queue. PyTorch calls it by this name for modules that were made on the meta device."""
        for buffer in self.buffers():
            buffer.zero_()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # A count that is not saved would keep what it held: no number at all if the queue was made on the meta device.
        self.num_refused = torch.zeros((), dtype=torch.int64, device=self.counts.device)

    @property
    def process_group(self) -> Any:
        return self._group.value

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor, descriptors: Tensor | None = None) -> None:
        """Adds keys, in order. If a class gets more than `length` keys, the last ones stay.

        Args:
            embeddings: (M, D) floating point, on the device of the queue; they are kept in its dtype.
            labels: (M,) int64.
            descriptors: (M, C) floating point, or (M,) for C = 1. They must be given if `descriptor_dim` is not 0, and
                only then.

        Raises:
            ValueError: shapes or devices that do not fit, or ranks whose dtypes or sizes differ.
            TypeError: wrong dtypes.
        """
        descriptors = self._checked(embeddings, labels, descriptors)
        if self.process_group is not None:
            embeddings, labels, descriptors = gather_rows([embeddings, labels, descriptors], self.process_group)
        embeddings, descriptors = embeddings.to(self.storage.dtype), descriptors.to(self.storage.dtype)
        k, length = self.num_classes, self.length
        known = (labels != self.ignore_index) & (labels >= 0) & (labels < k)
        known = known & self._finite(embeddings, descriptors, known)
        classes = torch.where(known, labels, k)
        order = classes.argsort(stable=True)
        classes = classes[order]
        arrivals = torch.zeros(k + 1, dtype=torch.int64, device=labels.device).scatter_add_(
            0, classes, torch.ones_like(classes)
        )
        # Each key's index within its class.
        place = torch.arange(len(classes), device=labels.device) - (arrivals.cumsum(0) - arrivals)[classes]
        kept = (classes < k) & (place >= arrivals[classes] - length)
        slot = classes * length + (self.positions[classes.clamp(max=k - 1)] + place) % length
        slot = torch.where(kept, slot, k * length)
        for storage, rows in ((self.storage, embeddings), (self.descriptor_storage, descriptors)):
            storage[slot] = rows[order]
            storage[-1] = 0
        self.positions.add_(arrivals[:k]).remainder_(length)
        self.counts.add_(arrivals[:k]).clamp_(max=length)

    def _finite(self, embeddings: Tensor, descriptors: Tensor, known: Tensor) -> Tensor:
        """(M,) bool: which keys are finite. Other keys of a known class are counted, with a warning on the CPU."""
        finite = embeddings.isfinite().all(dim=1) & descriptors.isfinite().all(dim=1)
        refused = (known & ~finite).sum()
        self.num_refused.add_(refused)
        if readable(refused) and refused > 0:
            count = f"{int(refused)} of {len(known)} keys"
            warnings.warn(f"EmbeddingQueue leaves out {count}: not finite in {dtype_name(embeddings)}", stacklevel=4)
        return finite

    def _checked(self, embeddings: Tensor, labels: Tensor, descriptors: Tensor | None) -> Tensor:
        check_embeddings("embeddings", embeddings, "M")
        if embeddings.shape[1] != self.embedding_dim:
            raise ValueError(f"embeddings must have shape (M, {self.embedding_dim}), got {tuple(embeddings.shape)}")
        check_device("embeddings", embeddings, "the queue", self.storage)
        check_labels("labels", labels, "M", "embeddings", embeddings)
        if descriptors is None:
            if self.descriptor_dim:
                raise ValueError(
                    f"descriptors must be given, with shape (M, C) = ({len(embeddings)}, {self.descriptor_dim}), since "
                    f"the queue has descriptor_dim={self.descriptor_dim}; got None"
                )
            return embeddings.new_zeros(len(embeddings), 0)
        check_floating("descriptors", descriptors)
        if not self.descriptor_dim:
            raise ValueError("descriptors must be None, since the queue has descriptor_dim=0; got a tensor")
        if descriptors.dim() == 1:
            descriptors = descriptors[:, None]
        if descriptors.shape != (len(embeddings), self.descriptor_dim):
            expected = (len(embeddings), self.descriptor_dim)
            raise ValueError(f"descriptors must have shape (M, C) = {expected}, got {tuple(descriptors.shape)}")
        check_device("descriptors", descriptors, "embeddings", embeddings)
        return descriptors

    def _filled(self) -> Tensor:
        """(K, length) bool: which slots are filled. A ring fills from its first slot."""
        return torch.arange(self.length, device=self.counts.device) < self.counts[:, None]

    def keys(self) -> Side:
        """Copies of all slots, filled or empty.

        Returns:
            :class:`Side` of embeddings (K * length, D), labels (K * length,) and descriptors (K * length, C), which are
            None for a queue without them. Numbers have the dtype of the queue. An empty slot has zeros and the label
            `ignore_index`, so shapes do not depend on how many slots are filled. :meth:`enqueue` does not change the
            copies, so a loss may be differentiated after the next keys are queued.
        """
        classes = torch.arange(self.num_classes, device=self.counts.device)[:, None]
        labels = torch.where(self._filled(), classes, self.ignore_index).flatten()
        descriptors = self.descriptor_storage[:-1].clone() if self.descriptor_dim else None
        return Side(self.storage[:-1].clone(), labels, descriptors)

    def class_keys(self) -> tuple[Tensor, Tensor]:
        """(K, length, D) keys, and (K, length) bool: which slots are filled."""
        return self.storage[:-1].view(self.num_classes, self.length, self.embedding_dim), self._filled()

    def statistics(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Mean and biased covariance of the keys of each class (method, section 6).

        Args:
            dtype: dtype of the computation and the result, float32 or float64, also under autocast; by default that of
                the queue, or float32 where that is narrower.

        Returns:
            Means (K, D) and covariances (K, D, D), 0 for a class without keys. The mean is subtracted before deviations
            are squared. So a single key has a covariance of exactly 0, and keys far from 0 lose no digits.

        Raises:
            TypeError: another dtype.
        """
        dtype = accumulate_dtype(self.storage.dtype) if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        keys, filled = self.class_keys()
        keys, weight = keys.to(dtype), filled[:, :, None].to(dtype)
        count = self.counts.clamp(min=1).to(dtype)[:, None]
        # The first key is subtracted first, so that equal keys have deviations of exactly 0.
        origin = keys[:, :1]
        mean = ((keys - origin) * weight).sum(dim=1) / count
        deviation = (keys - origin - mean[:, None]) * weight
        with without_autocast(keys):
            covariance = deviation.mT @ deviation / count[:, :, None]
        return (origin.squeeze(1) + mean) * (self.counts > 0)[:, None], covariance

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, length={self.length}"
