"""The losses over the ranks of a process group: gloo processes on this machine."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor

from pglcl_ext import (
    CoverageThreshold,
    EmbeddingQueue,
    GaussianContrastLoss,
    PatchContrastLoss,
    class_patches,
    distributed,
    patch_contrast_loss,
    patch_embeddings,
    patch_statistics,
    semantic_disparity,
)
from pglcl_ext._arguments import Side
from tests.problems import contrast_arguments

ops = torch.ops.pglcl_ext

FEATURES, DEPTH = 6, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounds": {"max_positive_disparity": 0.4, "min_negative_disparity": 0.1, "negative_weight": 3.0},
    "counts": {"num_positives": 3, "num_negatives": 4},
}
# Patches of each rank, for one to three ranks; one rank has none, one has a single one.
SIZES = {1: [[9]], 2: [[12, 7], [0, 11]], 3: [[8, 5, 10], [1, 0, 9]]}


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(sum(sizes))
    return [
        (
            torch.randn(n, FEATURES, generator=g, dtype=torch.float64),
            torch.randint(-1, 3, (n,), generator=g),
            torch.rand(n, generator=g, dtype=torch.float64),
        )
        for n in sizes
    ]


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, DEPTH, dtype=torch.float64)


def join(rank: int, world: int, folder: str, seconds: float = 60) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=seconds)
    )


def leave() -> None:
    """Ends this process at once, without the interpreter's own shutdown.

    DistributedDataParallel keeps the process group's threads after destroy_process_group(). Threads that run during the
    shutdown sometimes abort it.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def side(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, DEPTH, generator=g, dtype=torch.float64),
        torch.randint(-1, 3, (n,), generator=g),
        torch.rand(n, generator=g, dtype=torch.float64),
    )


def compare_with_one_process(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    for sizes in SIZES[world]:
        parts = batches(sizes)
        whole = [torch.cat(column) for column in zip(*parts, strict=True)]
        for options in OPTIONS.values():
            for with_keys in (False, True):
                single = network()
                keys: dict[str, Tensor] = {}
                if with_keys:
                    every = [side(4 + r, r) for r in range(world)]
                    names = ("keys", "key_labels", "key_descriptors")
                    keys = {n: torch.cat(c).clone() for n, c in zip(names, zip(*every, strict=True), strict=True)}
                    keys["keys"].requires_grad_()
                expected = patch_contrast_loss(single(whole[0]), *whole[1:], **keys, **options)
                expected.backward()
                for gather in ("all", "ring"):
                    model = nn.parallel.DistributedDataParallel(network())
                    x, y, h = parts[rank]
                    own: dict[str, Tensor] = {}
                    if with_keys:
                        own = {n: t.clone() for n, t in zip(names, side(4 + rank, rank), strict=True)}
                        own["keys"].requires_grad_()
                    loss = patch_contrast_loss(model(x), y, h, **own, **options, group=dist.group.WORLD, gather=gather)
                    loss.backward()
                    mean = loss.detach().clone()
                    dist.all_reduce(mean)
                    torch.testing.assert_close(mean / world, expected.detach(), rtol=1e-10, atol=1e-12)
                    for p, q in zip(model.parameters(), single.parameters(), strict=True):
                        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
                    if with_keys:  # the gradient of the sum of the ranks' losses
                        first = sum(4 + r for r in range(rank))
                        want = keys["keys"].grad[first : first + 4 + rank] * world
                        torch.testing.assert_close(own["keys"].grad, want, rtol=1e-9, atol=1e-12)
        per_anchor = patch_contrast_loss(whole[0], *whole[1:], reduction="none")
        first = sum(sizes[:rank])
        for gather in ("all", "ring"):
            x, y, h = parts[rank]
            mine = patch_contrast_loss(x, y, h, reduction="none", group=dist.group.WORLD, gather=gather)
            torch.testing.assert_close(mine, per_anchor[first : first + sizes[rank]])
            module = PatchContrastLoss(group=dist.group.WORLD, gather=gather, normalize=False, reduction="sum")
            torch.testing.assert_close(module(x, y, h), patch_contrast_sum(mine))
            alone = PatchContrastLoss(normalize=False)
            alone(whole[0], *whole[1:])
            assert module.num_valid == alone.num_valid
    leave()


def patch_contrast_sum(losses: Tensor) -> Tensor:
    return losses.sum()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_mean_over_ranks_is_the_loss_of_one_process_on_all_batches(world: int, tmp_path: Path) -> None:
    mp.spawn(compare_with_one_process, (world, str(tmp_path)), nprocs=world)


def low_precision(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        z, y, h = side(9, rank)
        results = []
        for gather in ("all", "ring"):
            t = nn.functional.normalize(z, dim=1).to(dtype).requires_grad_()
            loss = patch_contrast_loss(t, y, h, group=dist.group.WORLD, gather=gather)
            loss.backward()
            assert t.grad is not None
            assert t.grad.dtype == dtype
            results.append((loss.detach(), t.grad.float()))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=2e-2 * float(results[0][1].abs().max()))
    leave()


def test_both_ways_agree_in_low_precision(tmp_path: Path) -> None:
    mp.spawn(low_precision, (2, str(tmp_path)), nprocs=2)


def rows_of_any_bytes(rank: int, world: int, folder: str) -> None:
    """Rows of 2 to 30 bytes, one row and none, and views whose strides are not those of their shape."""
    join(rank, world, folder)
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.float16):
        for depth in (1, 3, 6):
            for sizes in ([5, 3], [1, 4], [2, 0], [1, 0], [0, 0]):
                every = [side(n, n) for n in sizes]
                z, y, h = (torch.cat(column) for column in zip(*every, strict=True))
                whole = z.repeat(1, 2)[:, :depth].to(dtype)
                labels, descriptors = y.clamp(min=0) % 2, h.float()
                want = patch_contrast_loss(whole, labels, descriptors, reduction="none")
                rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
                for strided in (False, True):
                    own, own_labels, own_descriptors = whole[rows], labels[rows], descriptors[rows]
                    if strided:
                        own = own.t().contiguous().t()
                        own_labels = own_labels.repeat_interleave(3)[::3]
                        own_descriptors = own_descriptors.expand(2, -1).t().contiguous()[:, 0]
                    for gather in ("all", "ring"):
                        options = {"reduction": "none", "group": group, "gather": gather}
                        got = patch_contrast_loss(own, own_labels, own_descriptors, **options)
                        torch.testing.assert_close(got, want[rows])
                    queue = EmbeddingQueue(2, depth, 9, descriptor_dim=1, process_group=group)
                    queue.enqueue(own, own_labels, own_descriptors)
                    alone = EmbeddingQueue(2, depth, 9, descriptor_dim=1)
                    alone.enqueue(whole, labels, descriptors)
                    assert torch.equal(queue.storage, alone.storage)
                    assert torch.equal(queue.counts, alone.counts)
    leave()


def test_rows_of_any_number_of_bytes_travel(tmp_path: Path) -> None:
    mp.spawn(rows_of_any_bytes, (2, str(tmp_path)), nprocs=2)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group that this process is alone in."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("gather", ["all", "ring"])
def test_forward_mode_and_export_are_refused_by_name(gather: str) -> None:
    z, y = torch.randn(4, 3), torch.arange(4) % 2
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="patch_contrast_loss has no forward"):
        patch_contrast_loss(forward_ad.make_dual(z, z), y, group=dist.group.WORLD, gather=gather)
    with pytest.raises(NotImplementedError, match="patch_contrast_loss with a process group cannot be exported"):
        torch.export.export(PatchContrastLoss(group=dist.group.WORLD, gather=gather), (z, y))


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("gather", ["all", "ring"])
def test_a_compiled_loss_with_a_group_is_the_eager_one(gather: str) -> None:
    module = PatchContrastLoss(num_positives=2, group=dist.group.WORLD, gather=gather)
    z, y, h = side(9, 0)
    results = []
    for function in (module, torch.compile(module, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        loss = function(leaf, y, h)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


class Image(Tensor):
    """A subclass whose ``new_empty`` takes a tuple alone, as that of MONAI's MetaTensor."""

    def new_empty(self, size: Any, **options: Any) -> Tensor:  # type: ignore[override]
        assert isinstance(size, tuple)
        return super().new_empty(size, **options)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("rows", [9, 0])
def test_a_subclass_of_tensor_changes_no_result(gather: str, rows: int) -> None:
    results = []
    for kind in (Tensor, Image):
        z, y, h = (t.as_subclass(kind) for t in side(rows, 0))
        z.requires_grad_()
        loss = patch_contrast_loss(z, y, h, num_positives=2, group=dist.group.WORLD, gather=gather)
        loss.backward()
        queue = EmbeddingQueue(3, DEPTH, 6, process_group=dist.group.WORLD)
        queue.enqueue(z, y)
        assert z.grad is not None
        results.append([t.detach().as_subclass(Tensor) for t in (loss, z.grad, queue.storage)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("alone")
def test_a_tensor_that_is_distributed_over_processes_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (1,))
    z, y, h = (distribute_tensor(t, mesh) for t in side(6, 0))
    image = distribute_tensor(torch.rand(1, 2, 4, 4), mesh)
    queue, gaussian, threshold = EmbeddingQueue(3, DEPTH, 6), GaussianContrastLoss(3, DEPTH), CoverageThreshold(3)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("anchors", lambda: patch_contrast_loss(z, y, h)),
        ("anchors", lambda: patch_contrast_loss(z, y, group=dist.group.WORLD)),
        ("embeddings", lambda: PatchContrastLoss()(z, y)),
        ("labels", lambda: patch_contrast_loss(z.to_local(), y)),
        ("embeddings", lambda: gaussian(z, y)),
        ("embeddings", lambda: queue.enqueue(z, y)),
        ("coverage", lambda: threshold.update(h, y)),
        ("input", lambda: patch_statistics(image, 2)),
        ("features", lambda: patch_embeddings(image, image, 2)),
        ("images", lambda: class_patches(image, image, 2, 2)),
        ("a", lambda: semantic_disparity(h)),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=rf"{name} must be a tensor of one process, got a DTensor\. Pass its full_"):
            call()


def train_sharded(rank: int, world: int, folder: str) -> None:
    """A network that FSDP shards, in both of its forms, has the gradients of one process on all batches."""
    join(rank, world, folder)
    parts = batches([8, 5])
    single = network()
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    patch_contrast_loss(single(whole[0]), *whole[1:], num_positives=3).backward()
    x, y, h = parts[rank]
    for gather in ("all", "ring"):
        sharded = network()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
        flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
        for model in (sharded, flat):
            z = model(x)
            patch_contrast_loss(z, y, h, num_positives=3, group=dist.group.WORLD, gather=gather).backward()
        for p, q in zip(sharded.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
        with FullyShardedDataParallel.summon_full_params(flat, with_grads=True):
            for p, q in zip(flat.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
    leave()


@pytest.mark.slow
def test_a_network_that_fsdp_shards_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    mp.spawn(train_sharded, (2, str(tmp_path)), nprocs=2)


def equal_queues(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    queue = EmbeddingQueue(3, DEPTH, 6, descriptor_dim=1, process_group=dist.group.WORLD)
    expected = EmbeddingQueue(3, DEPTH, 6, descriptor_dim=1)
    for step in range(5):
        every = [side((r + step) % 4, 10 * step + r) for r in range(world)]
        queue.enqueue(*every[rank])
        expected.enqueue(*(torch.cat(c) for c in zip(*every, strict=True)))
    for name, t in queue.state_dict().items():
        assert torch.equal(t, expected.state_dict()[name]), name
    leave()


def test_queues_stay_equal(tmp_path: Path) -> None:
    mp.spawn(equal_queues, (3, str(tmp_path)), nprocs=3)


def disagree(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    z, y, h = side(9, rank)
    group, other = dist.group.WORLD, rank == 1
    differs = f"rank {1 - rank} of the group differs from this rank, which passes"
    for gather in ("all", "ring"):
        module = PatchContrastLoss(group=group, gather=gather)
        for call in (
            (z.bfloat16() if other else z.half(), y),
            (z[:, :4] if other else z[:, :2], y),
            (z[:, :2] if other else z[:, :4].float(), y),  # as many bytes
            (z, y, h if other else None),
            (z, y, h[:, None] if other else h[:, None].expand(9, 2)),
            (z.clone().requires_grad_(), y) if other else (z, y),  # the one would wait for the other's gradient
            (z.clone().requires_grad_() if other else z[:0], y if other else y[:0]),  # as a rank without patches
        ):
            with pytest.raises(ValueError, match=f"all ranks must pass tensors of the same dtypes .*: {differs}"):
                module(*call)
    with pytest.raises(ValueError, match=f"{differs} float64 .rows, {DEPTH}."):
        PatchContrastLoss(group=group, gather="ring" if other else "all")(z, y)
    with pytest.raises(ValueError, match=differs):
        patch_contrast_loss(z, y, h, num_positives=2 if other else None, group=group)
    with pytest.raises(ValueError, match=differs):
        EmbeddingQueue(3, DEPTH, 6, process_group=group).enqueue(z.half() if other else z.bfloat16(), y)
    assert patch_contrast_loss(z, y, group=group).isfinite()  # the ranks still meet
    leave()


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    mp.spawn(disagree, (2, str(tmp_path)), nprocs=2)


def survive_a_dead_rank(rank: int, world: int, folder: str, gather: str) -> None:
    join(rank, world, folder, seconds=4)
    z, y, h = side(8, rank)
    patch_contrast_loss(z, y, h, group=dist.group.WORLD, gather=gather)
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    try:
        patch_contrast_loss(z, y, h, group=dist.group.WORLD, gather=gather)
    except RuntimeError as error:  # torch's own, from the process group
        Path(folder, "message").write_text(f"{time.monotonic() - start:.1f} {error}")
    os._exit(0)


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_a_dead_rank_does_not_hang_the_others(gather: str, tmp_path: Path) -> None:
    mp.spawn(survive_a_dead_rank, (2, str(tmp_path), gather), nprocs=2)
    message = (tmp_path / "message").read_text()
    assert float(message.split()[0]) < 20
    assert any(word in message.lower() for word in ("timed out", "timeout", "connection", "closed")), message


def test_bad_options_are_refused_by_name() -> None:
    z, y = torch.randn(4, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match="gather must be one of all, ring, got 'some'"):
        patch_contrast_loss(z, y, gather="some")
    with pytest.raises(ValueError, match="gather must be one of"):
        PatchContrastLoss(gather="some")
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="cannot be given with a process group"):
        patch_contrast_loss(z, y, positive_mask=mask, negative_mask=mask, group=object())
    for call in (
        lambda: patch_contrast_loss(z, y, group="all"),
        lambda: patch_contrast_loss(z, y, group="all", gather="ring"),
        lambda: PatchContrastLoss(group="all"),
        lambda: EmbeddingQueue(2, 3, 4, process_group="all"),
    ):
        with pytest.raises(TypeError, match=r"a process group must be a torch\.distributed\.ProcessGroup, got str"):
            call()


@pytest.mark.parametrize("scale", [0.5, 2.0**13, 2.0**57])
def test_sums_of_parts_merge_at_any_size_of_logits(scale: float) -> None:
    # A part without pairs of an anchor, parts of very different maxima, and equal logits in different parts.
    g = torch.Generator().manual_seed(0)
    z, k = (torch.randint(-2, 3, (n, 5), generator=g).float() * scale for n in (40, 90))
    y, key_labels = (torch.randint(0, 3, (n,), generator=g) for n in (40, 90))
    key_labels[:30] = -1

    def part(keys: slice) -> distributed._AnchorSums:
        numbers = {"temperature": 0.5, "negative_weight": 1e3, "reduction": "none"}
        x = contrast_arguments(Side(z, y), Side(k[keys], key_labels[keys]), **numbers)
        loss, top, log_sum, _, count, _ = ops.patch_contrast(*x.flat())
        return distributed._AnchorSums(top, log_sum, torch.where(count > 0, log_sum - loss, 0), count)

    merged = part(slice(0, 30)).merge(part(slice(30, 50))).merge(part(slice(50, 90)))
    whole = part(slice(0, 90))
    assert torch.equal(merged.num_positives, whole.num_positives)
    for a, b in (
        (merged.max_logit + merged.log_sum, whole.max_logit + whole.log_sum),
        (merged.log_sum - merged.positive, whole.log_sum - whole.positive),
    ):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
