"""patch_contrast_loss and PatchContrastLoss against the reference, the published formula, and their properties."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pglcl_ext import GaussianContrastLoss, PatchContrastLoss, patch_contrast_loss, reference
from pglcl_ext._arguments import Choice, ContrastArguments, ContrastNumbers, Side
from pglcl_ext._checks import REDUCTIONS
from pglcl_ext._library import ops
from tests.conftest import DEVICES
from tests.problems import DTYPES, TOLERANCE, ContrastProblem, assert_matches_reference, embeddings

OPTIONS = {
    "plain": {},
    "bounds": {"max_positive_disparity": 0.5, "min_negative_disparity": 0.1},
    "narrow": {"max_positive_disparity": 0.05, "min_negative_disparity": 0.7},
    "counts": {"num_positives": 3, "num_negatives": 5},
    "count and bound": {"num_positives": 4, "min_negative_disparity": 0.2},
    "weighted": {"negative_weight": 30.0},
    "no negatives": {"negative_weight": 0.0},
    "cold": {"temperature": 1e-3},
    "cold and weighted": {"temperature": 5e-3, "negative_weight": 4096.0},
    "warm": {"temperature": 5.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "max_positive_disparity": 0.4},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [None, 170], ids=["self", "keys"])
def test_matches_reference(name: str, dtype: torch.dtype, m: int | None, device: torch.device) -> None:
    assert_matches_reference(ContrastProblem.random(300, 33, m=m, **OPTIONS[name]), dtype, device)


@pytest.mark.parametrize("n", [1, 2, 31, 33, 127, 128, 129, 257])
@pytest.mark.parametrize("m", [None, 1, 128, 200])
def test_sizes_that_do_not_divide_tiles(n: int, m: int | None, device: torch.device) -> None:
    for d in (1, 7, 64):
        problem = ContrastProblem.random(n, d, m=m, classes=2, max_positive_disparity=0.6)
        assert_matches_reference(problem, torch.float32, device)


def test_every_instruction_set(isa: str) -> None:
    for dtype in DTYPES:
        for m in (None, 150):
            assert_matches_reference(ContrastProblem.random(280, 40, m=m, max_positive_disparity=0.5), dtype, "cpu")
            assert_matches_reference(ContrastProblem.random(280, 40, m=m, temperature=1e-2), dtype, "cpu")


@given(data=st.data())
def test_random_problems(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200), "n")
    m = data.draw(st.none() | st.integers(1, 200), "m")
    channels = data.draw(st.sampled_from([None, 1, 2, 5]), "channels")
    options = {"temperature": data.draw(st.sampled_from([0.01, 0.1, 1.0]), "temperature")}
    options["negative_weight"] = data.draw(st.sampled_from([0.0, 0.5, 1.0, 100.0]), "weight")
    options["reduction"] = data.draw(st.sampled_from(["none", "mean", "sum"]), "reduction")
    problem = ContrastProblem.random(
        n,
        data.draw(st.integers(1, 40), "d"),
        m=m,
        classes=data.draw(st.integers(1, 6), "classes"),
        channels=channels,
        seed=data.draw(st.integers(0, 1000), "seed"),
        **options,
    )
    if channels:
        for side, bound, count in (
            ("positive", "max_positive_disparity", "num_positives"),
            ("negative", "min_negative_disparity", "num_negatives"),
        ):
            kind = data.draw(st.sampled_from(["none", "number", "tensor", "count"]), side)
            if kind == "number":
                problem.options[bound] = data.draw(st.floats(0, 1, width=32), bound)
            elif kind == "tensor":
                problem.options[bound] = torch.rand(len(problem.anchors))
            elif kind == "count":
                problem.options[count] = data.draw(st.integers(1, 20), count)
    assert_matches_reference(problem, data.draw(st.sampled_from(DTYPES), "dtype"), "cpu")


@pytest.mark.parametrize("m", [None, 90], ids=["self", "keys"])
def test_explicit_masks(m: int | None, device: torch.device) -> None:
    problem = ContrastProblem.random(140, 16, m=m)
    shape = (140, m or 140)
    problem.options = {"positive_mask": torch.rand(shape) < 0.1, "negative_mask": torch.rand(shape) < 0.5}
    for dtype in DTYPES:
        assert_matches_reference(problem, dtype, device)
    # Transposed and expanded masks are read as they are, without a copy.
    problem.options = {
        "positive_mask": (torch.rand(shape[::-1]) < 0.1).t(),
        "negative_mask": (torch.rand(1, shape[1]) < 0.5).expand(shape),
    }
    assert_matches_reference(problem, torch.float32, device)


def supervised_contrastive_loss(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """L_out of Khosla et al. 2020, equation 2, as a double loop over the batch."""
    total, anchors = 0.0, 0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        if not positives:
            continue
        denominator = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        logs = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / denominator) for p in positives]
        total -= sum(logs) / len(positives)
        anchors += 1
    return torch.tensor(total / anchors, dtype=torch.float64)


def test_defaults_are_the_supervised_contrastive_loss(device: torch.device) -> None:
    z, y = embeddings(60, 12), torch.randint(0, 7, (60,))
    loss = patch_contrast_loss(z.to(device), y.to(device), temperature=0.2)
    torch.testing.assert_close(loss.cpu(), supervised_contrastive_loss(z, y, 0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_pytorch(dtype: torch.dtype, device: torch.device) -> None:
    problem = ContrastProblem.random(500, 64, max_positive_disparity=0.5, min_negative_disparity=0.1)
    ours, plain = problem.cast(dtype, device), problem.cast(dtype, device)
    exact = problem.cast(torch.float64)
    with torch.no_grad():
        exact.anchors.copy_(ours.anchors)
    expected = exact.loss(reference.patch_contrast_loss)
    (want,) = exact.gradients(expected)
    errors = []
    for p, function in ((ours, patch_contrast_loss), (plain, reference.patch_contrast_loss)):
        loss = p.loss(function)
        (grad,) = p.gradients(loss)
        errors.append(((loss.double().cpu() - expected).abs(), (grad.double().cpu() - want).abs().max()))
    assert errors[0][0] <= errors[1][0] + 1e-6
    assert errors[0][1] <= errors[1][1] + 1e-3 * want.abs().max()


# --- properties -----------------------------------------------------------------------------------------------------


def test_permuting_keys_changes_nothing(device: torch.device) -> None:
    p = ContrastProblem.random(100, 16, m=150, max_positive_disparity=0.4).cast(torch.float64, device)
    order = torch.randperm(150, device=device)
    q = ContrastProblem(
        p.anchors,
        p.labels,
        p.descriptors,
        p.keys[order],
        p.key_labels[order],
        p.key_descriptors[order],
        p.options,
    )
    torch.testing.assert_close(p.loss(), q.loss())


def test_permuting_anchors_permutes_losses(device: torch.device) -> None:
    p = ContrastProblem.random(150, 16, reduction="none").cast(torch.float64, device)
    order = torch.randperm(150, device=device)
    q = ContrastProblem(p.anchors[order], p.labels[order], p.descriptors[order], options=p.options)
    torch.testing.assert_close(p.loss()[order], q.loss())


def test_splitting_keys_and_merging_gives_the_same(device: torch.device) -> None:
    p = ContrastProblem.random(100, 16, m=150).cast(torch.float64, device)

    def part(keys: slice) -> tuple[Tensor, ...]:
        none = (None,) * 5
        numbers = (0.1, math.inf, 0.0, 1.0, -1, -1, 0, False)
        return ops.patch_contrast(p.anchors, p.labels, None, p.keys[keys], p.key_labels[keys], *none, *numbers)

    _, max_a, sum_a, logit_a, count_a, _ = part(slice(0, 60))
    _, max_b, sum_b, logit_b, count_b, _ = part(slice(60, 150))
    lse, count = torch.logaddexp(max_a + sum_a, max_b + sum_b), count_a + count_b
    logit = logit_a * count_a + logit_b * count_b
    merged = torch.where(count > 0, lse - logit / count.clamp(min=1), 0)
    _, whole_max, whole_sum, _, whole_count, _ = part(slice(0, 150))
    torch.testing.assert_close(lse, whole_max + whole_sum)
    assert torch.equal(count, whole_count)
    loss = patch_contrast_loss(p.anchors, p.labels, keys=p.keys, key_labels=p.key_labels)
    torch.testing.assert_close(merged.sum() / (count > 0).sum(), loss)


def test_scaling_temperature_and_embeddings_changes_nothing(device: torch.device) -> None:
    z, y = embeddings(90, 10).to(device), torch.randint(0, 3, (90,), device=device)
    a = patch_contrast_loss(z, y, temperature=0.1)
    torch.testing.assert_close(patch_contrast_loss(3 * z, y, temperature=0.9), a)


# Some are alike in their lower 32 bits, some lie at the ends of 31 and 32 bits, and one may be a row's number there.
LABELS = [0, 2**32, -(2**32), 2**30 - 1, 2**30, 2**30 + 3, -(2**30), -(2**30) - 1, 2**31, -(2**62), 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 70], ids=["self", "keys"])
def test_other_label_values_change_nothing(device: torch.device, m: int | None, dtype: torch.dtype) -> None:
    p = ContrastProblem.random(150, 16, m=m, max_positive_disparity=0.5, ignore_index=7).cast(dtype, device)
    names = torch.tensor(LABELS, device=device)
    p.labels = torch.arange(len(p.labels), device=device) % len(LABELS)
    if p.key_labels is not None:
        p.key_labels = torch.arange(len(p.key_labels), device=device) % len(LABELS)
    loss = p.loss()
    gradients = p.gradients(loss)
    p.labels, p.key_labels = names[p.labels], None if p.key_labels is None else names[p.key_labels]
    p.options["ignore_index"] = LABELS[7]
    renamed = p.loss()
    torch.testing.assert_close(renamed, loss)
    for one, other in zip(p.gradients(renamed), gradients):
        torch.testing.assert_close(one, other)


def test_ignored_patches_are_as_if_absent(device: torch.device) -> None:
    p = ContrastProblem.random(150, 16, max_positive_disparity=0.5).cast(torch.float64, device)
    kept = p.labels != -1
    q = ContrastProblem(p.anchors[kept], p.labels[kept], p.descriptors[kept], options=p.options)
    torch.testing.assert_close(p.loss(), q.loss())
    (grad,) = p.gradients(p.loss())
    assert torch.all(grad[~kept] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 700], ids=["self", "keys"])
def test_same_bits_for_any_number_of_threads(
    dtype: torch.dtype, m: int | None, set_threads: Callable[[int], None]
) -> None:
    results = []
    for threads in (1, 2, 5, 2):
        set_threads(threads)
        p = ContrastProblem.random(900, 64, m=m, max_positive_disparity=0.5).cast(dtype)
        loss = p.loss()
        results.append((loss, *p.gradients(loss)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# --- PyTorch's features ---------------------------------------------------------------------------------------------


def op_arguments(device: torch.device, dtype: torch.dtype, *, keys: bool, reduction: int) -> tuple:
    p = ContrastProblem.random(40, 8, m=30 if keys else None).cast(dtype, device)
    side = (p.keys, p.key_labels, p.key_descriptors) if keys else (None, None, None)
    bounds = (torch.rand(40, device=device), None) if keys else (None, None)
    numbers = (0.1, 0.5, 0.1, 1.0, -1, -1, reduction, False)
    return (p.anchors, p.labels, p.descriptors, *side, *bounds, None, None, *numbers)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(keys: bool, reduction: int, device: torch.device) -> None:
    arguments = op_arguments(device, torch.float32, keys=keys, reduction=reduction)
    torch.library.opcheck(ops.patch_contrast.default, arguments)
    with torch.no_grad():
        loss, max_logit, log_sum, _, count, valid = ops.patch_contrast(*arguments)
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    backward = (torch.ones_like(loss), max_logit, log_sum, count, valid, *detached, True, keys)
    torch.library.opcheck(ops.patch_contrast_backward.default, backward)


def test_gradcheck(device: torch.device) -> None:
    for options in ({}, {"max_positive_disparity": 0.5}, {"num_positives": 2}, {"reduction": "none"}):
        for m in (None, 9):
            p = ContrastProblem.random(12, 4, m=m, classes=2, **options).cast(torch.float64, device)

            def loss(anchors: Tensor, keys: Tensor | None = None, p: ContrastProblem = p) -> Tensor:
                side = (p.key_labels, p.key_descriptors)
                return ContrastProblem(anchors, p.labels, p.descriptors, keys, *side, p.options).loss()

            assert torch.autograd.gradcheck(loss, (p.anchors,) if m is None else (p.anchors, p.keys))


def test_double_backward_is_refused(device: torch.device) -> None:
    p = ContrastProblem.random(20, 4).cast(torch.float64, device)
    (grad,) = torch.autograd.grad(p.loss(), p.anchors, create_graph=True)
    with pytest.raises(NotImplementedError, match="patch_contrast_loss cannot be differentiated twice"):
        grad.sum().backward()


def test_compiles_whole(device: torch.device) -> None:
    p = ContrastProblem.random(60, 8, m=50).cast(torch.float32, device)
    q = ContrastProblem.random(60, 8, num_positives=3).cast(torch.float32, device)
    for problem in (p, q):
        compiled = torch.compile(patch_contrast_loss, fullgraph=True, backend="aot_eager")
        loss, expected = problem.loss(compiled), problem.loss()
        torch.testing.assert_close(loss, expected)
        for a, b in zip(problem.gradients(loss), problem.gradients(expected)):
            torch.testing.assert_close(a, b)
    module = PatchContrastLoss(0.1, max_positive_disparity=0.5)
    compiled_module = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled_module(q.anchors, q.labels, q.descriptors), module(q.anchors, q.labels, q.descriptors)
    )


def test_autocast(device: torch.device) -> None:
    linear = torch.nn.Linear(8, 8).to(device)
    x, y = torch.randn(50, 8, device=device), torch.randint(0, 3, (50,), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        z = linear(x)
        assert z.dtype == torch.bfloat16
        loss = PatchContrastLoss()(z, y)
        # A teacher's float32 keys with bfloat16 anchors.
        mixed = PatchContrastLoss()(z, y, keys=torch.randn(20, 8, device=device), key_labels=y[:20])
    assert loss.dtype == mixed.dtype == torch.float32
    (loss + mixed).backward()
    assert torch.isfinite(linear.weight.grad).all()


def test_slices_expansions_and_transposes(device: torch.device) -> None:
    wide = torch.randn(70, 40, device=device, dtype=torch.float64)
    y, d = torch.randint(0, 3, (140,), device=device)[::2], torch.rand(70, 3, device=device)[:, 1]
    for z in (wide[:, 5:25], wide[:, ::2], torch.randn(9, 70, device=device).double().t(), wide[:1].expand(70, 40)):
        z = z / 10
        a = patch_contrast_loss(z, y, d, max_positive_disparity=0.4)
        b = patch_contrast_loss(z.contiguous(), y.contiguous(), d.contiguous(), max_positive_disparity=0.4)
        assert torch.equal(a, b)


def test_keys_without_gradient(device: torch.device) -> None:
    p = ContrastProblem.random(60, 8, m=50).cast(torch.float32, device)
    p.keys = p.keys.detach()
    p.loss().backward()
    assert p.keys.grad is None
    assert p.anchors.grad is not None


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", ["N=0", "M=0", "all ignored", "all different", "one patch", "D=0"])
def test_nothing_to_contrast_is_zero_and_stays_in_the_graph(case: str, reduction: str, device: torch.device) -> None:
    n, d = (0 if case == "N=0" else 1 if case == "one patch" else 30), (0 if case == "D=0" else 8)
    z = torch.randn(n, d, device=device, requires_grad=True)
    y = torch.arange(n, device=device) if case != "all ignored" else torch.full((n,), -1, device=device)
    keys = {}
    if case == "M=0":
        k = torch.randn(0, d, device=device, requires_grad=True)
        keys = {"keys": k, "key_labels": torch.zeros(0, dtype=torch.long, device=device)}
    loss = patch_contrast_loss(z, y, reduction=reduction, **keys)
    assert loss.shape == ((n,) if reduction == "none" else ())
    assert torch.all(loss == 0)
    loss.sum().backward()
    assert z.grad is not None
    assert torch.all(z.grad == 0)


def test_module_counts_anchors(device: torch.device) -> None:
    module = PatchContrastLoss()
    assert module.num_valid is None
    y = torch.tensor([0, 0, 1, 2, -1], device=device)
    module(torch.randn(5, 4, device=device), y)
    assert module.num_valid.item() == 2
    module(torch.randn(5, 4, device=device), torch.arange(5, device=device))
    assert module.num_valid.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype, device: torch.device) -> None:
    z = (torch.randn(200, 8, dtype=dtype, device=device) * 100).requires_grad_()
    y = torch.randint(0, 3, (200,), device=device)
    for temperature, weight in ((1.0, 1.0), (1e-3, 1.0), (1e-3, 1e30), (1e-3, 1e-30)):
        loss = patch_contrast_loss(z, y, temperature=temperature, negative_weight=weight)
        (grad,) = torch.autograd.grad(loss, z)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


def integer_problem(scale: float, *, m: int | None, **options: Any) -> ContrastProblem:
    """Embeddings of a few whole numbers times `scale`. If `scale` and temperature are powers of two, logits are exact
    in every dtype, and many of them are equal."""
    p = ContrastProblem.random(150, 5, m=m, classes=3, channels=None, **options)
    g = torch.Generator().manual_seed(1)
    p.anchors = torch.randint(-2, 3, p.anchors.shape, generator=g).double() * scale
    if p.keys is not None:
        p.keys = torch.randint(-2, 3, p.keys.shape, generator=g).double() * scale
    return p


def assert_large_logits_match(problem: ContrastProblem, dtype: torch.dtype) -> None:
    """Compares loss and gradients with the reference, which can hold the logits."""
    ours, oracle = problem.cast(dtype), problem.cast(torch.float64)
    value, expected = ours.loss(), oracle.loss(reference.patch_contrast_loss)
    torch.testing.assert_close(value.double(), expected, rtol=4e-6, atol=4e-6)
    epsilon = max(torch.finfo(dtype).eps, 4e-6)
    for a, b in zip(ours.gradients(value), oracle.gradients(expected)):
        floor = epsilon * b.abs().max()
        torch.testing.assert_close(a.double(), b.to(dtype).double(), rtol=2 * epsilon, atol=float(floor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [None, 130], ids=["self", "keys"])
def test_large_logits(dtype: torch.dtype, m: int | None, isa: str) -> None:
    for scale in (1.0, 2.0**5, 2.0**13) + (() if dtype == torch.float16 else (2.0**57,)):  # norms up to 3e4, 6e17
        for temperature in (2.0**-4, 1.0, 16.0):
            for weight in (0.0, 2.0**-10, 1.0, 1e7):
                options = {"temperature": temperature, "negative_weight": weight}
                assert_large_logits_match(integer_problem(scale, m=m, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 50], ids=["self", "keys"])
@pytest.mark.parametrize(("norm", "temperature"), [(1e18, 1e-4), (1e19, 1.0), (1e37, 0.1)])
def test_logits_beyond_float32(norm: float, temperature: float, m: int | None, dtype: torch.dtype, isa: str) -> None:
    """The loss is right, or infinite where its dtype cannot hold it. Every fifth anchor is short, with small logits."""
    for channels, options in ((1, {}), (3, {"num_positives": 3, "num_negatives": 4}), (1, {"negative_weight": 30.0})):
        p = ContrastProblem.random(60, 8, m=m, channels=channels, temperature=temperature, reduction="none", **options)
        with torch.no_grad():
            p.anchors.mul_(norm)
            p.anchors[::5].div_(norm)
            if p.keys is not None:
                p.keys.mul_(norm)
        p = p.cast(dtype)
        exact = p.cast(torch.float64)
        losses, wanted = p.loss(), exact.loss(reference.patch_contrast_loss)
        largest = torch.finfo(torch.float32).max
        assert torch.equal(losses.isinf(), wanted > largest)
        torch.testing.assert_close(losses.double(), wanted.where(wanted <= largest, math.inf), rtol=1e-5, atol=1e-5)
        weights = torch.linspace(0.5, 1.5, 60)
        for got, want in zip(p.gradients(losses, weights), exact.gradients(wanted, weights.double())):
            room = want.abs() < torch.finfo(dtype).max
            epsilon = 2 * max(torch.finfo(dtype).eps, 1e-5)
            floor = epsilon * float(want[room].abs().max())
            torch.testing.assert_close(got[room].double(), want[room], rtol=epsilon, atol=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_anchor_has_no_gradient(dtype: torch.dtype, device: torch.device) -> None:
    z = torch.tensor([[300.0, 30], [300, 90], [210, 300]], dtype=dtype, device=device)
    for scale in (1, 100) + (() if dtype == torch.float16 else (1e14,)):
        anchors = (scale * z).requires_grad_()
        loss = patch_contrast_loss(anchors, torch.tensor([0, 0, 1], device=device), temperature=0.1)
        (grad,) = torch.autograd.grad(loss, anchors)
        assert loss == 0
        assert torch.all(grad == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_large_upstream_gradient(dtype: torch.dtype, isa: str) -> None:
    # All logits are the smallest of unit vectors: e^(logit - largest possible logit) is near the end of float32.
    z = torch.tensor([[1.0, 0], [-1, 0], [-1, 0]])
    for labels in ([0, 0, 0], [0, 0, 1], [0, 1, 1]):
        for weight in (0.0, 1e-6, 1.0, 1e6, 1e7):
            grads = []
            for function, kind in ((patch_contrast_loss, dtype), (reference.patch_contrast_loss, torch.float64)):
                anchors = z.to(kind).requires_grad_()
                loss = function(anchors, torch.tensor(labels), temperature=0.0254, negative_weight=weight)
                (grad,) = torch.autograd.grad(loss * 65536, anchors)
                grads.append(grad.double())
            # A gradient of 0 is the difference of terms of size 65536 / temperature.
            epsilon = max(torch.finfo(dtype).eps, 1e-5)
            torch.testing.assert_close(grads[0], grads[1], rtol=epsilon, atol=epsilon * 65536 / 0.0254)


@pytest.mark.parametrize(
    ("dtype", "upstream"), [(torch.float64, 1e306), (torch.float32, 1e37), (torch.bfloat16, 1e37)], ids=str
)
@pytest.mark.parametrize("m", [None, 30], ids=["self", "keys"])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("weight", [1.0, 1e-30, 1e19, 1e30])
def test_an_upstream_gradient_near_the_largest_number(
    dtype: torch.dtype, upstream: float, m: int | None, temperature: float, weight: float
) -> None:
    """Gradients are right, or infinite where their dtype cannot hold them."""
    options = {"temperature": temperature, "negative_weight": weight, "reduction": "none"}
    problem = ContrastProblem.random(40, 6, m=m, **options).cast(dtype)
    shares = torch.linspace(-1, 1, 40, dtype=torch.float64).pow(3)  # of both signs and many sizes
    ordinary = problem.gradients(problem.loss(), shares)
    for got, small in zip(problem.gradients(problem.loss(), shares * upstream), ordinary):
        want = small.double() * upstream
        largest = torch.finfo(dtype).max
        fits = want.abs() < largest * 0.99
        infinite = torch.where(want > 0, math.inf, -math.inf).to(dtype)
        assert torch.equal(got[~fits & (want.abs() > largest * 1.01)], infinite[~fits & (want.abs() > largest * 1.01)])
        tolerance = TOLERANCE[dtype] * min(float(want.abs().max()), largest)
        torch.testing.assert_close(got[fits].double(), want[fits], rtol=TOLERANCE[dtype], atol=tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [None, 140], ids=["self", "keys"])
def test_what_is_not_a_number_spreads_to_what_depends_on_it(bad: float, m: int | None, device: torch.device) -> None:
    p = ContrastProblem.random(140, 8, m=m, classes=2, ignored=False, reduction="none").cast(torch.float32, device)
    with torch.no_grad():
        p.anchors[3] = bad
    loss = p.loss()
    assert torch.isnan(loss[3])
    if m is not None:
        assert torch.isfinite(loss[4:]).all()
    p.gradients(loss, torch.ones_like(loss))  # neither crash nor hang
    p = ContrastProblem.random(140, 8, m=m, classes=2, ignored=False, reduction="none", max_positive_disparity=0.5)
    p = p.cast(torch.float32, device)
    p.descriptors[3] = bad
    loss = p.loss()
    assert torch.isnan(loss[3])
    grads = p.gradients(loss, torch.ones_like(loss))
    assert torch.isnan(grads[0][3]).all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_that_is_not_a_number_spoils_no_other(isa: str, masked: bool) -> None:
    # Key 0 is a positive of the anchors of its class that are near it, and a negative of the others that are far.
    g = torch.Generator().manual_seed(0)
    z, k = torch.randn(150, 6, generator=g), torch.randn(140, 6, generator=g)
    y, key_y = torch.randint(0, 2, (150,), generator=g), torch.randint(0, 2, (140,), generator=g)
    h, key_h = torch.rand(150, generator=g), torch.rand(140, generator=g)
    positives, negatives, _ = reference.guided_masks(
        y, h, key_y, key_h, max_positive_disparity=0.3, min_negative_disparity=0.5
    )
    k[0] = math.nan
    z.requires_grad_()
    k.requires_grad_()
    if masked:
        options: dict[str, Any] = {"positive_mask": positives, "negative_mask": negatives}
    else:
        options = {"max_positive_disparity": 0.3, "min_negative_disparity": 0.5}
        options.update(descriptors=h, key_descriptors=key_h)
    loss = patch_contrast_loss(z, y, keys=k, key_labels=key_y, reduction="none", **options)
    uses = (positives | negatives)[:, 0] & positives.any(1)
    assert torch.equal(torch.isnan(loss), uses)
    # An anchor whose loss is left out changes no gradient.
    grads = torch.autograd.grad(loss, (z, k), torch.where(uses, 0, 1.0), retain_graph=True)
    for grad in grads:
        assert torch.isfinite(grad).all()
    grad_z, grad_k = torch.autograd.grad(loss, (z, k), torch.ones_like(loss))
    assert torch.equal(torch.isnan(grad_z).any(1), uses)
    met = (positives | negatives)[uses].any(0)
    assert torch.equal(torch.isnan(grad_k).any(1), met)
    # Losses that are not NaN are the same as without that key.
    others = patch_contrast_loss(
        z, y, keys=torch.where(torch.isfinite(k), k, 0), key_labels=key_y, reduction="none", **options
    )
    torch.testing.assert_close(loss[~uses], others[~uses])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["plain", "bounds", "counts", "none"])
@pytest.mark.parametrize("m", [None, 30], ids=["self", "keys"])
def test_the_reference_agrees_on_descriptors_that_are_not_finite(bad: float, name: str, m: int | None) -> None:
    for seed in range(4):
        p = ContrastProblem.random(24, 4, m=m, classes=3, seed=seed, **{**OPTIONS[name], "reduction": "none"})
        p = p.cast(torch.float64)
        for side in (p.descriptors, p.key_descriptors):
            if side is not None:
                side[[3, 7]] = bad
        torch.testing.assert_close(p.loss(), p.loss(reference.patch_contrast_loss), equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("m", [None, 30], ids=["self", "keys"])
def test_descriptors_that_are_not_finite_move_no_bound_of_others(bad: float, channels: int, m: int | None) -> None:
    """The descriptor of an ignored patch changes nothing. That of an anchor that is no key spoils only its own loss."""
    counts = {"num_positives": 3, "num_negatives": 4, "reduction": "none"}
    p = ContrastProblem.random(24, 4, m=m, channels=channels, classes=3, ignored=False, **counts).cast(torch.float64)
    p.labels[5] = -1
    want = p.loss()
    p.descriptors[5] = bad
    if p.key_labels is not None:
        p.key_labels[7] = -1
        want = p.loss()
        p.key_descriptors[7] = bad
        torch.testing.assert_close(p.loss(), want)
        p.descriptors[3] = bad
        want = want.detach().index_fill(0, torch.tensor([3]), math.nan)
    torch.testing.assert_close(p.loss(), want, equal_nan=True)
    torch.testing.assert_close(p.loss(), p.loss(reference.patch_contrast_loss), equal_nan=True)


NINE, TEN, FIVE = torch.zeros(9), torch.zeros(10), torch.zeros(5, dtype=torch.long)
MASK, KEYS = torch.ones(10, 10, dtype=torch.bool), torch.zeros(5, 4)
BAD_CALLS = [
    ("labels must have shape", ValueError, {"labels": torch.zeros(9, dtype=torch.long)}),
    ("labels must be int64", TypeError, {"labels": TEN}),
    ("anchors must have shape", ValueError, {"anchors": torch.zeros(10)}),
    ("anchors must be float64", TypeError, {"anchors": torch.zeros(10, 4, dtype=torch.long)}),
    ("temperature must be", ValueError, {"temperature": 0.0}),
    ("temperature must be", ValueError, {"temperature": -1.0}),
    ("temperature must be", ValueError, {"temperature": math.nan}),
    ("negative_weight must be", ValueError, {"negative_weight": -1.0}),
    ("reduction must be", ValueError, {"reduction": "average"}),
    ("descriptors must have shape", ValueError, {"descriptors": NINE}),
    ("descriptors must be float64", TypeError, {"descriptors": torch.zeros(10, dtype=torch.long)}),
    ("labels must be int64, got int32", TypeError, {"labels": torch.zeros(10, dtype=torch.int32)}),
    ("labels must be int64, got bool", TypeError, {"labels": torch.zeros(10, dtype=torch.bool)}),
    ("labels must be a tensor, got list", TypeError, {"labels": [0] * 10}),
    ("labels must be a tensor, got ndarray", TypeError, {"labels": np.zeros(10, dtype=np.int64)}),
    ("anchors must be a tensor, got ndarray", TypeError, {"anchors": np.zeros((10, 4))}),
    ("keys must be a tensor, got list", TypeError, {"keys": [[0.0] * 4], "key_labels": FIVE}),
    ("descriptors must be a tensor, got list", TypeError, {"descriptors": [0.0] * 10}),
    ("positive_mask must be a tensor, got list", TypeError, {"positive_mask": [[True]], "negative_mask": MASK}),
    ("temperature must be a number, got a tensor .* never learn", TypeError, {"temperature": torch.tensor(0.1)}),
    ("negative_weight must be a number, got a tensor", TypeError, {"negative_weight": nn.Parameter(torch.ones(1))}),
    ("temperature must be a number, got str", TypeError, {"temperature": "0.1"}),
    ("temperature must be a number, got NoneType", TypeError, {"temperature": None}),
    ("temperature must be a finite number > 0, got -0.0", ValueError, {"temperature": -0.0}),
    ("temperature must be at least 1e-100, got 5e-324", ValueError, {"temperature": 5e-324}),
    ("negative_weight must be a finite number >= 0, got inf", ValueError, {"negative_weight": math.inf}),
    ("ignore_index must be an int, got NoneType", TypeError, {"ignore_index": None}),
    ("ignore_index must be an int, got float", TypeError, {"ignore_index": -1.0}),
    ("ignore_index must be an integer of 64 bits", ValueError, {"ignore_index": 2**63}),
    ("max_positive_disparity must be at least 0", ValueError, {"descriptors": TEN, "max_positive_disparity": -0.1}),
    ("min_negative_disparity must be at least 0", ValueError, {"descriptors": TEN, "min_negative_disparity": -1}),
    ("max_positive_disparity must be .* got str", TypeError, {"descriptors": TEN, "max_positive_disparity": "1"}),
    ("num_positives must be an int, got bool", TypeError, {"descriptors": TEN, "num_positives": True}),
    ("reduction must be one of none, mean, sum, got None", ValueError, {"reduction": None}),
    ("descriptors is None", ValueError, {"max_positive_disparity": 0.5}),
    ("exclude each other", ValueError, {"descriptors": TEN, "num_positives": 1, "max_positive_disparity": 1.0}),
    ("exclude each other", ValueError, {"descriptors": TEN, "num_negatives": 1, "min_negative_disparity": 1.0}),
    ("num_positives must be at least 1", ValueError, {"descriptors": TEN, "num_positives": 0}),
    ("num_negatives must be an int", TypeError, {"descriptors": TEN, "num_negatives": 1.5}),
    ("max_positive_disparity must be", ValueError, {"descriptors": TEN, "max_positive_disparity": math.nan}),
    ("max_positive_disparity must be", ValueError, {"descriptors": TEN, "max_positive_disparity": NINE}),
    ("given together", ValueError, {"keys": KEYS}),
    ("given together", ValueError, {"key_labels": FIVE}),
    ("keys must have shape", ValueError, {"keys": torch.zeros(5, 3), "key_labels": FIVE}),
    ("keys must have the dtype", TypeError, {"keys": KEYS.double(), "key_labels": FIVE}),
    ("key_labels must have shape", ValueError, {"keys": KEYS, "key_labels": torch.zeros(4, dtype=torch.long)}),
    ("given together", ValueError, {"descriptors": TEN, "keys": KEYS, "key_labels": FIVE}),
    ("key_descriptors need keys", ValueError, {"key_descriptors": TEN}),
    ("given together", ValueError, {"positive_mask": MASK}),
    ("positive_mask must be bool", TypeError, {"positive_mask": MASK.float(), "negative_mask": MASK}),
    ("negative_mask must have shape", ValueError, {"positive_mask": MASK, "negative_mask": MASK[:, :9]}),
    ("replace the rule", ValueError, {"positive_mask": MASK, "negative_mask": MASK, "num_positives": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "error", "change"), BAD_CALLS)
def test_bad_input(message: str, error: type[Exception], change: dict) -> None:
    call = {"anchors": torch.randn(10, 4), "labels": torch.zeros(10, dtype=torch.long), **change}
    with pytest.raises(error, match=message):
        patch_contrast_loss(**call)


@pytest.mark.parametrize(("message", "error", "change"), BAD_CALLS)
def test_bad_input_is_refused_at_tracing(message: str, error: type[Exception], change: dict) -> None:
    """Fake tensors get the messages of real ones, so that no program is compiled or exported that cannot run."""
    call = {"anchors": torch.randn(10, 4), "labels": torch.zeros(10, dtype=torch.long), **change}
    with FakeTensorMode() as mode:
        call = {name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in call.items()}
        with pytest.raises(error, match=message):
            patch_contrast_loss(**call)


def every_tensor(device: str) -> dict[str, Tensor]:
    z, y, d = torch.zeros(10, 4), torch.zeros(10, dtype=torch.long), torch.zeros(10)
    sides = {"anchors": z, "labels": y, "descriptors": d, "keys": z, "key_labels": y, "key_descriptors": d}
    bounds = {"max_positive_disparity": d, "min_negative_disparity": d}
    return {name: t.to(device) for name, t in (sides | bounds).items()}


@pytest.mark.parametrize("name", [*every_tensor("cpu")])
def test_other_devices_are_refused(name: str) -> None:
    cpu, meta = every_tensor("cpu"), every_tensor("meta")
    patch_contrast_loss(**meta)
    for call in ({**cpu, name: meta[name]}, {**meta, name: cpu[name]}):
        with pytest.raises(ValueError, match="must be on the device of"):
            patch_contrast_loss(**call)
    masks = {"positive_mask": MASK, "negative_mask": MASK}
    for mask in masks:
        with pytest.raises(ValueError, match=f"{mask} must be on the device of anchors, cpu, got meta"):
            patch_contrast_loss(cpu["anchors"], cpu["labels"], **{**masks, mask: MASK.to("meta")})


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a second device: no GPU is visible")
def test_other_device_is_refused() -> None:
    with pytest.raises(ValueError, match="labels must be on the device of anchors"):
        patch_contrast_loss(torch.randn(10, 4, device="cuda"), torch.zeros(10, dtype=torch.long))


def test_module_refuses_bad_options_at_once() -> None:
    with pytest.raises(ValueError, match="temperature"):
        PatchContrastLoss(0.0)
    with pytest.raises(ValueError, match="exclude"):
        PatchContrastLoss(num_positives=1, max_positive_disparity=0.5)
    with pytest.raises(ValueError, match="reduction"):
        PatchContrastLoss(reduction="max")
    with pytest.raises(TypeError, match="normalize must be True or False, got str"):
        PatchContrastLoss(normalize="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ignore_index must be an int, got NoneType"):
        PatchContrastLoss(ignore_index=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_positive_disparity must be a number that a float has room for, got 1000"):
        PatchContrastLoss(max_positive_disparity=10**400)
    with pytest.raises(ValueError, match="temperature must be a number that a float has room for, got 1000"):
        PatchContrastLoss(Fraction(10**400))  # type: ignore[arg-type]
    for bound in ("max_positive_disparity", "min_negative_disparity"):
        with pytest.raises(TypeError, match=f"{bound} must be a number, got a tensor of shape .* would never learn"):
            PatchContrastLoss(**{bound: torch.nn.Parameter(torch.tensor(0.3))})  # type: ignore[arg-type]


def test_module_normalises(device: torch.device) -> None:
    z, y = torch.randn(40, 8, device=device) * 50, torch.randint(0, 3, (40,), device=device)
    expected = patch_contrast_loss(F.normalize(z, dim=1), y, temperature=0.1)
    torch.testing.assert_close(PatchContrastLoss()(z, y), expected)
    assert "temperature=0.1" in repr(PatchContrastLoss())


# Rows whose squares leave the range of their dtype, upwards or downwards.
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
        (torch.float32, 1e25),
        (torch.float32, 1e-25),
        (torch.bfloat16, 1e25),
        (torch.bfloat16, 1e-25),
        (torch.float16, 6e3),
        (torch.float16, 1e-4),
    ],
)
def test_module_normalises_rows_of_any_size(dtype: torch.dtype, size: float, device: torch.device) -> None:
    z = (torch.randn(12, 40, device=device, dtype=torch.float64) * size).to(dtype).requires_grad_()
    y = torch.arange(12, device=device) % 3
    exact = z.detach().double().requires_grad_()
    scaled = exact / exact.detach().abs().amax(dim=1, keepdim=True)
    expected = reference.patch_contrast_loss(scaled / scaled.norm(dim=1, keepdim=True), y)
    loss = PatchContrastLoss()(z, y)
    tolerance = 3 * TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    (got,), (want,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, exact)
    want = want.to(dtype)  # infinite if the dtype cannot hold it
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want[want.isfinite()].abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_stays_as_it_is(dtype: torch.dtype, device: torch.device) -> None:
    z = torch.randn(6, 4, device=device).to(dtype)
    z[0] = 0
    z.requires_grad_()
    y = torch.arange(6, device=device) % 2
    loss = PatchContrastLoss()(z, y)
    unit = F.normalize(z.detach().double(), dim=1).to(dtype).requires_grad_()
    expected = patch_contrast_loss(unit, y)
    torch.testing.assert_close(loss, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    (got,), (of_unit,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, unit)
    assert got.isfinite().all()
    assert 0 < float(got[0].abs().max()) <= 2 * float(of_unit.abs().max())


def test_module_takes_rows_without_entries(device: torch.device) -> None:
    z = torch.zeros(4, 0, device=device, requires_grad=True)
    loss = PatchContrastLoss()(z, torch.tensor([0, 0, 1, 1], device=device))
    torch.testing.assert_close(loss, torch.full((), math.log(3), device=device))
    assert torch.autograd.grad(loss, z)[0].shape == (4, 0)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([[1.0]], "embeddings must be a tensor, got list"),
        (torch.ones(2, 3).long(), "embeddings must be float64, float32, bfloat16 or float16, got int64"),
        (torch.ones(2, 3).to_sparse(), "embeddings must be a dense tensor, got a sparse_coo one"),
        (torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged), "embeddings must be a dense tensor, got a"),
    ],
)
def test_modules_refuse_embeddings_by_name(embeddings: Any, message: str) -> None:
    gaussian = GaussianContrastLoss(2, 3)
    y = torch.zeros(2).long()
    for call in (PatchContrastLoss(), gaussian, gaussian.enqueue, PatchContrastLoss(normalize=False)):
        with pytest.raises(TypeError, match=message):
            call(embeddings, y)


def test_transforms_leave_nothing_of_theirs_in_the_module() -> None:
    module, y = PatchContrastLoss(), torch.arange(6) % 2
    z = torch.randn(3, 6, 4)
    module(z[0], y)
    assert module.num_valid == 6
    torch.vmap(lambda t: module(t, y))(z)
    assert copy.deepcopy(module).num_valid is None
    torch.func.grad(lambda t: module(t, y))(z[0])
    assert copy.deepcopy(module).num_valid is None


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("with_keys", [False, True])
def test_memory_is_linear(with_keys: bool, peak_growth: Callable[[Callable[[], None]], int]) -> None:
    n, d = 65536, 128
    z = F.normalize(torch.randn(n, d), dim=1).requires_grad_()
    y, h = torch.randint(0, 4, (n,)), torch.rand(n)
    options: dict = {"max_positive_disparity": 0.5, "min_negative_disparity": 0.1}
    gradients = n * d * 4
    if with_keys:
        k = F.normalize(torch.randn(n, d), dim=1).requires_grad_()
        options.update(keys=k, key_labels=y, key_descriptors=h)
        gradients *= 2
    patch_contrast_loss(z[:256].detach(), y[:256])  # starts threads and loads libraries
    growth = peak_growth(lambda: patch_contrast_loss(z, y, h, **options).backward())
    assert growth - gradients < 200 * 2**20, f"{growth / 2**20:.0f} MiB, of which {gradients / 2**20:.0f} are gradients"


def test_an_anchor_among_given_keys_is_no_pair_under_any_label(isa: str) -> None:
    """For the op itself, in which key i + self_offset is anchor i."""
    g = torch.Generator().manual_seed(0)
    z, labels = torch.randn(40, 8, generator=g), torch.arange(40) // 20
    keys, key_labels = torch.cat([torch.randn(3, 8, generator=g), z]), torch.cat([torch.zeros(3).long(), 1 - labels])
    numbers = ContrastNumbers(0.5, math.inf, 0.0, 1.0, -1, 3, REDUCTIONS["mean"], False)
    x = ContrastArguments(Side(z, labels), Side(keys, key_labels), Choice(), numbers)
    loss, *_ = ops.patch_contrast(*x.flat())
    same, other = labels[:, None] == key_labels, torch.ones(40, 43).bool()
    other[torch.arange(40), torch.arange(40) + 3] = False
    masks = {"positive_mask": same & other, "negative_mask": ~same & other}
    want = reference.patch_contrast_loss(
        z.double(), labels, keys=keys.double(), key_labels=key_labels, temperature=0.5, **masks
    )
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
