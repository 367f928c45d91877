"""The ops on random inputs, against the reference in float64.

    python -m tests.fuzz --minutes 3 [--seed 0]

Hypothesis draws types, shapes, temperatures, weights, norms, labels, bounds, counts, masks, strides and threads. CORPUS
holds cases that were once wrong. A failure prints the smallest case that hypothesis finds, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from pglcl_ext import (
    build_info,
    gaussian_contrast_loss,
    patch_contrast_loss,
    patch_statistics,
    reference,
    semantic_disparity,
)
from tests.problems import DTYPES

LARGEST = 2**63 - 1
BATCH = 200  # examples between two looks at the clock


@dataclass
class Contrast:
    """A case of patch_contrast_loss as numbers, so that a failure can be copied into CORPUS."""

    n: int = 20
    m: int | None = None
    d: int = 8
    dtype: int = 1
    norm: float = 1.0
    temperature: float = 0.1
    weight: float = 1.0
    classes: int = 3
    far_labels: bool = False
    channels: int = 1
    positives: str = "none"
    negatives: str = "none"
    masks: bool = False
    reduction: str = "mean"
    layout: str = "contiguous"
    threads: int = 1
    upstream: float = 1.0
    seed: int = 0


# Certain anchors with large logits, a small temperature with a scaled gradient, heavy negatives, odd layouts.
CORPUS = [
    Contrast(n=3, d=2, norm=300.0),
    Contrast(n=3, d=2, norm=3e4, dtype=0),
    Contrast(n=40, norm=1e18, temperature=1.0),
    Contrast(n=3, d=1, classes=2, temperature=0.0254, upstream=65536.0),
    Contrast(n=3, d=1, classes=2, temperature=0.0254, upstream=65536.0, weight=1e7),
    Contrast(n=33, m=129, far_labels=True, positives="count", negatives="tensor", layout="strided", threads=3),
    Contrast(n=64, d=2048, dtype=2, layout="misaligned"),
    Contrast(n=30, m=1, masks=True, dtype=3),
    Contrast(n=5, weight=0.0, temperature=1e-4),
    Contrast(n=5, temperature=1e4, reduction="none"),
]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout: part of a wider tensor, one element after its start, or transposed."""
    if layout == "strided":
        wide = t.new_zeros(t.shape[0], 2 * t.shape[1] + 3)
        wide[:, 1 : 1 + 2 * t.shape[1] : 2] = t
        return wide[:, 1 : 1 + 2 * t.shape[1] : 2]
    if layout == "misaligned":
        flat = t.new_zeros(t.numel() + 1)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    if layout == "transposed":
        return t.t().contiguous().t()
    return t


def tensors(case: Contrast) -> tuple[list[Tensor], dict[str, Any]]:
    """Embeddings of both sides in the case's dtype, and all other arguments."""
    g = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    norm = min(case.norm, 1e4) if dtype == torch.float16 else case.norm
    places = torch.tensor([-LARGEST - 1, LARGEST, 7, -5, 0, 2**40])

    def side(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.nn.functional.normalize(torch.randn(rows, case.d, generator=g, dtype=torch.float64), dim=1) * norm
        y = torch.randint(-1, case.classes, (rows,), generator=g)
        y = torch.where(y < 0, y, places[y]) if case.far_labels else y
        values = (torch.rand(rows, case.channels, generator=g) * 8).round() / 8
        return z.to(dtype), y, values if case.channels > 1 else values[:, 0]

    anchors, labels, descriptors = side(case.n)
    embeddings, arguments = [anchors], {"labels": labels, "descriptors": descriptors}
    if case.m is not None:
        keys, key_labels, key_descriptors = side(case.m)
        embeddings.append(keys)
        arguments |= {"key_labels": key_labels, "key_descriptors": key_descriptors}
    bounds = {"number": 0.5, "tensor": torch.rand(case.n, generator=g)}
    for kind, bound, count in (
        (case.positives, "max_positive_disparity", "num_positives"),
        (case.negatives, "min_negative_disparity", "num_negatives"),
    ):
        if not case.masks and kind in bounds:
            arguments[bound] = bounds[kind]
        if not case.masks and kind == "count":
            arguments[count] = 1 + case.seed % 7
    if case.masks:
        shape = (case.n, case.n if case.m is None else case.m)
        arguments["positive_mask"] = torch.rand(shape, generator=g) < 0.2
        arguments["negative_mask"] = torch.rand(shape, generator=g) < 0.5
    arguments |= {"temperature": case.temperature, "negative_weight": case.weight, "reduction": case.reduction}
    return embeddings, arguments


def loss_and_gradients(
    function: Any, embeddings: list[Tensor], case: Contrast, arguments: dict[str, Any]
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in embeddings]
    keys = {"keys": leaves[1]} if len(leaves) == 2 else {}
    loss = function(leaves[0], **keys, **arguments)
    return [loss.detach(), *torch.autograd.grad(loss.sum() * case.upstream, leaves)]


def check_contrast(case: Contrast) -> None:
    embeddings, arguments = tensors(case)
    norms = [float(t.double().norm(dim=1).max()) if t.numel() else 0.0 for t in embeddings]
    largest = norms[0] * norms[-1] / case.temperature
    if case.dtype != 0 and largest > 1e36:
        return  # float32 cannot hold such a logit
    with with_threads(case.threads):
        ours = loss_and_gradients(patch_contrast_loss, [laid_out(t, case.layout) for t in embeddings], case, arguments)
    exact = loss_and_gradients(reference.patch_contrast_loss, [t.double() for t in embeddings], case, arguments)
    # A logit is a sum of products of the accumulating type. Its error is the type's eps times the largest product.
    accumulated = torch.float64 if case.dtype == 0 else torch.float32
    off = (8 + case.d**0.5) * torch.finfo(accumulated).eps * largest
    close(ours[0], exact[0], 1e-5, off + 1e-6)
    # A share of the softmax is at most 1. It has the error of its exponent, and is multiplied by embeddings / tau.
    # Where the processor multiplies pairs of bfloat16, gradients of that type come from shares rounded to it.
    pairs = embeddings[0].dtype == torch.bfloat16 and build_info()["cpu_instruction_set"] == "avx512_bf16"
    rounded = torch.finfo(torch.bfloat16).eps / 2 if pairs else 0.0
    shares = min(1.0, math.expm1(min(off, 1.0)) + 1e-5 + rounded)
    for got, want, other in zip(ours[1:], exact[1:], reversed(norms), strict=True):
        counted = 1 if case.reduction == "mean" else len(got)
        floor = 4 * shares * case.upstream * other / case.temperature * counted
        if math.isfinite(floor):
            close(got, want, 4 * torch.finfo(got.dtype).eps + 1e-5, floor + torch.finfo(got.dtype).tiny)


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def close(got: Tensor, want: Tensor, relative: float, floor: float) -> None:
    """Checks that `got` is within `relative` of `want`, or within `floor`, which alone counts for a true value of 0.

    It must also be finite wherever the dtype can hold the true value.
    """
    room = want.double().abs() < 0.9 * torch.finfo(got.dtype).max
    got, want = got.double()[room], want.double()[room]
    assert got.isfinite().all(), "not finite"
    difference = (got - want).abs()
    bad = difference > relative * want.abs() + floor
    assert not bad.any(), f"off by {float(difference.max()):.3g}, allowed {floor:.3g} + {relative:.3g} of the value"


logarithmic = st.floats(-4, 4).map(lambda power: 10.0**power)
contrasts = st.builds(
    Contrast,
    n=st.integers(0, 150),
    m=st.none() | st.integers(0, 150),
    d=st.integers(1, 40) | st.sampled_from([127, 128, 129, 2048]),
    dtype=st.integers(0, 3),
    norm=st.just(1.0) | st.floats(-3, 18).map(lambda power: 10.0**power),
    temperature=logarithmic,
    weight=st.sampled_from([0.0, 1.0, 1e-7]) | st.floats(0, 1e7),
    classes=st.integers(1, 6),
    far_labels=st.booleans(),
    channels=st.integers(1, 4),
    positives=st.sampled_from(["none", "number", "tensor", "count"]),
    negatives=st.sampled_from(["none", "number", "tensor", "count"]),
    masks=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    layout=st.sampled_from(["contiguous", "strided", "misaligned", "transposed"]),
    threads=st.integers(1, 3),
    upstream=st.sampled_from([1.0, 1e-3, 65536.0]),
    seed=st.integers(0, 10**6),
)


def check_statistics(
    dtype: int,
    shape: tuple[int, int, int],
    patch: int,
    stride: int,
    scale: float,
    normalize: bool,
    threads: int,
    seed: int,
) -> None:
    """Checks entropy, confidence and class entropy, and the gradient of each, for logits up to `scale`."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2, *shape, generator=g, dtype=torch.float64) * scale).to(DTYPES[dtype])
    exact_statistics = reference.patch_statistics(logits.double(), patch, stride)
    # The class entropy of a class without mass in a patch is 0 / 0; that of a class with hardly any mass is dropped.
    present = exact_statistics.confidence > 1e-30
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in exact_statistics]
    weights[2] = torch.where(present, weights[2], 0)
    weights = [w.to(DTYPES[dtype]) for w in weights]
    results = []
    for function, x in ((patch_statistics, logits), (reference.patch_statistics, logits.double())):
        x = x.detach().requires_grad_()
        with with_threads(threads if x.dtype == logits.dtype else 1):
            values = function(x, patch, stride, normalize=normalize)
            grads = [
                torch.autograd.grad(value, x, weight.to(value.dtype), retain_graph=True)[0]
                for value, weight in zip(values, weights, strict=True)
            ]
        results.append([*(value.detach() for value in values[:2]), torch.where(present, values[2].detach(), 0), *grads])
    eps = max(torch.finfo(DTYPES[dtype]).eps, 1e-6)
    for got, want in zip(*results, strict=True):
        close(got, want, 8 * eps, 8 * eps * max(1.0, float(want.abs().amax()) if want.numel() else 0.0))


def check_disparity(
    dtype: int, n: int, m: int | None, channels: int, scale: float, ties: bool, layout: str, threads: int, seed: int
) -> None:
    """Checks disparities of descriptors up to `scale`, and their gradients; `ties`: descriptors on a coarse grid."""
    g = torch.Generator().manual_seed(seed)

    def side(rows: int) -> Tensor:
        values = torch.rand(rows, channels, generator=g, dtype=torch.float64)
        return ((values * 4).round() / 4 if ties else values).mul(scale).to(DTYPES[dtype])

    sides = [side(n)] if m is None else [side(n), side(m)]
    grad = torch.randn(n, n if m is None else m, generator=g, dtype=torch.float64).to(DTYPES[dtype])
    results = []
    for function, wide in ((semantic_disparity, False), (reference.semantic_disparity, True)):
        leaves = [(t.double() if wide else laid_out(t, layout)).detach().requires_grad_() for t in sides]
        with with_threads(1 if wide else threads):
            disparity = function(*leaves)
            results.append([disparity.detach(), *torch.autograd.grad(disparity, leaves, grad.to(disparity.dtype))])
    eps = max(torch.finfo(DTYPES[dtype]).eps, torch.finfo(torch.float32).eps if dtype else 0.0)
    subnormal = torch.finfo(DTYPES[dtype]).tiny * torch.finfo(DTYPES[dtype]).eps
    close(results[0][0], results[1][0], 4 * eps, 4 * eps * scale + subnormal)
    for got, want, rows in zip(results[0][1:], results[1][1:], grad.shape[::-1][: len(leaves)], strict=True):
        close(got, want, 4 * eps, 8 * eps * (1 + rows) ** 0.5)


def check_gaussian(dtype: int, n: int, d: int, classes: int, temperature: float, weight: float, seed: int) -> None:
    """Checks anchors of length 1 against classes, one of which may be empty."""
    g = torch.Generator().manual_seed(seed)
    t = torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1).to(DTYPES[dtype])
    accumulated = torch.float64 if dtype == 0 else torch.float32
    roots = torch.randn(classes, d, d, generator=g, dtype=torch.float64) / d
    means = (torch.randn(classes, d, generator=g, dtype=torch.float64) / d**0.5).to(accumulated)
    covariances = (roots @ roots.mT).to(accumulated)
    labels = torch.randint(-1, classes, (n,), generator=g)
    counts = torch.randint(0, 3, (classes,), generator=g)
    results = []
    for function, x in ((gaussian_contrast_loss, t), (reference.gaussian_contrast_loss, t.double())):
        x = x.detach().requires_grad_()
        statistics = (means, covariances) if x.dtype != torch.float64 else (means.double(), covariances.double())
        loss = function(x, labels, *statistics, counts, temperature=temperature, negative_weight=weight)
        results.append([loss.detach(), *torch.autograd.grad(loss, x)])
    # Exponents reach t'St lambda / 2 tau^2, in the accumulating type.
    largest = 10 / temperature + 40 / temperature**2
    off = (8 + d) * torch.finfo(accumulated).eps * largest
    close(results[0][0], results[1][0], 1e-5, off + 1e-6)
    share = min(1.0, off + 1e-5)
    close(results[0][1], results[1][1], 4 * torch.finfo(DTYPES[dtype]).eps + 1e-5, 4 * share * largest)


powers = {
    "statistics": st.floats(-2, 2).map(lambda power: 10.0**power),
    "disparity": st.floats(-6, 4).map(lambda power: 10.0**power),
    "gaussian": st.floats(-1, 3).map(lambda power: 10.0**power),
}
layouts = st.sampled_from(["contiguous", "strided", "misaligned", "transposed"])
seeds, dtypes, threads = st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 3)
# Each check, and the strategy of its arguments.
CHECKS: list[tuple[Callable[..., None], st.SearchStrategy[Any]]] = [
    (check_contrast, st.tuples(contrasts)),
    (
        check_statistics,
        st.tuples(
            dtypes,
            st.tuples(st.integers(2, 9), st.integers(4, 33), st.integers(4, 33)),
            st.integers(1, 4),
            st.integers(1, 5),
            powers["statistics"],
            st.booleans(),
            threads,
            seeds,
        ),
    ),
    (
        check_disparity,
        st.tuples(
            dtypes,
            st.integers(0, 70),
            st.none() | st.integers(0, 70),
            st.integers(1, 5),
            powers["disparity"],
            st.booleans(),
            layouts,
            threads,
            seeds,
        ),
    ),
    (
        check_gaussian,
        st.tuples(
            dtypes,
            st.integers(0, 60),
            st.integers(1, 40),
            st.integers(1, 6),
            powers["gaussian"],
            st.floats(0, 1e7),
            seeds,
        ),
    ),
]


def draw(check: Callable[..., None], cases: st.SearchStrategy[Any], seed: int) -> None:
    """Runs BATCH cases of a check; raises the error of the first bad one."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(cases)
    def every(case: Any) -> None:
        check(*case)

    every()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for case in CORPUS:
        try:
            check_contrast(case)
        except AssertionError as error:
            print(f"corpus: {asdict(case)}: {error}")
            failed += 1
    end, seed, batches = time.monotonic() + 60 * options.minutes, options.seed, 0
    while not failed and (batches == 0 or time.monotonic() < end):
        for check, cases in CHECKS:
            draw(check, cases, seed + batches)
        batches += 1
    passed = len(CHECKS) * BATCH * batches
    print(f"{len(CORPUS) - failed} passed, {failed} failed of the corpus; {passed} random cases passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
