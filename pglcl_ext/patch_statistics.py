"""Entropy and class confidence of the patches of a prediction (method, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pglcl_ext._arguments import StatisticsArguments
from pglcl_ext._autograd import OpFunction, exportable, in_graph, is_traced, register
from pglcl_ext._checks import check_statistics, check_statistics_options, check_tensor, per_dimension
from pglcl_ext._library import ops
from pglcl_ext._precision import accumulate_dtype

__all__ = ["PatchStatistics", "patch_entropy", "patch_statistics", "pixel_entropy"]


@exportable
class PatchStatistics(NamedTuple):
    """Statistics of each patch, in the dtype of the input; ``*g`` is the patch grid.

    Attributes:
        entropy: (B, ``*g``), the average entropy, in nats; with ``normalize=True`` divided by log K.
        confidence: (B, K, ``*g``), the average probability of each class.
        class_entropy: (B, K, ``*g``), the average entropy, weighted with the probability of each class; in the unit of
            `entropy`.
    """

    entropy: Tensor
    confidence: Tensor
    class_entropy: Tensor


def pixel_entropy(p: Tensor, dim: int = 1) -> Tensor:
    """The entropy, in nats, of probabilities whose classes lie along `dim`. The result has no such dimension.

    Its gradient at a probability of 0 is infinite, unlike that of :func:`patch_entropy`.
    """
    entropy: Tensor = torch.special.entr(p).sum(dim=dim)
    return entropy


def patch_grid_arguments(
    input: Tensor, patch_size: int | Sequence[int], stride: int | Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """`patch_size` and `stride` with one entry per spatial dimension of `input` (B, K, *S)."""
    check_tensor("input", input)
    dims = max(input.dim() - 2, 0)
    patch = per_dimension("patch_size", patch_size, dims)
    return patch, patch if stride is None else per_dimension("stride", stride, dims)


def patch_statistics(
    input: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    probabilities: bool = False,
    normalize: bool = False,
) -> PatchStatistics:
    r"""Average entropy, class confidence and class entropy of every patch, in one pass over the prediction.

    The probabilities are :math:`p = \mathrm{softmax}_K(\ell)`, and the entropy of a pixel is
    :math:`h(x) = -\sum_k p_k(x) \log p_k(x)`. Each patch :math:`j` has (method, section 2; the average patch entropy is
    the paper's, the rest our choice)

    .. math::
        H_j = \mathrm{mean}_{x \in j}\, h(x), \quad
        c_{jk} = \mathrm{mean}_{x \in j}\, p_k(x), \quad
        H_{jk} = \frac{\sum_{x \in j} p_k(x) h(x)}{\sum_{x \in j} p_k(x)}.

    The grid is that of average pooling without padding, ``g = (S - patch_size) // stride + 1`` per dimension.

    Args:
        input: logits, (B, K, H, W) or (B, K, D, H, W) with K >= 2; float64, float32, bfloat16 or float16. A logit of
            minus infinity is a probability of 0.
        patch_size: in pixels, an int or one per spatial dimension; at most the image.
        stride: in pixels, an int or one per spatial dimension; the patch size by default.
        probabilities: `input` holds probabilities instead of logits. Where one is 0, the gradient of its entropy,
            which is infinite there, is taken as 0.
        normalize: divide the entropies, in nats, by log K, so that they lie in [0, 1].

    Returns:
        :class:`PatchStatistics` in the dtype of `input`, each differentiable with respect to it. A class without any
        probability in a patch has class entropy 0 there.

    Raises:
        ValueError: wrong rank, fewer than two classes, a patch larger than the image, or a `patch_size` or `stride`
            that is not positive.
        TypeError: `input` is not floating point, or an argument has the wrong type.
        NotImplementedError: forward-mode or second derivatives.
    """
    found = _statistics(input, patch_size, stride, probabilities, normalize)
    return found if found[0].dtype == input.dtype else PatchStatistics(*(t.to(input.dtype) for t in found))


def patch_entropy(
    input: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    probabilities: bool = False,
    normalize: bool = False,
) -> Tensor:
    """The average entropy of each patch, (B, *g): :attr:`PatchStatistics.entropy` alone.

    Arguments and errors are those of :func:`patch_statistics`.
    """
    return _statistics(input, patch_size, stride, probabilities, normalize).entropy.to(input.dtype)


def _statistics(
    input: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    probabilities: bool,
    normalize: bool,
) -> PatchStatistics:
    """The statistics as the op keeps them: in float32 for inputs of 16 bits."""
    patch, step = patch_grid_arguments(input, patch_size, stride)
    x = StatisticsArguments(input, patch, step, probabilities, normalize)
    if is_traced():
        check_statistics(x)
        return PatchStatistics(*_in_graph(*x))
    check_statistics_options(x)
    return PatchStatistics(*_Statistics.checked(check_statistics, x, x))


def _fake(
    input: Tensor, patch_size: list[int], stride: list[int], probabilities: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_statistics(StatisticsArguments(input, patch_size, stride, probabilities, normalize))
    batch, classes, *image = input.shape
    grid = [(s - p) // t + 1 for s, p, t in zip(image, patch_size, stride)]
    dtype = accumulate_dtype(input.dtype)
    return (
        input.new_empty((batch, *grid), dtype=dtype),
        input.new_empty((batch, classes, *grid), dtype=dtype),
        input.new_empty((batch, classes, *grid), dtype=dtype),
    )


def _fake_backward(
    grad_entropy: Tensor,
    grad_confidence: Tensor,
    grad_class_entropy: Tensor,
    input: Tensor,
    confidence: Tensor,
    class_entropy: Tensor,
    *options: Any,
) -> Tensor:
    check_statistics(StatisticsArguments(input, *options))
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@register
class _Statistics(OpFunction):
    name = "patch_statistics"
    op = ops.patch_statistics.default
    backward_op = ops.patch_statistics_backward.default
    gradients_flow_to = ("input",)
    fake = staticmethod(_fake)
    backward_fake = staticmethod(_fake_backward)

    @classmethod
    def keep(cls, ctx: Any, flat: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        image, *ctx.options = flat
        _, confidence, class_entropy = outputs
        ctx.save_for_backward(image, confidence, class_entropy)

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cls.run_backward(*grads, *ctx.saved_tensors, *ctx.options), None, None


_in_graph = in_graph(_Statistics)
