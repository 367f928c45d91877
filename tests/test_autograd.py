"""The ops in torch.func, forward-mode differentiation, torch.compile and torch.export."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim

from pglcl_ext import (
    EmbeddingQueue,
    GaussianContrastLoss,
    PatchContrastLoss,
    gaussian_contrast_loss,
    patch_contrast_loss,
    patch_embeddings,
    patch_entropy,
    patch_statistics,
    semantic_disparity,
)
from pglcl_ext._arguments import ContrastOutputs, Side
from tests.problems import ContrastProblem, contrast_arguments, gaussian_problem

ops = torch.ops.pglcl_ext

CONTRAST = ContrastProblem.random(12, 5, m=9, classes=2)
LABELS = CONTRAST.labels.clamp(min=0)
ANCHORS, *GAUSSIAN = gaussian_problem(12, 5)
KEYS = {"keys": CONTRAST.keys, "key_labels": CONTRAST.key_labels, "key_descriptors": CONTRAST.key_descriptors}
# Each op as a scalar function of one tensor.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "patch_contrast_loss": (
        lambda z: patch_contrast_loss(z, CONTRAST.labels, CONTRAST.descriptors, max_positive_disparity=0.5),
        CONTRAST.anchors,
    ),
    "patch_contrast_loss with keys": (
        lambda z: patch_contrast_loss(z, CONTRAST.labels, CONTRAST.descriptors, **KEYS, num_positives=2),
        CONTRAST.anchors,
    ),
    "gaussian_contrast_loss": (lambda z: gaussian_contrast_loss(z, *GAUSSIAN), ANCHORS),
    "patch_statistics": (
        lambda x: torch.stack([t.square().sum() for t in patch_statistics(x, 4)]).sum(),
        torch.linspace(-2, 2, 2 * 3 * 9 * 8, dtype=torch.float64).sin().view(2, 3, 9, 8),
    ),
    "semantic_disparity": (lambda a: semantic_disparity(a, a * a).sum(), torch.rand(7, 2, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func_gives_the_gradient_of_autograd(name: str) -> None:
    function, x = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf), leaf)
    assert want.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(function)(x), want)
    torch.testing.assert_close(torch.func.jacrev(function)(x), want)
    torch.testing.assert_close(torch.func.vjp(function, x)[1](torch.ones((), dtype=x.dtype))[0], want)
    batch = torch.stack([x * 0.5, x])
    torch.testing.assert_close(torch.vmap(function)(batch)[1], function(x))
    torch.testing.assert_close(torch.vmap(torch.func.grad(function))(batch)[1], want)
    whole = torch.func.grad(lambda b: torch.vmap(function)(b).sum())(batch)
    torch.testing.assert_close(whole[1], want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_autograd_gives_the_gradient_of_an_eager_loss(name: str) -> None:
    function, x = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf), leaf)
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with compiled_autograd._enable(compiler):
        function(leaf).backward()
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_and_gradients_may_be_changed_in_place(name: str) -> None:
    """PyTorch refuses to change a view that a torch.autograd.Function has made."""
    function, x = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    want = torch.autograd.grad(value, leaf, retain_graph=True)[0].clamp(-1e-2, 1e-2)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    torch.testing.assert_close(gradient.clamp_(-1e-2, 1e-2), want)
    torch.testing.assert_close(function(leaf).mul_(2), 2 * value)


def test_no_result_is_a_view() -> None:
    z, x = (FUNCTIONS[name][1].clone().requires_grad_() for name in ("patch_contrast_loss", "patch_statistics"))
    disparity = semantic_disparity(x[0, 0])
    results = [disparity, *patch_statistics(x, 4), gaussian_contrast_loss(ANCHORS.clone().requires_grad_(), *GAUSSIAN)]
    results.append(patch_contrast_loss(z, CONTRAST.labels, reduction="none"))
    assert all(t.requires_grad and not t._is_view() for t in results)
    (want,) = torch.autograd.grad((semantic_disparity(x[0, 0]) * 3).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(disparity.mul_(3).square().sum(), x)[0], want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_that_was_kept_from_a_transform_gets_its_gradient(name: str) -> None:
    function, x = FUNCTIONS[name]
    for learnt in (True, False):
        leaf, kept = x.clone().requires_grad_(learnt), []
        torch.func.grad(lambda t, kept=kept: (kept.append(t), t.sum())[1])(leaf)
        value = function(kept[0])
        assert value.requires_grad == learnt
        if learnt:
            torch.testing.assert_close(torch.autograd.grad(value, leaf), torch.autograd.grad(function(leaf), leaf))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inference_mode_records_nothing_even_where_gradients_are_enabled(name: str) -> None:
    function, x = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        value = function(leaf)
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), function(leaf).detach())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_module_that_is_trained_can_be_traced(name: str) -> None:
    function, x = FUNCTIONS[name]

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((), 0.5, dtype=torch.float64))

        def forward(self, t: Tensor) -> Tensor:
            return function(self.scale * t)

    module = Scaled()
    traced = torch.jit.trace(module, (x,))  # runs it again without gradients, and compares the graphs
    torch.testing.assert_close(traced(x), module(x))
    (want,) = torch.autograd.grad(module(x), module.scale)
    torch.testing.assert_close(torch.autograd.grad(traced(x), traced.scale)[0], want)


def contrast_op(z: Tensor, keys: Tensor) -> Tensor:
    """The op itself, as a graph holds it."""
    return ContrastOutputs(*ops.patch_contrast(*contrast_arguments(Side(z, LABELS), Side(keys, LABELS)).flat())).loss


def contrast(z: Tensor, keys: Tensor) -> Tensor:
    return patch_contrast_loss(z, LABELS, keys=keys, key_labels=LABELS)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", [contrast, contrast_op])
def test_torch_func_works_on_the_op_and_on_compiled_functions(function: Callable[..., Tensor], compiled: bool) -> None:
    """Also nested transforms, each with respect to another argument."""

    def inner(keys: Tensor) -> Tensor:
        return torch.func.grad_and_value(function)(z, keys)[1]

    def unseen(keys: Tensor) -> Tensor:
        with torch.no_grad():
            seen_not = function(z, keys)
        return seen_not + function(z, keys) * 2

    z, keys = CONTRAST.anchors, CONTRAST.anchors.flip(0) * 0.5
    leaves = [t.clone().requires_grad_() for t in (z, keys)]
    want = torch.autograd.grad(contrast(*leaves), leaves)
    batch = torch.stack([keys, keys * 2])
    for transform, call, expected in (
        (torch.func.grad(function, argnums=(0, 1)), (z, keys), want),
        (torch.func.grad(inner), (keys,), want[1]),
        (torch.func.grad(lambda k: torch.func.grad_and_value(unseen)(k)[1]), (keys,), 2 * want[1]),
        (torch.func.grad(lambda b: torch.vmap(inner)(b)[0]), (batch,), torch.stack([want[1], 0 * want[1]])),
    ):
        run = torch.compile(transform, fullgraph=True, backend="aot_eager") if compiled else transform
        torch.testing.assert_close(run(*call), expected)
    if not compiled:
        torch.testing.assert_close(torch.autograd.grad(inner(leaves[1]), leaves[1])[0], want[1])
        with pytest.raises(NotImplementedError, match="patch_contrast_loss cannot be differentiated twice"):
            torch.func.grad(lambda k: torch.func.grad(function)(z, k).sum())(keys)
        with pytest.raises(NotImplementedError, match="patch_contrast_loss has no forward-mode derivative"):
            torch.func.jvp(lambda k: function(z, k), (keys,), (keys,))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_and_second_derivatives_are_refused_by_name(name: str) -> None:
    function, x = FUNCTIONS[name]
    forward = f"pglcl_ext.{name.split()[0]} has no forward-mode derivative"
    for transform in (
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.func.linearize(function, x),
        lambda: torch.func.hessian(function)(x),
    ):
        with pytest.raises(NotImplementedError, match=forward):
            transform()
    with forward_ad.dual_level():
        for requires_grad in (False, True):
            dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), torch.ones_like(x))
            with pytest.raises(NotImplementedError, match=forward):
                function(dual)
    with pytest.raises(NotImplementedError, match=f"{name.split()[0]} cannot be differentiated twice"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).sum())(x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_an_empty_batch_gives_empty_results(name: str) -> None:
    function, x = FUNCTIONS[name]
    none = x.new_zeros(0, *x.shape)
    assert torch.vmap(function)(none).shape == (0,)
    assert torch.vmap(torch.func.grad(function))(none).shape == none.shape


class Scheduled(nn.Module):
    """A module that reads its numbers from attributes, which a schedule may set."""

    def __init__(self, function: Callable[..., Tensor], **numbers: float) -> None:
        super().__init__()
        self.function = function
        for name, value in numbers.items():
            setattr(self, name, value)
        self.names = tuple(numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **{name: getattr(self, name) for name in self.names})


SCHEDULES: dict[str, tuple[Callable[..., Tensor], Tensor, dict[str, Any]]] = {
    "temperature": (lambda z, **o: patch_contrast_loss(z, LABELS, **o), CONTRAST.anchors, {"temperature": 0.1}),
    "negative_weight": (lambda z, **o: patch_contrast_loss(z, LABELS, **o), CONTRAST.anchors, {"negative_weight": 1.5}),
    "bound": (
        lambda z, **o: patch_contrast_loss(z, LABELS, CONTRAST.descriptors, **o),
        CONTRAST.anchors,
        {"max_positive_disparity": 0.2},
    ),
    "count": (
        lambda z, **o: patch_contrast_loss(z, LABELS, CONTRAST.descriptors, **o),
        CONTRAST.anchors,
        {"num_positives": 2},
    ),
    "ignore_index": (lambda z, **o: patch_contrast_loss(z, LABELS, **o), CONTRAST.anchors, {"ignore_index": 7}),
    "gaussian temperature": (
        lambda z, **o: gaussian_contrast_loss(z, GAUSSIAN[0].clamp(min=0), *GAUSSIAN[1:], **o),
        ANCHORS,
        {"temperature": 0.2},
    ),
    "covariance_scale": (
        lambda z, **o: gaussian_contrast_loss(z, GAUSSIAN[0].clamp(min=0), *GAUSSIAN[1:], **o),
        ANCHORS,
        {"covariance_scale": 0.2},
    ),
}


# An integer that is an attribute of a module is a constant to torch.compile, unless this is set.
@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("attribute", [False, True])
def test_a_number_that_changes_compiles_at_most_once_more(name: str, attribute: bool) -> None:
    function, x, numbers = SCHEDULES[name]
    ((option, first),) = numbers.items()
    torch._dynamo.reset()
    counters.clear()
    leaf = x.clone().requires_grad_()
    module = Scheduled(function, **numbers)
    run: Any = module if attribute else lambda z, value: function(z, **{option: value})
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for step in range(10):
        value = first + (step if isinstance(first, int) else 0.05 * step)
        setattr(module, option, value)
        got, want = (f(leaf) if attribute else f(leaf, value) for f in (compiled, run))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(want, leaf))
    assert counters["stats"]["unique_graphs"] <= 2


def test_sizes_of_an_exported_loss_may_vary() -> None:
    """No bounds on the sizes are given."""
    gaussian = GaussianContrastLoss(3, 5, queue_length=8)
    gaussian.enqueue(torch.randn(20, 5), torch.arange(20) % 3)
    for strict in (False, True):
        for module in (PatchContrastLoss(), gaussian):
            rows = {0: Dim("n")}
            example = (torch.randn(12, 5), torch.arange(12) % 3)
            program = torch.export.export(module, example, dynamic_shapes=(rows, rows), strict=strict).module()
            for n in (2, 9, 40):
                z, y = torch.randn(n, 5), torch.arange(n) % 3
                torch.testing.assert_close(program(z, y), module(z, y))


def test_exported_losses_can_be_trained_through() -> None:
    queue = GaussianContrastLoss(3, 5, queue_length=8)
    queue.enqueue(torch.randn(20, 5), torch.arange(20) % 3)
    z, y = torch.randn(12, 5), torch.arange(12) % 3
    for module in (queue, PatchContrastLoss()):
        program = torch.export.export(module, (z, y)).module()
        leaf = z.clone().requires_grad_()
        (got,) = torch.autograd.grad(program(leaf, y), leaf)
        (want,) = torch.autograd.grad(module(leaf, y), leaf)
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


class Together(nn.Module):
    """The losses and statistics in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.contrast = PatchContrastLoss(max_positive_disparity=0.5)
        self.gaussian = GaussianContrastLoss(3, 5, queue_length=8)
        self.gaussian.enqueue(torch.randn(20, 5), torch.arange(20) % 3)

    def forward(self, z: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        entropy = patch_entropy(x, 4).flatten()
        return entropy, PatchContrastLoss()(z, y), self.contrast(z, y, entropy), self.gaussian(z, y)


def test_an_exported_loss_holds_no_infinite_number() -> None:
    """AOTInductor writes such a number as a word, and then refuses to read its file."""
    for dtype in (torch.float32, torch.float64):
        for bounds in ({}, {"max_positive_disparity": math.inf, "min_negative_disparity": math.inf}):
            module = Scheduled(
                lambda z, **bounds: patch_contrast_loss(z, LABELS, CONTRAST.descriptors, **bounds), **bounds
            )
            z = ANCHORS.to(dtype)
            program = torch.export.export(module, (z,))
            numbers = [a for node in program.graph.nodes for a in node.args if isinstance(a, float)]
            assert len(numbers) == 4
            assert all(map(math.isfinite, numbers))
            torch.testing.assert_close(program.module()(z), module(z))


@pytest.mark.slow
def test_an_exported_loss_runs_without_python(tmp_path: Path) -> None:
    module, arguments = Together(), (torch.randn(8, 5), torch.arange(8) % 3, torch.randn(2, 3, 8, 8))
    file = torch._inductor.aoti_compile_and_package(
        torch.export.export(module, arguments), package_path=str(tmp_path / "module.pt2")
    )
    torch.testing.assert_close(tuple(torch._inductor.aoti_load_package(file)(*arguments)), module(*arguments))


def test_hard_negatives_compile_whole() -> None:
    module = GaussianContrastLoss(2, 3, queue_length=16, hard_negatives=True)
    module.enqueue(torch.randn(40, 3), torch.arange(40) % 2)
    z, y = torch.randn(10, 3, requires_grad=True), torch.arange(10) % 2
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        loss = function(z, y)
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_refused_eagerly_is_refused_at_tracing() -> None:
    x, y, z = torch.zeros(2, 3, 8, 8), torch.zeros(5, dtype=torch.int64), torch.zeros(6, 4)
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("patch_size must not exceed the image", patch_entropy, (x, 9)),
        ("stride must be positive", patch_statistics, (x, 4, 0)),
        ("labels must have shape", patch_contrast_loss, (z, y)),
        ("labels must have shape", gaussian_contrast_loss, (z, y, z[:2], torch.zeros(2, 4, 4), y[:2])),
        ("as many channels", semantic_disparity, (z, z[:, :3])),
    ]
    for message, function, arguments in calls:
        with pytest.raises(ValueError, match=message):
            function(*arguments)
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
            function(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        with pytest.raises(Exception, match=message):
            torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    # The ops themselves, which tracers call.
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="stride must be positive"):
        torch.ops.pglcl_ext.patch_statistics(mode.from_tensor(x), [4, 4], [0, 4], False, False)


@pytest.mark.parametrize("position", range(5))
def test_other_devices_are_refused(position: int) -> None:
    cpu = [torch.zeros(6, 4), torch.zeros(6).long(), torch.zeros(2, 4), torch.zeros(2, 4, 4), torch.ones(2).long()]
    meta = [t.to("meta") for t in cpu]
    assert gaussian_contrast_loss(*meta).device.type == "meta"
    for some, others in ((cpu, meta), (meta, cpu)):
        call = [*some[:position], others[position], *some[position + 1 :]]
        with pytest.raises(ValueError, match="must be on the device of"):
            gaussian_contrast_loss(*call)
    with pytest.raises(ValueError, match="b must be on the device of a, cpu, got meta"):
        semantic_disparity(cpu[0], meta[0])


def made_in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


NOT_LEARNT: dict[str, Callable[..., Tensor]] = {
    "keys": lambda of, z: patch_contrast_loss(
        z, of(LABELS), of(CONTRAST.descriptors), **{name: of(t) for name, t in KEYS.items()}, num_positives=2
    ),
    "anchors": lambda of, z: patch_contrast_loss(of(CONTRAST.anchors), LABELS, keys=z, key_labels=of(LABELS)),
    "bounds": lambda of, z: patch_contrast_loss(
        z, LABELS, of(CONTRAST.descriptors), max_positive_disparity=of(CONTRAST.descriptors)
    ),
    "masks": lambda of, z: patch_contrast_loss(
        z, of(LABELS), positive_mask=of(LABELS[:, None] == LABELS), negative_mask=of(LABELS[:, None] != LABELS)
    ),
    "disparity": lambda of, z: semantic_disparity(z, of(CONTRAST.keys)).sum(),
    "mean": lambda of, z: gaussian_contrast_loss(z, *map(of, GAUSSIAN)),
    "none": lambda of, z: gaussian_contrast_loss(z, *map(of, GAUSSIAN), reduction="none").sum(),
}


@pytest.mark.parametrize("name", NOT_LEARNT)
def test_tensors_made_in_inference_mode_are_accepted(name: str) -> None:
    """PyTorch's autograd saves no tensor that was made there."""
    assert made_in_inference_mode(LABELS).is_inference()
    gradients = []
    for of in (made_in_inference_mode, lambda t: t):
        leaf = CONTRAST.anchors.clone().requires_grad_()
        gradients += torch.autograd.grad(NOT_LEARNT[name](of, leaf), leaf)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


class Results(nn.Module):
    """A module that returns a named tuple of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = EmbeddingQueue(3, 5, 4)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return patch_statistics(x, 4), patch_embeddings(x, x.softmax(1), 4), self.queue.keys()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_that_returns_named_tuples_is_saved_and_loaded(strict: bool) -> None:
    module, x = Results(), torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,), strict=strict), file)
    file.seek(0)
    for got, want in zip(torch.export.load(file).module()(x), module(x), strict=True):
        assert type(got) is type(want)
        torch.testing.assert_close(got, want)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
@pytest.mark.parametrize("within", [False, True])
def test_a_number_of_rows_that_depends_on_data_compiles_whole(within: bool) -> None:
    weights, loss = torch.rand(2, 3, 8, 8).softmax(1), PatchContrastLoss()

    def step(features: Tensor) -> Tensor:
        select = (lambda rows: rows.compact()) if within else None
        batch = patch_embeddings(features, weights, 4, coverage=0.33, select=select)
        batch = batch if within else batch.compact()
        return loss(batch.embeddings, batch.labels, batch.entropy)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        features = torch.linspace(-3, 3, 2 * 4 * 8 * 8).sin().view(2, 4, 8, 8).requires_grad_()
        value = function(features)
        results.append((value.detach(), *torch.autograd.grad(value, features)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
