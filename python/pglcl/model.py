"""The network: MONAI's UNet, its last features beside its logits, and the projection that patches are compared in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn

from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.files import load_tensors, read_object
from pglcl.intensity import Intensity
from pglcl.labels import LabelMap


class Projection(nn.Module):
    """Two layers to the L2-normalised embedding.

    LayerNorm, not BatchNorm: a batch may hold one patch, or none.
    """

    def __init__(self, features: int, embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, embedding_dim),
            nn.LayerNorm(embedding_dim),
            nn.GELU(),
            nn.Linear(embedding_dim, embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, features) to (N, embedding_dim)."""
        return F.normalize(self.layers(x.to(next(self.layers.parameters()).dtype)), dim=1)


class SegmentationNetwork(nn.Module):
    """MONAI's UNet with residual units.

    The features are what enters its last up-sampling block, at half the resolution: skip connection and decoder side by
    side.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the images.
        num_classes: K, with background.
        channels: from the outside in.
        embedding_dim: of the projection.

    Attributes:
        stride: the sides of an image are multiples of it.
        feature_stride, feature_channels: of the features.
    """

    feature_stride = 2

    def __init__(
        self, spatial_dims: int, in_channels: int, num_classes: int, channels: Sequence[int], embedding_dim: int
    ) -> None:
        super().__init__()
        self.arguments = {
            "spatial_dims": spatial_dims,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "channels": list(channels),
            "embedding_dim": embedding_dim,
        }
        strides = [2] * (len(channels) - 1)
        self.stride = 2 ** len(strides)
        # Of two numbers the second is the bottom's, whose output is not brought to the width of the first.
        self.feature_channels = channels[0] + channels[1 if len(channels) == 2 else 0]
        self.unet = UNet(spatial_dims, in_channels, num_classes, channels, strides, num_res_units=2)
        self.projection = Projection(self.feature_channels, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) to logits (B, K, *S); S a multiple of the network's stride."""
        return self.with_features(x)[0]

    def with_features(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, K, *S) and features (B, feature_channels, *S / 2).

        Args:
            kept: (B, feature_channels, 1, ...), what the logits see of each feature channel; all by default.
        """
        down, inner, up = self.unet.model.children()
        features = inner(down(x))
        return up(features if kept is None else features * kept), features


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average; early steps average over those there were."""
    keep = min(decay, 1 - 1 / (step + 1))
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.lerp_(s, 1 - keep)
    for held, new in zip(teacher.buffers(), student.buffers()):
        held.lerp_(new, 1 - keep) if held.is_floating_point() else held.copy_(new)


@dataclass
class TrainedModel:
    """A network with what it needs to know of the data: its own part of a run. step: that the weights are of."""

    network: SegmentationNetwork
    config: TrainConfig
    slice_axis: int | None
    labels: LabelMap
    intensity: Intensity
    step: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return len(self.intensity.channels)

    @property
    def class_names(self) -> dict[int, str]:
        return self.labels.class_names

    def state(self) -> dict[str, Any]:
        return {
            "network": {name: t.cpu() for name, t in self.network.state_dict().items()},
            "arguments": self.network.arguments,
            "config": vars(self.config).copy(),
            "slice_axis": self.slice_axis,
            "labels": self.labels.state(),
            "intensity": self.intensity.state(),
            "step": self.step,
        }


def load_model(run: Path, device: str = "auto") -> TrainedModel:
    """The teacher of a run: of its end, or of its last checkpoint when it has not ended."""
    path = run / "model.pt" if (run / "model.pt").exists() else run / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{run}: no trained model there (neither model.pt nor checkpoint.pt)")
    whole = load_tensors(path)
    _check_run(whole, path)
    state = whole.get("model", whole)
    try:
        config = TrainConfig(**state["config"])
        network = SegmentationNetwork(**state["arguments"])
        network.load_state_dict(state["network"])
        return TrainedModel(
            network.to(choose_device(device)).eval(),
            config,
            state["slice_axis"],
            LabelMap.from_state(state["labels"]),
            Intensity.from_state(state["intensity"]),
            int(whole.get("step", state["config"]["steps"])),
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not a model of this version of pglcl: {str(error).splitlines()[0]}") from error


def _check_run(state: dict[str, Any], path: Path) -> None:
    """Raises UserError when a model or checkpoint was put into the folder of another run."""
    described = path.parent / "run.json"
    own = state.get("run")
    if described.exists() and isinstance(own, dict):
        expected = read_object(described).get("id")
        if own.get("id") != expected:
            raise UserError(f"{path}: is of the run {own.get('id')}, not of this one, {expected}")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available: {str(error).splitlines()[0]}") from error
    return device
