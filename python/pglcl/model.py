"""One of MONAI's networks, with its features and the projection in which patches are compared; trained models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from torch import Tensor, nn

from pglcl.config import TrainConfig, completed
from pglcl.description import Description
from pglcl.errors import UserError, first_line
from pglcl.files import load_tensors, read_object
from pglcl.intensity import Intensity
from pglcl.labels import LabelMap
from pglcl.levels import Levels
from pglcl.postprocess import Organ
from pglcl.resolution import Resolution


class Projection(nn.Module):
    """Two layers that give an L2-normalised embedding.

    They have LayerNorm instead of BatchNorm, since a batch may hold one patch, or none.
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


@dataclass(frozen=True)
class Architecture:
    """One of MONAI's networks.

    Attributes:
        build: makes the network from spatial_dims, the numbers of input and output channels, and the channels of each
            level, from the outside in.
        features: gives, for the number of levels, the name of the module whose output the contrast compares. That
            output has half the resolution.
        feature_channels: gives, for the channels of each level, the channels of that output.
    """

    build: Callable[[int, int, int, list[int]], nn.Module]
    features: Callable[[int], str]
    feature_channels: Callable[[list[int]], int]


def _unet(dims: int, images: int, classes: int, channels: list[int]) -> nn.Module:
    return UNet(dims, images, classes, channels, [2] * (len(channels) - 1), num_res_units=2)


def _basic_unet(dims: int, images: int, classes: int, channels: list[int]) -> nn.Module:
    return BasicUNet(dims, images, classes, [*channels, channels[0]])


def _dynunet(dims: int, images: int, classes: int, channels: list[int]) -> nn.Module:
    strides = [1, *[2] * (len(channels) - 1)]
    return DynUNet(dims, images, classes, [3] * len(channels), strides, strides[1:], filters=channels)


def _segresnet(dims: int, images: int, classes: int, channels: list[int]) -> nn.Module:
    levels = len(channels)
    down, up = (1, *[2] * (levels - 2), 4), (1,) * (levels - 1)
    # Learned up-sampling: the gradient of the interpolated one is not deterministic on CUDA.
    return SegResNet(dims, channels[0], images, classes, blocks_down=down, blocks_up=up, upsample_mode="deconv")


ARCHITECTURES = {
    # The features are skip connection and decoder. With two levels, the second is the bottom, which keeps its width.
    "unet": Architecture(_unet, lambda levels: "model.1", lambda c: c[0] + c[1 if len(c) == 2 else 0]),
    "basicunet": Architecture(_basic_unet, lambda levels: "upcat_2", lambda c: c[1]),
    "dynunet": Architecture(_dynunet, lambda levels: f"upsamples.{levels - 3}", lambda c: c[1]),
    "segresnet": Architecture(
        _segresnet, lambda levels: f"up_layers.{levels - 3}" if levels > 2 else "down_layers.1", lambda c: c[1]
    ),
}


class SegmentationNetwork(nn.Module):
    """One of MONAI's networks, with its features at half the resolution and their projection.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the images.
        num_classes: K, with background.
        channels: of each level, from the outside in.
        embedding_dim: of the projection.
        network: one of :data:`ARCHITECTURES`.

    Attributes:
        unet: MONAI's network, an encoder and a decoder with skip connections.
        stride: the sides of an image must be multiples of it.
        feature_stride, feature_channels: of the features.
    """

    feature_stride = 2

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int],
        embedding_dim: int,
        network: str = "unet",
    ) -> None:
        super().__init__()
        channels = list(channels)
        self.arguments = {
            "spatial_dims": spatial_dims,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "channels": channels,
            "embedding_dim": embedding_dim,
            "network": network,
        }
        architecture = ARCHITECTURES[network]
        self.stride = 2 ** (len(channels) - 1)
        self.feature_channels = architecture.feature_channels(channels)
        self.unet = architecture.build(spatial_dims, in_channels, num_classes, channels)
        self.features = architecture.features(len(channels))
        self.unet.get_submodule(self.features)  # a wrong name fails here, not in the first step
        self.projection = Projection(self.feature_channels, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) to logits (B, K, *S); S a multiple of the network's stride."""
        logits: Tensor = self.unet(x)
        return logits

    def with_features(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, K, *S) and features (B, feature_channels, *S / 2).

        Args:
            x: (B, C, *S).
            kept: (B, feature_channels, 1, ...), factors of the feature channels from which logits are computed;
                default: 1. The features that are returned do not change.
        """
        seen: list[Tensor] = []

        def take(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.append(output)
            return output if kept is None else output * kept

        hook = self.unet.get_submodule(self.features).register_forward_hook(take)
        try:
            logits = self(x)
        finally:
            hook.remove()
        return logits, seen[0]


def network_for(config: TrainConfig, in_channels: int, num_classes: int) -> SegmentationNetwork:
    """The network that the options ask for, with new weights."""
    return SegmentationNetwork(
        config.spatial_dims, in_channels, num_classes, config.channel_list, config.embedding_dim, config.network
    )


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Moves the teacher's weights to the exponential moving average of the student's; at first, to their plain mean."""
    keep = min(decay, 1 - 1 / (step + 1))
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - keep)
    for held, new in zip(teacher.buffers(), student.buffers()):
        held.lerp_(new, 1 - keep) if held.is_floating_point() else held.copy_(new)


@dataclass
class TrainedModel:
    """A network, and what it needs to know of the data.

    step: the step of the weights. organs: those of which a mask keeps only the largest component, chosen on the
    validation patients; None before that choice, or without such patients. split: the patients of each part, for a
    model that was read from a run. resolution, levels, description: what the data of the training were; None for a
    model of an older version, which did not keep it.
    """

    network: SegmentationNetwork
    config: TrainConfig
    slice_axis: int | None
    labels: LabelMap
    intensity: Intensity
    step: int = 0
    organs: tuple[Organ, ...] | None = None
    split: dict[str, list[str]] | None = None
    resolution: Resolution | None = None
    levels: Levels | None = None
    description: Description | None = None

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return len(self.intensity.channels)

    @property
    def class_names(self) -> dict[int, str]:
        return self.labels.class_names

    @property
    def finished(self) -> bool:
        """Whether the weights are those of the last step."""
        return self.step >= self.config.steps

    def unfinished(self, run: Path) -> str:
        """A line for people, about a model whose run has not ended."""
        return f"{run}: unfinished, step {self.step} of {self.config.steps}"

    def state(self) -> dict[str, Any]:
        """Tensors, lists and numbers for a file; :func:`load_model` reads them back."""
        return {
            "network": {name: t.cpu() for name, t in self.network.state_dict().items()},
            "arguments": self.network.arguments,
            "config": vars(self.config).copy(),
            "slice_axis": self.slice_axis,
            "labels": self.labels.state(),
            "intensity": self.intensity.state(),
            "step": self.step,
            "organs": self.organs,
            "resolution": self.resolution.state() if self.resolution else None,
            "levels": self.levels.state() if self.levels else None,
            "description": self.description.state() if self.description else None,
        }


WEIGHTS = ("last", "best")
UNKNOWN_VOXELS = "does not know the voxel size of its training images, since an older pglcl wrote it"


def load_model(run: Path, device: str = "auto", weights: str = "last") -> TrainedModel:
    """Loads the teacher of a run.

    Args:
        run: the folder that training wrote.
        device: as for training.
        weights: "last": of the end of the run, or of its last checkpoint if it has not ended; "best": of the step with
            the best validation Dice.

    Raises:
        UserError: the model is missing, damaged, or from another run; or the device is not available.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights must be {' or '.join(WEIGHTS)}, got {weights}")
    path = run / "model.pt" if (run / "model.pt").exists() else run / "checkpoint.pt"
    if weights == "best":
        path = run / "best.pt"
        if not path.exists():
            raise UserError(f"{path}: not found: --weights best needs a run with validation patients")
    if not path.exists():
        raise UserError(f"{run}: has no trained model (neither model.pt nor checkpoint.pt)")
    whole = load_tensors(path)
    _check_run(whole, path)
    state = whole.get("model", whole)
    try:
        config = TrainConfig(**completed(state["config"]))
        network = SegmentationNetwork(**state["arguments"])
        network.load_state_dict(state["network"])
        resolution, levels, description = (state.get(name) for name in ("resolution", "levels", "description"))
        return TrainedModel(
            network.to(choose_device(device)).eval(),
            config,
            state["slice_axis"],
            LabelMap.from_state(state["labels"]),
            Intensity.from_state(state["intensity"]),
            int(whole.get("step", state["config"]["steps"])),
            _organs(state["organs"]),
            (whole.get("run") or {}).get("split"),
            resolution=Resolution.from_state(resolution) if resolution else None,
            levels=Levels.from_state(levels) if levels else None,
            description=Description.from_state(description) if description else None,
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not a model of this version of pglcl: {first_line(error)}") from error


def _organs(saved: Sequence[int | Sequence[int]] | None) -> tuple[Organ, ...] | None:
    """The organs of a saved model. Older versions saved a class as a number."""
    return None if saved is None else tuple((o,) if isinstance(o, int) else tuple(o) for o in saved)


def _check_run(state: dict[str, Any], path: Path) -> None:
    """Raises UserError when a model or checkpoint was put into the folder of another run."""
    described = path.parent / "run.json"
    own = state.get("run")
    if described.exists() and isinstance(own, dict):
        expected = read_object(described).get("id")
        if own.get("id") != expected:
            raise UserError(f"{path}: belongs to the run {own.get('id')}, not to this run, {expected}")


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def initial_model(
    config: TrainConfig, channels: int, labels: LabelMap, description: Description | None = None
) -> TrainedModel | None:
    """The model of `--init`, None without it.

    Args:
        config: the options of the run that starts from it.
        channels: of that run's images.
        labels: of that run.
        description: of that run's data.

    Raises:
        UserError: a line for each difference between the two that weights depend on.
    """
    if not config.init:
        return None
    model = load_model(Path(config.init), "cpu")
    theirs: dict[str, Any] = model.network.arguments
    compared: dict[str, tuple[Any, Any]] = {
        "--network": (theirs["network"], config.network),
        "--spatial-dims": (theirs["spatial_dims"], config.spatial_dims),
        "--channels": (_listed(theirs["channels"]), _listed(config.channel_list)),
        "--embedding-dim": (theirs["embedding_dim"], config.embedding_dim),
        "channels of the images": (theirs["in_channels"], channels),
        "classes": (_listed(model.labels.names), _listed(labels.names)),
    }
    lines = [f"{name}: that run has {old}, got {new}" for name, (old, new) in compared.items() if old != new]
    if model.description and description:
        lines += model.description.contradictions(Description(description.channels))
    if lines:
        raise UserError(f"--init {config.init}: its weights do not fit this run:", *lines)
    return model


def _listed(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def choose_device(name: str) -> torch.device:
    """The device of `--device`; "auto" is a GPU where there is one. Raises UserError if it is not available."""
    if name == "meta":
        raise UserError("--device meta: not available: it computes nothing")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available: {first_line(error)}") from error
    return device
