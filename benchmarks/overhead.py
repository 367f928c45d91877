"""python -m benchmarks.overhead: what a small call costs on one thread: the ops, by size, and autograd beyond them.

It compares both passes through the public function with the op and its backward op, called alone below autograd. In a
loop of their own, the ops find their code in the nearest caches; beside other code they do not. So a third time is that
of a ``torch.autograd.Function`` that does nothing, its backward pass, and then the ops, which do not belong to it. A
sample is the processor time of this thread for 20 calls. The smallest of many samples counts, since a disturbance can
only add time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import machine, markdown
from pglcl_ext import gaussian_contrast_loss, patch_contrast_loss, patch_statistics

N, DEPTH, CLASSES = 32, 128, 4
ROUNDS, CALLS = 60, 20


def cases() -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    """Each public function of one tensor that requires a gradient."""
    g = torch.Generator().manual_seed(0)
    anchors = F.normalize(torch.randn(N, DEPTH, generator=g), dim=1).requires_grad_()
    labels, entropy = torch.randint(0, CLASSES, (N,), generator=g), torch.rand(N, generator=g)
    statistics = torch.randn(CLASSES, DEPTH, generator=g), torch.eye(DEPTH).repeat(CLASSES, 1, 1) / DEPTH
    counts = torch.full((CLASSES,), 100)
    logits = torch.randn(1, CLASSES, 32, 32, generator=g).requires_grad_()
    return {
        "patch_contrast_loss": (lambda z: patch_contrast_loss(z, labels, entropy), anchors),
        "gaussian_contrast_loss": (lambda z: gaussian_contrast_loss(z, labels, *statistics, counts), anchors),
        "patch_statistics": (lambda x: patch_statistics(x, 8).entropy.sum(), logits),
    }


def recorded(function: Callable[[Tensor], Any], x: Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of our ops that both passes make, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "pglcl_ext":
                calls.append((op, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
            return op(*args, **(kwargs or {}))

    with Recorder():
        torch.autograd.grad(function(x), x)
    return calls


class Nothing(torch.autograd.Function):
    """A scalar from a tensor, and a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.zeros = torch.zeros_like(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.zeros  # type: ignore[no-any-return]


def fastest(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds per call of each function, measured in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                function()
            best[name] = min(best[name], (time.thread_time_ns() - start) / CALLS / 1e3)
    return best


def rows() -> list[dict[str, Any]]:
    found = []
    for name, (function, x) in cases().items():

        def ops(calls: list[tuple[Any, tuple[Any, ...]]] = recorded(function, x)) -> None:  # noqa: B008
            with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                for op, arguments in calls:
                    op(*arguments)

        def both(function: Callable[[Tensor], Any] = function, x: Tensor = x) -> None:
            torch.autograd.grad(function(x), x)

        def nothing(x: Tensor = x) -> None:
            torch.autograd.grad(Nothing.apply(x), x)  # type: ignore[no-untyped-call]

        def beside(nothing: Callable[[], None] = nothing, ops: Callable[[], None] = ops) -> None:
            nothing()
            ops()

        found.append({"function": name, **fastest({"ops": ops, "nothing": nothing, "beside": beside, "both": both})})
    return found


def sizes() -> list[list[str]]:
    """Microseconds of the contrastive op and its backward op below autograd, from no patches to many."""
    found = []
    for n, depth in ((0, DEPTH), (1, DEPTH), (N, 8), (N, DEPTH)):
        g = torch.Generator().manual_seed(0)
        anchors = F.normalize(torch.randn(n, depth, generator=g), dim=1).requires_grad_()
        labels, entropy = torch.randint(0, CLASSES, (n,), generator=g), torch.rand(n, generator=g)
        calls = recorded(lambda z, y=labels, h=entropy: patch_contrast_loss(z, y, h), anchors)
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            times = fastest({str(op): lambda op=op, arguments=arguments: op(*arguments) for op, arguments in calls})
        found.append([f"{n} x {depth}", *(f"{t:.1f}" for t in times.values())])
    return found


def main() -> None:
    torch.set_num_threads(1)
    info = machine()
    print(f"{info['processor']}, 1 thread, {info['cpu_instruction_set']}, torch {info['torch_running']}\n")
    head = [
        "function, microseconds",
        "op and backward op",
        "a Function that does nothing",
        "both, in turns",
        "both passes",
    ]
    kinds = ("ops", "nothing", "beside", "both")
    print(markdown(head, [[r["function"], *(f"{r[k]:.0f}" for k in kinds)] for r in rows()]))
    print()
    print(markdown(["patch_contrast, N x D, microseconds", "op", "backward op"], sizes()))


if __name__ == "__main__":
    main()
