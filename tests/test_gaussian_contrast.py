"""gaussian_contrast_loss against a straight double loop and the reference, and GaussianContrastLoss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl_ext import GaussianContrastLoss, gaussian_contrast_loss, reference
from pglcl_ext._arguments import GaussianArguments
from pglcl_ext._checks import REDUCTIONS
from tests.problems import DTYPES, TOLERANCE, gaussian_arguments, gaussian_problem, rising_upstream

ops = torch.ops.pglcl_ext

OPTIONS: dict[str, dict[str, Any]] = {
    "authors": {},
    "warm": {"temperature": 1.0},
    "cold": {"temperature": 0.02},
    "hottest": {"temperature": 1e200},  # its square has no room in a float
    "no spread": {"covariance_scale": 0.0},
    "no negatives": {"negative_weight": 0.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
}


def double_loop(x: GaussianArguments) -> Tensor:
    """method, section 6, term by term, with exact logarithms of sums; float64."""
    taking_part = [k for k in range(len(x.counts)) if x.counts[k] > 0]
    losses = []
    for t, y in zip(x.anchors, x.labels.tolist(), strict=True):
        if y not in taking_part:
            continue

        def exponent(j: int, t: Tensor = t, y: int = y) -> Tensor:
            mu, sigma = (x.means[y, j], x.covariances[y, j]) if x.means.dim() == 3 else (x.means[j], x.covariances[j])
            return t @ mu / x.temperature + x.covariance_scale / x.temperature / x.temperature / 2 * (t @ sigma @ t)

        terms = [exponent(y)]
        if x.negative_weight > 0:
            log_weight = math.log(x.negative_weight / len(taking_part))
            terms += [exponent(j) + log_weight for j in taking_part if j != y]
        mu = x.means[y, y] if x.means.dim() == 3 else x.means[y]
        losses.append(torch.logsumexp(torch.stack(terms), 0) - t @ mu / x.temperature)
    return torch.stack(losses).mean() if losses else x.anchors.sum() * 0


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("empty", [(), (1,), (0, 2, 3)])
@pytest.mark.parametrize("name", ["authors", "warm", "cold", "no spread", "no negatives"])
def test_matches_the_double_loop(name: str, empty: tuple[int, ...], pairwise: bool, device: torch.device) -> None:
    anchors, *rest = gaussian_problem(23, 9, pairwise=pairwise, empty=empty)
    ours = anchors.to(device).requires_grad_()
    loss = gaussian_contrast_loss(ours, *(t.to(device) for t in rest), **OPTIONS[name])
    oracle = anchors.clone().requires_grad_()
    expected = double_loop(gaussian_arguments(oracle, *rest, **OPTIONS[name]))
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-11, atol=1e-11)
    (got,), (want,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, oracle)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-11)


def assert_matches_reference(problem: tuple[Tensor, ...], dtype: torch.dtype, device: Any, **options: Any) -> None:
    ours = problem[0].to(device, dtype).requires_grad_()
    oracle = ours.detach().double().cpu().requires_grad_()
    loss = gaussian_contrast_loss(ours, *(t.to(device) for t in problem[1:]), **options)
    expected = reference.gaussian_contrast_loss(oracle, *problem[1:], **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Exponents of size lambda / (2 tau^2) are rounded in the accumulating type.
    tau = options.get("temperature", 0.2)
    tolerance = TOLERANCE[dtype] + 4 * torch.finfo(loss.dtype).eps / tau / tau
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    upstream = rising_upstream(expected)
    (got,) = torch.autograd.grad(loss, ours, upstream.to(device, loss.dtype))
    (want,) = torch.autograd.grad(expected, oracle, upstream)
    assert got.dtype == dtype
    scale = max(want.abs().max().item(), 1e-6) if want.numel() else 1.0
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_reference(name: str, dtype: torch.dtype, pairwise: bool, device: torch.device) -> None:
    assert_matches_reference(gaussian_problem(150, 40, pairwise=pairwise, empty=(2,)), dtype, device, **OPTIONS[name])


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 65])
@pytest.mark.parametrize("d", [1, 7, 16, 33, 300])
def test_sizes_that_do_not_divide_tiles_match_the_reference(n: int, d: int, device: torch.device) -> None:
    assert_matches_reference(gaussian_problem(n, d, classes=2), torch.float32, device)


def test_every_instruction_set_matches_the_reference(isa: str) -> None:
    for dtype in DTYPES:
        assert_matches_reference(gaussian_problem(70, 20), dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    problem = [t.to(dtype) if t.is_floating_point() else t for t in gaussian_problem(300, 64)]
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        t = problem[0].clone().requires_grad_()
        loss = gaussian_contrast_loss(t, *problem[1:])
        results.append((loss.detach(), torch.autograd.grad(loss, t)[0]))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_exponents_that_overflow_a_plain_exponential_give_a_finite_loss(device: torch.device) -> None:
    # psi = 4096, lambda = 4 and tau = 0.2 give exponents of 50 t' S t, far above 88, where float32 ends.
    anchors, labels, means, covariances, counts = gaussian_problem(40, 8)
    naive = torch.exp(4 / (2 * 0.2**2) * (anchors.float() * 6) @ covariances[0].float() @ (anchors.float() * 6).t())
    assert torch.isinf(naive.diagonal()).any()
    t = (anchors * 6).float().to(device).requires_grad_()
    loss = gaussian_contrast_loss(t, *(x.to(device) for x in (labels, means, covariances, counts)))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(t.grad).all()


def test_one_class_gives_the_positive_term_alone(device: torch.device) -> None:
    anchors, labels, means, covariances, counts = (t.to(device) for t in gaussian_problem(20, 6))
    only = torch.where(torch.arange(len(counts), device=device) == 2, counts, 0)
    loss = gaussian_contrast_loss(anchors, torch.full_like(labels, 2), means, covariances, only)
    expected = (4 / (2 * 0.2**2) * torch.einsum("nd,de,ne->n", anchors, covariances[2], anchors)).mean()
    torch.testing.assert_close(loss, expected)


def test_a_class_without_keys_takes_no_part(device: torch.device) -> None:
    anchors, labels, means, covariances, counts = (t.to(device) for t in gaussian_problem(60, 6, empty=(1,)))
    for nothing in (math.nan, math.inf, 1e30):
        spoilt_means, spoilt = means.clone(), covariances.clone()
        spoilt_means[1], spoilt[1] = nothing, nothing
        losses = gaussian_contrast_loss(anchors, labels, spoilt_means, spoilt, counts, reduction="none")
        assert torch.isfinite(losses).all()
        assert torch.all(losses[(labels == 1) | (labels == -1)] == 0)
        keep = labels != 1
        want = gaussian_contrast_loss(anchors[keep], labels[keep], means, covariances, counts)
        torch.testing.assert_close(gaussian_contrast_loss(anchors, labels, spoilt_means, spoilt, counts), want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_contrast_is_zero_and_stays_in_the_graph(reduction: str, device: torch.device) -> None:
    anchors, labels, means, covariances, counts = (t.to(device) for t in gaussian_problem(5, 4))
    for n, kept in ((0, counts), (5, torch.zeros_like(counts))):
        t = anchors[:n].clone().requires_grad_()
        loss = gaussian_contrast_loss(t, labels[:n], means, covariances, kept, reduction=reduction)
        assert torch.all(loss == 0)
        loss.sum().backward()
        assert torch.all(t.grad == 0)


def test_opcheck_accepts_both_ops(device: torch.device) -> None:
    problem = [t.to(device) for t in gaussian_problem(12, 5)]
    problem[0].requires_grad_()
    for reduction in REDUCTIONS:
        torch.library.opcheck(ops.gaussian_contrast, tuple(gaussian_arguments(*problem, reduction=reduction)))
    gradients, valid = torch.randn(2, 12, 5, device=device), torch.tensor(7, device=device)
    grad = torch.randn((), device=device)
    torch.library.opcheck(ops.gaussian_contrast_backward, (grad, *gradients, valid, REDUCTIONS["mean"]))


def test_gradients_pass_gradcheck(device: torch.device) -> None:
    anchors, *rest = (t.to(device) for t in gaussian_problem(6, 4, pairwise=True))
    torch.autograd.gradcheck(lambda t: gaussian_contrast_loss(t, *rest, temperature=0.7), anchors.requires_grad_())


def test_double_backward_is_refused(device: torch.device) -> None:
    anchors, *rest = (t.to(device) for t in gaussian_problem(6, 4))
    anchors.requires_grad_()
    (grad,) = torch.autograd.grad(gaussian_contrast_loss(anchors, *rest), anchors, create_graph=True)
    with pytest.raises(NotImplementedError, match="gaussian_contrast_loss cannot be differentiated twice"):
        grad.sum().backward()


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    anchors, *rest = (t.to(device).float() if t.is_floating_point() else t.to(device) for t in gaussian_problem(30, 8))

    def step(t: Tensor) -> Tensor:
        return gaussian_contrast_loss(F.normalize(t, dim=1), *rest) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        t = anchors.clone().requires_grad_()
        loss = function(t)
        results.append((loss.detach(), *torch.autograd.grad(loss, t)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


GOOD = dict(
    anchors=torch.zeros(6, 4),
    labels=torch.zeros(6, dtype=torch.long),
    means=torch.zeros(3, 4),
    covariances=torch.zeros(3, 4, 4),
    counts=torch.ones(3, dtype=torch.long),
)
BAD_CALLS = [
    ("anchors must have shape", ValueError, {"anchors": torch.zeros(6)}),
    ("anchors must be float64", TypeError, {"anchors": torch.zeros(6, 4, dtype=torch.long)}),
    ("labels must have shape", ValueError, {"labels": torch.zeros(5, dtype=torch.long)}),
    ("labels must be int64", TypeError, {"labels": torch.zeros(6)}),
    ("means must have shape", ValueError, {"means": torch.zeros(3, 5)}),
    ("means must have shape", ValueError, {"means": torch.zeros(2, 3, 4)}),
    ("means must be float64", TypeError, {"means": torch.zeros(3, 4, dtype=torch.long)}),
    ("covariances must have shape", ValueError, {"covariances": torch.zeros(3, 4, 5)}),
    ("covariances must have shape .* = .3, 3, 4, 4., like the means", ValueError, {"means": torch.zeros(3, 3, 4)}),
    ("counts must be int64", TypeError, {"counts": torch.ones(3)}),
    ("counts must have shape", ValueError, {"counts": torch.ones(0, dtype=torch.long)}),
    ("temperature must be", ValueError, {"temperature": 0.0}),
    ("temperature must be at least 1e-100", ValueError, {"temperature": 1e-160}),
    (r"covariance_scale / \(2 temperature\^2\)", ValueError, {"temperature": 1e-90, "covariance_scale": 1e200}),
    ("covariance_scale must be", ValueError, {"covariance_scale": -1.0}),
    ("negative_weight must be", ValueError, {"negative_weight": math.inf}),
    ("reduction must be", ValueError, {"reduction": "average"}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "error", "change"), BAD_CALLS)
def test_bad_input_is_refused_by_name(message: str, error: type[Exception], change: dict) -> None:
    with pytest.raises(error, match=message):
        gaussian_contrast_loss(**{**GOOD, **change})


def test_labels_beyond_the_classes_are_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in .0, K. = .0, 3. .* got 3 at index 2"):
        gaussian_contrast_loss(**{**GOOD, "labels": torch.tensor([0, -1, 3, 0, 0, 0])})


@pytest.mark.parametrize("hard", [False, True])
def test_the_module_contrasts_with_its_queue(hard: bool, device: torch.device) -> None:
    module = GaussianContrastLoss(3, 8, queue_length=64, hard_negatives=hard).to(device)
    z, y = torch.randn(40, 8, device=device, requires_grad=True), torch.randint(0, 3, (40,), device=device)
    assert module(z, y) == 0  # nothing is queued yet
    module.enqueue(torch.randn(150, 8, device=device), torch.randint(0, 3, (150,), device=device))
    generator = torch.Generator(device).manual_seed(0)
    loss = module(z, y, generator=generator)
    loss.backward()
    assert torch.isfinite(z.grad).all()
    assert loss > 0
    generator.manual_seed(0)
    assert torch.equal(module(z, y, generator=generator), loss)
    torch.testing.assert_close(module(z * 7, y, generator=generator.manual_seed(0)), loss)  # it normalises
    assert "temperature=0.2" in repr(module)


def test_module_state_survives_bit_for_bit(tmp_path) -> None:
    module = GaussianContrastLoss(3, 8, queue_length=16)
    module.enqueue(torch.randn(70, 8), torch.randint(0, 3, (70,)))
    torch.save(module.state_dict(), tmp_path / "loss.pt")
    other = GaussianContrastLoss(3, 8, queue_length=16)
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    z, y = torch.randn(20, 8), torch.randint(0, 3, (20,))
    assert torch.equal(module(z, y), other(z, y))
    more = torch.randn(9, 8), torch.randint(0, 3, (9,))
    for m in (module, other):
        m.enqueue(*more)
    for name, t in module.state_dict().items():
        assert torch.equal(t, other.state_dict()[name])


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("norm", [1e15, 1e18, 1e25])
def test_exponents_beyond_float32_give_the_right_loss_or_infinity(norm: float, pairwise: bool, isa: str) -> None:
    """Loss and gradient are right, or infinite where float32 cannot hold them."""
    anchors, labels, means, covariances, counts = gaussian_problem(40, 6, pairwise=pairwise)
    anchors[::4] /= norm  # with moderate exponents
    statistics = means.float(), covariances.float()
    results = []
    for function, kind in ((gaussian_contrast_loss, torch.float32), (reference.gaussian_contrast_loss, torch.float64)):
        leaf = (anchors * norm).float().to(kind).requires_grad_()
        loss = function(leaf, labels, *(t.to(kind) for t in statistics), counts, reduction="none")
        results.append((loss.detach().double(), torch.autograd.grad(loss.sum(), leaf)[0].double()))
    largest = torch.finfo(torch.float32).max
    (got, got_grad), (want, want_grad) = results
    assert want_grad.isfinite().all()
    torch.testing.assert_close(got, want.where(want <= largest, math.inf), rtol=1e-4, atol=1e-4)
    room = want_grad.abs() < largest
    torch.testing.assert_close(
        got_grad[room], want_grad[room], rtol=1e-4, atol=1e-4 * float(want_grad[room].abs().max())
    )


def test_an_anchor_that_takes_no_part_may_hold_anything(device: torch.device) -> None:
    z, y, *statistics = (t.to(device) for t in gaussian_problem(30, 6, empty=(1,)))
    taken = (y >= 0) & (y != 1)
    spoilt = torch.where(taken[:, None], z, math.nan).requires_grad_()
    plain = z.clone().requires_grad_()
    for function in (gaussian_contrast_loss, reference.gaussian_contrast_loss):
        loss, expected = function(spoilt, y, *statistics), function(plain, y, *statistics)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, spoilt), torch.autograd.grad(expected, plain))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_keys_queued_before_the_backward_pass_do_not_change_gradients(reduction: str, device: torch.device) -> None:
    z, y = torch.randn(9, 5, device=device), torch.arange(9, device=device) % 3
    gradients = []
    for between in (False, True):
        module = GaussianContrastLoss(4, 5, queue_length=8, reduction=reduction).to(device)
        module.enqueue(z.flip(0), y)
        leaf = z.clone().requires_grad_()
        loss = module(leaf, y).sum()
        if between:
            module.enqueue(torch.ones_like(z), torch.full_like(y, 3))
        gradients += torch.autograd.grad(loss, leaf)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_an_upstream_gradient_that_is_not_finite_spoils_no_anchor_that_is_left_out(
    upstream: float, reduction: str, device: torch.device
) -> None:
    """As in plain PyTorch, where the loss of such an anchor is a constant. The root of a loss has such a gradient."""
    anchors, labels, *statistics = (t.to(device) for t in gaussian_problem(9, 5, empty=(2,)))
    labels = torch.arange(9, device=device) % 4
    labels[labels == 3] = -1
    left_out = (labels == -1) | (labels == 2)
    if reduction != "none":  # one number reaches all anchors
        labels, left_out = torch.full_like(labels, 2), torch.ones_like(left_out)
    gradients = []
    for function in (gaussian_contrast_loss, reference.gaussian_contrast_loss):
        leaf = anchors.clone().requires_grad_()
        loss = function(leaf, labels, *statistics, reduction=reduction)
        weights = torch.where(left_out, upstream, 1.0) if reduction == "none" else torch.tensor(upstream)
        gradients += torch.autograd.grad(loss, leaf, weights.to(loss))
    assert (gradients[0][left_out] == 0).all()
    torch.testing.assert_close(*gradients)


def test_the_module_names_its_own_arguments_in_errors() -> None:
    y = torch.zeros(6).long()
    for hard_negatives in (False, True):
        module = GaussianContrastLoss(3, 4, queue_length=8, hard_negatives=hard_negatives)
        for call, rows in ((module, "N"), (module.enqueue, "M")):
            with pytest.raises(ValueError, match=rf"embeddings must have shape \({rows}, 4\), got \(6, 5\)"):
                call(torch.zeros(6, 5), y)
            with pytest.raises(ValueError, match="embeddings must be on the device of the queue, cpu, got meta"):
                call(torch.zeros(6, 4, device="meta"), y.to("meta"))
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
            module(torch.zeros(6, 4), y, generator=5)  # type: ignore[arg-type]
    for name in ("normalize", "hard_negatives"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got str"):
            GaussianContrastLoss(3, 4, **{name: "no"})  # type: ignore[arg-type]
