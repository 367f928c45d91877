"""Small networks, batches and steps for the tests of the method."""

from __future__ import annotations

import torch
from pglcl.model import SegmentationNetwork
from pglcl.step import StepLoss
from torch import Tensor


def networks(dims: int = 2, seed: int = 0) -> tuple[SegmentationNetwork, SegmentationNetwork]:
    """Student and teacher."""
    torch.manual_seed(seed)
    student, teacher = (SegmentationNetwork(dims, 1, 3, [4, 8, 8], 8) for _ in range(2))
    return student, teacher.requires_grad_(False)


def make_batch(dims: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    space = (32,) * dims if dims == 2 else (16,) * dims
    weak = torch.randn(2, 1, *space, generator=g)
    return {
        "image": torch.randn(2, 1, *space, generator=g),
        "label": torch.randint(0, 3, (2, *space), generator=g),
        "weak": weak,
        "strong": weak + 0.1 * torch.randn(weak.shape, generator=g),
        "strong2": weak + 0.1 * torch.randn(weak.shape, generator=g),
    }


@torch.no_grad()
def predict_class_everywhere(network: SegmentationNetwork, k: int) -> None:
    last = [m for m in network.unet.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))][-1]
    assert last.bias is not None
    last.bias.zero_()
    last.bias[k] = 50.0


def gradient_of(step: StepLoss, batch: dict[str, Tensor], number: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of a step, and the student's gradients in one row."""
    step.student.zero_grad()
    loss, parts = step(dict(batch), number, torch.Generator().manual_seed(0))
    loss.backward()
    grads = [p.grad.flatten() for p in step.student.parameters() if p.grad is not None]
    return parts, torch.cat(grads)
