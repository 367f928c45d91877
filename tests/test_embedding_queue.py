"""EmbeddingQueue against Python lists that keep the newest keys."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pglcl_ext import EmbeddingQueue, GaussianContrastLoss, PatchContrastLoss


class ListQueue:
    """The specification: a list per class, cut to its newest entries."""

    def __init__(self, classes: int, length: int) -> None:
        self.lists: list[list[Tensor]] = [[] for _ in range(classes)]
        self.length = length

    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        for z, y in zip(embeddings, labels.tolist(), strict=True):
            if 0 <= y < len(self.lists):
                self.lists[y] = [*self.lists[y], z][-self.length :]


def as_set(rows) -> list[tuple[float, ...]]:
    return sorted(tuple(r.tolist()) for r in rows)


@given(
    batches=st.lists(st.lists(st.integers(-1, 3), max_size=14), max_size=6),
    length=st.integers(1, 6),
)
def test_the_queue_holds_the_newest_keys_of_each_class(batches: list[list[int]], length: int) -> None:
    queue, expected = EmbeddingQueue(3, 2, length), ListQueue(3, length)
    for labels in batches:
        z, y = torch.randn(len(labels), 2), torch.tensor(labels, dtype=torch.int64)
        queue.enqueue(z, y)
        expected.enqueue(z, y)
    keys, filled = queue.class_keys()
    for k in range(3):
        assert queue.counts[k] == len(expected.lists[k])
        assert as_set(keys[k][filled[k]]) == as_set(expected.lists[k])
    held = queue.keys()
    assert held.embeddings.shape == (3 * length, 2)
    for k in range(3):
        assert as_set(held.embeddings[held.labels == k]) == as_set(expected.lists[k])


def test_descriptors_stay_with_their_keys(device: torch.device) -> None:
    queue = EmbeddingQueue(2, 3, 5, descriptor_dim=1).to(device)
    for _ in range(4):
        z = torch.randn(7, 3, device=device)
        queue.enqueue(z, torch.randint(-1, 2, (7,), device=device), z.sum(dim=1))
    held = queue.keys()
    assert held.descriptors is not None
    torch.testing.assert_close(held.descriptors.squeeze(1), held.embeddings.sum(dim=1))


def test_statistics_are_those_of_the_keys(device: torch.device) -> None:
    queue = EmbeddingQueue(3, 6, 50).to(device)
    queue.enqueue(torch.randn(90, 6, device=device) + 1000, torch.arange(90, device=device) % 2)
    means, covariances = queue.statistics()
    keys, filled = queue.class_keys()
    for k in range(2):
        own = keys[k][filled[k]].double()
        torch.testing.assert_close(means[k].double(), own.mean(dim=0), rtol=1e-6, atol=0)
        # Far from the origin, where E[x x'] - mean mean' has lost every digit in float32.
        torch.testing.assert_close(covariances[k].double(), own.T.cov(correction=0), rtol=1e-3, atol=1e-4)
    assert torch.all(means[2] == 0)
    assert torch.all(covariances[2] == 0)


@pytest.mark.parametrize("count", [1, 7])
def test_equal_keys_have_no_spread(count: int, device: torch.device) -> None:
    queue = EmbeddingQueue(2, 5, 8).to(device)
    z = torch.randn(1, 5, device=device) * 100
    queue.enqueue(z.repeat(count, 1), torch.zeros(count, dtype=torch.int64, device=device))
    means, covariances = queue.statistics()
    assert torch.equal(means[0], z[0])
    assert torch.all(covariances[0] == 0)


def test_statistics_are_kept_in_32_bits_under_autocast(device: torch.device) -> None:
    module = GaussianContrastLoss(2, 8, queue_length=32).to(device)
    module.enqueue(torch.randn(50, 8, device=device), torch.arange(50, device=device) % 2)
    z, y = torch.randn(6, 8, device=device), torch.arange(6, device=device) % 2
    expected, loss = module.queue.statistics(), module(z, y)
    with torch.autocast(device.type, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(module.queue.statistics(), expected, strict=True))
        assert torch.equal(module(z, y), loss)
    for dtype in (torch.float16, torch.int64, 0):
        with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or torch\.float64, got"):
            module.queue.statistics(dtype)


def test_queued_keys_carry_no_gradient() -> None:
    queue = EmbeddingQueue(2, 3, 4)
    z = torch.randn(6, 3, requires_grad=True)
    queue.enqueue(z * 2, torch.zeros(6, dtype=torch.int64))
    assert not queue.keys().embeddings.requires_grad
    assert not queue.statistics()[0].requires_grad


def test_state_survives_bit_for_bit_and_moves(tmp_path) -> None:
    queue, other = (EmbeddingQueue(3, 4, 5, descriptor_dim=2) for _ in range(2))
    queue.enqueue(torch.randn(23, 4), torch.randint(-1, 3, (23,)), torch.randn(23, 2))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    batch = torch.randn(6, 4), torch.randint(0, 3, (6,)), torch.randn(6, 2)
    for q in (queue, other):
        q.enqueue(*batch)
    assert set(queue.state_dict()) == {"storage", "descriptor_storage", "positions", "counts"}
    for name, t in queue.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name
    assert all(t.device.type == "meta" for t in queue.to("meta").buffers())


@pytest.mark.parametrize("assign", [False, True])
def test_a_queue_made_on_the_meta_device_can_be_loaded_or_reset(assign: bool) -> None:
    """As large models are made. What is not saved must get a value, too."""
    full = EmbeddingQueue(2, 3, 4)
    full.enqueue(torch.randn(5, 3), torch.arange(5) % 2)
    with torch.device("meta"):
        queue = EmbeddingQueue(2, 3, 4)
    if not assign:
        queue.to_empty(device="cpu")
        queue.num_refused.fill_(77)  # what lay in the memory
    queue.load_state_dict(full.state_dict(), assign=assign)
    with pytest.warns(UserWarning, match="1 of 1 keys"):
        queue.enqueue(torch.full((1, 3), math.nan), torch.zeros(1, dtype=torch.int64))
    assert queue.num_refused.device.type == "cpu"
    assert queue.num_refused == 1
    queue.reset_parameters()
    assert all((buffer == 0).all() for buffer in queue.buffers())


def test_nothing_waits_for_a_device() -> None:
    # Tensors without values, which cannot be read.
    queue = EmbeddingQueue(3, 4, 5).to("meta")
    queue.enqueue(torch.empty(7, 4, device="meta"), torch.empty(7, dtype=torch.int64, device="meta"))
    queue.statistics()
    assert queue.keys().embeddings.shape == (15, 4)


def test_queued_keys_give_the_loss_of_the_same_keys(device: torch.device) -> None:
    queue, loss = EmbeddingQueue(3, 4, 20).to(device), PatchContrastLoss()
    z, y = torch.randn(30, 4, device=device), torch.randint(0, 3, (30,), device=device)
    queue.enqueue(z, y)
    keys, labels, _ = queue.keys()
    anchors = torch.randn(9, 4, device=device), torch.randint(0, 3, (9,), device=device)
    torch.testing.assert_close(loss(*anchors, keys=keys, key_labels=labels), loss(*anchors, keys=z, key_labels=y))


ROWS = (torch.zeros(5, 4), torch.zeros(5).long())


@pytest.mark.parametrize(
    ("message", "error", "arguments"),
    [
        ("embeddings must have shape", ValueError, (torch.zeros(5, 3), torch.zeros(5).long())),
        ("labels must be int64", TypeError, (torch.zeros(5, 4), torch.zeros(5))),
        ("labels must have shape", ValueError, (torch.zeros(5, 4), torch.zeros(4).long())),
        ("descriptors must be None, since the queue has descriptor_dim=0", ValueError, (*ROWS, torch.zeros(5))),
        ("labels must be int64, got int32", TypeError, (torch.zeros(5, 4), torch.zeros(5).int())),
        ("labels must be a tensor, got list", TypeError, (torch.zeros(5, 4), [0] * 5)),
        (
            "embeddings must be on the device of the queue, cpu, got meta",
            ValueError,
            (torch.zeros(5, 4, device="meta"), torch.zeros(5).long()),
        ),
        (
            "labels must be on the device of embeddings, cpu, got meta",
            ValueError,
            (torch.zeros(5, 4), torch.zeros(5).long().to("meta")),
        ),
    ],
)
def test_bad_input_is_refused_by_name(message: str, error: type[Exception], arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(error, match=message):
        EmbeddingQueue(3, 4).enqueue(*arguments)


def test_bad_options_and_descriptors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"descriptors must have shape \(M, C\) = \(5, 2\), got \(5, 1\)"):
        EmbeddingQueue(3, 4, 5, descriptor_dim=2).enqueue(*ROWS, torch.zeros(5))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        EmbeddingQueue(3, 4, 0)
    with pytest.raises(ValueError, match=r"descriptors must be given, with shape \(M, C\) = \(5, 1\)"):
        EmbeddingQueue(3, 4, descriptor_dim=1).enqueue(torch.zeros(5, 4), torch.zeros(5).long())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
def test_keys_that_are_not_finite_are_left_out_with_a_warning(bad: float) -> None:
    queue, expected = (EmbeddingQueue(2, 3, 8, descriptor_dim=1) for _ in range(2))
    z, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
    h = torch.rand(9, dtype=torch.float64)
    z[2, 1] = h[5] = bad  # 1e300 is infinite in the float32 of the queue
    with pytest.warns(UserWarning, match="EmbeddingQueue leaves out 2 of 9 keys: not finite in float32"):
        queue.enqueue(z, y, h)
    kept = [i for i in range(9) if i not in (2, 5)]
    expected.enqueue(z[kept], y[kept], h[kept])
    assert queue.num_refused == 2
    assert expected.num_refused == 0
    for name, t in queue.state_dict().items():
        assert torch.equal(t, expected.state_dict()[name]), name
    assert all(t.isfinite().all() for t in queue.statistics())
    y[2] = y[5] = -1  # keys of no class give no warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queue.enqueue(z, y, h)
    assert queue.num_refused == 2


def test_a_subclass_of_tensor_gives_the_warning_too() -> None:
    class Image(Tensor):
        pass

    queue = EmbeddingQueue(2, 3, 8)
    with pytest.warns(UserWarning, match="EmbeddingQueue leaves out 1 of 2 keys"):
        queue.enqueue(torch.tensor([[0.0, 0.0, math.nan], [0.0, 0.0, 1.0]]).as_subclass(Image), torch.arange(2))
    assert queue.counts.tolist() == [0, 1]
    assert type(queue.storage) is Tensor


def test_modules_with_a_group_are_copied_and_not_pickled() -> None:
    group = dist.ProcessGroup(0, 1)
    queue = EmbeddingQueue(2, 3, 4, process_group=group)
    loss = PatchContrastLoss(group=group)
    gaussian = GaussianContrastLoss(2, 3, process_group=group)
    assert copy.deepcopy(queue).process_group is group
    assert copy.deepcopy(loss).group is group
    assert copy.deepcopy(gaussian).queue.process_group is group
    for module in (queue, loss, gaussian):
        with pytest.raises(TypeError, match="a module with a process group cannot be pickled"):
            pickle.dumps(module)
    for module in (EmbeddingQueue(2, 3, 4), PatchContrastLoss(), GaussianContrastLoss(2, 3)):
        assert repr(pickle.loads(pickle.dumps(module))) == repr(module)
    assert pickle.loads(pickle.dumps(PatchContrastLoss())).group is None
