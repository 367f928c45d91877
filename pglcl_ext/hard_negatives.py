"""Statistics of negatives that lie between the classes (method, section 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pglcl_ext._checks import check_device, check_embeddings, check_generator, check_integer, check_labels
from pglcl_ext._precision import accumulate_dtype, without_autocast
from pglcl_ext.embedding_queue import EmbeddingQueue

__all__ = ["hard_negative_statistics"]

# A covariance counts as singular when a squared pivot of its Cholesky factor falls below this share of its largest
# variance. Rounding of float32 keys leaves about 1e-14.
SINGULAR = 1e-12


def hard_negative_statistics(
    anchors: Tensor,
    labels: Tensor,
    queue: EmbeddingQueue,
    *,
    num_samples: int = 1024,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Means and covariances of hard negatives for every pair of classes.

    The source is section 7 of the method, after the authors' code, whose rejection loop has no bound. For anchors of
    class i and keys of class j, `n*` is the queued key of j nearest to class i in Mahalanobis distance. `p*` is the
    anchor of i nearest to class j, and :math:`v = n^* - p^*`. Samples are drawn from :math:`N(\mu_j, \Sigma_j)`,
    restricted to the slab :math:`v \cdot p^* \le v \cdot x \le v \cdot n^*`. The draw is exact: the truncated normal
    distribution along v by inversion, then the conditional distribution of the other directions. A sample qualifies if
    it is no farther from class i than `n*`. Half of the samples are kept: of those that qualify, the closest to class
    j. If too few qualify, convex mixtures of two of them fill up the rest. All are L2-normalised.

    Args:
        anchors: (N, D) floating point, L2-normalised like the queued keys; no gradient flows through them. A row that
            is not finite does not count.
        labels: (N,) int64. A row whose label is not in [0, K) does not count.
        queue: the queue that holds the keys, on the device of the anchors.
        num_samples: number of samples drawn for each pair of classes, at least 2.
        generator: a generator on the device of the anchors; by default PyTorch's own. It must be None under
            torch.compile. Every call draws the same number of random numbers.

    Returns:
        Means (K, K, D) and covariances (K, K, D, D) for :func:`gaussian_contrast_loss`, in the dtype of the queue
        (float32 or wider). The first index is the anchors' class i, the second the keys' class j. The diagonal holds
        the plain statistics of class j. A pair of classes has them too if it has no anchor, a singular covariance, an
        empty slab, or no sample that qualifies.

    Raises:
        ValueError: shapes or devices that do not fit, fewer than 2 samples, a generator under torch.compile.
        TypeError: wrong dtypes, or arguments of the wrong type.
    """
    if not isinstance(queue, EmbeddingQueue):
        raise TypeError(f"queue must be an EmbeddingQueue, got {type(queue).__name__}")
    check_generator(generator)
    check_embeddings("anchors", anchors, "N")
    if anchors.shape[1] != queue.embedding_dim:
        raise ValueError(f"anchors must have shape (N, {queue.embedding_dim}), got {tuple(anchors.shape)}")
    check_labels("labels", labels, "N", "anchors", anchors)
    check_device("anchors", anchors, "the queue", queue.storage)
    num_samples = check_integer("num_samples", num_samples, least=2)
    if generator is not None and torch.compiler.is_compiling():
        raise ValueError("generator must be None in a compiled function, which draws from the default one")
    with torch.no_grad(), without_autocast(anchors):
        return _pairwise_statistics(anchors.detach().double(), labels, queue, num_samples, generator)


def _pairwise_statistics(
    anchors: Tensor, labels: Tensor, queue: EmbeddingQueue, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    k, dtype = queue.num_classes, accumulate_dtype(queue.storage.dtype)
    means, covariances = queue.statistics(torch.float64)
    keys, filled = queue.class_keys()
    keys = keys.double()
    if len(anchors) == 0:  # a row that belongs to no class keeps the reductions below defined
        anchors, labels = anchors.new_zeros(1, anchors.shape[1]), labels.new_full((1,), -1)
    factors, regular = _cholesky(covariances)
    usable_anchor = anchors.isfinite().all(dim=1)  # others would hide the nearest anchor
    rows_mean, rows_covariance = [], []
    for i in range(k):
        own = (labels == i) & usable_anchor
        for j in range(k):
            if i == j:
                rows_mean.append(means[j])
                rows_covariance.append(covariances[j])
                continue
            key_distance = _mahalanobis(keys[j], means[i], factors[i]).masked_fill(~filled[j], math.inf)
            anchor_distance = _mahalanobis(anchors, means[j], factors[j]).masked_fill(~own, math.inf)
            nearest_key, nearest_anchor = _nearest(keys[j], key_distance), _nearest(anchors, anchor_distance)
            direction = nearest_key - nearest_anchor
            samples, found = sample_slab(
                means[j],
                factors[j],
                direction,
                direction @ nearest_anchor,
                direction @ nearest_key,
                num_samples,
                generator,
            )
            samples, qualified = _keep_nearest(samples, means, factors, i, j, key_distance.min(), generator)
            samples = samples / samples.norm(dim=1, keepdim=True).clamp(min=1e-12)
            mean = samples.mean(dim=0)
            deviation = samples - mean
            usable = found & qualified & regular[i] & regular[j] & own.any()
            rows_mean.append(torch.where(usable, mean, means[j]))
            rows_covariance.append(torch.where(usable, deviation.mT @ deviation / len(samples), covariances[j]))
    d = anchors.shape[1]
    return (
        torch.stack(rows_mean).view(k, k, d).to(dtype),
        torch.stack(rows_covariance).view(k, k, d, d).to(dtype),
    )


def _cholesky(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors (the identity for a singular covariance), and which covariances are regular."""
    factors, info = torch.linalg.cholesky_ex(covariances)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square().min(dim=-1).values
    variance = covariances.diagonal(dim1=-2, dim2=-1).max(dim=-1).values
    regular = (info == 0) & (pivots > SINGULAR * variance)
    eye = torch.eye(covariances.shape[-1], dtype=factors.dtype, device=factors.device)
    return torch.where(regular[:, None, None], factors, eye), regular


def _mahalanobis(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """(N,) distances of the rows of x from N(mean, factor factor')."""
    distances: Tensor = torch.linalg.solve_triangular(factor, (x - mean).mT, upper=False).norm(dim=0)
    return distances


def _nearest(rows: Tensor, distances: Tensor) -> Tensor:
    """The row at the smallest distance. Indexing with a scalar tensor would wait for the device."""
    return rows.index_select(0, distances.argmin(dim=0, keepdim=True)).squeeze(0)


def _keep_nearest(
    samples: Tensor,
    means: Tensor,
    factors: Tensor,
    i: int,
    j: int,
    limit: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Keeps half of the samples: those no farther from class i than `limit`, the closest to class j first.

    Mixtures of these replace the missing ones. Also returns whether there is any such sample.
    """
    samples = samples[_mahalanobis(samples, means[j], factors[j]).argsort(stable=True)]
    farther = _mahalanobis(samples, means[i], factors[i]) > limit
    half = farther.to(torch.int8).argsort(stable=True)[: len(samples) // 2]
    samples, count = samples[half], (~farther[half]).sum()
    draws = torch.rand(3, len(samples), dtype=samples.dtype, device=samples.device, generator=generator)
    first, second = (draws[:2] * count).long().clamp(max=len(samples) - 1)
    mixtures = draws[2, :, None] * samples[first] + (1 - draws[2, :, None]) * samples[second]
    keep = torch.arange(len(samples), device=samples.device) < count
    return torch.where(keep[:, None], samples, mixtures), count > 0


def sample_slab(
    mean: Tensor,
    factor: Tensor,
    direction: Tensor,
    lower: Tensor,
    upper: Tensor,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Exact samples of :math:`N(\mu, L L^\top)` restricted to :math:`lower \le v \cdot x \le upper`.

    Args:
        mean: (D,) float64.
        factor: L, (D, D), lower triangular.
        direction: v, (D,).
        lower, upper: scalars.
        num_samples: S.
        generator: draws S (D + 1) numbers.

    Returns:
        Samples (S, D), and a bool scalar: whether the slab holds anything. If it is empty, samples are unrestricted.
    """
    options = {"dtype": mean.dtype, "device": mean.device, "generator": generator}
    x = mean + torch.randn(num_samples, len(mean), **options) @ factor.mT  # type: ignore[call-overload]
    u = torch.rand(num_samples, **options)  # type: ignore[call-overload]
    spread = factor.mT @ direction
    variance = spread @ spread
    found = (variance > 0) & (lower < upper) & torch.isfinite(variance)
    deviation = torch.where(found, variance, 1).sqrt()
    along = direction @ mean
    a, b = (torch.where(found, (bound - along) / deviation, sign) for bound, sign in ((lower, -1.0), (upper, 1.0)))
    y = along + deviation * truncated_normal(a, b, u)
    y = torch.minimum(torch.maximum(y, lower), upper)
    # To get v.x = y, a sample of x is moved along the covariance of x and v.x; its conditional distribution is kept.
    moved = x + ((y - x @ direction) / deviation.square())[:, None] * (factor @ spread)
    return torch.where(found, moved, x), found


def truncated_normal(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Samples of the standard normal on [a, b], by inversion of uniform `u`; logarithms make it exact in far tails."""
    # Only in the lower tail do probabilities keep their relative precision, so an interval above 0 is mirrored.
    mirror = a + b > 0
    low, high = torch.where(mirror, -b, a), torch.where(mirror, -a, b)
    u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
    log_p = torch.logaddexp(
        torch.special.log_ndtr(low) + torch.log1p(-u),
        torch.special.log_ndtr(high) + torch.log(u),
    )
    tail = log_p < -600
    x = torch.where(tail, -(-2 * log_p).clamp(min=1).sqrt(), torch.special.ndtri(log_p.exp()))
    for _ in range(4):  # Newton's steps where exp(log_p) underflows; each doubles the digits, from three on
        value = torch.special.log_ndtr(x)
        slope = torch.exp(-0.5 * x.square() - 0.5 * math.log(2 * math.pi) - value)
        x = torch.where(tail, x - (value - log_p) / slope, x)
    x = torch.minimum(torch.maximum(x, low), high)
    return torch.where(mirror, -x, x)
