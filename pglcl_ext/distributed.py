"""The contrastive loss over the ranks of a process group: each rank contrasts its own anchors with the keys of all.

With ``gather="all"``, every rank gathers all keys. With ``gather="ring"``, keys travel around a ring, and each rank
merges the log-sum-exps of one part after another. It then holds the keys of only two ranks at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pglcl_ext._arguments import ContrastArguments, ContrastOutputs, Side
from pglcl_ext._autograd import records_gradients, run, savable
from pglcl_ext._checks import REDUCTIONS, dtype_name
from pglcl_ext._library import ops
from pglcl_ext._precision import accumulate_dtype

__all__ = ["GATHERS", "SharedGroup", "all_keys_contrast", "first_row", "gather_rows", "ring_contrast", "row_counts"]

GATHERS = ("all", "ring")
Function = TypeVar("Function", bound=Callable[..., Any])
NONE, MEAN, SUM = REDUCTIONS["none"], REDUCTIONS["mean"], REDUCTIONS["sum"]


class SharedGroup:
    """Holds the process group of a module. A copy of the module shares it; it cannot be pickled."""

    def __init__(self, value: Any) -> None:
        if value is not None:
            check_group(value)
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> Any:
        if self.value is None:
            return SharedGroup, (None,)
        raise TypeError(
            "a module with a process group cannot be pickled, since the group belongs to this process. Save its "
            "state_dict() and load it into a module made with the group of the other process"
        )


def eager(function: Function) -> Function:
    """Keeps torch.compile out of a function that talks to other ranks: it splits its graph there, without a warning."""
    disabled: Function = torch.compiler.disable(function)
    return disabled


def check_group(group: Any) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"a process group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")


@eager
def row_counts(tensors: list[Tensor], group: Any, manner: str = "gathering") -> list[int]:
    """The number of rows of every rank.

    Ranks must agree in everything else, since they exchange bytes without a type, and wait for each other.
    """
    check_group(group)
    kind = ", ".join(f"{dtype_name(t)} {('rows', *t.shape[1:])}".replace("'", "") for t in tensors)
    sent = torch.tensor([len(tensors[0]), zlib.crc32(f"{manner} {kind}".encode())], device=tensors[0].device)
    every = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, sent, group=group)
    sizes, kinds = zip(*(t.tolist() for t in every))
    for rank, other in enumerate(kinds):
        if other != kinds[dist.get_rank(group)]:
            raise ValueError(
                f"all ranks must pass tensors of the same dtypes and sizes (only the number of rows may differ), must "
                f"agree on which of them need gradients, and must have the same options: rank {rank} of the group "
                f"differs from this rank, which passes {kind} ({manner})"
            )
    return list(sizes)


def _bytes(t: Tensor, rows: int) -> Tensor:
    """`t` as bytes, (rows, bytes of a row), with zeros in the added rows. So no backend has to know its dtype."""
    width = t[:1].numel() * t.element_size() if len(t) else t.new_empty((1, *t.shape[1:])).numel() * t.element_size()
    padded = torch.zeros(rows, width, dtype=torch.uint8, device=t.device)
    if t.numel():  # copied as numbers, since memory of any strides can be read so
        padded.view(t.dtype)[: len(t)] = t.detach().reshape(len(t), -1)
    return padded


def _from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    if rows.shape[1] == 0:
        return like.new_empty((len(rows), *like.shape[1:]))
    # A single row of a block counts as contiguous, wherever it begins and however long the rows of the block are.
    rows = rows.contiguous() if len(rows) > 1 else rows.clone(memory_format=torch.contiguous_format)
    return rows.view(like.dtype).view(len(rows), *like.shape[1:])


@eager
def gather_rows(tensors: list[Tensor], group: Any, sizes: list[int] | None = None) -> list[Tensor]:
    """The rows of all ranks, in the order of the ranks, for each of `tensors`. No gradient flows.

    All `tensors` of a rank must have the same number of rows. `sizes` are their :func:`row_counts`, if these are known.
    """
    sizes = row_counts(tensors, group) if sizes is None else sizes
    packed = torch.cat([_bytes(t, max(sizes)) for t in tensors], dim=1)
    parts = [torch.empty_like(packed) for _ in sizes]
    dist.all_gather(parts, packed, group=group)
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes)])
    widths = [_bytes(t[:0], 0).shape[1] for t in tensors]
    return [_from_bytes(columns, t) for columns, t in zip(whole.split(widths, dim=1), tensors)]


class _GatherKeys(torch.autograd.Function):
    """Gathers the rows of all ranks. In the backward pass, a rank gets the sum of all ranks' gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, sizes: list[int], group: Any) -> Tensor:
        ctx.group, ctx.rows, ctx.first = group, len(keys), first_row(sizes, group)
        (gathered,) = gather_rows([keys], group, sizes)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        wide = grad.to(accumulate_dtype(grad.dtype)).contiguous()
        dist.all_reduce(wide, group=ctx.group)
        return wide[ctx.first : ctx.first + ctx.rows].to(grad.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("pglcl_ext.patch_contrast_loss has no forward-mode derivative")


def first_row(sizes: list[int], group: Any) -> int:
    """The index at which this rank's rows begin among those of all ranks, of which there are `sizes`."""
    return sum(sizes[: dist.get_rank(group)])


def _with_gradients(manner: str, **tensors: Tensor) -> str:
    """`manner`, and which of `tensors` get a gradient. A rank would wait for a gradient that others do not send."""
    learnt = [name for name, t in tensors.items() if records_gradients() and t.requires_grad]
    return f"{manner}, with gradients of {' and '.join(learnt) or 'nothing'}"


def _own_keys(x: ContrastArguments) -> Side:
    """This rank's keys."""
    return x.anchors if x.keys is None else x.keys


def _given(side: Side) -> list[Tensor]:
    """The tensors of a side: embeddings, labels and, if they are given, descriptors."""
    return [t for t in side if t is not None]


def _with_keys(x: ContrastArguments, keys: Side, self_offset: int, reduction: int) -> ContrastArguments:
    return x._replace(keys=keys, numbers=x.numbers._replace(self_offset=self_offset, reduction=reduction))


def _reduce(losses: Tensor, num_valid: Tensor, reduction: int, group: Any) -> tuple[Tensor, Tensor]:
    total = num_valid.clone()
    dist.all_reduce(total, group=group)
    if reduction == NONE:
        return losses, total
    loss = losses.sum()
    # The mean of the ranks' losses is then the loss of one process on all batches.
    return loss * dist.get_world_size(group) / total.clamp(min=1) if reduction == MEAN else loss, total


@eager
def all_keys_contrast(
    contrast: Callable[[ContrastArguments], ContrastOutputs], x: ContrastArguments, group: Any
) -> tuple[Tensor, Tensor]:
    """The loss with the keys of all ranks, which are held at once.

    Args:
        contrast: the differentiable op.
        x: the anchors and keys of this rank.
        group: the process group.

    Returns:
        The loss, and the number of counted anchors of all ranks, an int64 scalar.
    """
    own = _own_keys(x)
    embeddings, *others = _given(own)
    sizes = row_counts(_given(own), group, _with_gradients("gathering", keys=embeddings))
    gathered = _GatherKeys.apply(embeddings, sizes, group)  # type: ignore[no-untyped-call]
    keys = Side(gathered, *gather_rows(others, group, sizes))
    offset = first_row(sizes, group) if x.keys is None else -1
    outputs = contrast(_with_keys(x, keys, offset, NONE if x.numbers.reduction == NONE else SUM))
    return _reduce(outputs.loss, outputs.num_valid, x.numbers.reduction, group)


class _Ring:
    """Sends blocks of rows to the next rank, and receives those of the previous rank."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def start(self, block: Tensor) -> tuple[Tensor, list[Any]]:
        """Starts to exchange blocks. Returns the arriving one, and handles to wait for before it is read."""
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
        """The rank whose block is here after `step` moves."""
        return (self.rank - step) % self.world


class _AnchorSums(NamedTuple):
    """Sums of each anchor over one part of the keys, (N,) each; `max_logit` is subtracted from all logits."""

    max_logit: Tensor  # float64
    log_sum: Tensor  # log of the sum of e^(logit - max_logit)
    positive: Tensor  # mean of the positives' logits less max_logit, 0 without a positive
    num_positives: Tensor

    def merge(self, other: _AnchorSums) -> _AnchorSums:
        """The sums over both parts together."""
        top = torch.maximum(self.max_logit, other.max_logit)
        count = self.num_positives + other.num_positives
        log_sums, positive = [], torch.zeros_like(self.positive)
        for part in (self, other):
            lower = torch.where(part.max_logit == top, 0, part.max_logit - top)  # 0 also where both are infinite
            lower = lower.to(part.log_sum.dtype)
            log_sums.append(part.log_sum + lower)
            share = part.num_positives.to(lower.dtype) / count.clamp(min=1)
            positive = positive + torch.where(part.num_positives > 0, share * (part.positive + lower), 0)
        return _AnchorSums(top, torch.logaddexp(*log_sums), positive, count)


class _RingContrast(torch.autograd.Function):
    """The loss and number of positives of each anchor. Keys, labels and descriptors travel as one block of bytes."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, own_keys: Tensor, x: ContrastArguments, sizes: list[int], group: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.sizes = sizes
        ctx.ring = _Ring(group)
        sums = None
        for part in _RingContrast.parts(ctx, x):
            outputs = ContrastOutputs(*run(ops.patch_contrast.default, part.flat()))
            count = outputs.num_positives
            positive = torch.where(count > 0, outputs.log_sum - outputs.loss, 0)
            part_sums = _AnchorSums(outputs.max_logit, outputs.log_sum, positive, count)
            sums = part_sums if sums is None else sums.merge(part_sums)
        assert sums is not None
        ctx.save_for_backward(sums.max_logit, sums.log_sum, sums.num_positives, *map(savable, x.tensors()))
        ctx.numbers = x.numbers
        ctx.mark_non_differentiable(sums.num_positives)
        return torch.where(sums.num_positives > 0, sums.log_sum - sums.positive, 0), sums.num_positives

    @staticmethod
    def parts(ctx: Any, x: ContrastArguments) -> Iterator[ContrastArguments]:
        """Yields the contrast with the keys of each rank, beginning with this one, while the next keys travel."""
        own = _given(_own_keys(x))
        block = torch.cat([_bytes(t, max(ctx.sizes)) for t in own], dim=1)
        widths = [_bytes(t[:0], 0).shape[1] for t in own]
        for step in range(ctx.ring.world):
            arriving, moves = ctx.ring.start(block) if step + 1 < ctx.ring.world else (block, [])
            here = block[: ctx.sizes[ctx.ring.owner(step)]].split(widths, dim=1)
            keys = Side(*(_from_bytes(columns, t) for columns, t in zip(here, own)))
            yield _with_keys(x, keys, 0 if x.keys is None and step == 0 else -1, NONE)
            for move in moves:
                move.wait()
            block = arriving

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        max_logit, log_sum, count, *tensors = ctx.saved_tensors
        x = ContrastArguments.nested((*tensors, *ctx.numbers))
        anchors, own_keys = x.anchors.embeddings, _own_keys(x).embeddings
        needs_anchors, needs_keys, *_ = ctx.needs_input_grad
        wide = accumulate_dtype(anchors.dtype)
        grad_anchors = torch.zeros(anchors.shape, dtype=wide, device=anchors.device)
        # The gradient of the keys travels behind them. Each rank adds its part; at the end it is back at its own rank.
        travelling = torch.zeros(max(ctx.sizes), own_keys.shape[1], dtype=wide, device=own_keys.device)
        forward = (max_logit, log_sum, count, torch.ones((), dtype=torch.int64, device=anchors.device))
        with torch.no_grad():
            for step, part in enumerate(_RingContrast.parts(ctx, x)):
                arguments = (grad, *forward, *part.flat(), needs_anchors, needs_keys)
                part_anchors, part_keys = run(ops.patch_contrast_backward.default, arguments)
                if needs_anchors:
                    grad_anchors += part_anchors
                if needs_keys:
                    travelling[: ctx.sizes[ctx.ring.owner(step)]] += part_keys
                    travelling, moves = ctx.ring.start(travelling)
                    for move in moves:
                        move.wait()
        grads = (
            grad_anchors.to(anchors.dtype) if needs_anchors else None,
            travelling[: len(own_keys)].to(own_keys.dtype) if needs_keys else None,
        )
        if torch.is_grad_enabled():
            return (*(None if g is None else _Twice.apply(g, grad, anchors, own_keys) for g in grads), None, None, None)  # type: ignore[no-untyped-call]
        return (*grads, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("pglcl_ext.patch_contrast_loss has no forward-mode derivative")


class _Twice(torch.autograd.Function):
    """A gradient that refuses to be differentiated with respect to the tensors that it was computed from."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *computed_from: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("pglcl_ext.patch_contrast_loss cannot be differentiated twice")


@eager
def ring_contrast(x: ContrastArguments, group: Any) -> tuple[Tensor, Tensor]:
    """As :func:`all_keys_contrast`, but holds the keys of only two ranks at a time."""
    own = _own_keys(x)
    anchors, keys = x.anchors.embeddings, own.embeddings
    sizes = row_counts(_given(own), group, _with_gradients("a ring", anchors=anchors, keys=keys))
    losses, count = _RingContrast.apply(anchors, keys, x, sizes, group)  # type: ignore[no-untyped-call]
    return _reduce(losses, (count > 0).sum(), x.numbers.reduction, group)
