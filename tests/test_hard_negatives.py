"""hard_negative_statistics, and the exact sampling in a slab that it uses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from pglcl_ext import EmbeddingQueue, hard_negative_statistics
from pglcl_ext.hard_negatives import sample_slab, truncated_normal


def random_law(d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(d, generator=g, dtype=torch.float64), torch.linalg.cholesky(
        root @ root.T / d + 0.1 * torch.eye(d)
    )


# In units of v.x's standard deviation, from its mean; the last ones lie where the distribution function is 0 or 1.
SLABS = [(-0.3, 0.4), (-math.inf, math.inf), (0.5, 3.0), (-7.0, -6.5), (9.0, 9.5), (40.0, 41.0), (-300.0, -200.0)]


@pytest.mark.parametrize("slab", SLABS)
def test_samples_lie_in_the_slab_and_follow_the_law(slab: tuple[float, float]) -> None:
    mean, factor = random_law(5)
    direction = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5], dtype=torch.float64)
    spread = (factor.T @ direction).norm()
    lower, upper = (direction @ mean + spread * bound for bound in slab)
    samples, found = sample_slab(mean, factor, direction, lower, upper, 4000, torch.Generator().manual_seed(1))
    assert found
    along = samples @ direction
    slack = 1e-9 * spread * (1 + abs(slab[0]) if math.isfinite(slab[0]) else 1)
    assert torch.all(along >= lower - slack)
    assert torch.all(along <= upper + slack)
    # Along v: the truncated normal (Kolmogorov-Smirnov, uniform after its distribution function in logarithms).
    standard = ((along - direction @ mean) / spread).numpy()
    a, b = slab
    if a + b > 0:
        standard, a, b = -standard, -b, -a
    low, high, here = stats.norm.logcdf(a), stats.norm.logcdf(b), stats.norm.logcdf(standard)
    uniform = (torch.tensor(here - high).exp() - math.exp(low - high)) / (1 - math.exp(low - high))
    assert stats.kstest(uniform.clamp(0, 1).numpy(), "uniform").pvalue > 1e-3
    # Across v: the rest after regression on v.x has the conditional normal distribution, for any slab.
    covariance = factor @ factor.T
    gain = covariance @ direction / spread**2
    rest = samples - mean - (along - direction @ mean)[:, None] * gain
    conditional = covariance - torch.outer(gain, gain) * spread**2
    values, vectors = torch.linalg.eigh(conditional)
    white = (rest @ vectors[:, 1:]) / values[1:].sqrt()
    for column in white.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(white.T.cov(), torch.eye(4, dtype=torch.float64), atol=0.08, rtol=0)
    position = torch.tensor(stats.rankdata(standard))
    assert all(abs(torch.corrcoef(torch.stack([position, column]))[0, 1]) < 0.06 for column in white.T)


@pytest.mark.parametrize(
    ("a", "b"), [(-1.0, 2.0), (5.0, 6.0), (-38.0, -37.0), (38.0, 50.0), (-1e4, -9.9e3), (0.0, 0.0)]
)
def test_truncated_normal_stays_inside(a: float, b: float) -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    x = truncated_normal(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), u)
    assert torch.all((x >= a) & (x <= b))
    assert torch.all(x.diff() * (1 if a + b <= 0 else -1) >= -1e-9)


def test_an_empty_slab_is_reported() -> None:
    mean, factor = random_law(3)
    v, one = torch.ones(3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for direction, lower, upper in ((v, one, -one), (v, one, one), (v * 0, -one, one)):
        samples, found = sample_slab(mean, factor, direction, lower, upper, 50)
        assert not found
        assert torch.isfinite(samples).all()


def queue_of(keys: list[Tensor], length: int = 64) -> EmbeddingQueue:
    queue = EmbeddingQueue(len(keys), keys[0].shape[1], length)
    for k, rows in enumerate(keys):
        queue.enqueue(F.normalize(rows, dim=1), torch.full((len(rows),), k))
    return queue


def clusters(d: int = 6, count: int = 60) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(count, d, generator=g) * 0.4 + torch.eye(d)[k] * 2 for k in range(3)]


def test_hard_negatives_lie_between_the_classes() -> None:
    queue = queue_of(clusters())
    g = torch.Generator().manual_seed(0)
    anchors = F.normalize(torch.cat([c[:20] for c in clusters()]) + 0.05, dim=1)
    labels = torch.arange(60) // 20
    means, covariances = hard_negative_statistics(anchors, labels, queue, generator=g)
    plain_means, plain_covariances = queue.statistics()
    assert means.shape == (3, 3, 6)
    assert covariances.shape == (3, 3, 6, 6)
    for i in range(3):
        torch.testing.assert_close(means[i, i], plain_means[i])
        torch.testing.assert_close(covariances[i, i], plain_covariances[i])
        for j in range(3):
            if i != j:  # nearer to the anchors' class than the keys' own class
                assert (means[i, j] - plain_means[i]).norm() < (plain_means[j] - plain_means[i]).norm()
                assert torch.linalg.eigvalsh(covariances[i, j]).min() > -1e-6


def test_the_same_seed_gives_the_same_statistics() -> None:
    queue, anchors, labels = queue_of(clusters()), F.normalize(clusters()[0], dim=1), torch.zeros(60).long()
    results = []
    for seed in (5, 5, 6):
        generator = torch.Generator().manual_seed(seed)
        results.append(hard_negative_statistics(anchors, labels, queue, generator=generator))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    # The generator's state is restored bit for bit, and continues.
    g = torch.Generator().manual_seed(7)
    state = g.get_state()
    first = hard_negative_statistics(anchors, labels, queue, generator=g)
    g.set_state(state)
    assert torch.equal(hard_negative_statistics(anchors, labels, queue, generator=g)[0], first[0])


DEGENERATE = {
    "one key": [clusters()[0], clusters()[1][:1], clusters()[2]],
    "identical keys": [clusters()[0], clusters()[1][:1].repeat(30, 1), clusters()[2]],
    "fewer keys than dimensions": [clusters()[0], clusters()[1][:4], clusters()[2]],
    "no key": [clusters()[0], clusters()[1][:0], clusters()[2]],
    "a plane": [clusters()[0], clusters()[1] * torch.tensor([1.0, 1, 1, 1, 1, 0]), clusters()[2]],
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_classes_fall_back(case: str) -> None:
    queue = queue_of(DEGENERATE[case])
    anchors, labels = F.normalize(torch.cat([c[:5] for c in clusters()]), dim=1), torch.arange(15) // 5
    means, covariances = hard_negative_statistics(anchors, labels, queue)
    plain_means, plain_covariances = queue.statistics()
    for other in (0, 2):
        for i, j in ((1, other), (other, 1)):
            torch.testing.assert_close(means[i, j], plain_means[j])
            torch.testing.assert_close(covariances[i, j], plain_covariances[j])
    assert not torch.allclose(means[0, 2], plain_means[2], atol=1e-3)
    assert torch.isfinite(means).all()
    assert torch.isfinite(covariances).all()


def test_no_anchor_and_an_anchor_on_a_key_fall_back() -> None:
    queue = queue_of(clusters())
    plain, _ = queue.statistics()
    for anchors in (torch.zeros(0, 6), torch.zeros(3, 6)):
        labels = torch.full((len(anchors),), -1)
        means, _ = hard_negative_statistics(anchors, labels, queue)
        torch.testing.assert_close(means, plain.expand(3, 3, 6))
    key = queue.class_keys()[0][1][:1]  # the only anchor of class 0 is also the nearest key: an empty slab
    one = EmbeddingQueue(2, 6, 64)
    one.load_state_dict(queue_of(clusters()[:2]).state_dict())
    means, _ = hard_negative_statistics(key, torch.zeros(1).long(), one)
    assert torch.isfinite(means).all()


def test_bad_input_is_refused_by_name() -> None:
    queue = queue_of(clusters())
    with pytest.raises(ValueError, match="anchors must have shape"):
        hard_negative_statistics(torch.zeros(4, 5), torch.zeros(4).long(), queue)
    with pytest.raises(ValueError, match="labels must have shape"):
        hard_negative_statistics(torch.zeros(4, 6), torch.zeros(3).long(), queue)
    with pytest.raises(ValueError, match="num_samples"):
        hard_negative_statistics(torch.zeros(4, 6), torch.zeros(4).long(), queue, num_samples=1)
    with pytest.raises(TypeError, match="queue must be an EmbeddingQueue, got NoneType"):
        hard_negative_statistics(torch.zeros(4, 6), torch.zeros(4).long(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_anchor_that_is_not_finite_does_not_count(bad: float) -> None:
    queue = EmbeddingQueue(2, 3, 32)
    queue.enqueue(F.normalize(torch.randn(60, 3), dim=1), torch.arange(60) % 2)
    z, y = F.normalize(torch.randn(8, 3), dim=1), torch.arange(8) % 2
    results = []
    for extra in (0, 2):
        anchors = torch.cat([z, torch.full((extra, 3), bad)])
        labels = torch.cat([y, torch.arange(extra)])
        generator = torch.Generator().manual_seed(0)
        results.append(hard_negative_statistics(anchors, labels, queue, generator=generator))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(results[0][0][0, 1], queue.statistics()[0][1])
