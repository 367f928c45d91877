"""Random problems of the ops, drawn by hypothesis or by hand, and comparisons with the reference."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl_ext import gaussian_contrast_loss, patch_contrast_loss, reference
from pglcl_ext._arguments import Choice, ContrastArguments, ContrastNumbers, GaussianArguments, Side
from pglcl_ext._checks import REDUCTIONS
from pglcl_ext._library import allow_tf32

MOST_ROWS = math.inf  # of a problem; an emulated device sets it lower

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def embeddings(n: int, d: int, *, generator: torch.Generator | None = None) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


@dataclass
class ContrastProblem:
    """Inputs of patch_contrast_loss in float64; `cast` gives them in another dtype, on another device."""

    anchors: Tensor
    labels: Tensor
    descriptors: Tensor | None = None
    keys: Tensor | None = None
    key_labels: Tensor | None = None
    key_descriptors: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def random(
        cls,
        n: int,
        d: int,
        *,
        m: int | None = None,
        classes: int = 4,
        channels: int | None = 1,
        ignored: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> ContrastProblem:
        g = torch.Generator().manual_seed(seed)
        n = int(min(n, MOST_ROWS))
        m = None if m is None else int(min(m, MOST_ROWS))

        def side(count: int) -> tuple[Tensor, Tensor, Tensor | None]:
            labels = torch.randint(-1 if ignored else 0, classes, (count,), generator=g)
            shape = (count,) if channels == 1 else (count, channels or 1)
            # Half of the values lie on a coarse grid, so that ties occur.
            values = torch.rand(shape, generator=g)
            values = torch.where(torch.rand(shape, generator=g) < 0.5, (values * 8).round() / 8, values)
            return embeddings(count, d, generator=g), labels, values if channels else None

        anchors, labels, descriptors = side(n)
        if m is None:
            return cls(anchors, labels, descriptors, options=options)
        return cls(anchors, labels, descriptors, *side(m), options=options)

    @property
    def temperature(self) -> float:
        return self.options.get("temperature", CONTRAST_DEFAULTS["temperature"])  # type: ignore[no-any-return]

    def cast(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> ContrastProblem:
        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, dtype).detach().clone().requires_grad_()

        def move(t: Any) -> Any:
            return t.to(device) if isinstance(t, Tensor) else t

        return ContrastProblem(
            leaf(self.anchors),  # type: ignore[arg-type]
            move(self.labels),
            move(self.descriptors),
            leaf(self.keys),
            move(self.key_labels),
            move(self.key_descriptors),
            {name: move(value) for name, value in self.options.items()},
        )

    def loss(self, function: Any = patch_contrast_loss) -> Tensor:
        keys = {}
        if self.keys is not None:
            keys = {"keys": self.keys, "key_labels": self.key_labels}
            if self.descriptors is not None:
                keys["key_descriptors"] = self.key_descriptors
        return function(self.anchors, self.labels, self.descriptors, **keys, **self.options)

    def gradients(self, loss: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        inputs = [t for t in (self.anchors, self.keys) if t is not None]
        return list(torch.autograd.grad(loss, inputs, weights))


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


CONTRAST_DEFAULTS, GAUSSIAN_DEFAULTS = defaults_of(patch_contrast_loss), defaults_of(gaussian_contrast_loss)


def contrast_arguments(
    anchors: Side, keys: Side | None = None, choice: Choice | None = None, *, reduction: str = "mean", **numbers: Any
) -> ContrastArguments:
    """The arguments of the op, with the defaults of the public function where `numbers` has none."""
    defaults = ContrastNumbers(
        temperature=CONTRAST_DEFAULTS["temperature"],
        positive_bound=math.inf,
        negative_bound=0.0,
        negative_weight=CONTRAST_DEFAULTS["negative_weight"],
        ignore_index=CONTRAST_DEFAULTS["ignore_index"],
        self_offset=-1,
        reduction=REDUCTIONS[reduction],
        allow_tf32=allow_tf32(),
    )
    return ContrastArguments(anchors, keys, choice or Choice(), defaults._replace(**numbers))


def gaussian_arguments(*tensors: Tensor, needs_gradients: bool = True, **options: Any) -> GaussianArguments:
    """The arguments of the op for the tensors and options of the public function, whose defaults hold."""
    options = {**GAUSSIAN_DEFAULTS, **options}
    reduction = REDUCTIONS[options.pop("reduction")]
    return GaussianArguments(*tensors, **options, reduction=reduction, needs_gradients=needs_gradients)


# Largest accepted error relative to the largest gradient; losses are compared with the same number, absolutely and
# relatively. Low precision is limited by the rounding of the result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_matches_reference(problem: ContrastProblem, dtype: torch.dtype, device: torch.device | str) -> None:
    """The loss and its gradients in `dtype` against the reference in float64 on the same, rounded, numbers."""
    ours = problem.cast(dtype, device)
    oracle = ours.cast(torch.float64)
    value, expected = ours.loss(), oracle.loss(reference.patch_contrast_loss)
    # Exponentials are of logits up to 1 / temperature, which are rounded in the accumulating type.
    tolerance = TOLERANCE[dtype] + 2 * torch.finfo(value.dtype).eps / problem.temperature
    torch.testing.assert_close(value.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    upstream = rising_upstream(expected)
    got = ours.gradients(value, upstream.to(value.device, value.dtype))
    assert_gradients_match(problem, got, oracle.gradients(expected, upstream), tolerance)


def rising_upstream(loss: Tensor) -> Tensor:
    """An upstream gradient of the shape of `loss` that rises from 1/2 to 3/2, in float64."""
    return torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()].reshape(loss.shape)


def assert_gradients_match(
    problem: ContrastProblem, got: Iterable[Tensor], want: Iterable[Tensor], tolerance: float
) -> None:
    for a, b in zip(got, want, strict=True):
        # A gradient is a sum of up to N terms of size 1 / temperature (over N for the mean), which may cancel.
        term = 0.1 / (problem.temperature * max(len(problem.anchors), 1) ** 0.5)
        scale = max(b.abs().max().item(), term) if b.numel() else term
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=tolerance * scale)


def gaussian_problem(
    n: int, d: int, *, classes: int = 4, pairwise: bool = False, empty: tuple[int, ...] = (), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """anchors, labels, means, covariances and counts of gaussian_contrast_loss, in float64."""
    g = torch.Generator().manual_seed(seed)
    n = int(min(n, MOST_ROWS))
    lead = (classes, classes) if pairwise else (classes,)
    roots = torch.randn(*lead, d, d + 2, generator=g, dtype=torch.float64) / (d + 2)
    counts = torch.randint(1, 100, (classes,), generator=g)
    counts[list(empty)] = 0
    return (
        embeddings(n, d, generator=g),
        torch.randint(-1, classes, (n,), generator=g),
        torch.randn(*lead, d, generator=g, dtype=torch.float64) / d**0.5,
        roots @ roots.mT,
        counts,
    )
