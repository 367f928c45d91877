"""Keeps numbers within the range of their dtype, and with the digits that they need."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["accumulate_dtype", "unit_rows", "without_autocast"]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over elements of `dtype` are kept: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which products keep the dtype of their factors, on the device of `like`."""
    if like.device.type == "meta":  # has no autocast to turn off
        return contextlib.nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def unit_rows(x: Tensor) -> Tensor:
    """The rows of x, (N, D), divided by their L2 norm; a row of zeros stays as it is.

    The sum of squares in a norm leaves the range of a dtype long before the row does. So each row is first divided by
    its largest entry, in float32 or wider. Its largest entry is then 1, and its norm at least 1. A row of zeros is
    divided by 1, so the size of its gradient does not change.
    """
    if x.shape[1] == 0:  # an empty row has no largest entry
        return x
    wide = x.to(accumulate_dtype(x.dtype))
    largest = wide.detach().abs().amax(dim=1, keepdim=True)
    return F.normalize(wide / (largest + (largest == 0)), dim=1, eps=1.0).to(x.dtype)
