"""What a training loop does around the functions: checkpoints, copies, threads, other defaults and other tensors."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pglcl_ext import (
    CoverageThreshold,
    EmbeddingQueue,
    GaussianContrastLoss,
    PatchContrastLoss,
    class_patches,
    patch_contrast_loss,
    patch_embeddings,
    patch_statistics,
    semantic_disparity,
)

Z, Y, H = torch.linspace(-9, 9, 60).sin().view(12, 5), torch.arange(12) % 3, torch.linspace(0, 1, 12)
IMAGE = torch.linspace(-40, 40, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)


NOWHERE = torch.full((2, 8, 8), -1)
CPU = torch.device("cpu")  # where modules are made, also if another device is the default


def guided() -> PatchContrastLoss:
    return PatchContrastLoss(num_positives=2, num_negatives=3)


def gaussian(hard_negatives: bool = False) -> GaussianContrastLoss:
    with CPU:
        module = GaussianContrastLoss(3, 5, queue_length=8, hard_negatives=hard_negatives)
    module.enqueue(Z.flip(0), Y)
    return module


def queue() -> EmbeddingQueue:
    with CPU:
        module = EmbeddingQueue(3, 5, 4, descriptor_dim=1)
    module.enqueue(Z, Y, H)
    return module


def threshold() -> CoverageThreshold:
    with CPU:
        module = CoverageThreshold(3)
    module.update(H, Y)
    return module


# Each public function and module as a function of numbers that a gradient may flow to.
USES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "patch_contrast_loss": (lambda z: guided()(z, Y, H), Z),
    "with keys": (lambda z: patch_contrast_loss(z, Y, keys=z * 2, key_labels=Y, reduction="none"), Z),
    "gaussian_contrast_loss": (lambda z: gaussian()(z, Y), Z),
    "hard_negatives": (lambda z: seeded(lambda: gaussian(hard_negatives=True)(z, Y)), Z),
    "patch_statistics": (lambda x: patch_statistics(x, 4, 2), IMAGE),
    "semantic_disparity": (lambda z: semantic_disparity(z, z * z), Z),
    "patch_embeddings": (lambda x: patch_embeddings(x, x.detach().softmax(1), 4, 2)[0], IMAGE),
    "selected": (
        lambda x: patch_embeddings(x, x.detach().softmax(1), 4, 2, select=lambda r: r.limited(2, r.entropy).compact()),
        IMAGE,
    ),
    "class_patches": (lambda x: class_patches(x, x.detach().softmax(1), 4, 3, output_size=6), IMAGE),
    "no class_patches": (lambda x: class_patches(x, NOWHERE, 4, 3), IMAGE),
    "queue": (lambda z: (queue().keys(), queue().statistics()), Z),
    "threshold": (lambda z: threshold().value, Z),
}


def seeded(call: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(3)
    return call()


def tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from tensors(part)


def with_gradient(use: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """The results, and the gradient of the sum of those that have one."""
    leaf = x.clone().requires_grad_()
    results = list(tensors(use(leaf)))
    learnt = [t.sum() for t in results if t.requires_grad]
    if learnt:
        torch.stack(learnt).sum().backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
    return [t.detach().as_subclass(Tensor) for t in results]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a, b)


@pytest.mark.slow  # torch.utils.checkpoint imports the compiler
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hard", [None, False, True])
def test_a_checkpoint_changes_no_gradient(hard: bool | None, reentrant: bool) -> None:
    module: Any = guided() if hard is None else gaussian(hard)
    use = (lambda z: module(z, Y, H)) if hard is None else lambda z: module(z, Y)
    results = []
    for call in (use, lambda z: checkpoint(use, z, use_reentrant=reentrant)):
        torch.manual_seed(0)
        results.append(with_gradient(call, Z))
    assert results[0][1].abs().max() > 0
    assert_same(*results)


@pytest.mark.parametrize("name", ["anchors", "labels", "descriptors", "keys", "key_labels", "max_positive_disparity"])
def test_an_argument_changed_in_place_before_the_backward_pass_is_an_error(name: str) -> None:
    arguments = {
        "anchors": Z.clone().requires_grad_() * 1,
        "labels": Y.clone(),
        "descriptors": H.clone(),
        "keys": Z.clone(),
        "key_labels": Y.clone(),
        "key_descriptors": H.clone(),
        "max_positive_disparity": H.clone(),
    }
    loss = patch_contrast_loss(**arguments)
    with torch.no_grad():
        arguments[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("make", [guided, gaussian, lambda: gaussian(True), queue, threshold])
def test_copies_of_modules_and_saved_states_go_on_alike(make: Callable[[], nn.Module]) -> None:
    def go_on(module: Any) -> Any:
        if isinstance(module, CoverageThreshold):
            module.update(H.flip(0), Y)
            return module.value
        if isinstance(module, EmbeddingQueue):
            module.enqueue(Z * 2, Y, H)
            return module.keys(), module.statistics()
        if isinstance(module, GaussianContrastLoss):
            module.enqueue(Z * 2, Y)
            return seeded(lambda: module(Z, Y))
        return module(Z, Y, H)

    module: nn.Module = make()
    go_on(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False), make()]
    copies[-1].load_state_dict(module.state_dict())
    want = list(tensors(go_on(module)))
    for each in copies:
        assert_same(list(tensors(go_on(each))), want)


@pytest.mark.parametrize("name", USES)
def test_other_defaults_of_pytorch_change_no_result(name: str) -> None:
    use, x = USES[name]
    want = with_gradient(use, x)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            got = with_gradient(use, x)
    finally:
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
    assert_same(got, want)


class Image(Tensor):
    """A subclass whose ``new_empty`` takes a tuple alone, as that of MONAI's MetaTensor."""

    def new_empty(self, size: Any, **options: Any) -> Tensor:  # type: ignore[override]
        assert isinstance(size, tuple)
        return super().new_empty(size, **options)


@pytest.mark.parametrize("name", USES)
def test_a_subclass_of_tensor_changes_no_result(name: str) -> None:
    use, x = USES[name]
    assert_same(with_gradient(use, x.as_subclass(Image)), with_gradient(use, x))


@pytest.mark.parametrize("name", USES)
def test_views_that_negate_change_no_result(name: str) -> None:
    """PyTorch makes such a view for the imaginary part of a conjugate; its memory holds the other sign."""
    use, x = USES[name]
    assert torch._neg_view(x).is_neg()
    got, want = (with_gradient(lambda t, f=f: use(f(t)), x) for f in (torch._neg_view, torch.neg))
    assert_same(got, want)


def test_threads_that_call_at_the_same_time_get_the_same_results() -> None:
    want = {name: with_gradient(use, x) for name, (use, x) in USES.items() if name != "hard_negatives"}
    failed = []

    def run() -> None:
        for name in want:
            try:
                assert_same(with_gradient(*USES[name]), want[name])
            except Exception as error:
                failed.append((name, error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_gradients_accumulate_and_a_kept_graph_gives_them_again() -> None:
    use, x = USES["patch_contrast_loss"]
    leaf = x.clone().requires_grad_()
    loss = use(leaf)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    loss.backward()
    use(leaf).backward()
    torch.testing.assert_close(leaf.grad, 3 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
