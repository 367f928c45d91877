"""The CUDA code of the ops, host and device, on an emulated device against the reference in float64.

test_host.py runs them in another process, as ``pytest --emulated 80 tests/simt/emulated_kernels.py``, in which the
emulated ops replace those of the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pglcl_ext import patch_statistics, reference
from tests.problems import DTYPES, TOLERANCE, ContrastProblem, gaussian_problem
from tests.simt import calls, emulator

TF32 = 4e-3  # in place of TOLERANCE: operands are rounded to 10 bits of mantissa


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
        loss, grads = calls.patch_contrast(anchors.detach(), *arguments, **options, **device)
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
@pytest.mark.parametrize("depth", [1, 8, 20, 64, 136, 256])
def test_depths(depth: int, dtype: torch.dtype) -> None:
    assert_contrast(ContrastProblem.random(35, depth, m=66, classes=2), dtype)


@pytest.mark.parametrize("device", [{"capability": 75}, {}, {"allow_tf32": True}], ids=["sm_75", "sm_80", "TF32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("depth", "n", "m"), [(257, 35, None), (300, 34, 40), (512, 5, 33)])
def test_rows_that_pass_in_chunks(
    depth: int, n: int, m: int | None, dtype: torch.dtype, device: dict[str, Any]
) -> None:
    emulator.take_launches()
    assert_contrast(ContrastProblem.random(n, depth, m=m, classes=2, max_positive_disparity=0.6), dtype, **device)
    assert not [name for name in emulator.take_launches() if "plain" in name]


def test_masks_and_channels_of_rows_that_pass_in_chunks() -> None:
    problem = ContrastProblem.random(33, 260, m=20)
    problem.options = {"positive_mask": torch.rand(33, 20) < 0.3, "negative_mask": torch.rand(33, 20) < 0.5}
    assert_contrast(problem, torch.float32)
    assert_contrast(ContrastProblem.random(20, 260, channels=3, max_positive_disparity=0.4), torch.bfloat16)


def test_a_depth_of_2048() -> None:
    assert_contrast(ContrastProblem.random(6, 2048, classes=2), torch.bfloat16)


def test_plain_kernel_beyond_one_chunk_of_depth() -> None:
    assert_contrast(ContrastProblem.random(6, 1100, classes=2), torch.float64)


@pytest.mark.parametrize(
    "device",
    [
        {"capability": 75, "shared_bytes": 64 * 1024},
        {"capability": 86, "shared_bytes": 99 * 1024},
        {"capability": 80, "allow_tf32": True},
        {"capability": 80, "shared_bytes": 60 * 1024},
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
        loss, grads = calls.patch_contrast(
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
        loss, grads = calls.patch_contrast(z, problem.labels, d, **problem.options)
        assert torch.isnan(loss).all()
        assert torch.isnan(grads[0]).all()
        z = z.clone()
        z[3] = bad
        loss, _ = calls.patch_contrast(z, problem.labels, problem.descriptors, **problem.options)
        assert torch.isnan(loss[3])


GRIDS = [
    ((2, 3, 20, 23), (5, 5), (5, 5)),
    ((1, 2, 20, 23), (5, 4), (2, 3)),
    ((1, 4, 33, 64), (16, 16), (16, 16)),
    ((1, 4, 32, 32), (16, 16), (8, 8)),
    ((1, 8, 9, 9), (4, 4), (4, 4)),
    ((1, 11, 8, 9), (4, 4), (3, 3)),
    ((1, 19, 8, 9), (4, 4), (3, 3)),
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
    got, grad = calls.patch_statistics(x, list(patch), list(stride), [w.to(dtype) for w in weights], **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b.detach(), rtol=tolerance, atol=tolerance)
    (expected,) = torch.autograd.grad(want, oracle, weights)
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=4 * tolerance * scale)


@pytest.mark.parametrize(
    ("shape", "patch"), [((1030, 3, 2), (2, 2)), ((10, 12, 14), (12, 13)), ((9, 18, 17), (17, 17))]
)
def test_statistics_of_more_classes_than_registers_hold(shape: tuple[int, ...], patch: tuple[int, int]) -> None:
    """Patches of 1, 2 and 3 chunks of 128 pixels."""
    x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    want = reference.patch_statistics(x, patch, (1, 1))
    weights = [torch.randn(t.shape, dtype=torch.float64) for t in want]
    got, grad = calls.patch_statistics(x, list(patch), [1, 1], weights, probabilities=False, normalize=False)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(want, x, weights)[0], rtol=1e-10, atol=1e-12)


def test_statistics_where_their_elements_lie() -> None:
    """Channels last, slices and expanded gradients are read in place."""
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    grads = [torch.randn(2, 4, 4).double(), torch.tensor(0.5).double().expand(2, 4, 4, 4)]
    grads.append(torch.randn(2, 4, 4, 4).double().transpose(2, 3))
    options = {"probabilities": False, "normalize": True}
    want, expected = calls.patch_statistics(x, [4, 4], [4, 4], [g.contiguous() for g in grads], **options)
    for same in (
        x.to(memory_format=torch.channels_last),
        torch.stack([x, x], dim=-1)[..., 1],
        torch.cat([x, x], dim=3)[..., 16:],
        torch.cat([x, x], dim=3)[..., 1:17].copy_(x),
    ):
        got, grad = calls.patch_statistics(same, [4, 4], [4, 4], grads, **options)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(grad, expected)
        assert grad.stride() == torch.empty_like(same).stride()


@pytest.mark.parametrize("classes", [2, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_confident_logits(classes: int, dtype: torch.dtype) -> None:
    """A class of subnormal mass has an entropy and a gradient. The gradient does not depend on rounded outputs."""
    g = torch.Generator().manual_seed(0)
    for low in (-6.0, -12.0, -90.0):
        x = (torch.rand(1, classes, 8, 8, generator=g, dtype=torch.float64) + low).to(dtype)
        x[:, : classes // 2] = torch.rand(classes // 2, 8, 8, generator=g).to(dtype)
        oracle = x.double().requires_grad_()
        want = reference.patch_statistics(oracle, 4)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in want]
        got, grad = calls.patch_statistics(x, [4, 4], [4, 4], weights, probabilities=False, normalize=False)
        eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        torch.testing.assert_close(got[2].double(), want[2].detach(), rtol=2 * eps, atol=2e-6)
        (expected,) = torch.autograd.grad(want, oracle, [w.double() for w in weights])
        scale = max(expected.abs().max().item(), 1e-3)  # upstream gradients of order 1 cancel
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=max(4 * eps, 1e-5) * scale)


def test_probabilities_below_the_normal_range() -> None:
    x = torch.tensor([1.0, 1e-42]).reshape(1, 2, 1, 1)
    ones = [torch.ones(1, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)]
    _, grad = calls.patch_statistics(x, [1, 1], [1, 1], ones, probabilities=True, normalize=False)
    torch.testing.assert_close(grad.flatten(), -(x.double().log() + 1).float().flatten())


def test_statistics_of_extreme_logits() -> None:
    x = torch.randint(0, 2, (1, 3, 16, 16)) * 2e4 - 1e4
    got, grad = calls.patch_statistics(
        x, [4, 4], [4, 4], [torch.ones(1, 4, 4), *[torch.ones(1, 3, 4, 4)] * 2], probabilities=False, normalize=False
    )
    assert all(torch.isfinite(t).all() for t in (*got, grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "m", "channels"), [(1, 1, 1), (33, 20, 1), (20, 70, 3), (0, 5, 1)])
def test_disparity(n: int, m: int, channels: int, dtype: torch.dtype) -> None:
    a, b = (torch.rand(k, channels).mul(8).round().div(8).to(dtype).requires_grad_() for k in (n, m))
    want = reference.semantic_disparity(a, b)
    torch.testing.assert_close(calls.semantic_disparity(a.detach(), b.detach()), want.detach())
    grad = torch.randn(n, m, dtype=dtype)
    got = calls.semantic_disparity_backward(grad, a.detach(), b.detach())
    for x, y in zip(got, torch.autograd.grad(want, (a, b), grad)):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("itself", [True, False])
def test_bounds(positives: bool, itself: bool, dtype: torch.dtype) -> None:
    for count in (1, 4, 30):
        for channels in (1, 3):
            a, y = torch.rand(40, channels).mul(10).round().div(10).to(dtype), torch.randint(-1, 3, (40,))
            b, z = (a, y) if itself else (torch.rand(55, channels).to(dtype), torch.randint(-1, 3, (55,)))
            offset = 0 if itself else -1
            got, want = calls.disparity_bounds(a, y, b, z, count, positives=positives, self_offset=offset)
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
        loss, gradients, num_valid = calls.gaussian_contrast(ours, *rest, shared_bytes=shared, **options)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
        scale = max(want.abs().max().item(), 1e-6) if want.numel() else 1.0
        torch.testing.assert_close(gradients.double(), want, rtol=0, atol=tolerance * scale)
        assert num_valid == ((rest[0] >= 0) & (rest[0] != 1)).sum()


# For every kernel of the loss, the dtype and the options that lead to it.
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
    # The positive is far larger than the negative, so loss and gradient are 0.
    z = padded([[300.0, 30], [300, 90], [210, 300]], dtype)
    up = torch.tensor(upstream)
    loss, (grad,) = calls.patch_contrast(z, torch.tensor([0, 0, 1]), temperature=0.1, upstream=up, **device)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    loss, (grad,) = calls.patch_contrast(z * 100, torch.tensor([0, 0, 1]), temperature=0.1, upstream=up, **device)
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
        loss, (grad,) = calls.patch_contrast(
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
    # Patch 5 is ignored. No patch is close enough to patch 7, the only one of its class, so it uses all and all use it.
    labels[5] = -1
    spoiled = z.clone()
    spoiled[5] = bad
    clean, (want,) = calls.patch_contrast(z, labels, descriptors, **problem.options, **device)
    loss, (grad,) = calls.patch_contrast(spoiled, labels, descriptors, **problem.options, **device)
    torch.testing.assert_close(loss, clean, rtol=0, atol=0)
    torch.testing.assert_close(grad, want, rtol=0, atol=0)
    # A key of class 0 counts only for anchors of class 0, since no disparity from other classes is large enough.
    options = {**problem.options, "min_negative_disparity": 2.0, "max_positive_disparity": 2.0}
    spoiled = z.clone()
    row = int((labels == 0).nonzero()[0])
    spoiled[row, 3] = bad
    loss, (grad,) = calls.patch_contrast(spoiled, labels, descriptors, **options, **device)
    used = labels == 0
    assert not torch.isfinite(loss[used]).any()
    assert torch.isfinite(loss[~used]).all()
    assert not torch.isfinite(grad[used]).all(dim=1).any()
    assert torch.isfinite(grad[~used]).all()


@pytest.mark.parametrize("weight", [2.0**-10, 1e7])
def test_the_weight_of_negatives_does_not_drown_in_large_logits(path, weight: float) -> None:
    """Embeddings are whole numbers, so logits are exact in every type, and many are equal."""
    dtype, device = path
    g = torch.Generator().manual_seed(1)
    z = torch.randint(-2, 3, (70, 8), generator=g).double() * 2.0**13
    y = torch.randint(0, 3, (70,), generator=g)
    oracle = z.clone().requires_grad_()
    expected = reference.patch_contrast_loss(oracle, y, temperature=2.0**-4, negative_weight=weight)
    (want,) = torch.autograd.grad(expected, oracle)
    options = {"temperature": 2.0**-4, "negative_weight": weight, "upstream": torch.tensor(1.0)}
    loss, (grad,) = calls.patch_contrast(z.to(dtype), y, **options, **device)
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6, atol=4e-6)
    epsilon = max(torch.finfo(dtype).eps, 1e-3 if device.get("allow_tf32") else 4e-6)
    torch.testing.assert_close(grad.double(), want, rtol=2 * epsilon, atol=epsilon * float(want.abs().max()))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_logit_that_is_infinite(path, sign: float) -> None:
    """Anchors 0 and 1 are a pair whose logit is beyond the type; all other logits are 0.

    Beyond float32, the loss is right, or infinite if it does not fit; beyond float64, it is NaN.
    """
    dtype, device = path
    z = torch.zeros(40, 8, dtype=dtype)
    length, temperature = (4e110, 1e-100) if dtype == torch.float64 else (4, 1e-38)
    z[0, 0], z[1, 0] = length, sign * length
    y = torch.ones(40, dtype=torch.long)
    y[:2] = 0
    upstream = torch.ones(40).index_fill(0, torch.tensor([0, 1]), 0)
    options = {"temperature": temperature, "reduction": "none", "upstream": upstream}
    loss, (grad,) = calls.patch_contrast(z, y, **options, **device)
    # log(37 positives and 2 negatives, all of logit 0); the positive itself is far above, or below.
    torch.testing.assert_close(loss[2:].double(), torch.full((38,), math.log(39)).double(), rtol=1e-5, atol=1e-5)
    if dtype == torch.float64:
        assert (torch.isnan(loss[:2]) if sign > 0 else loss[:2] == math.inf).all()
    else:
        assert loss[:2].tolist() == [0.0 if sign > 0 else math.inf] * 2
    # The losses of the two are left out.
    assert torch.isfinite(grad).all() or dtype == torch.float16  # whose gradients are beyond the type


def test_tiles_of_ignored_patches_add_nothing(path) -> None:
    dtype, device = path
    problem = ContrastProblem.random(40, 8, ignored=False, reduction="sum")
    z = torch.nn.functional.pad(problem.anchors.to(dtype), (0, 0, 0, 100), value=math.nan)
    labels = torch.nn.functional.pad(problem.labels, (0, 100), value=-1)
    alone, (want,) = calls.patch_contrast(z[:40], problem.labels, reduction="sum", **device)
    loss, (grad,) = calls.patch_contrast(z, labels, reduction="sum", **device)
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    assert torch.equal(grad[:40], want)
    assert torch.all(grad[40:] == 0)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_columns_shared_out_among_blocks(dtype: torch.dtype) -> None:
    """Anchors and keys are in up to four parts each; one launch adds them up."""
    problem = ContrastProblem.random(280, 16, m=300, classes=3, max_positive_disparity=0.5)
    emulator.take_launches()
    assert_contrast(problem, dtype, multiprocessors=60)
    launched = [name for name in emulator.take_launches() if "gradients" in name or "backward" in name]
    assert launched == ["contrast_backward_mma", "contrast_backward_mma", "contrast_finish_gradients"]


@pytest.mark.parametrize("name", ["plain", "none", "bounds"])
def test_keys_shared_out_among_blocks(name: str) -> None:
    """600 keys in up to two parts of four tiles give the same loss as one block, also for undecided anchors."""
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
        loss, _ = calls.patch_contrast(*arguments, **keys, multiprocessors=6, **problem.options)
        assert torch.equal(loss.isnan(), labels != -1)


# --- launches, allocations, and what a CUDA graph cannot hold ---------------------------------------------------------

# The host code may call these while a graph is captured: they allocate, or run kernels without waiting for the device.
CAPTURABLE = {
    "aten::arange", "aten::argsort", "aten::as_strided", "aten::clone", "aten::contiguous", "aten::copy_", "aten::div",
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::eq", "aten::expand", "aten::fill_", "aten::full",
    "aten::index_select", "aten::logical_not", "aten::masked_fill", "aten::masked_fill_", "aten::reshape",
    "aten::resize_", "aten::scatter", "aten::sort", "aten::sum", "aten::to", "aten::_to_copy", "aten::transpose",
    "aten::view", "aten::add", "aten::_reshape_alias", "aten::_unsafe_view", "aten::slice", "aten::select",
    "aten::unsqueeze", "aten::detach", "aten::alias", "aten::zeros", "aten::zero_", "aten::flip", "aten::new_empty",
    "aten::pad", "aten::constant_pad_nd", "aten::narrow",
}  # fmt: skip


def inside(op: str, call: Any) -> tuple[list[str], int]:
    """The names of the PyTorch functions that the op calls, in order, and how often it allocates memory."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()
    spans = [(e.start_ns(), e.end_ns()) for e in events if e.name() == f"pglcl_ext::{op}"]
    assert spans, f"{op} was not called"
    own = [e for e in events if any(first <= e.start_ns() <= last for first, last in spans)]
    called = [e.name() for e in own if e.name().startswith("aten::")]
    return called, sum(e.name() == "[memory]" and e.nbytes() > 0 for e in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 70], ids=["self", "keys"])
def test_launches_and_allocations_of_the_loss(m: int | None, dtype: torch.dtype) -> None:
    """As NOTES has them: three kernels at most in each pass."""
    problem = ContrastProblem.random(67, 24, m=m, max_positive_disparity=0.5).cast(dtype)
    losses: list[torch.Tensor] = []
    emulator.take_launches()
    called, allocated = inside("patch_contrast", lambda: losses.append(problem.loss()))
    launched = emulator.take_launches()
    called_back, allocated_back = inside("patch_contrast_backward", losses[0].backward)
    launched_back = emulator.take_launches()
    assert set(called) | set(called_back) <= CAPTURABLE
    assert (len(launched), allocated) == (3, 7), launched
    assert (len(launched_back), allocated_back) == ((2, 1) if m is None else (3, 2)), launched_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_op_waits_for_the_device(dtype: torch.dtype) -> None:
    """The host code allocates and launches, and calls no function of PyTorch that a graph cannot capture."""
    x = torch.randn(1, 3, 16, 16).to(dtype).requires_grad_()
    outs: list[Any] = []
    a, y = torch.rand(40, 1), torch.randint(0, 3, (40,))
    anchors, *rest = gaussian_problem(20, 8)
    pairwise = gaussian_problem(20, 8, pairwise=True)
    asked = {
        "statistics": inside("patch_statistics", lambda: outs.append(patch_statistics(x, 4))),
        "statistics, backward": inside("patch_statistics_backward", lambda: outs[0].entropy.sum().backward()),
        "bounds": inside("disparity_bounds", lambda: torch.ops.pglcl_ext.disparity_bounds(a, y, a, y, 3, True, -1, 0)),
        "disparity": inside("semantic_disparity", lambda: calls.semantic_disparity(a.to(dtype), a.to(dtype))),
        "disparity, backward": inside(
            "semantic_disparity_backward",
            lambda: calls.semantic_disparity_backward(torch.ones(1, 1).expand(40, 40), a, a),
        ),
        "gaussian": inside("gaussian_contrast", lambda: calls.gaussian_contrast(anchors.to(dtype), *rest)),
        "pairwise": inside("gaussian_contrast", lambda: calls.gaussian_contrast(*pairwise)),
    }
    for name, (called, allocated) in asked.items():
        assert set(called) <= CAPTURABLE, (name, sorted(set(called) - CAPTURABLE))
        assert allocated > 0, name
    assert any(called for called, _ in asked.values())


# --- large sizes and unusual layouts ----------------------------------------------------------------------------------


def test_masks_whose_strides_exceed_32_bits() -> None:
    # Pages that are not written take no memory.
    row = 2**31 + 8
    problem = ContrastProblem.random(3, 8, m=5)
    masks = []
    for _ in range(2):
        mask = torch.empty(2 * row + 5, dtype=torch.bool).as_strided((3, 5), (row, 1))
        masks.append(mask.copy_(torch.rand(3, 5) < 0.5))
    problem.options = {"positive_mask": masks[0], "negative_mask": masks[1]}
    assert_contrast(problem, torch.float32)
    assert_contrast(problem, torch.float64)


def test_statistics_whose_places_exceed_32_bits() -> None:
    far = 2**30
    x = torch.empty(1, 2, 1, far + 16, dtype=torch.bfloat16)
    ends = [torch.randn(1, 2, 1, 16).bfloat16() for _ in range(2)]
    x[..., :16], x[..., far:] = ends
    got = torch.ops.pglcl_ext.patch_statistics(x, [1, 16], [1, far], False, False)
    for end, where in zip(ends, range(2)):
        want = torch.ops.pglcl_ext.patch_statistics(end, [1, 16], [1, 16], False, False)
        for a, b in zip(got[:3], want[:3]):
            torch.testing.assert_close(a[..., where], b[..., 0])


@pytest.mark.parametrize("n", [300, 600])
def test_the_reduction_takes_more_than_one_round(n: int) -> None:
    for reduction in ("mean", "sum", "none"):
        assert_contrast(ContrastProblem.random(n, 8, m=20, classes=2, reduction=reduction), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_anchor_that_is_a_later_key(dtype: torch.dtype) -> None:
    z = torch.nn.functional.normalize(torch.randn(90, 16, dtype=torch.float64), dim=1).to(dtype)
    y = torch.randint(0, 3, (90,))
    offset = 45
    inputs = (
        z[offset : offset + 30],
        y[offset : offset + 30],
        None,
        z,
        y,
        *[None] * 5,
        0.1,
        math.inf,
        0.0,
        1.0,
        -1,
        offset,
        0,
        False,
    )
    losses, *_ = torch.ops.pglcl_ext.patch_contrast(*inputs)
    whole = reference.patch_contrast_loss(z.double(), y, reduction="none")
    tolerance = 2 * TOLERANCE[dtype] + 1e-5 * (dtype != torch.float64)
    torch.testing.assert_close(losses.double(), whole[offset : offset + 30], rtol=tolerance, atol=tolerance)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, which begin at the second element of a longer memory."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_of_what_the_backward_passes_take(dtype: torch.dtype) -> None:
    ops = torch.ops.pglcl_ext
    problem = ContrastProblem.random(35, 16, m=40).cast(dtype)
    masks = (torch.rand(35, 40) < 0.3, torch.rand(35, 40) < 0.5)
    keys = (problem.keys.detach(), problem.key_labels, None)
    numbers = (0.1, math.inf, 0.0, 1.0, -1, -1, 1, False)
    inputs = (problem.anchors.detach(), problem.labels, None, *keys, None, None, *masks, *numbers)
    loss, *saved = ops.patch_contrast(*inputs)
    forward = (torch.ones_like(loss), saved[0], saved[1], saved[3], saved[4])

    def moved(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(shifted(t) if isinstance(t, torch.Tensor) else t for t in arguments)

    torch.testing.assert_close(ops.patch_contrast(*moved(inputs))[0], loss)
    want = ops.patch_contrast_backward(*forward, *inputs, True, True)
    got = ops.patch_contrast_backward(*moved((*forward, *inputs)), True, True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    x = torch.randn(1, 3, 8, 16).to(dtype)
    outputs = ops.patch_statistics(x, [4, 8], [4, 8], False, False)
    grads = tuple(torch.randn_like(t) for t in outputs)
    back = (*grads, x, *outputs[1:])
    a, b = (ops.patch_statistics_backward(*t, [4, 8], [4, 8], False, False) for t in (moved(back), back))
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_of_gaussians_and_descriptors(dtype: torch.dtype) -> None:
    ops = torch.ops.pglcl_ext
    for pairwise in (False, True):
        anchors, *rest = gaussian_problem(11, 8, pairwise=pairwise)
        want = calls.gaussian_contrast(anchors.to(dtype), *rest)
        got = calls.gaussian_contrast(shifted(anchors.to(dtype)), *(shifted(t) for t in rest))
        for a, b in zip(got, want):
            assert torch.equal(a, b)
    for channels in (1, 3):
        a, b = torch.rand(20, channels).to(dtype), torch.rand(17, channels).to(dtype)
        y, z, grad = torch.randint(-1, 3, (20,)), torch.randint(-1, 3, (17,)), torch.randn(20, 17).to(dtype)
        assert torch.equal(ops.semantic_disparity(shifted(a), shifted(b)), ops.semantic_disparity(a, b))
        moved = ops.semantic_disparity_backward(shifted(grad), shifted(a), shifted(b), True, True)
        for got, want in zip(moved, ops.semantic_disparity_backward(grad, a, b, True, True)):
            assert torch.equal(got, want)
        keys = (shifted(a), shifted(y), shifted(b), shifted(z))
        for positives in (True, False):
            want = ops.disparity_bounds(a, y, b, z, 3, positives, -1, -1)
            got = ops.disparity_bounds(*keys, 3, positives, -1, -1)
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_of_every_tensor(dtype: torch.dtype) -> None:
    problem = ContrastProblem.random(
        40, 16, m=50, max_positive_disparity=torch.rand(40), min_negative_disparity=torch.rand(40) / 3
    )
    ours = problem.cast(dtype)
    moved = ContrastProblem(
        *(shifted(t.detach()) for t in (ours.anchors, ours.labels, ours.descriptors, ours.keys, ours.key_labels)),
        shifted(ours.key_descriptors),
        {name: shifted(v) if isinstance(v, torch.Tensor) else v for name, v in ours.options.items()},
    )
    want, wanted = calls.patch_contrast(
        ours.anchors,
        ours.labels,
        ours.descriptors,
        keys=ours.keys,
        key_labels=ours.key_labels,
        key_descriptors=ours.key_descriptors,
        **ours.options,
    )
    got, grads = calls.patch_contrast(
        moved.anchors,
        moved.labels,
        moved.descriptors,
        keys=moved.keys,
        key_labels=moved.key_labels,
        key_descriptors=moved.key_descriptors,
        **moved.options,
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    x = torch.randn(1, 3, 8, 16).to(dtype)
    for a, b in zip(
        calls.patch_statistics(shifted(x), [4, 8], [4, 8], None, probabilities=False, normalize=False)[0],
        calls.patch_statistics(x, [4, 8], [4, 8], None, probabilities=False, normalize=False)[0],
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "patch", "stride"), [(20, 4, 4), (36, 18, 18), (26, 8, 6), (24, 16, 4), (32, 18, 6)])
def test_statistics_of_widths_that_vectors_do_not_divide(
    width: int, patch: int, stride: int, dtype: torch.dtype
) -> None:
    x = torch.randn(1, 3, 6, width, dtype=torch.float64).to(dtype)
    got, _ = calls.patch_statistics(x, [3, patch], [3, stride], None, probabilities=False, normalize=False)
    want = reference.patch_statistics(x.double(), (3, patch), (3, stride))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_statistics_of_probabilities_that_are_exactly_zero() -> None:
    p = torch.rand(1, 5, 8, 8, dtype=torch.float64).softmax(1)
    p[:, 2] = 0
    p[0, 0, 3, 3] = 0
    weights = [torch.randn(1, 2, 2).double(), torch.randn(1, 5, 2, 2).double(), torch.zeros(1, 5, 2, 2).double()]
    got, grad = calls.patch_statistics(p, [4, 4], [4, 4], weights, probabilities=True, normalize=False)
    assert torch.equal(got[2][:, 2], torch.zeros(1, 2, 2).double())
    assert torch.isfinite(grad).all()
    for a, b in zip(got, reference.patch_statistics(p, 4, probabilities=True)):
        torch.testing.assert_close(a, b)


def test_labels_beyond_the_classes_and_an_ignored_class() -> None:
    anchors, labels, means, covariances, counts = gaussian_problem(30, 8)
    labels = labels.clone()
    labels[3], labels[4] = 7, 4  # beyond the four classes
    labels[5] = 2
    loss, gradients, valid = calls.gaussian_contrast(
        anchors, labels, means, covariances, counts, reduction="none", ignore_index=2
    )
    left_out = (labels < 0) | (labels >= 4) | (labels == 2)
    assert torch.all(loss[left_out] == 0)
    assert torch.all(gradients[left_out] == 0)
    assert int(valid) == int((~left_out).sum())
    want = reference.gaussian_contrast_loss(
        anchors[~left_out], labels[~left_out], means, covariances, counts, reduction="none"
    )
    torch.testing.assert_close(loss[~left_out], want)


@pytest.mark.parametrize("positives", [True, False])
def test_exactly_as_many_keys_as_asked_for(positives: bool) -> None:
    for channels in (1, 2):
        a = torch.rand(9, channels).double()
        y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
        for count in range(1, 8):
            got, want = calls.disparity_bounds(a, y, a, y, count, positives=positives, self_offset=0)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bounds_and_logits_that_are_no_numbers(bad: float) -> None:
    problem = ContrastProblem.random(20, 8, classes=2, ignored=False, reduction="none")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bounds = torch.full((20,), 0.5)
        bounds[4] = math.nan
        loss, _ = calls.patch_contrast(
            problem.anchors.to(dtype),
            problem.labels,
            problem.descriptors,
            max_positive_disparity=bounds,
            reduction="none",
        )
        assert torch.isnan(loss[4])
        assert torch.isfinite(loss[torch.arange(20) != 4]).all()
    x = torch.randn(1, 3, 8, 8)
    x[0, 1, 2, 3] = bad
    (h, *_), _ = calls.patch_statistics(x, [4, 4], [4, 4], None, probabilities=False, normalize=False)
    assert torch.isnan(h[0, 0, 0])
    assert torch.isfinite(h.flatten()[1:]).all()


def test_float32_is_not_truncated_to_tf32() -> None:
    problem = ContrastProblem.random(40, 32, temperature=0.1)
    exact, _ = calls.patch_contrast(problem.anchors, problem.labels)
    rounded, _ = calls.patch_contrast(problem.anchors.float(), problem.labels)
    tf32, _ = calls.patch_contrast(problem.anchors.float(), problem.labels, allow_tf32=True)
    truncated = (problem.anchors.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
    cut, _ = calls.patch_contrast(truncated.double(), problem.labels)
    assert abs(rounded.double() - exact) < 2e-6 * exact
    assert abs(tf32.double() - exact) < 0.5 * abs(cut - exact)
