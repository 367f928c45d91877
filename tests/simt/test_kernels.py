"""The CUDA kernels, the very files that nvcc compiles, under the emulator against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pglcl_ext import reference
from pglcl_ext.semantic_disparity import disparity_bounds
from tests.problems import DTYPES, ContrastProblem, gaussian_problem
from tests.simt import emulator

# Loss and gradients; TF32 rounds operands to 10 bits of mantissa.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TF32 = 4e-3


def assert_contrast(problem: ContrastProblem, dtype: torch.dtype, **device: Any) -> None:
    ours = problem.cast(dtype)
    oracle = problem.cast(torch.float64)
    with torch.no_grad():
        oracle.anchors.copy_(ours.anchors)
        if oracle.keys is not None and ours.keys is not None:
            oracle.keys.copy_(ours.keys)
    expected = oracle.loss(reference.patch_contrast_loss)
    upstream = torch.linspace(0.5, 1.5, max(expected.numel(), 1), dtype=torch.float64)[: expected.numel()]
    want = oracle.gradients(expected, upstream.reshape(expected.shape))

    def run(anchors: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal grads
        options = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        loss, grads = emulator.patch_contrast(anchors.detach(), *arguments, **options, **device)
        return loss

    grads: list[torch.Tensor] = []
    loss = ours.loss(run)
    temperature = problem.options.get("temperature", 0.1)
    tolerance = TOLERANCE[dtype]
    if dtype != torch.float64:
        tolerance += 2 * torch.finfo(torch.float32).eps / temperature
    if device.get("allow_tf32"):
        tolerance = max(tolerance, TF32 * 0.1 / temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads, want, strict=True):
        term = 0.1 / (temperature * max(expected.numel(), len(problem.anchors)) ** 0.5)
        scale = max(b.abs().max().item(), term) if b.numel() else term
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounds": {"max_positive_disparity": 0.5, "min_negative_disparity": 0.1},
    "weighted": {"negative_weight": 30.0, "reduction": "sum"},
    "no negatives": {"negative_weight": 0.0},
    "cold": {"temperature": 1e-3},
    "none": {"reduction": "none", "max_positive_disparity": 0.4},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [None, 70], ids=["self", "keys"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, m: int | None, dtype: torch.dtype) -> None:
    assert_contrast(ContrastProblem.random(67, 24, m=m, classes=3, **OPTIONS[name]), dtype)


@pytest.mark.parametrize("n", [1, 2, 31, 33, 127, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_that_do_not_divide_tiles(n: int, dtype: torch.dtype) -> None:
    assert_contrast(ContrastProblem.random(n, 16, classes=2, max_positive_disparity=0.6), dtype)
    assert_contrast(ContrastProblem.random(33, 8, m=n, classes=2), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [1, 8, 20, 64, 136, 256, 264])
def test_depths(depth: int, dtype: torch.dtype) -> None:
    assert_contrast(ContrastProblem.random(35, depth, m=66, classes=2), dtype)


def test_plain_kernel_beyond_one_chunk_of_depth() -> None:
    assert_contrast(ContrastProblem.random(6, 1100, classes=2), torch.float64)


@pytest.mark.parametrize(
    "device",
    [
        {"capability": 75, "shared_bytes": 64 * 1024},
        {"capability": 86, "shared_bytes": 99 * 1024},
        {"capability": 80, "allow_tf32": True},
        {"capability": 80, "shared_bytes": 40 * 1024},
    ],
    ids=["sm_75", "sm_86", "TF32", "one stage"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_devices(dtype: torch.dtype, device: dict[str, Any]) -> None:
    for m in (None, 100):
        assert_contrast(ContrastProblem.random(70, 96, m=m, max_positive_disparity=0.5), dtype, **device)


def test_bounds_per_anchor_channels_and_masks() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for m in (None, 50):
            problem = ContrastProblem.random(40, 8, m=m)
            problem.options = {"max_positive_disparity": torch.rand(40), "min_negative_disparity": torch.rand(40) / 2}
            assert_contrast(problem, dtype)
            assert_contrast(ContrastProblem.random(40, 8, m=m, channels=3, max_positive_disparity=0.4), dtype)
            problem = ContrastProblem.random(40, 8, m=m)
            shape = (40, m or 40)
            problem.options = {
                "positive_mask": (torch.rand(shape[::-1]) < 0.2).t(),
                "negative_mask": torch.rand(shape) < 0.5,
            }
            assert_contrast(problem, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nothing_to_contrast(dtype: torch.dtype) -> None:
    for n, m, label in ((0, None, 0), (5, 0, 0), (40, None, -1), (1, None, 0)):
        keys = {} if m is None else {"keys": torch.randn(m, 8, dtype=dtype), "key_labels": torch.zeros(m).long()}
        loss, grads = emulator.patch_contrast(
            torch.randn(n, 8, dtype=dtype), torch.full((n,), label), reduction="mean", **keys
        )
        assert loss.item() == 0
        assert all(torch.all(g == 0) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_is_not_a_number(dtype: torch.dtype) -> None:
    problem = ContrastProblem.random(40, 8, classes=2, ignored=False, max_positive_disparity=0.5, reduction="none")
    for bad in (math.nan, math.inf):
        z, d = problem.anchors.to(dtype), problem.descriptors.clone()
        d[3] = bad
        loss, grads = emulator.patch_contrast(z, problem.labels, d, **problem.options)
        assert torch.isnan(loss).all()
        assert torch.isnan(grads[0]).all()
        z = z.clone()
        z[3] = bad
        loss, _ = emulator.patch_contrast(z, problem.labels, problem.descriptors, **problem.options)
        assert torch.isnan(loss[3])


GRIDS = [
    ((2, 3, 20, 23), (5, 5), (5, 5)),
    ((1, 2, 20, 23), (5, 4), (2, 3)),
    ((1, 4, 33, 64), (16, 16), (16, 16)),
    ((1, 4, 32, 32), (16, 16), (8, 8)),
    ((1, 8, 9, 9), (4, 4), (4, 4)),
    ((1, 11, 8, 9), (4, 4), (3, 3)),
    ((1, 131, 5, 5), (4, 4), (1, 1)),
    ((1, 9, 14, 13), (13, 12), (1, 1)),
    ((1, 4, 20, 36), (18, 18), (2, 6)),
    ((1, 4, 9, 10, 11), (3, 4, 5), (2, 2, 3)),
    ((1, 3, 8, 8, 16), (4, 4, 8), (4, 4, 8)),
    ((0, 3, 8, 8), (4, 4), (4, 4)),
]


@pytest.mark.parametrize(("shape", "patch", "stride"), GRIDS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(shape, patch, stride, probabilities: bool, dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 2
    x = (x.softmax(1) if probabilities else x).to(dtype)
    oracle = x.double().requires_grad_()
    options = {"probabilities": probabilities, "normalize": bool(shape[0] % 2)}
    want = reference.patch_statistics(oracle, patch, stride, **options)
    weights = [
        torch.linspace(-1, 1, max(t.numel(), 1), dtype=torch.float64)[: t.numel()].reshape(t.shape) for t in want
    ]
    got, grad = emulator.patch_statistics(x, list(patch), list(stride), [w.to(dtype) for w in weights], **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b.detach(), rtol=tolerance, atol=tolerance)
    (expected,) = torch.autograd.grad(want, oracle, weights)
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=4 * tolerance * scale)


def test_statistics_where_their_elements_lie() -> None:
    """Channels last, slices and expanded gradients are read in place."""
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    grads = [torch.randn(2, 4, 4).double(), torch.tensor(0.5).double().expand(2, 4, 4, 4)]
    grads.append(torch.randn(2, 4, 4, 4).double().transpose(2, 3))
    options = {"probabilities": False, "normalize": True}
    want, expected = emulator.patch_statistics(x, [4, 4], [4, 4], [g.contiguous() for g in grads], **options)
    for same in (
        x.to(memory_format=torch.channels_last),
        torch.stack([x, x], dim=-1)[..., 1],
        torch.cat([x, x], dim=3)[..., 16:],
        torch.cat([x, x], dim=3)[..., 1:17].copy_(x),
    ):
        got, grad = emulator.patch_statistics(same, [4, 4], [4, 4], grads, **options)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(grad, expected)
        assert grad.stride() == torch.empty_like(same).stride()


@pytest.mark.parametrize("classes", [2, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_confident_logits(classes: int, dtype: torch.dtype) -> None:
    """A class of denormal mass has an entropy and a gradient; rounded outputs do not decide the gradient."""
    g = torch.Generator().manual_seed(0)
    for low in (-6.0, -12.0, -90.0):
        x = (torch.rand(1, classes, 8, 8, generator=g, dtype=torch.float64) + low).to(dtype)
        x[:, : classes // 2] = torch.rand(classes // 2, 8, 8, generator=g).to(dtype)
        oracle = x.double().requires_grad_()
        want = reference.patch_statistics(oracle, 4)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in want]
        got, grad = emulator.patch_statistics(x, [4, 4], [4, 4], weights, probabilities=False, normalize=False)
        eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        torch.testing.assert_close(got[2].double(), want[2].detach(), rtol=2 * eps, atol=2e-6)
        (expected,) = torch.autograd.grad(want, oracle, [w.double() for w in weights])
        scale = max(expected.abs().max().item(), 1e-3)  # upstream gradients of order 1 cancel
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=max(4 * eps, 1e-5) * scale)


def test_probabilities_below_the_normal_range() -> None:
    x = torch.tensor([1.0, 1e-42]).reshape(1, 2, 1, 1)
    ones = [torch.ones(1, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)]
    _, grad = emulator.patch_statistics(x, [1, 1], [1, 1], ones, probabilities=True, normalize=False)
    torch.testing.assert_close(grad.flatten(), -(x.double().log() + 1).float().flatten())


def test_statistics_of_extreme_logits() -> None:
    x = torch.randint(0, 2, (1, 3, 16, 16)) * 2e4 - 1e4
    got, grad = emulator.patch_statistics(
        x, [4, 4], [4, 4], [torch.ones(1, 4, 4), *[torch.ones(1, 3, 4, 4)] * 2], probabilities=False, normalize=False
    )
    assert all(torch.isfinite(t).all() for t in (*got, grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "m", "channels"), [(1, 1, 1), (33, 20, 1), (20, 70, 3), (0, 5, 1)])
def test_disparity(n: int, m: int, channels: int, dtype: torch.dtype) -> None:
    a, b = (torch.rand(k, channels).mul(8).round().div(8).to(dtype).requires_grad_() for k in (n, m))
    want = reference.semantic_disparity(a, b)
    torch.testing.assert_close(emulator.semantic_disparity(a.detach(), b.detach()), want.detach())
    grad = torch.randn(n, m, dtype=dtype)
    got = emulator.semantic_disparity_backward(grad, a.detach(), b.detach())
    for x, y in zip(got, torch.autograd.grad(want, (a, b), grad)):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("itself", [True, False])
def test_bounds(positives: bool, itself: bool, dtype: torch.dtype) -> None:
    for count in (1, 4, 30):
        for channels, select in ((1, False), (1, True), (3, True)):
            a, y = torch.rand(40, channels).mul(10).round().div(10).to(dtype), torch.randint(-1, 3, (40,))
            b, z = (a, y) if itself else (torch.rand(55, channels).to(dtype), torch.randint(-1, 3, (55,)))
            offset = 0 if itself else -1
            want = disparity_bounds(a, y, b, z, count, positives=positives, ignore_index=-1, self_offset=offset)
            got = emulator.disparity_bounds(a, y, b, z, count, positives=positives, self_offset=offset, select=select)
            valid = y != -1  # the bound of an ignored anchor is never read
            torch.testing.assert_close(got[valid], want[valid])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize(
    ("n", "depth", "shared"), [(1, 1, 160), (37, 20, 160), (20, 130, 160), (9, 200, 11), (0, 8, 160)]
)
def test_gaussian(n: int, depth: int, shared: int, pairwise: bool, dtype: torch.dtype) -> None:
    anchors, *rest = gaussian_problem(n, depth, pairwise=pairwise, empty=(1,))
    ours = anchors.to(dtype)
    shared = shared * 1024 * (2 if dtype == torch.float64 else 1)
    for options in ({}, {"reduction": "none", "negative_weight": 0.0}, {"reduction": "sum", "temperature": 1.0}):
        oracle = ours.double().requires_grad_()
        losses = reference.gaussian_contrast_loss(oracle, *rest, **{**options, "reduction": "none"})
        (want,) = torch.autograd.grad(losses.sum(), oracle)
        expected = reference.gaussian_contrast_loss(oracle.detach(), *rest, **options)
        loss, gradients, num_valid = emulator.gaussian_contrast(ours, *rest, shared_bytes=shared, **options)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
        scale = max(want.abs().max().item(), 1e-6) if want.numel() else 1.0
        torch.testing.assert_close(gradients.double(), want, rtol=0, atol=tolerance * scale)
        assert num_valid == ((rest[0] >= 0) & (rest[0] != 1)).sum()


# Every kernel of the loss, by what leads to it.
PATHS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain float64": (torch.float64, {}),
    "plain float32": (torch.float32, {"shared_bytes": 1024}),
    "plain bfloat16": (torch.bfloat16, {"shared_bytes": 1024}),
    "FFMA float32": (torch.float32, {}),
    "FFMA bfloat16": (torch.bfloat16, {"capability": 75}),
    "FFMA float16": (torch.float16, {"capability": 75}),
    "TF32": (torch.float32, {"allow_tf32": True}),
    "mma bfloat16": (torch.bfloat16, {}),
    "mma float16": (torch.float16, {}),
    "mma bfloat16 in parts": (torch.bfloat16, {"multiprocessors": 6}),
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> tuple[torch.dtype, dict[str, Any]]:
    return PATHS[request.param]


def padded(rows: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.pad(torch.tensor(rows, dtype=dtype), (0, 8 - len(rows[0])))


@pytest.mark.parametrize("upstream", [1.0, 65536.0])
def test_large_logits_have_the_gradient_of_their_loss(path, upstream: float) -> None:
    dtype, device = path
    # The positive outweighs the negative by far: the loss is 0, and flat.
    z = padded([[300.0, 30], [300, 90], [210, 300]], dtype)
    up = torch.tensor(upstream)
    loss, (grad,) = emulator.patch_contrast(z, torch.tensor([0, 0, 1]), temperature=0.1, upstream=up, **device)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    loss, (grad,) = emulator.patch_contrast(z * 100, torch.tensor([0, 0, 1]), temperature=0.1, upstream=up, **device)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_gradient_scaler_and_heavy_negatives_stay_finite(path) -> None:
    dtype, device = path
    z = padded([[1.0, 0], [-1, 0], [-1, 0]], dtype)
    labels = torch.tensor([0, 0, 1])
    for weight, scale in ((1.0, 65536.0), (1e7, 1.0), (1e-30, 1.0), (1e30, 1.0), (1e7, 65536.0 / 64)):
        oracle = z.double().requires_grad_()
        expected = reference.patch_contrast_loss(oracle, labels, temperature=0.0254, negative_weight=weight)
        (want,) = torch.autograd.grad(expected, oracle, torch.tensor(scale, dtype=torch.float64))
        if dtype == torch.float16 and want.abs().max() > 6e4:
            continue  # the true gradient is beyond the type
        loss, (grad,) = emulator.patch_contrast(
            z, labels, temperature=0.0254, negative_weight=weight, upstream=torch.tensor(scale), **device
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 1e-2)
        torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_spoils_only_what_uses_it(path, bad: float) -> None:
    dtype, device = path
    problem = ContrastProblem.random(40, 8, classes=3, ignored=False, max_positive_disparity=0.5, reduction="none")
    z, labels, descriptors = problem.anchors.to(dtype), problem.labels.clone(), problem.descriptors
    # Patch 5 is ignored; of patch 7 nobody is close enough, and its class is its own: it uses all, and is used by all.
    labels[5] = -1
    spoiled = z.clone()
    spoiled[5] = bad
    clean, (want,) = emulator.patch_contrast(z, labels, descriptors, **problem.options, **device)
    loss, (grad,) = emulator.patch_contrast(spoiled, labels, descriptors, **problem.options, **device)
    torch.testing.assert_close(loss, clean, rtol=0, atol=0)
    torch.testing.assert_close(grad, want, rtol=0, atol=0)
    # A key of class 0 that only anchors of class 0 see, since no disparity to other classes is large enough.
    options = {**problem.options, "min_negative_disparity": 2.0, "max_positive_disparity": 2.0}
    spoiled = z.clone()
    row = int((labels == 0).nonzero()[0])
    spoiled[row, 3] = bad
    loss, (grad,) = emulator.patch_contrast(spoiled, labels, descriptors, **options, **device)
    used = labels == 0
    assert not torch.isfinite(loss[used]).any()
    assert torch.isfinite(loss[~used]).all()
    assert not torch.isfinite(grad[used]).all(dim=1).any()
    assert torch.isfinite(grad[~used]).all()


def test_masks_that_call_a_key_both_count_it_twice(path) -> None:
    dtype, device = path
    problem = ContrastProblem.random(40, 8, m=70)
    both = torch.rand(40, 70) < 0.3
    problem.options = {
        "positive_mask": both | (torch.rand(40, 70) < 0.2),
        "negative_mask": both,
        "negative_weight": 3.0,
    }
    assert_contrast(problem, dtype, **device)


@pytest.mark.parametrize("name", ["plain", "none", "bounds"])
def test_keys_shared_out_among_blocks(name: str) -> None:
    """600 keys in up to two parts of four tiles; the same loss as one block finds, undecided anchors included."""
    problem = ContrastProblem.random(70, 16, m=600, classes=3, **OPTIONS[name])
    assert_contrast(problem, torch.bfloat16, multiprocessors=6)
    assert_contrast(ContrastProblem.random(600, 16, classes=3, **OPTIONS[name]), torch.bfloat16, multiprocessors=60)
    if name != "none":
        return
    z, labels = problem.anchors.bfloat16(), problem.labels
    for place in (0, 599):
        descriptors = problem.key_descriptors.clone()
        descriptors[place] = math.nan
        arguments = (z, labels, problem.descriptors)
        keys = {"keys": problem.keys.bfloat16(), "key_labels": problem.key_labels.abs(), "key_descriptors": descriptors}
        loss, _ = emulator.patch_contrast(*arguments, **keys, multiprocessors=6, **problem.options)
        assert torch.equal(loss.isnan(), labels != -1)
