"""The fused contrastive loss over patches (method, sections 4 and 5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pglcl_ext._arguments import (
    BoundsArguments,
    Choice,
    ContrastArguments,
    ContrastNumbers,
    ContrastOptions,
    ContrastOutputs,
    Side,
)
from pglcl_ext._autograd import OpFunction, in_functorch, in_graph, is_traced, register
from pglcl_ext._checks import (
    REDUCTIONS,
    check_bound,
    check_choice,
    check_choice_of_pairs,
    check_contrast,
    check_embeddings,
    check_flag,
    check_integer,
    check_keys_come_together,
    check_positive,
    check_reduction,
    check_temperature,
)
from pglcl_ext._library import allow_tf32, ops
from pglcl_ext._precision import accumulate_dtype, unit_rows
from pglcl_ext.distributed import (
    GATHERS,
    SharedGroup,
    all_keys_contrast,
    first_row,
    gather_rows,
    ring_contrast,
    row_counts,
)
from pglcl_ext.semantic_disparity import disparity_bounds

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

    The logits are :math:`s_{ij} = z_i \cdot k_j / \tau`. The disparities :math:`\Delta_{ij}` are those of the
    descriptors (:func:`semantic_disparity`), and :math:`\psi` = `negative_weight`. Positives, negatives and the loss of
    an anchor are (method, sections 4 and 5: guided sampling is the paper's, the rule and the InfoNCE form are our
    choice, psi is from the authors' code)

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
        descriptors: (N,) or (N, C) floating point, usually the patch entropies. Their disparity guides the choice of
            pairs. They are compared in float32 (float64 for float64 anchors). Without them, labels alone decide.
            With masks they have no effect.
        keys: embeddings to contrast with, (M, D), of the dtype of `anchors` (under autocast both are promoted). By
            default the anchors are the keys and a patch is never its own pair; with `keys` every pair counts.
        key_labels: (M,) int64, needed with `keys`.
        key_descriptors: (M,) or (M, C) floating point, needed with `keys` and `descriptors`.
        temperature: tau, at least 1e-100.
        max_positive_disparity: delta+ >= 0, a number or a floating-point tensor (N,); infinity by default. It needs
            `descriptors`.
        min_negative_disparity: delta- >= 0, a number or a floating-point tensor (N,); 0 by default. It needs
            `descriptors`.
        num_positives: at least 1, instead of delta+: keep this many of the most similar positives of each anchor, and
            ties.
        num_negatives: at least 1, instead of delta-: keep this many of the most different negatives of each anchor,
            and ties.
        positive_mask: (N, M) bool, the positives, instead of the rule. It needs `negative_mask`, and excludes bounds
            and counts. Ignored patches, and the pair of a patch with itself, are left out anyway.
        negative_mask: (N, M) bool, the negatives, instead of the rule.
        negative_weight: psi >= 0.
        ignore_index: patches with this label are left out altogether, as anchors and as keys.
        reduction: ``"mean"`` over the anchors that have a positive, ``"sum"``, or ``"none"``.
        group: a ``torch.distributed`` process group, or None. This rank's anchors are contrasted with the keys of all
            its ranks. Every rank must call and differentiate the loss, even without any patch. The numbers of patches
            may differ. With ``reduction="mean"``, a rank returns the sum over its own anchors, divided by the number of
            counted anchors of all ranks, times the number of ranks. The mean of the ranks' losses is then the loss of
            one process on all batches, and the averaging of DistributedDataParallel or FSDP gives its gradient. It
            excludes masks. torch.compile leaves the exchange out of its graphs, so it refuses ``fullgraph=True``.
        gather: how keys are exchanged in a group; without one it has no effect. ``"all"`` gathers all keys on every
            rank. ``"ring"`` passes them from rank to rank, so that memory does not depend on the number of ranks
            (except for `num_positives` and `num_negatives`, which need the labels and descriptors of all keys).

    Returns:
        A scalar, or (N,) for ``reduction="none"``, in float32 (float64 for float64). An anchor that is ignored or has
        no positive gives 0 and is not counted. Without any counted anchor, the loss and the gradients are 0. Gradients
        flow only to `anchors` and `keys`. A loss or gradient beyond the range of its dtype is infinite. Logits beyond
        float32 are computed in float64; with ``gather="ring"`` they make the loss NaN or infinite.

    Raises:
        ValueError: shapes or devices that do not fit, options that exclude each other, values out of range, or ranks
            whose dtypes or sizes differ in more than the number of rows.
        TypeError: wrong dtypes, or arguments of the wrong type.
        NotImplementedError: forward-mode or second derivatives, or a `group` within a transform of ``torch.func``
            or in ``torch.export``.
    """
    options = ContrastOptions(
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
    return patch_contrast(Side(anchors, labels, descriptors), (keys, key_labels, key_descriptors), options)[0]


def patch_contrast(
    anchors: Side, keys: tuple[Tensor | None, Tensor | None, Tensor | None], options: ContrastOptions
) -> tuple[Tensor, Tensor]:
    """:func:`patch_contrast_loss` and the number of anchors it counted, an int64 scalar tensor."""
    check_reduction(options.reduction)
    check_choice("gather", options.gather, GATHERS)
    check_keys_come_together(*keys)
    check_choice_of_pairs(anchors.descriptors, options)
    z, k = _promoted(anchors.embeddings, keys[0])
    positive_bound, positive_bounds = _bound("max_positive_disparity", options.max_positive_disparity, math.inf)
    negative_bound, negative_bounds = _bound("min_negative_disparity", options.min_negative_disparity, 0.0)
    x = ContrastArguments(
        Side(z, anchors.labels, anchors.descriptors),
        None if k is None else Side(k, *keys[1:]),  # type: ignore[arg-type]
        Choice(positive_bounds, negative_bounds, options.positive_mask, options.negative_mask),
        ContrastNumbers(
            check_temperature(options.temperature),
            positive_bound,
            negative_bound,
            check_positive("negative_weight", options.negative_weight, or_zero=True),
            check_integer("ignore_index", options.ignore_index),
            -1,
            REDUCTIONS[options.reduction],
            allow_tf32(),
        ),
    )
    group = options.group
    if group is not None:
        _check_group(x)
    x = _with_counted_bounds(x, options.num_positives, options.num_negatives, group)
    if group is not None:
        return all_keys_contrast(_contrast, x, group) if options.gather == "all" else ring_contrast(x, group)
    outputs = _contrast(x)
    return outputs.loss, outputs.num_valid


def _contrast(x: ContrastArguments) -> ContrastOutputs:
    if is_traced():
        check_contrast(x)
        return ContrastOutputs(*_in_graph(*(_finite(x) if torch.compiler.is_exporting() else x).flat()))
    return ContrastOutputs(*_Contrast.checked(check_contrast, x, x.flat()))


def _finite(x: ContrastArguments) -> ContrastArguments:
    """`x` with the largest number in place of an infinite bound, which AOTInductor writes but cannot read."""
    largest = torch.finfo(accumulate_dtype(x.anchors.embeddings.dtype)).max
    positive, negative = (min(b, largest) for b in (x.numbers.positive_bound, x.numbers.negative_bound))
    return x._replace(numbers=x.numbers._replace(positive_bound=positive, negative_bound=negative))


def _promoted(anchors: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Anchors and keys; under autocast, those of different dtypes are converted to the wider one."""
    if not isinstance(keys, Tensor) or not isinstance(anchors, Tensor) or keys.dtype == anchors.dtype:
        return anchors, keys
    if anchors.device.type == "meta" or not torch.is_autocast_enabled(anchors.device.type):
        return anchors, keys
    wide = torch.promote_types(anchors.dtype, keys.dtype)
    return anchors.to(wide), keys.to(wide)


def _check_group(x: ContrastArguments) -> None:
    check_contrast(x)  # a rank that stopped later would leave the others waiting
    if x.choice.positive_mask is not None:
        raise ValueError("positive_mask and negative_mask cannot be given with a process group")
    if in_functorch():
        raise NotImplementedError("pglcl_ext.patch_contrast_loss with a process group cannot be used in torch.func")
    if torch.compiler.is_exporting():
        raise NotImplementedError("pglcl_ext.patch_contrast_loss with a process group cannot be exported")


def _bound(name: str, value: float | Tensor | None, default: float) -> tuple[float, Tensor | None]:
    """A bound as a number and a tensor or None. The tensor, if there is one, takes the place of the number."""
    if value is None:
        return default, None
    if isinstance(value, Tensor):
        return default, value.detach()
    return check_bound(name, value), None


def _with_counted_bounds(
    x: ContrastArguments, num_positives: int | None, num_negatives: int | None, group: Any
) -> ContrastArguments:
    """Turns counts, if there are any, into a bound for each anchor.

    The labels and descriptors of the keys of all ranks give the bound.
    """
    if num_positives is None and num_negatives is None:
        return x
    check_contrast(x)
    keys = x.anchors if x.keys is None else x.keys
    assert x.anchors.descriptors is not None
    assert keys.descriptors is not None
    labels, descriptors, self_offset = keys.labels, keys.descriptors, 0
    if group is not None:
        sizes = row_counts([labels, descriptors], group)
        labels, descriptors = gather_rows([labels, descriptors], group, sizes)
        self_offset = first_row(sizes, group)
    dtype = accumulate_dtype(x.anchors.embeddings.dtype)
    bounds = {}
    for name, count, positives in (("positive", num_positives, True), ("negative", num_negatives, False)):
        if count is not None:
            bounds[f"{name}_bounds"] = disparity_bounds(
                BoundsArguments(
                    x.anchors.descriptors.to(dtype),
                    x.anchors.labels,
                    descriptors.to(dtype),
                    labels,
                    check_integer(f"num_{name}s", count),
                    positives,
                    x.numbers.ignore_index,
                    self_offset if x.keys is None else -1,
                )
            )
    return x._replace(choice=x.choice._replace(**bounds))


class PatchContrastLoss(nn.Module):
    """:func:`patch_contrast_loss` as a module.

    Args:
        temperature: tau, at least 1e-100.
        normalize: divide embeddings and keys by their L2 norm first, so that logits are cosines over tau. A row of
            zeros stays as it is.
        max_positive_disparity, min_negative_disparity: as in :func:`patch_contrast_loss`, but only numbers.
        num_positives, num_negatives, negative_weight, ignore_index: as in :func:`patch_contrast_loss`.
        reduction, group, gather: as in :func:`patch_contrast_loss`.

    Attributes:
        num_valid: int64 scalar tensor, the number of anchors that the last call counted, over all ranks of `group`.
            None before the first call, and after a call within a transform of ``torch.func``. It tells a loss of 0 over
            no anchors from a loss of 0 over many. Reading it on a GPU waits.

    Raises:
        ValueError: options that exclude each other, or values out of range.
        TypeError: arguments of the wrong type.
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
        check_temperature(temperature)
        check_positive("negative_weight", negative_weight, or_zero=True)
        check_reduction(reduction)
        check_choice("gather", gather, GATHERS)
        check_flag("normalize", normalize)
        for name, bound in (
            ("max_positive_disparity", max_positive_disparity),
            ("min_negative_disparity", min_negative_disparity),
        ):
            if bound is not None:
                check_bound(name, bound)  # not a tensor, as the function takes: a parameter would never learn
        self.temperature = temperature
        self.normalize = normalize
        self.max_positive_disparity = max_positive_disparity
        self.min_negative_disparity = min_negative_disparity
        self.num_positives = num_positives
        self.num_negatives = num_negatives
        self.negative_weight = negative_weight
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.reduction = reduction
        self._group = SharedGroup(group)
        self.gather = gather
        self.num_valid = None
        placeholder = torch.empty(0)  # only the call shows whether there are descriptors
        check_choice_of_pairs(placeholder, self._options(None, None))

    @property
    def group(self) -> Any:
        return self._group.value

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
        check_embeddings("embeddings", embeddings, "N")
        if keys is not None:
            check_embeddings("keys", keys, "M")
        if self.normalize:
            embeddings = unit_rows(embeddings)
            keys = None if keys is None else unit_rows(keys)
        side = Side(embeddings, labels, descriptors)
        options = self._options(positive_mask, negative_mask)
        loss, num_valid = patch_contrast(side, (keys, key_labels, key_descriptors), options)
        if not torch.compiler.is_exporting():  # an exported program changes no attribute
            # What a transform of torch.func counts has no meaning outside it.
            self.num_valid = None if in_functorch() else num_valid
        return loss

    def _options(self, positive_mask: Tensor | None, negative_mask: Tensor | None) -> ContrastOptions:
        return ContrastOptions(
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

    def extra_repr(self) -> str:
        names = "temperature normalize max_positive_disparity min_negative_disparity num_positives num_negatives "
        names += "negative_weight ignore_index reduction gather"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split() if getattr(self, name) is not None)


def _fake(*flat: Any) -> ContrastOutputs:
    x = ContrastArguments.nested(flat)
    check_contrast(x)
    z = x.anchors.embeddings
    n, dtype = z.shape[0], accumulate_dtype(z.dtype)
    return ContrastOutputs(
        z.new_empty((n,) if x.numbers.reduction == REDUCTIONS["none"] else (), dtype=dtype),
        z.new_empty((n,), dtype=torch.float64),
        z.new_empty((n,), dtype=dtype),
        z.new_empty((n,), dtype=dtype),
        z.new_empty((n,), dtype=torch.int32),
        z.new_empty((), dtype=torch.int64),
    )


def _fake_backward(
    grad: Tensor, max_logit: Tensor, log_sum: Tensor, num_positives: Tensor, num_valid: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *flat, needs_anchors, needs_keys = rest
    x = ContrastArguments.nested(flat)
    check_contrast(x)
    z = x.anchors.embeddings
    return (
        z.new_empty(z.shape if needs_anchors else (0,)),
        z.new_empty(x.keys.embeddings.shape if x.keys is not None and needs_keys else (0,)),
    )


@register
class _Contrast(OpFunction):
    name = "patch_contrast_loss"
    op = ops.patch_contrast.default
    backward_op = ops.patch_contrast_backward.default
    gradients_flow_to = ("anchors", "keys")
    only_first_differentiable = True
    fake = staticmethod(_fake)
    backward_fake = staticmethod(_fake_backward)

    @classmethod
    def keep(cls, ctx: Any, flat: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        cls.save(ctx, ContrastOutputs(*outputs).for_backward(), flat)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        needs_anchors, needs_keys, *_ = ctx.needs_input_grad
        grad_anchors, grad_keys = cls.run_backward(grad, *ctx.saved_tensors, *ctx.options, needs_anchors, needs_keys)
        return grad_anchors if needs_anchors else None, grad_keys if needs_keys else None, None, None


_in_graph = in_graph(_Contrast)
