"""Masks, probabilities and entropy maps of volumes, in the geometry of their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.layouts import Case
from pglcl.model import TrainedModel
from pglcl.prepare import Prepared, prepare
from pglcl.volumes import write_like

SLICES_AT_ONCE = 16


@torch.no_grad()
def network_output(network: torch.nn.Module, image: Tensor, config: TrainConfig) -> Tensor:
    """Logits (K, X, Y, Z) of a prepared image (C, X, Y, Z)."""
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        if config.spatial_dims == 2:
            slices = image.movedim(-1, 0)
            parts = [network(part.to(device)).float().cpu() for part in slices.split(SLICES_AT_ONCE)]
            return torch.cat(parts).movedim(0, -1)
        size = tuple(config.size)
        logits = sliding_window_inference(image[None].to(device), size, 4, network, overlap=0.5, mode="gaussian")
        return logits[0].float().cpu()


def probabilities(network: torch.nn.Module, prepared: Prepared, config: TrainConfig, slice_axis: int | None) -> Tensor:
    """(K, X, Y, Z) at the volume's own resolution, in canonical axes."""
    logits = network_output(network, prepared.image, config)
    if slice_axis is not None:
        logits = logits.movedim(-1, slice_axis + 1)
    p = prepared.geometry.restore(logits.softmax(dim=0))
    return p / p.sum(dim=0, keepdim=True).clamp(min=1e-12)


def predict_case(model: TrainedModel, case: Case) -> tuple[Tensor, Prepared]:
    """Probabilities (K, X, Y, Z) in canonical axes."""
    prepared = prepare(case, model.config, None, model.slice_axis, label=False)
    if len(prepared.image) != model.channels:
        raise UserError(f"{case.images[0]}: must have {model.channels} channels, got {len(prepared.image)}")
    return probabilities(model.network, prepared, model.config, model.slice_axis), prepared


def entropy_map(p: Tensor) -> Tensor:
    """(X, Y, Z), nats."""
    return -torch.special.xlogy(p, p).sum(dim=0)


def write_prediction(
    p: Tensor, prepared: Prepared, folder: Path, *, with_probabilities: bool, with_entropy: bool
) -> list[Path]:
    name, source = prepared.case.name, prepared.volume.source
    mask = p.argmax(dim=0).numpy().astype(np.uint8 if len(p) <= 256 else np.uint16)
    written = [folder / f"{name}.nii.gz"]
    write_like(mask, source, written[0])
    if with_probabilities:
        written.append(folder / f"{name}_probabilities.nii.gz")
        write_like(p.movedim(0, -1).numpy().astype(np.float32), source, written[-1])
    if with_entropy:
        written.append(folder / f"{name}_entropy.nii.gz")
        write_like(entropy_map(p).numpy().astype(np.float32), source, written[-1])
    return written
