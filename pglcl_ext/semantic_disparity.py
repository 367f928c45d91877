"""The disparity of patches by their predictions (method, section 3), and bounds on it (section 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pglcl_ext._arguments import BoundsArguments
from pglcl_ext._autograd import OpFunction, in_graph, is_traced, op_in_graph, register, register_op
from pglcl_ext._checks import check_disparity, check_disparity_bounds
from pglcl_ext._library import ops
from pglcl_ext._precision import accumulate_dtype

__all__ = ["semantic_disparity"]


def semantic_disparity(a: Tensor, b: Tensor | None = None) -> Tensor:
    r"""The disparity :math:`\Delta_{ij} = \frac{1}{C} \sum_c |a_{ic} - b_{jc}|` of every pair of patches.

    The paper compares patches by their average entropy; the formula is our choice (method, section 3).
    :func:`pglcl_ext.patch_contrast_loss` applies it to descriptors without storing this matrix.

    Args:
        a: descriptors, (N,) or (N, C) floating point; a vector counts as C = 1. Usually patch entropies, in nats.
        b: descriptors, (M,) or (M, C), of the dtype and device of `a`; `a` itself by default.

    Returns:
        (N, M) in the dtype of `a`, differentiable with respect to both. Where two descriptors are equal, the derivative
        is taken as 0.

    Raises:
        ValueError: wrong rank, no channel, or different numbers of channels or devices.
        TypeError: not floating point, or different dtypes.
        NotImplementedError: forward-mode or second derivatives.
    """
    b = a if b is None else b
    if is_traced():
        check_disparity(a, b)
        disparity: Tensor = _in_graph(a, b)
    else:
        disparity = _Disparity.checked(lambda pair: check_disparity(*pair), (a, b), (a, b))
    return disparity


def disparity_bounds(x: BoundsArguments) -> Tensor:
    """The bound that keeps `wanted` positives or negatives of each anchor, ties included (method, section 4).

    One descriptor channel takes a sort. Several channels take all disparities, one row at a time.

    Returns:
        (N,) in float32 (float64 for float64 descriptors). An anchor with at most `wanted` such keys gets infinity as
        the bound of positives, or 0 as that of negatives.
    """
    check_disparity_bounds(x)
    x = x._replace(descriptors=x.descriptors.detach(), key_descriptors=x.key_descriptors.detach())
    op = _bounds_in_graph if is_traced() else ops.disparity_bounds.default
    bounds: Tensor = op(*x)
    return bounds


def _fake(a: Tensor, b: Tensor) -> Tensor:
    check_disparity(a, b)
    return a.new_empty((a.shape[0], b.shape[0]))


def _fake_backward(grad: Tensor, a: Tensor, b: Tensor, needs_a: bool, needs_b: bool) -> tuple[Tensor, Tensor]:
    check_disparity(a, b)
    return a.new_empty(a.shape if needs_a else (0,)), b.new_empty(b.shape if needs_b else (0,))


def _fake_bounds(*flat: Any) -> Tensor:
    x = BoundsArguments(*flat)
    check_disparity_bounds(x)
    return x.descriptors.new_empty((x.descriptors.shape[0],), dtype=accumulate_dtype(x.descriptors.dtype))


@register
class _Disparity(OpFunction):
    name = "semantic_disparity"
    op = ops.semantic_disparity.default
    backward_op = ops.semantic_disparity_backward.default
    gradients_flow_to = ("a", "b")
    fake = staticmethod(_fake)
    backward_fake = staticmethod(_fake_backward)

    @classmethod
    def keep(cls, ctx: Any, flat: tuple[Any, ...], outputs: Tensor) -> None:
        cls.save(ctx, (), flat)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_a, needs_b, *_ = ctx.needs_input_grad
        grad_a, grad_b = cls.run_backward(grad, *ctx.saved_tensors, needs_a, needs_b)
        return grad_a if needs_a else None, grad_b if needs_b else None, None, None


_in_graph = in_graph(_Disparity)


register_op(ops.disparity_bounds.default, _fake_bounds)
_bounds_in_graph = op_in_graph(ops.disparity_bounds.default, _fake_bounds)
