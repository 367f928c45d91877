"""Every option of ``pglcl train``, once: name, default, unit, help. Command line and TOML file come from here."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pglcl.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHOICES = {
    "method": ("supervised", "semi", "patchcl"),
    "consistency": ("mean-teacher", "weak-to-strong", "copy-paste"),
    "loss": ("infonce", "gaussian"),
    "patches": ("pooled", "crop"),
    "spatial_dims": (2, 3),
    "anchors": ("labelled", "all"),
    "flips": ("none", "all"),
}


def _opt(default: Any, text: str, group: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. Lists of numbers are written with commas."""

    # fmt: off
    labelled: int = _opt(4, "patients whose labels are used: the first ones of the training part", "Data")
    validation: int = _opt(-1, "patients kept for validation (of choices, never trained on); -1: a tenth", "Data")
    test: int = _opt(-1, "patients kept for the test, the last ones; -1: a fifth", "Data")
    shuffle: bool = _opt(False, "shuffle the patients with the seed before they are split (else: by name)", "Data")
    split_file: str = _opt("", "JSON file with the lists labelled, unlabelled, validation, test of patients", "Data")
    num_classes: int = _opt(0, "classes with background; 0: from dataset.json, or the labels found", "Data")
    spatial_dims: int = _opt(2, "2: slices, for anisotropic volumes; 3: patches of volumes", "Data")
    image_size: str = _opt("", "pixels of a slice or patch; one, or one an axis; default 128, 3-D 32,48,32", "Data")
    spacing: str = _opt("", "3-D: mm an axis that volumes are resampled to, e.g. 1,1,1; default: as they are", "Data")
    slice_axis: int = _opt(-1, "axis that 2-D slices are taken across; -1: the one with the fewest voxels", "Data")

    method: str = _opt("patchcl", "supervised; semi: a semi-supervised base; patchcl: patch contrast on it", "Method")
    consistency: str = _opt("copy-paste", "the base: mean-teacher, weak-to-strong or copy-paste", "Method")
    loss: str = _opt("infonce", "contrast: infonce (guided) or gaussian (the paper's, from queue statistics)", "Method")
    patches: str = _opt("pooled", "pooled: from one feature map; crop: cropped images, encoded again", "Method")
    contrast_weight: float = _opt(0.5, "weight of the contrastive loss", "Method")
    consistency_weight: float = _opt(1.0, "weight of the base's loss on unlabelled images", "Method")
    confidence: float = _opt(0.8, "weak-to-strong: pixels count where the teacher is at least this sure", "Method")
    ema_decay: float = _opt(0.99, "decay of the teacher, a step", "Method")
    temperature: float = _opt(0.1, "temperature of the InfoNCE loss (gaussian: 0.2, the authors')", "Method")
    guidance: bool = _opt(True, "choose positives and negatives by the disparity of the patches' entropies", "Method")
    max_positive_disparity: float = _opt(0.3, "delta+: most that positives differ, in units of log K", "Method")
    min_negative_disparity: float = _opt(0.0, "delta-: least that negatives differ, in units of log K", "Method")
    hard_negatives: bool = _opt(False, "gaussian: statistics of hard negatives", "Method")
    anchors: str = _opt("labelled", "anchors are annotated pixels, or all: pseudo-labels too; keys are both", "Method")
    anchors_per_class: int = _opt(64, "anchors of a class in a step, at most; 0: all", "Method")
    hard_anchors: bool = _opt(True, "the anchors whose prediction is least certain; else a random sample", "Method")
    keys_per_class: int = _opt(32, "keys of a class that a step queues, at most; 0: all", "Method")
    patch_size: int = _opt(4, "pixels of a patch along each axis (of an image given to the network)", "Method")
    coverage_target: float = _opt(0.8, "share of a class's patches that the adaptive threshold lets pass", "Method")
    queue_length: int = _opt(256, "keys kept of each class; 0: only those of the batch", "Method")
    embedding_dim: int = _opt(64, "numbers of an embedding", "Method")
    crops_per_class: int = _opt(1, "crop: patches of a class and image", "Method")

    steps: int = _opt(2000, "training steps", "Training")
    warmup: int = _opt(500, "of these, steps on labelled images alone", "Training")
    batch_size: int = _opt(8, "images a step; after warm-up half of them unlabelled", "Training")
    learning_rate: float = _opt(2e-3, "of AdamW, decays polynomially to 0", "Training")
    weight_decay: float = _opt(1e-4, "of AdamW", "Training")
    channels: str = _opt("16,32,64,128,256", "of the MONAI UNet, from the outside in", "Training")
    flips: str = _opt("none", "mirror images at random: none, or all axes", "Training")
    rotation: float = _opt(20.0, "largest random rotation, degrees", "Training")
    scaling: float = _opt(0.15, "largest random change of size, as a share", "Training")
    seed: int = _opt(0, "of everything random", "Training")
    amp: bool = _opt(False, "bfloat16 where PyTorch's autocast uses it", "Training")
    device: str = _opt("auto", "cpu, cuda, cuda:1; auto: a GPU where there is one", "Training")
    workers: int = _opt(-1, "processes that prepare batches; -1: measured at the start", "Training")
    checkpoint_every: int = _opt(200, "steps between checkpoints", "Training")
    validate_every: int = _opt(500, "steps between validations; 0: none", "Training")
    # fmt: on

    def __post_init__(self) -> None:
        problems = []
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(str, choices))
                problems.append(f"{flag(name)} must be one of {wanted}, got {getattr(self, name)}")
        at_least = {
            "labelled": 1, "validation": -1, "test": -1, "num_classes": 0, "patch_size": 1, "queue_length": 0,
            "anchors_per_class": 0, "keys_per_class": 0,
            "embedding_dim": 1, "crops_per_class": 1, "steps": 1, "warmup": 0, "batch_size": 2, "workers": -1,
            "checkpoint_every": 1, "validate_every": 0, "seed": 0, "contrast_weight": 0, "consistency_weight": 0,
            "rotation": 0, "scaling": 0, "weight_decay": 0, "slice_axis": -1,
        }  # fmt: skip
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                problems.append(f"{flag(name)} must be at least {least}, got {getattr(self, name)}")
        for name in ("temperature", "learning_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                problems.append(f"{flag(name)} must be a number > 0, got {getattr(self, name)}")
        for name in ("ema_decay", "confidence", "coverage_target"):
            if not 0 < getattr(self, name) < 1:
                problems.append(f"{flag(name)} must lie between 0 and 1, got {getattr(self, name)}")
        for name, kind in (("image_size", int), ("spacing", float), ("channels", int)):
            try:
                numbers = _numbers(getattr(self, name), kind)
            except ValueError:
                problems.append(f"{flag(name)} must be numbers with commas between, got {getattr(self, name)!r}")
                continue
            if name != "channels" and len(numbers) not in (0, 1, self.spatial_dims):
                problems.append(f"{flag(name)} must be one number or {self.spatial_dims}, got {getattr(self, name)!r}")
            if any(not n > 0 for n in numbers):
                problems.append(f"{flag(name)} must be positive, got {getattr(self, name)!r}")
        if not problems:
            step = 2 ** (len(self.channel_list) - 1)
            if len(self.channel_list) < 2:
                problems.append(f"--channels must have at least two numbers, got {self.channels!r}")
            elif any(size % step for size in self.size):
                problems.append(f"--image-size must be a multiple of {step} along each axis, got {self.size}")
            elif any(self.patch_size > size or self.patch_size % 2 for size in self.size):
                problems.append(
                    f"--patch-size must be even and at most --image-size {self.size}, got {self.patch_size}"
                )
        if problems:
            raise UserError(*problems)

    @property
    def size(self) -> tuple[int, ...]:
        numbers = _numbers(self.image_size, int) or ([128] if self.spatial_dims == 2 else [32, 48, 32])
        return tuple(numbers * self.spatial_dims if len(numbers) == 1 else numbers)

    @property
    def target_spacing(self) -> tuple[float, ...] | None:
        numbers = _numbers(self.spacing, float)
        return tuple(numbers * 3 if len(numbers) == 1 else numbers) if numbers else None

    @property
    def channel_list(self) -> list[int]:
        return _numbers(self.channels, int)

    @property
    def contrast(self) -> bool:
        return self.method == "patchcl"


def _numbers(text: str, kind: type) -> list[Any]:
    return [kind(part) for part in str(text).replace(" ", "").split(",") if part]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_toml(path: Path) -> dict[str, Any]:
    """The options of a TOML file, by the names of :class:`TrainConfig` (dashes may stand for underscores)."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    options = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise UserError(f"{path}: unknown option {key!r}; pglcl train --help lists them")
        if isinstance(value, list):
            value = ",".join(map(str, value))
        wanted = type(fields[name].default)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if type(value) is not wanted:
            raise UserError(f"{path}: {key} must be of type {wanted.__name__}, got {value!r}")
        options[name] = value
    return options
