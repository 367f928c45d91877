"""An argument that is not valid is refused by its name, also where the checks run only because the op has refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pglcl_ext import gaussian_contrast_loss, patch_contrast_loss, patch_entropy, patch_statistics, semantic_disparity
from pglcl_ext._autograd import OpFunction


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Public functions with valid arguments; a gradient flows to the first."""
    z, y, h = torch.randn(6, 4), torch.arange(6) % 2, torch.rand(6)
    keys = {"keys": torch.randn(5, 4), "key_labels": torch.arange(5) % 2}
    bounds = {"max_positive_disparity": torch.rand(6), "min_negative_disparity": torch.rand(6)}
    masks = {"positive_mask": torch.zeros(6, 5).bool(), "negative_mask": torch.ones(6, 5).bool()}
    contrast = {"anchors": z, "labels": y, "descriptors": h, **keys, "key_descriptors": torch.rand(5)}
    normal = {"means": torch.randn(2, 4), "covariances": torch.eye(4).repeat(2, 1, 1), "counts": torch.ones(2).long()}
    image = {"input": torch.randn(2, 3, 8, 8), "patch_size": 4}
    return {
        "contrast": (patch_contrast_loss, {**contrast, **bounds}),
        "masks": (patch_contrast_loss, {"anchors": z, "labels": y, **keys, **masks}),
        "gaussian": (gaussian_contrast_loss, {"anchors": z, "labels": y, **normal}),
        "statistics": (patch_statistics, image),
        "entropy": (patch_entropy, image),
        "disparity": (semantic_disparity, {"a": h, "b": torch.rand(5)}),
    }


ODD: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
    "text": lambda t: "x",
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "complex": lambda t: t.to(torch.complex64),
    "int32": lambda t: t.to(torch.int32),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "one dimension more": lambda t: t[None],
    "nine dimensions more": lambda t: t[(None,) * 9],
    "no dimension": lambda t: t.new_ones(()),
    "one row less": lambda t: t[:-1],
}
# A batch of another size is valid, and so are descriptors of other patches. A tensor of meta alone has results of meta.
VALID = {
    ("statistics", "input", "one row less"), ("entropy", "input", "one row less"), ("disparity", "a", "one row less"),
    ("disparity", "b", "one row less"), ("statistics", "input", "meta"), ("entropy", "input", "meta"),
}  # fmt: skip


TENSORS = [
    (name, argument) for name, (_, given) in calls().items() for argument, t in given.items() if isinstance(t, Tensor)
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
@pytest.mark.parametrize("differentiated", [False, True])
def test_every_odd_tensor_is_refused_by_name(name: str, argument: str, odd: str, differentiated: bool) -> None:
    function, arguments = calls()[name]
    first = next(iter(arguments))
    given = {**arguments, argument: ODD[odd](arguments[argument])}
    if differentiated and argument != first:
        given[first] = given[first].clone().requires_grad_()
    if (name, argument, odd) in VALID:
        function(**given)
        return
    with pytest.raises((ValueError, TypeError)) as refusal:
        function(**given)
    message = str(refusal.value)
    assert message.split()[0] in {*arguments, "every"}, message
    # Sizes and devices are compared, and either tensor may be named.
    if not (odd.endswith(("less", "more")) or (odd == "meta" and argument == first)):
        assert message.startswith(f"{argument} must "), message


def test_a_refusal_is_raised_alone() -> None:
    """Not as one that happened while another was handled."""
    with pytest.raises(ValueError, match="labels must have shape") as refusal:
        patch_contrast_loss(torch.randn(3, 2), torch.zeros(4).long())
    assert refusal.value.__context__ is None


def test_an_error_that_has_nothing_to_do_with_the_arguments_is_raised_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = MemoryError("no room")

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(OpFunction, "call", refuse)
    with pytest.raises(MemoryError) as raised:
        patch_contrast_loss(torch.randn(4, 2), torch.arange(4) % 2)
    assert raised.value is error


def test_counts_without_a_class_are_refused_by_the_op_itself() -> None:
    z, y = torch.randn(3, 2), torch.full((3,), -1)
    arguments = (torch.zeros(0, 2), torch.zeros(0, 2, 2), torch.zeros(0).long(), 0.2, 4.0, 1.0, -1, 1, False)
    with pytest.raises(RuntimeError, match="counts"):
        torch.ops.pglcl_ext.gaussian_contrast(z, y, *arguments)
