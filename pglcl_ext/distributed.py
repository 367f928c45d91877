"""The contrastive loss over the ranks of a process group: keys of all ranks, anchors of one's own.

Either every rank gathers all keys (``gather="all"``), or keys travel around a ring and the log-sum-exps of one part
after another are merged (``gather="ring"``), which holds the keys of two ranks at a time, however many there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pglcl_ext._library import ops

__all__ = ["GATHERS", "all_keys_contrast", "gather_rows", "ring_contrast"]

GATHERS = ("all", "ring")
NONE, MEAN, SUM = 0, 1, 2  # reductions, as the op numbers them

# temperature, the two bounds as numbers, negative_weight, ignore_index
Numbers = tuple[float, float, float, float, int]


def _sizes(rows: int, device: torch.device, group: Any) -> list[int]:
    """The number of rows of every rank."""
    mine = torch.tensor([rows], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(size) for size in sizes]


def _bytes(t: Tensor, rows: int) -> Tensor:
    """The rows of `t` as bytes, (rows, bytes of a row), with zeros below: no backend has to know its dtype."""
    width = t[:1].numel() * t.element_size() if len(t) else t.new_empty(1, *t.shape[1:]).numel() * t.element_size()
    padded = torch.zeros(rows, width, dtype=torch.uint8, device=t.device)
    if t.numel():
        padded[: len(t)] = t.detach().contiguous().view(len(t), -1).view(torch.uint8)
    return padded


def _from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    if rows.shape[1] == 0:
        return like.new_empty(len(rows), *like.shape[1:])
    return rows.contiguous().view(like.dtype).view(len(rows), *like.shape[1:])


def gather_rows(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """The rows of all ranks, in their order, for each of `tensors`, which have as many rows. No gradients."""
    sizes = _sizes(len(tensors[0]), tensors[0].device, group)
    packed = torch.cat([_bytes(t, max(sizes)) for t in tensors], dim=1)
    parts = [torch.empty_like(packed) for _ in sizes]
    dist.all_gather(parts, packed, group=group)
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes)])
    widths = [_bytes(t[:0], 0).shape[1] for t in tensors]
    return [_from_bytes(columns, t) for columns, t in zip(whole.split(widths, dim=1), tensors)]


class _GatherKeys(torch.autograd.Function):
    """Rows of all ranks; backward, each rank gets the sum of what all ranks have to say about its own."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, len(keys)
        (gathered,) = gather_rows([keys], group)
        ctx.first = first_row(len(keys), keys.device, group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        dist.all_reduce(wide, group=ctx.group)
        return wide[ctx.first : ctx.first + ctx.rows].to(grad.dtype), None


def first_row(rows: int, device: torch.device, group: Any) -> int:
    """Where this rank's rows begin among those of all ranks."""
    return sum(_sizes(rows, device, group)[: dist.get_rank(group)])


def _own_keys(
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    key_descriptors: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """This rank's keys, and their labels and, where given, descriptors."""
    if keys is None:
        return anchors, [labels] if descriptors is None else [labels, descriptors]
    if key_labels is None or (descriptors is None) != (key_descriptors is None):
        raise ValueError("keys need key_labels and, with descriptors, key_descriptors")
    return keys, [key_labels] if key_descriptors is None else [key_labels, key_descriptors]


def _reduce(losses: Tensor, num_valid: Tensor, reduction: int, group: Any) -> tuple[Tensor, Tensor]:
    total = num_valid.clone()
    dist.all_reduce(total, group=group)
    if reduction == NONE:
        return losses, total
    loss = losses.sum()
    # The mean of the ranks' losses is then the loss of one process on all batches.
    return loss * dist.get_world_size(group) / total.clamp(min=1) if reduction == MEAN else loss, total


def all_keys_contrast(
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    key_descriptors: Tensor | None,
    positive_bounds: Tensor | None,
    negative_bounds: Tensor | None,
    numbers: Numbers,
    reduction: int,
    group: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, number of counted anchors of all ranks); the keys of all ranks are held at once."""
    rows, sides = _own_keys(anchors, labels, descriptors, keys, key_labels, key_descriptors)
    gathered = _GatherKeys.apply(rows, group)
    other_labels, *other = gather_rows(sides, group)
    offset = first_row(len(rows), rows.device, group) if keys is None else -1
    loss, *_, num_valid = ops.patch_contrast(
        anchors,
        labels,
        descriptors,
        gathered,
        other_labels,
        other[0] if other else None,
        positive_bounds,
        negative_bounds,
        None,
        None,
        *numbers,
        offset,
        NONE if reduction == NONE else SUM,
    )
    return _reduce(loss, num_valid, reduction, group)


class _Ring:
    """Passes a block of rows on to the next rank, and takes that of the one before."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def start(self, block: Tensor) -> tuple[Tensor, list[Any]]:
        arriving = torch.empty_like(block)
        if self.world == 1:
            arriving.copy_(block)
            return arriving, []
        after, before = ((self.rank + step) % self.world for step in (1, -1))
        after, before = (dist.get_global_rank(self.group, r) for r in (after, before))
        moves = [
            dist.P2POp(dist.isend, block, after, group=self.group),
            dist.P2POp(dist.irecv, arriving, before, group=self.group),
        ]
        return arriving, dist.batch_isend_irecv(moves)

    def owner(self, step: int) -> int:
        """Whose block is here after `step` moves."""
        return (self.rank - step) % self.world


class _AnchorSums(NamedTuple):
    """What one part of the keys says of each anchor, (N,) each. All logits are kept less `max_logit`."""

    max_logit: Tensor
    log_sum: Tensor  # log of the sum of e^(logit - max_logit)
    positive: Tensor  # mean of the positives' logits less max_logit, 0 without a positive
    count: Tensor  # number of positives

    def merge(self, other: _AnchorSums) -> _AnchorSums:
        """The same of both parts together."""
        top = torch.maximum(self.max_logit, other.max_logit)
        count = self.count + other.count
        log_sums, positive = [], torch.zeros_like(self.positive)
        for part in (self, other):
            lower = torch.where(part.max_logit == top, 0, part.max_logit - top)  # 0 also where both are infinite
            log_sums.append(part.log_sum + lower)
            share = part.count.to(positive.dtype) / count.clamp(min=1)
            positive = positive + torch.where(part.count > 0, share * (part.positive + lower), 0)
        return _AnchorSums(top, torch.logaddexp(*log_sums), positive, count)


class _RingContrast(torch.autograd.Function):
    """Per-anchor losses and counts. Keys, their labels and descriptors travel as one block of bytes."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        rows: Tensor,
        labels: Tensor,
        descriptors: Tensor | None,
        row_labels: Tensor,
        row_descriptors: Tensor | None,
        positive_bounds: Tensor | None,
        negative_bounds: Tensor | None,
        numbers: Numbers,
        own: bool,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        ring = _Ring(group)
        ctx.sizes = _sizes(len(rows), rows.device, group)
        ctx.ring, ctx.numbers, ctx.own = ring, numbers, own
        sums = None
        for owner, keys, key_labels, key_descriptors in _RingContrast.visit(ctx, rows, row_labels, row_descriptors):
            part = ops.patch_contrast(
                anchors,
                labels,
                descriptors,
                keys,
                key_labels,
                key_descriptors,
                positive_bounds,
                negative_bounds,
                None,
                None,
                *numbers,
                0 if own and owner == ring.rank else -1,
                NONE,
            )
            loss, max_logit, log_sum, _, count, _ = part
            part_sums = _AnchorSums(max_logit, log_sum, torch.where(count > 0, log_sum - loss, 0), count)
            sums = part_sums if sums is None else sums.merge(part_sums)
        assert sums is not None
        ctx.save_for_backward(
            anchors,
            rows,
            labels,
            descriptors,
            row_labels,
            row_descriptors,
            positive_bounds,
            negative_bounds,
            sums.max_logit,
            sums.log_sum,
            sums.count,
        )
        ctx.mark_non_differentiable(sums.count)
        return torch.where(sums.count > 0, sums.log_sum - sums.positive, 0), sums.count

    @staticmethod
    def visit(ctx: Any, rows: Tensor, row_labels: Tensor, row_descriptors: Tensor | None) -> Any:
        """The keys of every rank, one's own first; the next ones are on their way while these are worked on."""
        sides = [rows, row_labels] + ([] if row_descriptors is None else [row_descriptors])
        block = torch.cat([_bytes(t, max(ctx.sizes)) for t in sides], dim=1)
        widths = [_bytes(t[:0], 0).shape[1] for t in sides]
        for step in range(ctx.ring.world):
            arriving, moves = ctx.ring.start(block) if step + 1 < ctx.ring.world else (block, [])
            owner = ctx.ring.owner(step)
            here = block[: ctx.sizes[owner]].split(widths, dim=1)
            parts = [_from_bytes(columns, t) for columns, t in zip(here, sides)]
            yield owner, parts[0], parts[1], parts[2] if len(parts) > 2 else None
            for move in moves:
                move.wait()
            block = arriving

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (
            anchors,
            rows,
            labels,
            descriptors,
            row_labels,
            row_descriptors,
            positive_bounds,
            negative_bounds,
            max_logit,
            log_sum,
            count,
        ) = ctx.saved_tensors
        needs_anchors, needs_rows = ctx.needs_input_grad[:2]
        wide = torch.promote_types(anchors.dtype, torch.float32)
        grad_anchors = torch.zeros(anchors.shape, dtype=wide, device=anchors.device)
        # What the ranks have said so far about the keys that are here travels behind them, and comes home at the end.
        travelling = torch.zeros(max(ctx.sizes), rows.shape[1], dtype=wide, device=rows.device)
        one = torch.ones((), dtype=torch.int64, device=anchors.device)
        for owner, keys, key_labels, key_descriptors in _RingContrast.visit(ctx, rows, row_labels, row_descriptors):
            part_anchors, part_keys = ops.patch_contrast_backward(
                grad,
                max_logit,
                log_sum,
                count,
                one,
                anchors,
                labels,
                descriptors,
                keys,
                key_labels,
                key_descriptors,
                positive_bounds,
                negative_bounds,
                None,
                None,
                *ctx.numbers,
                0 if ctx.own and owner == ctx.ring.rank else -1,
                NONE,
                needs_anchors,
                needs_rows,
            )
            if needs_anchors:
                grad_anchors += part_anchors
            if needs_rows:
                travelling[: ctx.sizes[owner]] += part_keys
                travelling, moves = ctx.ring.start(travelling)
                for move in moves:
                    move.wait()
        grad_rows = travelling[: len(rows)]
        return (
            grad_anchors.to(anchors.dtype) if needs_anchors else None,
            grad_rows.to(rows.dtype) if needs_rows else None,
            *[None] * 9,
        )


def ring_contrast(
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    key_descriptors: Tensor | None,
    positive_bounds: Tensor | None,
    negative_bounds: Tensor | None,
    numbers: Numbers,
    reduction: int,
    group: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`all_keys_contrast`, with the keys of two ranks held at a time."""
    rows, sides = _own_keys(anchors, labels, descriptors, keys, key_labels, key_descriptors)
    losses, count = _RingContrast.apply(
        anchors,
        rows,
        labels,
        descriptors,
        sides[0],
        sides[1] if len(sides) > 1 else None,
        positive_bounds,
        negative_bounds,
        numbers,
        keys is None,
        group,
    )
    return _reduce(losses, (count > 0).sum(), reduction, group)
