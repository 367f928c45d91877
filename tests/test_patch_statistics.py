"""patch_statistics and patch_entropy against the reference, and their properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pglcl_ext import PatchStatistics, patch_entropy, patch_statistics, reference
from pglcl_ext.patch_statistics import pixel_entropy
from tests.problems import DTYPES

ops = torch.ops.pglcl_ext

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_matches_reference(input: Tensor, dtype: torch.dtype, device: torch.device | str, *grid, **options) -> None:
    x = input.to(device, dtype).requires_grad_()
    oracle = x.detach().double().cpu().requires_grad_()
    got, want = patch_statistics(x, *grid, **options), reference.patch_statistics(oracle, *grid, **options)
    for a, b, name in zip(got, want, PatchStatistics._fields, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double().cpu(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=name)
    weights = [torch.linspace(-1, 1, b.numel(), dtype=torch.float64).reshape(b.shape) for b in want]
    (a,) = torch.autograd.grad(got, x, [w.to(device, dtype) for w in weights])
    (b,) = torch.autograd.grad(want, oracle, weights)
    assert torch.isfinite(b).all()
    scale = max(b.abs().max().item(), 1e-3)
    torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=4 * TOLERANCE[dtype] * scale)


GRIDS = [
    ((2, 3, 20, 23), 5, None),
    ((2, 2, 20, 23), (5, 4), (2, 3)),
    ((1, 4, 33, 65), 16, None),
    ((1, 7, 16, 16), 16, None),
    ((1, 4, 64, 40), 16, 8),
    ((1, 3, 17, 19), 3, 7),
    ((1, 4, 9, 10, 11), (3, 4, 5), (2, 2, 3)),
    ((2, 3, 8, 8, 8), 4, None),
    ((1, 2, 1, 1), 1, None),
]


@pytest.mark.parametrize(("shape", "patch", "stride"), GRIDS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(shape, patch, stride, probabilities: bool, dtype, device: torch.device) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 2
    x = x.softmax(1) if probabilities else x
    for normalize in (False, True):
        assert_matches_reference(x, dtype, device, patch, stride, probabilities=probabilities, normalize=normalize)


def test_every_instruction_set_matches_the_reference(isa: str) -> None:
    for shape, patch, stride in GRIDS:
        for dtype in DTYPES:
            assert_matches_reference(torch.randn(shape, dtype=torch.float64), dtype, "cpu", patch, stride)


@given(data=st.data())
def test_random_grids_agree_with_plain_pytorch(data: st.DataObject) -> None:
    dims = data.draw(st.integers(2, 3))
    image = [data.draw(st.integers(1, 20)) for _ in range(dims)]
    patch = [data.draw(st.integers(1, s)) for s in image]
    stride = [data.draw(st.integers(1, 2 * p)) for p in patch]
    shape = (data.draw(st.integers(1, 2)), data.draw(st.integers(2, 6)), *image)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    probabilities = data.draw(st.booleans())
    x = x.softmax(1) if probabilities else x
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    assert_matches_reference(x, dtype, "cpu", patch, stride, probabilities=probabilities)


def test_statistics_stay_in_their_bounds_and_ignore_a_shift(device: torch.device) -> None:
    x = torch.randn(2, 4, 24, 24, device=device) * 3
    s = patch_statistics(x, 8)
    assert (s.entropy >= 0).all()
    assert (s.entropy <= math.log(4)).all()
    torch.testing.assert_close(s.confidence.sum(1), torch.ones_like(s.entropy))
    # A shifted logit changes no entropy, nor does the order of the classes.
    shift = torch.randn(2, 1, 24, 24, device=device)
    torch.testing.assert_close(patch_entropy(x + shift, 8), s.entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patch_entropy(x.flip(1), 8), s.entropy)
    # Uniform predictions have the largest entropy, log K, or 1 when normalised.
    torch.testing.assert_close(
        patch_entropy(torch.zeros(1, 4, 8, 8, device=device), 8, normalize=True), torch.ones(1, 1, 1, device=device)
    )
    # The entropy of a patch is the mean of its classes', weighted by their confidence.
    torch.testing.assert_close((s.class_entropy * s.confidence).sum(1), s.entropy)


def test_extreme_logits_give_finite_statistics_and_gradients(device: torch.device) -> None:
    x = (torch.randint(0, 2, (1, 3, 16, 16), device=device) * 2e4 - 1e4).requires_grad_()
    s = patch_statistics(x, 4)
    for t in s:
        assert torch.isfinite(t).all()
    (grad,) = torch.autograd.grad([t.sum() for t in s], x)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("gap", [60.0, 80.0, 87.0, 90.0, 100.0, 104.0, 1e4])
def test_statistics_of_an_unlikely_class_are_exact(gap: float, isa: str) -> None:
    x = torch.randn(1, 2, 8, 8)
    x[:, 1] -= gap
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = patch_statistics(ours, 4), reference.patch_statistics(exact, 4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    (a,) = torch.autograd.grad([t.sum() for t in got], ours)
    (b,) = torch.autograd.grad([t.sum() for t in want], exact)
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_class_entropy_of_confident_logits_is_exact_in_low_precision(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 16, 16)
    x[:, 0] += 9
    x = x.to(dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 3.0])[:, None, None] * 64  # a loss scale: float16 would lose small gradients
    (a,) = torch.autograd.grad(patch_statistics(ours, 8).class_entropy, ours, weights.expand(1, 3, 2, 2).to(dtype))
    (b,) = torch.autograd.grad(
        reference.patch_statistics(exact, 8).class_entropy, exact, weights.expand(1, 3, 2, 2).double()
    )
    torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=float(1e-3 * b.abs().max()))


def test_gradients_of_probabilities_below_the_normal_range_are_exact(device: torch.device) -> None:
    tiny = torch.tensor([1e-37, 1.5e-38, 1e-39, 1e-42, 1.4e-45], device=device)
    p = torch.stack([torch.ones_like(tiny), tiny]).reshape(1, 2, 1, 5)
    ours, exact = p.clone().requires_grad_(), p.double().requires_grad_()
    (a,) = torch.autograd.grad(patch_entropy(ours, 1, probabilities=True).sum(), ours)
    (b,) = torch.autograd.grad(reference.patch_entropy(exact, 1, probabilities=True).sum(), exact)
    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)  # -(log p + 1): 95.7 at 1e-42


def test_an_absent_class_and_a_certain_one_have_entropy_0(device: torch.device) -> None:
    p = torch.zeros(1, 3, 8, 8, device=device)
    p[:, 0] = 1
    p.requires_grad_()
    s = patch_statistics(p, 4, probabilities=True)
    assert torch.equal(s.entropy, torch.zeros_like(s.entropy))
    assert torch.equal(s.class_entropy, torch.zeros_like(s.class_entropy))
    (grad,) = torch.autograd.grad([t.sum() for t in s], p)
    assert torch.isfinite(grad).all()


def test_nan_stays_in_its_patch(device: torch.device) -> None:
    for bad in (math.nan, math.inf):
        x = torch.randn(1, 3, 16, 16, device=device)
        x[0, 1, 2, 3] = bad
        h = patch_entropy(x, 8)
        assert torch.isnan(h[0, 0, 0])
        assert torch.isfinite(h.flatten()[1:]).all()


@pytest.mark.parametrize("stride", [2**31, 2**62, 2**63 - 1])
def test_a_stride_beyond_the_image_leaves_one_patch(stride: int, device: torch.device) -> None:
    x = torch.randn(2, 3, 9, 8, device=device, requires_grad=True)
    results = []
    for step in (9, stride):
        s = patch_statistics(x, 4, step)
        assert s.entropy.shape == (2, 1, 1)
        results.append([*s, *torch.autograd.grad([t.sum() for t in s], x)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_empty_batch_gives_empty_statistics(device: torch.device) -> None:
    x = torch.zeros(0, 3, 16, 16, device=device, requires_grad=True)
    s = patch_statistics(x, 8)
    assert s.entropy.shape == (0, 2, 2)
    assert s.confidence.shape == (0, 3, 2, 2)
    torch.autograd.grad([t.sum() for t in s], x)


def test_slices_and_transposes_change_no_statistics(device: torch.device) -> None:
    wide = torch.randn(4, 6, 40, 40, device=device)
    for x in (wide[1:3, ::2, 3:30, 5:33], wide.transpose(2, 3), wide[:, :1].expand(4, 3, 40, 40)):
        for a, b in zip(patch_statistics(x, 9), patch_statistics(x.contiguous(), 9), strict=True):
            assert torch.equal(a, b)


def test_same_bits_for_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    x = torch.randn(2, 4, 100, 100, requires_grad=True)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        s = patch_statistics(x, 16, 8)
        results.append((*s, *torch.autograd.grad([t.square().sum() for t in s], x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck_derivatives_and_compilation_pass(device: torch.device) -> None:
    x = torch.randn(2, 3, 9, 8, device=device, dtype=torch.float64, requires_grad=True)
    arguments = (x, [4, 3], [2, 3], False, True)
    torch.library.opcheck(ops.patch_statistics.default, arguments)
    with torch.no_grad():
        s = ops.patch_statistics(*arguments)
    grads = tuple(torch.randn_like(t) for t in s)
    torch.library.opcheck(
        ops.patch_statistics_backward.default, (*grads, x.detach(), s[1], s[2], [4, 3], [2, 3], False, True)
    )
    assert torch.autograd.gradcheck(lambda x: tuple(patch_statistics(x, 3, 2)), x)
    p = torch.rand_like(x).softmax(1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: tuple(patch_statistics(p, 3, probabilities=True)), p)
    compiled = torch.compile(patch_statistics, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, 4), patch_statistics(x, 4), strict=True):
        torch.testing.assert_close(a, b)
    (grad,) = torch.autograd.grad(patch_entropy(x, 4).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="patch_statistics cannot be differentiated twice"):
        grad.sum().backward()


def test_autocast_keeps_the_dtype_of_the_input(device: torch.device) -> None:
    conv = torch.nn.Conv2d(1, 3, 3).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        s = patch_statistics(conv(torch.randn(1, 1, 18, 18, device=device)), 8)
    assert s.entropy.dtype == torch.bfloat16
    s.entropy.sum().backward()
    assert torch.isfinite(conv.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_pytorch(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 4, 32, 32, device=device).to(dtype)
    exact = reference.patch_statistics(x.double(), 8)
    for ours, plain, e in zip(patch_statistics(x, 8), reference.patch_statistics(x, 8), exact, strict=True):
        assert (ours - e).abs().max() <= (plain - e).abs().max() + torch.finfo(dtype).eps


BAD_CALLS = [
    ("input must have shape", ValueError, (torch.zeros(3, 8, 8), 4)),
    ("at least two classes", ValueError, (torch.zeros(1, 1, 8, 8), 4)),
    ("must not exceed the image", ValueError, (torch.zeros(1, 2, 8, 8), 9)),
    ("patch_size must be positive", ValueError, (torch.zeros(1, 2, 8, 8), 0)),
    ("stride must be positive", ValueError, (torch.zeros(1, 2, 8, 8), 4, 0)),
    ("one entry per spatial dimension", ValueError, (torch.zeros(1, 2, 8, 8), (4, 4, 4))),
    ("input must be float64", TypeError, (torch.zeros(1, 2, 8, 8, dtype=torch.long), 4)),
    ("patch_size must be an int", TypeError, (torch.zeros(1, 2, 8, 8), 4.0)),
]


@pytest.mark.parametrize(("message", "error", "arguments"), BAD_CALLS)
def test_bad_input_is_refused_by_name(message: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        patch_statistics(*arguments)


def test_flags_that_are_not_bool_are_refused() -> None:
    for name in ("probabilities", "normalize"):
        for bad in ("no", None, 1, torch.tensor(True)):
            with pytest.raises(TypeError, match=f"{name} must be True or False, got {type(bad).__name__}"):
                patch_statistics(torch.zeros(1, 2, 8, 8), 4, **{name: bad})


def test_gradients_keep_their_digits_at_large_logits(device: torch.device) -> None:
    """The gradient of a certain pixel is 0 for logits of any size. Other pixels have the gradient of small logits."""
    logits = torch.tensor([[201.7726, -159.5181, 300.25, -700.5], [-159.5181, 201.7726, 300.75, -700.25]])
    ours = logits.view(1, 2, 2, 2).to(device).requires_grad_()
    oracle = logits.view(1, 2, 2, 2).double().requires_grad_()
    grads = []
    for function, x in ((patch_statistics, ours), (reference.patch_statistics, oracle)):
        values = function(x, 1)
        total = values.entropy.sum() + values.confidence.square().sum() + values.class_entropy.sum()
        grads.append(torch.autograd.grad(total, x)[0].double().cpu())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("gap", "stride"), [(70, 4), (80, 4), (80, 1), (82, 4)])
def test_the_gradient_of_an_unlikely_class_beside_two_likely_ones_is_exact(gap: float, stride: int, isa: str) -> None:
    """The third class has the class entropy of the pixels where it is least unlikely, so its gradient is not small."""
    x = torch.randn(1, 3, 8, 8)
    x[:, 2] -= gap
    grads = []
    for function, leaf in ((patch_statistics, x.clone()), (reference.patch_statistics, x.double())):
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf, 4, stride).class_entropy[:, 2].sum(), leaf)
        grads.append(grad.double())
    assert grads[1].abs().max() > 1e-2
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 7, 11])
def test_logits_of_minus_infinity_count_as_probability_0(classes: int, dtype: torch.dtype, isa: str) -> None:
    """A masked class, -inf, has probability 0. So has a logit that is smaller by more than the largest number."""
    largest = torch.finfo(dtype).max
    x = torch.randn(1, classes, 6, 37, dtype=torch.float64)
    x[0, 0, 0], x[0, 1, 1, ::2], x[0, 0, 2, 5:9] = -math.inf, -math.inf, -largest
    x[0, 1:, 4, 3:30], x[0, :-1, 5, 7:] = -math.inf, -math.inf  # all but one class
    if dtype != torch.float64:  # the reference can hold their difference
        x[0, 0, 3], x[0, 1, 3] = largest, -largest
    ours, exact = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
    got, want = patch_statistics(ours, 3), reference.patch_statistics(exact, 3)
    for a, b in zip(got, want, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    (a,) = torch.autograd.grad([t.sum() for t in got], ours)
    (b,) = torch.autograd.grad([t.sum() for t in want], exact)
    torch.testing.assert_close(a.double(), b, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("classes", [2, 3, 7, 11])
def test_float64_logits_beyond_float32_agree_with_plain_pytorch(classes: int, isa: str) -> None:
    """Logits up to the largest float64, whose distance is infinite; no class, one class or all of them are likely."""
    x = torch.randn(1, classes, 6, 37, dtype=torch.float64)
    x[0, :, 0] *= 1e39
    x[0, 0, 1], x[0, 1, 1] = 1.7e308, -1.7e308
    x[0, :, 2] += 1e300
    x[0, :, 3] -= 1e18
    ours, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = patch_statistics(ours, 3), reference.patch_statistics(exact, 3)
    for a, b in zip(got, want, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (a,) = torch.autograd.grad([t.sum() for t in got], ours)
    (b,) = torch.autograd.grad([t.sum() for t in want], exact)
    torch.testing.assert_close(a, b, rtol=4e-12, atol=4e-12)


@pytest.mark.parametrize("classes", [2, 3, 7, 11])
def test_a_pixel_without_probabilities_spoils_all_classes_of_its_patch(classes: int, isa: str) -> None:
    """All logits of the pixel are minus infinity, or that of any one class is plus infinity or NaN."""
    for bad, which in ((-math.inf, slice(None)), (math.inf, 0), (math.inf, 1), (math.nan, 0), (math.nan, classes - 1)):
        x = torch.randn(1, classes, 4, 12)
        x[0, which, 1, 5] = bad
        leaf = x.requires_grad_()
        s = patch_statistics(leaf, 4)
        for t in s:
            assert t.isnan().flatten(0, -2).any(0).tolist() == [False, True, False]
            assert t[..., 1].isnan().all()
        (grad,) = torch.autograd.grad([t.sum() for t in s], leaf)
        assert grad[..., :4].isfinite().all()
        assert grad[..., 8:].isfinite().all()
        assert grad[0, :, 1, 5].isnan().all()


def test_the_reference_has_nan_at_the_same_places() -> None:
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    x[0, 1, 1, 5] = math.nan
    for ours, theirs in zip(patch_statistics(x, 4), reference.patch_statistics(x, 4), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_class_of_negative_probability_has_no_gradient(isa: str) -> None:
    """Interpolation can make negative probabilities. Such a class counts as absent, so its class entropy is 0."""
    x = torch.rand(1, 3, 4, 4)
    x[0, 2] = -1e-3
    results = []
    for function, kind in ((patch_statistics, torch.float32), (reference.patch_statistics, torch.float64)):
        leaf = x.to(kind).requires_grad_()
        s = function(leaf, 4, probabilities=True)
        assert s.class_entropy[0, 2] == 0
        results.append(torch.autograd.grad(s.class_entropy.sum(), leaf)[0].double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_as_it_is(dtype: torch.dtype, isa: str) -> None:
    """A patch of one pixel has that pixel's probability, even an infinite one, also in the last part of a vector."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for width in (256, 37):
        images = numbers[: 65536 // width * width].view(1, 1, -1, width).expand(1, 2, -1, -1)
        confidence = patch_statistics(images, 1, probabilities=True).confidence
        assert torch.equal(confidence.nan_to_num(nan=-7.0), images.nan_to_num(nan=-7.0))
        assert torch.equal(confidence.isnan(), images.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_to_16_bits_as_pytorch_does(dtype: torch.dtype, isa: str) -> None:
    """The mean of two pixels returns half of its gradient to each; a subnormal half lies between two numbers. A pixel
    in two patches gets the sum of both halves."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    upstream = numbers[numbers.isfinite()]
    upstream = upstream[: len(upstream) // 74 * 74].view(1, 1, -1, 74).expand(1, 2, -1, -1)
    half = upstream.float() / 2
    for stride, want in ((2, half.repeat_interleave(2, dim=3)), (1, F.pad(half, (0, 1)) + F.pad(half, (1, 0)))):
        images = torch.full_like(want, 0.5, dtype=dtype).requires_grad_()
        confidence = patch_statistics(images, (1, 2), (1, stride), probabilities=True).confidence
        [gradient] = torch.autograd.grad(confidence, images, upstream)
        assert torch.equal(gradient, want.to(dtype))


def test_entropy_of_a_pixel_is_that_of_a_patch_of_one_pixel() -> None:
    p = torch.randn(2, 3, 4, 5, dtype=torch.float64).mul(3).softmax(dim=1)
    p[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(pixel_entropy(p), patch_entropy(p, 1, probabilities=True))
    assert torch.equal(pixel_entropy(p.movedim(1, 0), dim=0), pixel_entropy(p))
