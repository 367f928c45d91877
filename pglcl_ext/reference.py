"""The ops in plain PyTorch. Each function reads like its formula in docs/method.md, and is differentiable twice.

These functions store every matrix, and do not check their arguments as the ops do. Tests compare the kernels with
them, and you can do the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl_ext._precision import accumulate_dtype
from pglcl_ext.patch_statistics import PatchStatistics, patch_grid_arguments

__all__ = [
    "gaussian_contrast_loss",
    "patch_contrast_loss",
    "patch_entropy",
    "patch_statistics",
    "semantic_disparity",
]


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p over the classes, (B, 1, *S), with value and gradient 0 where p = 0."""
    return -(p * torch.where(p > 0, p, 1).log()).sum(dim=1, keepdim=True)


def patch_statistics(
    input: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    probabilities: bool = False,
    normalize: bool = False,
) -> PatchStatistics:
    """method, section 2; see :func:`pglcl_ext.patch_statistics`."""
    patch, step = patch_grid_arguments(input, patch_size, stride)
    pool = F.avg_pool2d if input.dim() == 4 else F.avg_pool3d

    def mean(x: Tensor) -> Tensor:
        return pool(x, patch, step)

    if probabilities:
        p, h = input, _entropy(input)
    else:
        p = input.softmax(dim=1)
        log_p = input.log_softmax(dim=1).clamp(min=-1e4)  # finite, so that 0 log 0 = 0; p is 0 far above it
        h = -(p * log_p).sum(dim=1, keepdim=True)
    confidence = mean(p)
    absent = confidence <= 0
    class_entropy = torch.where(absent, 0, mean(p * h) / torch.where(absent, 1, confidence))
    scale = 1 / math.log(input.shape[1]) if normalize else 1.0
    return PatchStatistics(mean(h).squeeze(1) * scale, confidence, class_entropy * scale)


def patch_entropy(
    input: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    probabilities: bool = False,
    normalize: bool = False,
) -> Tensor:
    """method, section 2; see :func:`pglcl_ext.patch_entropy`."""
    return patch_statistics(input, patch_size, stride, probabilities=probabilities, normalize=normalize).entropy


def semantic_disparity(a: Tensor, b: Tensor | None = None) -> Tensor:
    """method, section 3; see :func:`pglcl_ext.semantic_disparity`."""
    b = a if b is None else b
    a, b = (t[:, None] if t.dim() == 1 else t for t in (a, b))
    return (a[:, None, :] - b[None, :, :]).abs().mean(dim=2)


def _nth(values: Tensor, mask: Tensor, n: int, *, largest: bool, default: float) -> Tensor:
    """The n-th smallest or largest of the masked entries of each row, (N, 1); `default` for rows with at most n."""
    worst = -math.inf if largest else math.inf
    ordered = values.masked_fill(~mask, worst).sort(dim=1, descending=largest).values
    if n > ordered.shape[1]:
        return values.new_full((values.shape[0], 1), default)
    nth = ordered[:, n - 1 : n]
    return torch.where(mask.sum(dim=1, keepdim=True) > n, nth, default)


def guided_masks(
    labels: Tensor,
    descriptors: Tensor | None,
    key_labels: Tensor | None = None,
    key_descriptors: Tensor | None = None,
    *,
    max_positive_disparity: float | Tensor | None = None,
    min_negative_disparity: float | Tensor | None = None,
    num_positives: int | None = None,
    num_negatives: int | None = None,
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positives, negatives (method, section 4), and all pairs that may be either: three (N, M) bool masks."""
    other = labels if key_labels is None else key_labels
    allowed = (labels != ignore_index)[:, None] & (other != ignore_index)[None, :]
    if key_labels is None:
        allowed = allowed & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == other[None, :]
    positives, negatives = same & allowed, ~same & allowed
    if descriptors is None:
        return positives, negatives, allowed
    disparity = semantic_disparity(descriptors.detach(), None if key_descriptors is None else key_descriptors.detach())
    upper: float | Tensor = math.inf if max_positive_disparity is None else max_positive_disparity
    lower: float | Tensor = 0.0 if min_negative_disparity is None else min_negative_disparity
    if num_positives is not None:
        upper = _nth(disparity, positives, num_positives, largest=False, default=math.inf).squeeze(1)
    if num_negatives is not None:
        lower = _nth(disparity, negatives, num_negatives, largest=True, default=0.0).squeeze(1)
    upper = upper[:, None] if isinstance(upper, Tensor) else upper
    lower = lower[:, None] if isinstance(lower, Tensor) else lower
    return positives & (disparity <= upper), negatives & (disparity >= lower), allowed


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
) -> Tensor:
    """method, sections 4 and 5; see :func:`pglcl_ext.patch_contrast_loss`."""
    positives, negatives, allowed = guided_masks(
        labels,
        descriptors,
        key_labels,
        key_descriptors,
        max_positive_disparity=max_positive_disparity,
        min_negative_disparity=min_negative_disparity,
        num_positives=num_positives,
        num_negatives=num_negatives,
        ignore_index=ignore_index,
    )
    undefined = torch.zeros_like(allowed)
    if positive_mask is not None and negative_mask is not None:
        positives, negatives = positive_mask & allowed, negative_mask & allowed
    elif descriptors is not None:
        # A disparity that is not finite cannot be compared with a bound, so the loss is NaN.
        other = None if key_descriptors is None else key_descriptors.detach()
        undefined = ~semantic_disparity(descriptors.detach(), other).isfinite() & allowed

    logits = anchors @ (anchors if keys is None else keys).t() / temperature
    logits = logits.to(accumulate_dtype(logits.dtype))
    log_weight = math.log(negative_weight) if negative_weight > 0 else -math.inf
    count = positives.sum(dim=1)
    valid = count > 0
    # The anchor's largest logit is subtracted. That does not change the loss, but keeps the digits of large logits.
    counted = positives | negatives if negative_weight > 0 else positives
    top = F.pad(torch.where(counted, logits.detach(), -math.inf), (0, 1), value=-math.inf).amax(dim=1, keepdim=True)
    logits = logits - torch.where(top.isfinite(), top, 0)
    # Pairs that do not count are left out before the exponential. An anchor without any positive keeps its logits as
    # positive ones, so that no gradient is NaN; its loss is set to 0 below.
    positive_logits = torch.where(positives | ~valid[:, None], logits, -math.inf)
    negative_logits = torch.where(negatives, logits + log_weight, -math.inf)
    log_denominator = torch.cat([positive_logits, negative_logits], dim=1).logsumexp(dim=1)
    mean_positive = torch.where(positives, logits, 0).sum(dim=1) / count.clamp(min=1)
    loss = torch.where(valid, log_denominator - mean_positive, 0)
    spoilt = undefined.any(dim=1)
    loss = loss + torch.where(spoilt, logits.sum(dim=1), 0) * torch.where(spoilt, math.nan, 0)
    return _reduced(loss, valid, reduction)


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
    """method, section 6; see :func:`pglcl_ext.gaussian_contrast_loss`."""
    k = len(counts)
    taking_part = counts > 0
    known = (labels != ignore_index) & (labels >= 0) & (labels < k)
    own = torch.where(known, labels, 0)
    valid = known & taking_part[own]
    t = anchors.to(accumulate_dtype(anchors.dtype))
    t = torch.where(valid[:, None], t, 0)  # other anchors may be NaN
    # Statistics of a class without keys may be NaN, which must not spread.
    mu = torch.where(taking_part[:, None], means.detach().to(t.dtype), 0)
    sigma = torch.where(taking_part[:, None, None], covariances.detach().to(t.dtype), 0)
    if means.dim() == 3:  # the statistics of j depend on the anchor's class
        along, quadratic = torch.einsum("nd,nkd->nk", t, mu[own]), torch.einsum("nd,nkde,ne->nk", t, sigma[own], t)
    else:
        along, quadratic = torch.einsum("nd,kd->nk", t, mu), torch.einsum("nd,kde,ne->nk", t, sigma, t)
    logits = along / temperature
    exponents = logits + covariance_scale / temperature / temperature / 2 * quadratic
    log_weight = math.log(negative_weight) if negative_weight > 0 else -math.inf
    is_own = F.one_hot(own, k).bool()
    exponents = torch.where(is_own, exponents, exponents + log_weight - taking_part.sum().to(t.dtype).log())
    exponents = torch.where(is_own | (taking_part & valid[:, None]), exponents, -math.inf)
    own_logit = logits.gather(1, own[:, None]).squeeze(1)
    loss = torch.where(valid, exponents.logsumexp(dim=1) - own_logit, 0)
    return _reduced(loss, valid, reduction)


def _reduced(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Losses (N,) of anchors, 0 where they are not `valid`, as `reduction` says."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum().clamp(min=1)
