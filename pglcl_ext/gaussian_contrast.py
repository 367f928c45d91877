"""The contrastive loss against normally distributed keys (method, section 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pglcl_ext._arguments import GaussianArguments, GaussianOutputs
from pglcl_ext._autograd import OpFunction, in_functorch, in_graph, is_traced, records_gradients, register
from pglcl_ext._checks import (
    REDUCTIONS,
    check_device,
    check_embeddings,
    check_flag,
    check_gaussian,
    check_gaussian_numbers,
    check_generator,
    check_integer,
    check_known_labels,
    check_number,
    check_positive,
    check_reduction,
    check_temperature,
    check_tensor,
)
from pglcl_ext._library import ops
from pglcl_ext._precision import accumulate_dtype, unit_rows
from pglcl_ext.embedding_queue import EmbeddingQueue
from pglcl_ext.hard_negatives import hard_negative_statistics

__all__ = ["GaussianContrastLoss", "gaussian_contrast_loss"]


def gaussian_contrast_loss(
    anchors: Tensor,
    labels: Tensor,
    means: Tensor,
    covariances: Tensor,
    counts: Tensor,
    *,
    temperature: float = 0.2,
    covariance_scale: float = 4.0,
    negative_weight: float = 4096.0,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrastive loss against infinitely many keys, normally distributed in each class.

    Classes that have keys take part; `C` is their number. With :math:`\psi` = `negative_weight` and :math:`\lambda` =
    `covariance_scale`, the loss of an anchor `t` of such a class `i` is (method, section 6: derived again from the
    authors' code, which bounds the expected logarithm by Jensen's inequality; here it is computed in log-space)

    .. math::
        x_j = t \cdot \mu_j / \tau + \frac{\lambda}{2 \tau^2} t^\top \Sigma_j t, \qquad
        \ell = -t \cdot \mu_i / \tau + \log\Big(e^{x_i} + \frac{\psi}{C} \sum_{j \ne i} e^{x_j}\Big).

    If only one class has keys, or with ``negative_weight=0``, only the positive term remains. Neither N x N nor
    N x K x D numbers are stored.

    Args:
        anchors: embeddings, (N, D), used as given; float64, float32, bfloat16 or float16. Sums are kept in float32
            (float64 for float64).
        labels: (N,) int64, in [0, K) or `ignore_index`. On the CPU another value is an error. On a GPU, where a check
            would have to wait, such an anchor is left out.
        means: (K, D) floating point; or (K, K, D), where the first index is the anchor's class, as
            :func:`hard_negative_statistics` gives them.
        covariances: (K, D, D) floating point; or (K, K, D, D) with such means. Only the symmetric part matters.
        counts: (K,) int64, the number of keys of each class. Statistics of a class without keys are not read.
        temperature: tau, at least 1e-100.
        covariance_scale: lambda >= 0.
        negative_weight: psi >= 0.
        ignore_index: anchors with this label are left out.
        reduction: ``"mean"`` over the anchors whose class takes part, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or (N,) for ``reduction="none"``, in float32 (float64 for float64). Anchors of a class that takes no
        part give 0 and are not counted. Gradients flow only to `anchors`, since queued keys carry none.

    Raises:
        ValueError: shapes, devices or labels that do not fit, values out of range.
        TypeError: wrong dtypes, or arguments of the wrong type.
        NotImplementedError: forward-mode or second derivatives.
    """
    check_reduction(reduction)
    for name, t in (("anchors", anchors), ("means", means), ("covariances", covariances)):
        check_tensor(name, t)
    x = GaussianArguments(
        anchors,
        labels,
        means.detach(),
        covariances.detach(),
        counts,
        check_number("temperature", temperature),
        check_number("covariance_scale", covariance_scale),
        check_number("negative_weight", negative_weight),
        check_integer("ignore_index", ignore_index),
        REDUCTIONS[reduction],
        _needs_gradients(anchors),
    )
    if is_traced():
        check_gaussian(x)
        return GaussianOutputs(*_in_graph(*x)).loss
    check_gaussian_numbers(x)
    try:
        return GaussianOutputs(*_Gaussian.checked(check_gaussian, x, x)).loss
    except NotImplementedError:  # a derivative that there is not
        raise
    except RuntimeError:
        if labels.device.type == "cpu" and not in_functorch():  # the kernel is the first that reads them
            check_known_labels(labels, counts.shape[0], x.ignore_index)
        raise


class GaussianContrastLoss(nn.Module):
    """:func:`gaussian_contrast_loss` with a queue of keys, which gives the statistics.

    A call contrasts anchors with the keys that are in the queue. :meth:`enqueue` adds keys, usually the teacher's::

        loss = GaussianContrastLoss(num_classes=4, embedding_dim=128)
        value = loss(student_embeddings, labels)
        loss.enqueue(teacher_embeddings, labels)

    Args:
        num_classes: K.
        embedding_dim: D.
        queue_length: number of keys kept of each class.
        hard_negatives: take the statistics of negatives from :func:`hard_negative_statistics`.
        normalize: divide anchors and keys by their L2 norm first. A row of zeros stays as it is.
        temperature, covariance_scale, negative_weight, ignore_index, reduction: as in :func:`gaussian_contrast_loss`.
        process_group: the keys of all its ranks are queued on each rank, see :class:`EmbeddingQueue`.

    Attributes:
        queue: the :class:`EmbeddingQueue`.

    Raises:
        ValueError: values out of range.
        TypeError: arguments of the wrong type.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        queue_length: int = 4096,
        hard_negatives: bool = False,
        normalize: bool = True,
        temperature: float = 0.2,
        covariance_scale: float = 4.0,
        negative_weight: float = 4096.0,
        ignore_index: int = -1,
        reduction: str = "mean",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_positive("covariance_scale", covariance_scale, or_zero=True)
        check_positive("negative_weight", negative_weight, or_zero=True)
        check_reduction(reduction)
        check_flag("hard_negatives", hard_negatives)
        check_flag("normalize", normalize)
        self.queue = EmbeddingQueue(
            num_classes, embedding_dim, queue_length, ignore_index=ignore_index, process_group=process_group
        )
        self.hard_negatives = hard_negatives
        self.normalize = normalize
        self.temperature = temperature
        self.covariance_scale = covariance_scale
        self.negative_weight = negative_weight
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, embeddings: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of anchors against the queued keys.

        Args:
            embeddings: (N, D) floating point, on the device of the queue.
            labels: (N,) int64, as for :func:`gaussian_contrast_loss`.
            generator: draws the hard negatives, see :func:`hard_negative_statistics`; it is not used without them.

        Result and errors are those of these two functions.
        """
        check_generator(generator)
        embeddings = self._normalized(embeddings, "N")
        if self.hard_negatives:
            means, covariances = hard_negative_statistics(embeddings, labels, self.queue, generator=generator)
        else:
            means, covariances = self.queue.statistics()
        return gaussian_contrast_loss(
            embeddings,
            labels,
            means,
            covariances,
            self.queue.counts,
            temperature=self.temperature,
            covariance_scale=self.covariance_scale,
            negative_weight=self.negative_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        """Normalises keys if `normalize` is set, and adds them to the queue.

        Args:
            embeddings: (M, D) floating point, on the device of the queue.
            labels: (M,) int64.

        Errors are those of :meth:`EmbeddingQueue.enqueue`.
        """
        self.queue.enqueue(self._normalized(embeddings, "M"), labels)

    def _normalized(self, embeddings: Tensor, rows: str) -> Tensor:
        check_embeddings("embeddings", embeddings, rows)
        if embeddings.shape[1] != self.queue.embedding_dim:
            expected = f"({rows}, {self.queue.embedding_dim})"
            raise ValueError(f"embeddings must have shape {expected}, got {tuple(embeddings.shape)}")
        check_device("embeddings", embeddings, "the queue", self.queue.storage)
        return unit_rows(embeddings) if self.normalize else embeddings

    def extra_repr(self) -> str:
        names = "temperature covariance_scale negative_weight hard_negatives normalize ignore_index reduction"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())


def _needs_gradients(anchors: Tensor) -> bool:
    learnt = anchors.requires_grad or in_functorch()
    if torch.compiler.is_compiling():  # which cannot trace `records_gradients`
        return torch.is_grad_enabled() and learnt
    if torch._C._get_tracing_state() is not None:  # the trace must be the same with and without gradients
        return False  # so the backward pass computes them
    return records_gradients() and learnt


def _fake(*flat: Any) -> GaussianOutputs:
    x = GaussianArguments(*flat)
    check_gaussian(x)
    z = x.anchors
    n, dtype = z.shape[0], accumulate_dtype(z.dtype)
    return GaussianOutputs(
        z.new_empty((n,) if x.reduction == REDUCTIONS["none"] else (), dtype=dtype),
        z.new_empty((n if x.needs_gradients else 0, z.shape[1]), dtype=dtype),
        z.new_empty((), dtype=torch.int64),
    )


def _fake_backward(grad: Tensor, anchors: Tensor, gradients: Tensor, num_valid: Tensor, reduction: int) -> Tensor:
    return torch.empty_like(gradients, dtype=anchors.dtype)


@torch.library.impl("pglcl_ext::gaussian_contrast_backward", "CompositeExplicitAutograd")
def _product(grad: Tensor, anchors: Tensor, gradients: Tensor, num_valid: Tensor, reduction: int) -> Tensor:
    """The gradient of the anchors, on any device. `gradients` (N, D) are d loss_i / d anchor_i, by the forward pass."""
    scale = grad.to(gradients.dtype)
    if reduction == REDUCTIONS["none"]:
        return (gradients * scale.unsqueeze(1)).to(anchors.dtype)
    if reduction == REDUCTIONS["mean"]:
        scale = scale / num_valid
    return (gradients * torch.where(num_valid > 0, scale, 0)).to(anchors.dtype)  # also if the gradient is infinite


def _takes_part(x: GaussianArguments) -> Tensor:
    """(N,) bool: whether an anchor's class has keys."""
    k = x.counts.shape[0]
    known = (x.labels != x.ignore_index) & (x.labels >= 0) & (x.labels < k)
    return known & (x.counts.index_select(0, x.labels.clamp(0, k - 1)) > 0)


@register
class _Gaussian(OpFunction):
    name = "gaussian_contrast_loss"
    op = ops.gaussian_contrast.default
    backward_op = ops.gaussian_contrast_backward.default
    gradients_flow_to = ("anchors",)
    only_first_differentiable = True
    fake = staticmethod(_fake)
    backward_fake = staticmethod(_fake_backward)

    @classmethod
    def keep(cls, ctx: Any, flat: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        x = GaussianArguments(*flat)
        _, gradients, num_valid = outputs
        ctx.reduction, ctx.has_gradients = x.reduction, x.needs_gradients
        if x.needs_gradients:
            # Not the counts themselves: keys may be queued before the backward pass.
            counted = _takes_part(x) if x.reduction == REDUCTIONS["none"] else None
            ctx.save_for_backward(num_valid, x.anchors, gradients, counted)
        else:
            cls.save(ctx, (num_valid,), x)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        num_valid, anchors, *rest = ctx.saved_tensors
        if ctx.has_gradients:
            gradients, counted = rest
        else:  # the graph was made for inputs that need no gradient
            with torch.no_grad():
                x = GaussianArguments(anchors, *rest, *ctx.options)
                gradients = GaussianOutputs(*cls.call(x._replace(needs_gradients=True))).gradients
            counted = _takes_part(x) if x.reduction == REDUCTIONS["none"] else None
        if counted is not None:  # what follows the loss of an anchor that is left out has no effect
            grad = torch.where(counted, grad, 0)
        return cls.run_backward(grad, anchors, gradients, num_valid, ctx.reduction), None, None


_in_graph = in_graph(_Gaussian)
