"""patch_contrast_loss against the reference, the published formula, and its properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pglcl_ext import patch_contrast_loss, reference
from pglcl_ext._arguments import ContrastOutputs, Side
from tests.problems import DTYPES, ContrastProblem, assert_matches_reference, contrast_arguments, embeddings

ops = torch.ops.pglcl_ext

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
def test_sizes_that_do_not_divide_tiles_match_the_reference(n: int, m: int | None, device: torch.device) -> None:
    for d in (1, 7, 64):
        problem = ContrastProblem.random(n, d, m=m, classes=2, max_positive_disparity=0.6)
        assert_matches_reference(problem, torch.float32, device)


def test_every_instruction_set_matches_the_reference(isa: str) -> None:
    for dtype in DTYPES:
        for m in (None, 150):
            assert_matches_reference(ContrastProblem.random(280, 40, m=m, max_positive_disparity=0.5), dtype, "cpu")
            assert_matches_reference(ContrastProblem.random(280, 40, m=m, temperature=1e-2), dtype, "cpu")


@given(data=st.data())
def test_random_problems_agree_with_plain_pytorch(data: st.DataObject) -> None:
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
def test_explicit_masks_match_the_reference(m: int | None, device: torch.device) -> None:
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
    exact = ours.cast(torch.float64)
    expected = exact.loss(reference.patch_contrast_loss)
    (want,) = exact.gradients(expected)
    errors = []
    for p, function in ((ours, patch_contrast_loss), (plain, reference.patch_contrast_loss)):
        loss = p.loss(function)
        (grad,) = p.gradients(loss)
        errors.append(((loss.double().cpu() - expected).abs(), (grad.double().cpu() - want).abs().max()))
    assert errors[0][0] <= errors[1][0] + 1e-6
    assert errors[0][1] <= errors[1][1] + 1e-3 * want.abs().max()


def errors_beside_pytorch(problem: ContrastProblem) -> list[tuple[float, float]]:
    """Our largest error and that of plain PyTorch in float32, of the losses and of each gradient, as shares of the
    largest value."""
    exact = problem.cast(torch.float64)
    results = []
    for p, function in (
        (exact, reference.patch_contrast_loss),
        (problem.cast(torch.float32), patch_contrast_loss),
        (problem.cast(torch.float32), reference.patch_contrast_loss),
    ):
        loss = p.loss(function)
        results.append([t.detach().double() for t in (loss, *p.gradients(loss.mean()))])
    shares = [
        [float((a - b).abs().max() / b.abs().max()) for a, b in zip(r, results[0], strict=True)] for r in results[1:]
    ]
    return list(zip(*shares, strict=True))


@pytest.mark.parametrize("temperature", [0.2, 0.002])
@pytest.mark.parametrize("name", ["equal", "one above the others", "unit rows"])
def test_sums_over_a_million_keys_keep_their_digits(name: str, temperature: float, isa: str) -> None:
    """Terms of one size are rounded to one side. In float32 the losses were off by 4e-5, and gradients of keys too."""
    m = 1_000_000
    keys = {"equal": torch.full((m, 2), 0.3), "one above the others": torch.full((m, 2), 0.1)}.get(name)
    keys = embeddings(m, 2, generator=torch.Generator().manual_seed(0)) if keys is None else keys
    if name == "one above the others":
        keys[0] = 0.7
    anchors, labels = torch.tensor([[0.6, 0.77], [0.1, 0.3]]), torch.tensor([0, 1])
    options = {"temperature": temperature, "reduction": "none"}
    rows, of_keys = anchors.float(), keys.float().double()
    problem = ContrastProblem(rows.double(), labels, None, of_keys, torch.arange(m) % 2, options=options)
    loss, _, gradient_of_keys = errors_beside_pytorch(problem)
    assert loss[0] <= 2 * loss[1] + 2e-7
    assert gradient_of_keys[0] <= 2 * gradient_of_keys[1] + 2e-6


@pytest.mark.parametrize("m", [None, 70], ids=["self", "keys"])
@pytest.mark.parametrize("d", [256, 700, 5000])
def test_products_of_long_rows_keep_their_digits(d: int, m: int | None, isa: str) -> None:
    """Of numbers above 0, as after a ReLU, a sum of thousands loses digits if it is one."""
    g = torch.Generator().manual_seed(0)
    options = {"temperature": 1e-3, "reduction": "none"}
    problem = ContrastProblem.random(40, d, m=m, channels=None, ignored=False, **options)
    problem.anchors = F.normalize(torch.rand(40, d, generator=g), dim=1).double()
    if m is not None:
        problem.keys = F.normalize(torch.rand(m, d, generator=g), dim=1).double()
    for ours, plain in errors_beside_pytorch(problem):
        assert ours <= 3 * plain + 1e-6


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

    def part(keys: slice) -> ContrastOutputs:
        x = contrast_arguments(Side(p.anchors, p.labels), Side(p.keys[keys], p.key_labels[keys]), reduction="none")
        return ContrastOutputs(*ops.patch_contrast(*x.flat()))

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
    for one, other in zip(p.gradients(renamed), gradients, strict=True):
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
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
    x = contrast_arguments(Side(z, labels), Side(keys, key_labels), temperature=0.5, self_offset=3)
    loss, *_ = ops.patch_contrast(*x.flat())
    same, other = labels[:, None] == key_labels, torch.ones(40, 43).bool()
    other[torch.arange(40), torch.arange(40) + 3] = False
    masks = {"positive_mask": same & other, "negative_mask": ~same & other}
    want = reference.patch_contrast_loss(
        z.double(), labels, keys=keys.double(), key_labels=key_labels, temperature=0.5, **masks
    )
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
