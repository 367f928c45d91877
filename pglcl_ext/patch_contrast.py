"""The fused contrastive loss over patches (METHOD sections 4 and 5)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pglcl_ext._arguments import ContrastArguments
from pglcl_ext._checks import (
    REDUCTIONS,
    check_bound,
    check_choice,
    check_choice_of_pairs,
    check_contrast,
    check_integer,
    check_number,
    check_positive,
    check_reduction,
    check_tensor,
)
from pglcl_ext._library import no_double_backward, ops
from pglcl_ext.distributed import GATHERS, all_keys_contrast, first_row, gather_rows, ring_contrast
from pglcl_ext.semantic_disparity import accumulate_dtype, disparity_bounds

__all__ = ["PatchContrastLoss", "patch_contrast_loss"]


def patch_contrast_loss(
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_descriptors: Tensor | None = None,
    temperature: float = 0.1,
    max_positive_disparity: float | Tensor | None = None,
    min_negative_disparity: float | Tensor | None = None,
    num_positives: int | None = None,
    num_negatives: int | None = None,
    positive_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    negative_weight: float = 1.0,
    ignore_index: int = -1,
    reduction: str = "mean",
    group: Any = None,
    gather: str = "all",
) -> Tensor:
    r"""Contrastive loss between patches, with positives and negatives chosen by label and semantic disparity.

    With logits :math:`s_{ij} = z_i \cdot k_j / \tau`, disparities :math:`\Delta_{ij}` of the descriptors
    (:func:`semantic_disparity`) and :math:`\psi` = `negative_weight` (METHOD sections 4 and 5: guided sampling is the
    paper's, the rule and the InfoNCE form our choice, psi from the authors' code)

    .. math::
        P(i) = \{j : y_j = y_i, \Delta_{ij} \le \delta^+_i\}, \quad
        N(i) = \{j : y_j \ne y_i, \Delta_{ij} \ge \delta^-_i\}

        \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}
                 + \log\Big(\sum_{p \in P(i)} e^{s_{ip}} + \psi \sum_{n \in N(i)} e^{s_{in}}\Big).

    Nothing of size N x M is stored, forward or backward. At the defaults it is the supervised contrastive loss.

    Args:
        anchors: embeddings, (N, D), used as given (:class:`PatchContrastLoss` normalises them); float64, float32,
            bfloat16 or float16. Sums are kept in float32 (float64 for float64).
        labels: (N,) int64, ground truth or pseudo-labels.
        descriptors: (N,) or (N, C) floating point, what the disparity compares: the patch entropies, usually. Compared
            in float32 (float64 for float64 anchors). Without them the labels alone decide.
        keys: embeddings to contrast with, (M, D), of the dtype of `anchors` (under autocast both are promoted). By
            default the anchors are the keys and a patch is never its own pair; with `keys` every pair counts.
        key_labels: (M,) int64, needed with `keys`.
        key_descriptors: (M,) or (M, C), needed with `keys` and `descriptors`.
        temperature: tau > 0.
        max_positive_disparity: delta+, a number or a tensor (N,); infinity by default.
        min_negative_disparity: delta-, a number or a tensor (N,); 0 by default.
        num_positives: instead of delta+: keep this many of the most similar positives of each anchor, and ties.
        num_negatives: instead of delta-: keep this many of the most different negatives of each anchor, and ties.
        positive_mask: (N, M) bool, replaces the rule for positives; only together with `negative_mask`, and instead of
            bounds and counts. Ignored patches and a patch's pair with itself stay left out.
        negative_mask: (N, M) bool.
        negative_weight: psi >= 0.
        ignore_index: patches with this label are left out altogether, as anchors and as keys.
        reduction: ``"mean"`` over the anchors that have a positive, ``"sum"``, or ``"none"``.
        group: a ``torch.distributed`` process group: the keys of all its ranks are contrasted with this rank's anchors.
            Every rank calls, and differentiates, also one without any patch; the numbers of patches may differ. With
            ``reduction="mean"`` a rank returns the sum over its own anchors, divided by the counted anchors of all
            ranks, times the number of ranks: the mean of the ranks' losses is the loss of one process on all batches,
            and DistributedDataParallel's averaging gives its gradient. Excludes masks.
        gather: how the keys come together. ``"all"`` gathers them; ``"ring"`` passes them along, and memory does not
            depend on the number of ranks (but for counts, which need the labels and descriptors of all keys).

    Returns:
        A scalar, or (N,) for ``reduction="none"``, in float32 (float64 for float64). An anchor that is ignored or has
        no positive gives 0 and is not counted; without any counted anchor the loss is 0 and so are the gradients.
        Gradients flow to `anchors` and `keys`.

    Raises:
        ValueError: shapes or devices that do not fit, options that exclude each other, values out of range.
        TypeError: wrong dtypes.
    """
    loss, _ = patch_contrast(
        anchors,
        labels,
        descriptors,
        keys=keys,
        key_labels=key_labels,
        key_descriptors=key_descriptors,
        temperature=temperature,
        max_positive_disparity=max_positive_disparity,
        min_negative_disparity=min_negative_disparity,
        num_positives=num_positives,
        num_negatives=num_negatives,
        positive_mask=positive_mask,
        negative_mask=negative_mask,
        negative_weight=negative_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        group=group,
        gather=gather,
    )
    return loss


def patch_contrast(
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None,
    *,
    keys: Tensor | None,
    key_labels: Tensor | None,
    key_descriptors: Tensor | None,
    temperature: float,
    max_positive_disparity: float | Tensor | None,
    min_negative_disparity: float | Tensor | None,
    num_positives: int | None,
    num_negatives: int | None,
    positive_mask: Tensor | None,
    negative_mask: Tensor | None,
    negative_weight: float,
    ignore_index: int,
    reduction: str,
    group: Any = None,
    gather: str = "all",
) -> tuple[Tensor, Tensor]:
    """:func:`patch_contrast_loss` and the number of anchors it counted, an int64 scalar tensor."""
    check_reduction(reduction)
    check_choice("gather", gather, GATHERS)
    if group is not None and (positive_mask is not None or negative_mask is not None):
        raise ValueError("positive_mask and negative_mask cannot be given with a process group")
    check_choice_of_pairs(
        descriptors,
        max_positive_disparity,
        min_negative_disparity,
        num_positives,
        num_negatives,
        positive_mask,
        negative_mask,
    )
    temperature = check_number("temperature", temperature)
    negative_weight = check_number("negative_weight", negative_weight)
    ignore_index = check_integer("ignore_index", ignore_index)
    check_tensor("anchors", anchors)
    if isinstance(keys, Tensor) and keys.dtype != anchors.dtype and torch.is_autocast_enabled(anchors.device.type):
        wide = torch.promote_types(anchors.dtype, keys.dtype)
        anchors, keys = anchors.to(wide), keys.to(wide)

    positive_bound, positive_bounds = _bound("max_positive_disparity", max_positive_disparity, math.inf)
    negative_bound, negative_bounds = _bound("min_negative_disparity", min_negative_disparity, 0.0)
    sides = (anchors, labels, descriptors, keys, key_labels, key_descriptors)
    choice = (positive_bounds, negative_bounds, positive_mask, negative_mask)
    numbers = (temperature, positive_bound, negative_bound, negative_weight, ignore_index, -1, REDUCTIONS[reduction])
    check_contrast(ContrastArguments.of((*sides, *choice, *numbers)))
    if num_positives is not None or num_negatives is not None:
        side: tuple[Tensor | None, Tensor | None, Tensor | None] = (keys, key_labels, key_descriptors)
        self_offset = -1
        if group is not None:  # which n are the most similar depends on the keys of all ranks
            own_labels, own_descriptors = (labels, descriptors) if keys is None else (key_labels, key_descriptors)
            if own_labels is None or own_descriptors is None:
                raise ValueError("keys need key_labels and, with descriptors, key_descriptors")
            all_labels, all_descriptors = gather_rows([own_labels, own_descriptors], group)
            side = (anchors, all_labels, all_descriptors)
            self_offset = first_row(len(own_labels), anchors.device, group) if keys is None else -1
        positive_bounds, negative_bounds = _counted_bounds(
            anchors,
            labels,
            descriptors,
            *side,
            (num_positives, positive_bounds),
            (num_negatives, negative_bounds),
            ignore_index,
            self_offset,
        )
    if group is not None:
        contrast = all_keys_contrast if gather == "all" else ring_contrast
        return contrast(
            anchors,
            labels,
            descriptors,
            keys,
            key_labels,
            key_descriptors,
            positive_bounds,
            negative_bounds,
            (temperature, positive_bound, negative_bound, negative_weight, ignore_index),
            REDUCTIONS[reduction],
            group,
        )
    loss, *_, num_valid = ops.patch_contrast(
        anchors,
        labels,
        descriptors,
        keys,
        key_labels,
        key_descriptors,
        positive_bounds,
        negative_bounds,
        positive_mask,
        negative_mask,
        temperature,
        positive_bound,
        negative_bound,
        negative_weight,
        ignore_index,
        -1,
        REDUCTIONS[reduction],
    )
    return loss, num_valid


def _bound(name: str, value: float | Tensor | None, default: float) -> tuple[float, Tensor | None]:
    """A bound as (number, tensor or None); the tensor, where there is one, is what applies."""
    if value is None:
        return default, None
    if isinstance(value, Tensor):
        return default, value.detach()
    return check_bound(name, value), None


def _counted_bounds(
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    key_descriptors: Tensor | None,
    positives: tuple[int | None, Tensor | None],
    negatives: tuple[int | None, Tensor | None],
    ignore_index: int,
    self_offset: int = -1,
) -> tuple[Tensor | None, Tensor | None]:
    """Counts turned into bounds per anchor; (count, bound) pairs without a count keep their bound."""
    assert descriptors is not None
    dtype = accumulate_dtype(anchors.dtype)
    own = descriptors.to(dtype)
    if keys is None:
        other, other_labels, self_offset = own, labels, 0
    elif key_descriptors is None or key_labels is None:
        raise ValueError("keys need key_labels and, with descriptors, key_descriptors")
    else:
        other, other_labels = key_descriptors.to(dtype), key_labels
    bounds: list[Tensor | None] = []
    for (count, bound), is_positive in ((positives, True), (negatives, False)):
        if count is not None:
            bound = disparity_bounds(
                own,
                labels,
                other,
                other_labels,
                count,
                positives=is_positive,
                ignore_index=ignore_index,
                self_offset=self_offset,
            )
        bounds.append(bound)
    return bounds[0], bounds[1]


class PatchContrastLoss(nn.Module):
    """:func:`patch_contrast_loss` as a module.

    Args:
        temperature: tau > 0.
        normalize: divide embeddings and keys by their L2 norm first, so that logits are cosines over tau.
        max_positive_disparity, min_negative_disparity: as in :func:`patch_contrast_loss`, but numbers.
        num_positives, num_negatives, negative_weight, ignore_index: as in :func:`patch_contrast_loss`.
        reduction, group, gather: as in :func:`patch_contrast_loss`.

    Attributes:
        num_valid: int64 scalar tensor, the number of anchors that the last call counted; None before the first. A loss
            of 0 over 0 anchors says something else than a loss of 0 over many. Reading it on a GPU synchronises.
    """

    num_valid: Tensor | None

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        max_positive_disparity: float | None = None,
        min_negative_disparity: float | None = None,
        num_positives: int | None = None,
        num_negatives: int | None = None,
        negative_weight: float = 1.0,
        ignore_index: int = -1,
        reduction: str = "mean",
        group: Any = None,
        gather: str = "all",
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_positive("negative_weight", negative_weight, or_zero=True)
        check_reduction(reduction)
        check_choice("gather", gather, GATHERS)
        placeholder = torch.empty(0)  # whether descriptors come is known at the call only
        check_choice_of_pairs(placeholder, max_positive_disparity, min_negative_disparity, num_positives, num_negatives)
        self.temperature = temperature
        self.normalize = normalize
        self.max_positive_disparity = max_positive_disparity
        self.min_negative_disparity = min_negative_disparity
        self.num_positives = num_positives
        self.num_negatives = num_negatives
        self.negative_weight = negative_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.group = group
        self.gather = gather
        self.num_valid = None

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        descriptors: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        key_descriptors: Tensor | None = None,
        positive_mask: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` (N, D); arguments, result and errors are those of :func:`patch_contrast_loss`."""
        if self.normalize:
            embeddings = F.normalize(embeddings, dim=-1) if embeddings.dim() == 2 else embeddings
            keys = F.normalize(keys, dim=-1) if keys is not None and keys.dim() == 2 else keys
        loss, self.num_valid = patch_contrast(
            embeddings,
            labels,
            descriptors,
            keys=keys,
            key_labels=key_labels,
            key_descriptors=key_descriptors,
            temperature=self.temperature,
            max_positive_disparity=self.max_positive_disparity,
            min_negative_disparity=self.min_negative_disparity,
            num_positives=self.num_positives,
            num_negatives=self.num_negatives,
            positive_mask=positive_mask,
            negative_mask=negative_mask,
            negative_weight=self.negative_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            group=self.group,
            gather=self.gather,
        )
        return loss

    def extra_repr(self) -> str:
        names = "temperature normalize max_positive_disparity min_negative_disparity num_positives num_negatives "
        names += "negative_weight ignore_index reduction gather"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split() if getattr(self, name) is not None)


@torch.library.register_fake("pglcl_ext::patch_contrast")
def _fake(anchors: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    check_contrast(ContrastArguments.of((anchors, *rest)))
    reduction = rest[-1]
    n, dtype = anchors.shape[0], accumulate_dtype(anchors.dtype)
    loss = anchors.new_empty((n,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    return (
        loss,
        anchors.new_empty((n,), dtype=dtype),
        anchors.new_empty((n,), dtype=dtype),
        anchors.new_empty((n,), dtype=dtype),
        anchors.new_empty((n,), dtype=torch.int32),
        anchors.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("pglcl_ext::patch_contrast_backward")
def _fake_backward(
    grad: Tensor,
    max_logit: Tensor,
    log_sum: Tensor,
    num_positives: Tensor,
    num_valid: Tensor,
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None,
    keys: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    inputs = (anchors, labels, descriptors, keys, *rest[:-2])
    check_contrast(ContrastArguments.of(inputs))
    needs_anchors, needs_keys = rest[-2:]
    return (
        anchors.new_empty(anchors.shape if needs_anchors else (0,)),
        anchors.new_empty(keys.shape if keys is not None and needs_keys else (0,)),
    )


_TENSOR_INPUTS = 10  # the arguments of the op before the first number


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, max_logit, log_sum, positive_logit, num_positives, num_valid = output
    ctx.mark_non_differentiable(max_logit, log_sum, positive_logit, num_positives, num_valid)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(max_logit, log_sum, num_positives, num_valid, *inputs[:_TENSOR_INPUTS])
    ctx.options = inputs[_TENSOR_INPUTS:]


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * (_TENSOR_INPUTS + len(ctx.options))
    needs_anchors, needs_keys = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    if grad is not None and (needs_anchors or needs_keys):
        # Saved are max_logit, log_sum, num_positives, num_valid and the tensors among the inputs.
        grad_anchors, grad_keys = ops.patch_contrast_backward(
            grad, *ctx.saved_tensors, *ctx.options, needs_anchors, needs_keys
        )
        grads[0] = grad_anchors if needs_anchors else None
        grads[3] = grad_keys if needs_keys else None
    return tuple(grads)


torch.library.register_autograd("pglcl_ext::patch_contrast", _backward, setup_context=_setup_context)
torch.library.register_autograd("pglcl_ext::patch_contrast_backward", no_double_backward("patch_contrast_loss"))
