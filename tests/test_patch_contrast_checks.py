"""What patch_contrast_loss and PatchContrastLoss refuse, and the message."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pglcl_ext import GaussianContrastLoss, PatchContrastLoss, patch_contrast_loss
from tests.conftest import DEVICES

NINE, TEN, FIVE = torch.zeros(9), torch.zeros(10), torch.zeros(5, dtype=torch.long)
MASK, KEYS = torch.ones(10, 10, dtype=torch.bool), torch.zeros(5, 4)
BAD_CALLS = [
    ("labels must have shape", ValueError, {"labels": torch.zeros(9, dtype=torch.long)}),
    ("labels must be int64", TypeError, {"labels": TEN}),
    ("anchors must have shape", ValueError, {"anchors": torch.zeros(10)}),
    ("anchors must be float64", TypeError, {"anchors": torch.zeros(10, 4, dtype=torch.long)}),
    ("temperature must be", ValueError, {"temperature": 0.0}),
    ("temperature must be", ValueError, {"temperature": -1.0}),
    ("temperature must be", ValueError, {"temperature": math.nan}),
    ("negative_weight must be", ValueError, {"negative_weight": -1.0}),
    ("reduction must be", ValueError, {"reduction": "average"}),
    ("descriptors must have shape", ValueError, {"descriptors": NINE}),
    ("descriptors must be float64", TypeError, {"descriptors": torch.zeros(10, dtype=torch.long)}),
    ("labels must be int64, got int32", TypeError, {"labels": torch.zeros(10, dtype=torch.int32)}),
    ("labels must be int64, got bool", TypeError, {"labels": torch.zeros(10, dtype=torch.bool)}),
    ("labels must be a tensor, got list", TypeError, {"labels": [0] * 10}),
    ("labels must be a tensor, got ndarray", TypeError, {"labels": np.zeros(10, dtype=np.int64)}),
    ("anchors must be a tensor, got ndarray", TypeError, {"anchors": np.zeros((10, 4))}),
    ("keys must be a tensor, got list", TypeError, {"keys": [[0.0] * 4], "key_labels": FIVE}),
    ("descriptors must be a tensor, got list", TypeError, {"descriptors": [0.0] * 10}),
    ("positive_mask must be a tensor, got list", TypeError, {"positive_mask": [[True]], "negative_mask": MASK}),
    ("temperature must be a number, got a tensor .* never be trained", TypeError, {"temperature": torch.tensor(0.1)}),
    ("negative_weight must be a number, got a tensor", TypeError, {"negative_weight": nn.Parameter(torch.ones(1))}),
    ("temperature must be a number, got str", TypeError, {"temperature": "0.1"}),
    ("temperature must be a number, got NoneType", TypeError, {"temperature": None}),
    ("temperature must be a finite number > 0, got -0.0", ValueError, {"temperature": -0.0}),
    ("temperature must be at least 1e-100, got 5e-324", ValueError, {"temperature": 5e-324}),
    ("negative_weight must be a finite number >= 0, got inf", ValueError, {"negative_weight": math.inf}),
    ("ignore_index must be an int, got NoneType", TypeError, {"ignore_index": None}),
    ("ignore_index must be an int, got float", TypeError, {"ignore_index": -1.0}),
    ("ignore_index must be an integer of 64 bits", ValueError, {"ignore_index": 2**63}),
    ("max_positive_disparity must be at least 0", ValueError, {"descriptors": TEN, "max_positive_disparity": -0.1}),
    ("min_negative_disparity must be at least 0", ValueError, {"descriptors": TEN, "min_negative_disparity": -1}),
    ("max_positive_disparity must be .* got str", TypeError, {"descriptors": TEN, "max_positive_disparity": "1"}),
    ("num_positives must be an int, got bool", TypeError, {"descriptors": TEN, "num_positives": True}),
    ("reduction must be one of none, mean, sum, got None", ValueError, {"reduction": None}),
    ("descriptors must be given for max_positive_disparity, got None", ValueError, {"max_positive_disparity": 0.5}),
    ("exclude each other", ValueError, {"descriptors": TEN, "num_positives": 1, "max_positive_disparity": 1.0}),
    ("exclude each other", ValueError, {"descriptors": TEN, "num_negatives": 1, "min_negative_disparity": 1.0}),
    ("num_positives must be at least 1", ValueError, {"descriptors": TEN, "num_positives": 0}),
    ("num_negatives must be an int", TypeError, {"descriptors": TEN, "num_negatives": 1.5}),
    ("max_positive_disparity must be", ValueError, {"descriptors": TEN, "max_positive_disparity": math.nan}),
    ("max_positive_disparity must be", ValueError, {"descriptors": TEN, "max_positive_disparity": NINE}),
    ("given together", ValueError, {"keys": KEYS}),
    ("given together", ValueError, {"key_labels": FIVE}),
    ("keys must have shape", ValueError, {"keys": torch.zeros(5, 3), "key_labels": FIVE}),
    ("keys must have the dtype", TypeError, {"keys": KEYS.double(), "key_labels": FIVE}),
    ("key_labels must have shape", ValueError, {"keys": KEYS, "key_labels": torch.zeros(4, dtype=torch.long)}),
    ("given together", ValueError, {"descriptors": TEN, "keys": KEYS, "key_labels": FIVE}),
    ("key_descriptors must be given with keys", ValueError, {"key_descriptors": TEN}),
    ("given together", ValueError, {"positive_mask": MASK}),
    ("positive_mask must be bool", TypeError, {"positive_mask": MASK.float(), "negative_mask": MASK}),
    ("negative_mask must have shape", ValueError, {"positive_mask": MASK, "negative_mask": MASK[:, :9]}),
    ("choose all pairs", ValueError, {"positive_mask": MASK, "negative_mask": MASK, "num_positives": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "error", "change"), BAD_CALLS)
def test_bad_input_is_refused_by_name(message: str, error: type[Exception], change: dict) -> None:
    call = {"anchors": torch.randn(10, 4), "labels": torch.zeros(10, dtype=torch.long), **change}
    with pytest.raises(error, match=message):
        patch_contrast_loss(**call)


@pytest.mark.parametrize(("message", "error", "change"), BAD_CALLS)
def test_bad_input_is_refused_at_tracing(message: str, error: type[Exception], change: dict) -> None:
    """Fake tensors get the messages of real ones, so that no program is compiled or exported that cannot run."""
    call = {"anchors": torch.randn(10, 4), "labels": torch.zeros(10, dtype=torch.long), **change}
    with FakeTensorMode() as mode:
        call = {name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in call.items()}
        with pytest.raises(error, match=message):
            patch_contrast_loss(**call)


def every_tensor(device: str) -> dict[str, Tensor]:
    z, y, d = torch.zeros(10, 4), torch.zeros(10, dtype=torch.long), torch.zeros(10)
    sides = {"anchors": z, "labels": y, "descriptors": d, "keys": z, "key_labels": y, "key_descriptors": d}
    bounds = {"max_positive_disparity": d, "min_negative_disparity": d}
    return {name: t.to(device) for name, t in (sides | bounds).items()}


@pytest.mark.parametrize("name", [*every_tensor("cpu")])
def test_other_devices_are_refused(name: str) -> None:
    cpu, meta = every_tensor("cpu"), every_tensor("meta")
    patch_contrast_loss(**meta)
    for call in ({**cpu, name: meta[name]}, {**meta, name: cpu[name]}):
        with pytest.raises(ValueError, match="must be on the device of"):
            patch_contrast_loss(**call)
    masks = {"positive_mask": MASK, "negative_mask": MASK}
    for mask in masks:
        with pytest.raises(ValueError, match=f"{mask} must be on the device of anchors, cpu, got meta"):
            patch_contrast_loss(cpu["anchors"], cpu["labels"], **{**masks, mask: MASK.to("meta")})


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a second device: no GPU is visible")
def test_other_device_is_refused() -> None:
    with pytest.raises(ValueError, match="labels must be on the device of anchors"):
        patch_contrast_loss(torch.randn(10, 4, device="cuda"), torch.zeros(10, dtype=torch.long))


def test_module_refuses_bad_options_at_once() -> None:
    with pytest.raises(ValueError, match="temperature"):
        PatchContrastLoss(0.0)
    with pytest.raises(ValueError, match="exclude"):
        PatchContrastLoss(num_positives=1, max_positive_disparity=0.5)
    with pytest.raises(ValueError, match="reduction"):
        PatchContrastLoss(reduction="max")
    with pytest.raises(TypeError, match="normalize must be True or False, got str"):
        PatchContrastLoss(normalize="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ignore_index must be an int, got NoneType"):
        PatchContrastLoss(ignore_index=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_positive_disparity must be within the range of a float .*, got 1000"):
        PatchContrastLoss(max_positive_disparity=10**400)
    with pytest.raises(ValueError, match=r"temperature must be within the range of a float .*, got 1000"):
        PatchContrastLoss(Fraction(10**400))  # type: ignore[arg-type]
    for bound in ("max_positive_disparity", "min_negative_disparity"):
        with pytest.raises(TypeError, match=f"{bound} must be a number, got a tensor of shape .* never be trained"):
            PatchContrastLoss(**{bound: torch.nn.Parameter(torch.tensor(0.3))})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([[1.0]], "embeddings must be a tensor, got list"),
        (torch.ones(2, 3).long(), "embeddings must be float64, float32, bfloat16 or float16, got int64"),
        (torch.ones(2, 3).to_sparse(), "embeddings must be a dense tensor, got a sparse_coo one"),
        (torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged), "embeddings must be a dense tensor, got a"),
    ],
)
def test_modules_refuse_embeddings_by_name(embeddings: Any, message: str) -> None:
    gaussian = GaussianContrastLoss(2, 3)
    y = torch.zeros(2).long()
    for call in (PatchContrastLoss(), gaussian, gaussian.enqueue, PatchContrastLoss(normalize=False)):
        with pytest.raises(TypeError, match=message):
            call(embeddings, y)
