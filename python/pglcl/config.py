"""Defines every option of ``pglcl train`` once: its name, default, range, unit and help text."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pglcl.errors import UserError
from pglcl.labels import parse_labels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST = 10**9  # the largest value of a number without a bound of its own
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Option:
    """The description of an option, besides its type and default.

    Args:
        help: one line.
        group: heading in ``pglcl train --help``.
        unit: of the number.
        choices: the values that it may have.
        least, most: smallest and largest value. above, below: bounds that are excluded. Every number is finite.
        items: type of the numbers of a list, which is written as text, separated by commas.
        only: another option and its value; with any other value, this option would have no effect and is refused.
        weights: whether the option changes the trained weights; a resumed run must keep such options.
    """

    help: str
    group: str
    unit: str = ""
    choices: tuple[Any, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    items: type | None = None
    only: tuple[str, Any] | None = None
    weights: bool = True

    def problem(self, value: Any) -> str:
        """A message if `value` is wrong; empty if it is not."""
        if self.choices:
            return "" if value in self.choices else f"must be one of {', '.join(map(str, self.choices))}"
        if self.items is not None:
            return self._problem_of_items(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        if self.above is not None and self.below is not None:
            return "" if self.above < value < self.below else f"must lie between {self.above:g} and {self.below:g}"
        if self.above is not None:
            return "" if math.isfinite(value) and value > self.above else f"must be a number > {self.above:g}"
        if not math.isfinite(value):
            return "must be a finite number"
        if self.least is not None and value < self.least:
            return f"must be at least {self.least:g}"
        most = MOST if self.most is None else self.most
        return "" if value <= most else f"must be at most {most:.12g}"

    def _problem_of_items(self, text: str) -> str:
        assert self.items is not None
        try:
            numbers = numbers_in(text, self.items)
        except ValueError:
            return "must be numbers separated by commas"
        bounds = dataclasses.replace(self, items=None)
        return next((problem for problem in map(bounds.problem, numbers) if problem), "")

    @property
    def metavar(self) -> str | None:
        """The word for the value in ``--help``."""
        if self.choices:
            return "|".join(map(str, self.choices))
        return self.unit.upper().replace(" ", "-") or None


def _opt(default: Any, text: str, group: str, **rest: Any) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(text, group, **rest)})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. Lists of numbers are texts, separated by commas.

    Raises:
        UserError: a line for each option that has the wrong type, is out of range or does not fit the others.
    """

    # fmt: off
    labelled: int = _opt(4, "patients whose labels are used: the first ones of the training part", "Data", least=1)
    validation: int = _opt(-1,
        "patients kept for validation: used to choose options, never to train; -1: a tenth", "Data", least=-1)
    test: int = _opt(-1, "patients kept for the test, the last ones; -1: a fifth", "Data", least=-1)
    shuffle: bool = _opt(False, "shuffle the patients with the seed before they are split (default: by name)", "Data")
    split_file: str = _opt("", "JSON file with lists of patients: labelled, unlabelled, validation, test", "Data")
    folds: int = _opt(0, "number of folds that the patients with labels are split into at random; 0: no folds",
        "Data", least=0, most=1000)
    fold: int = _opt(0,
        "the fold that is kept for validation, counted from 0: of --folds, or of a --split-file with folds", "Data",
        least=0)
    labels: str = _opt("",
        "label values of each class, background first, e.g. 0,85=RV,1+2=kidney,255=ignore; 0+* adds all other values; "
        "default: each value that is found is a class", "Data")
    num_classes: int = _opt(0,
        "number of classes, whose label values are 0, 1, ...; 0: from dataset.json, or from the values that are found",
        "Data", least=0, most=256)
    normalise: str = _opt("auto", "how intensities are normalised; auto: chosen by dataset.json and the values",
        "Data", choices=("auto", "percentile", "zscore", "ct", "rgb", "none"))
    window: str = _opt("", "LEVEL,WIDTH of the window that intensities are clipped to, e.g. 40,400", "Data",
        items=float)
    cache: str = _opt("", "folder for prepared volumes, for data larger than memory; batches are read from it",
        "Data", weights=False)
    spatial_dims: int = _opt(2, "2: slices, for anisotropic volumes; 3: patches of volumes", "Data", choices=(2, 3))
    image_size: str = _opt("",
        "size of what the network sees, one number or one per axis; default: 128 in 2-D, 32,48,32 in 3-D",
        "Data", unit="pixels", items=int, least=1)
    slices: str = _opt("auto",
        "2-D; crop: the network sees parts of slices at their own resolution, as patches in 3-D; whole: slices scaled "
        "to --image-size; auto: whole for pictures, crop for volumes",
        "Data", choices=("auto", "crop", "whole"), only=("spatial_dims", 2))
    spacing: str = _opt("",
        "voxel size that volumes or cropped slices are resampled to, one number or one per axis, e.g. 1,1,1; default: "
        "unchanged",
        "Data", unit="mm", items=float, least=0.01, most=1000)
    slice_axis: int = _opt(-1, "axis across which slices are taken; -1: the one with the fewest voxels", "Data",
        least=-1, most=2, only=("spatial_dims", 2))

    method: str = _opt("patchcl",
        "supervised: only labelled images; semi: a semi-supervised base method; patchcl: base method and contrast",
        "Method", choices=("supervised", "semi", "patchcl"))
    consistency: str = _opt("copy-paste", "the semi-supervised base method", "Method",
        choices=("mean-teacher", "weak-to-strong", "copy-paste"))
    loss: str = _opt("infonce",
        "contrastive loss; infonce: guided by entropy; gaussian: the paper's, from statistics of the classes",
        "Method", choices=("infonce", "gaussian"))
    patches: str = _opt("pooled", "pooled: from one feature map; crop: cropped images that are encoded again", "Method",
        choices=("pooled", "crop"))
    contrast_weight: float = _opt(0.1, "largest weight of the contrastive loss", "Method", least=0)
    contrast_schedule: str = _opt("ramp",
        "ramp: the weight rises over the first 30 % of the steps and falls to 0 over the last 30 %; constant",
        "Method", choices=("ramp", "constant"))
    consistency_weight: float = _opt(1.0, "weight of the base method's loss on unlabelled images", "Method", least=0)
    confidence: float = _opt(0.8, "weak-to-strong: smallest probability of the teacher at which a pixel counts",
        "Method", above=0, below=1, only=("consistency", "weak-to-strong"))
    strong_views: int = _opt(2, "weak-to-strong: number of strong views of an unlabelled image", "Method",
        choices=(1, 2), only=("consistency", "weak-to-strong"))
    feature_dropout: float = _opt(0.5,
        "weak-to-strong: share of feature channels that are dropped in a weak view; 0: no such view", "Method",
        least=0, most=0.9, only=("consistency", "weak-to-strong"))
    mix_warmup: bool = _opt(True, "copy-paste: paste labelled images into each other during warm-up", "Method",
        only=("consistency", "copy-paste"))
    clean_pseudo_labels: str = _opt("auto",
        "classes of which a pseudo-label keeps only the largest component; auto: those that are one organ in the "
        "labels; largest-component: all; none: none",
        "Method", choices=("auto", "largest-component", "none"))
    ema_decay: float = _opt(0.99, "decay of the teacher's moving average in a step", "Method", above=0, below=1)
    temperature: float = _opt(0.5, "temperature of --loss infonce (that of gaussian is the authors' 0.2)", "Method",
        above=0, only=("loss", "infonce"))
    guidance: bool = _opt(True, "choose positives and negatives by the disparity of the patches' entropies", "Method")
    max_positive_disparity: float = _opt(0.3, "delta+: largest disparity of positives, in units of log K", "Method",
        least=0)
    min_negative_disparity: float = _opt(0.0, "delta-: smallest disparity of negatives, in units of log K", "Method",
        least=0)
    hard_negatives: bool = _opt(False, "--loss gaussian: use the statistics of hard negatives", "Method",
        only=("loss", "gaussian"))
    anchors: str = _opt("certain",
        "where anchors lie; labelled: on annotated pixels; certain: also where the teacher is sure; all: anywhere, as "
        "keys do",
        "Method", choices=("labelled", "certain", "all"))
    anchor_confidence: float = _opt(0.95,
        "--anchors certain: smallest probability at which the teacher counts as sure", "Method",
        above=0, below=1, only=("anchors", "certain"))
    anchors_per_class: int = _opt(64, "largest number of anchors of a class in a step; 0: all", "Method", least=0)
    anchor_order: str = _opt("student",
        "which anchors are taken first; student, teacher: those of which that network is least certain; random: a "
        "random sample",
        "Method", choices=("student", "teacher", "random"))
    mixed_patches: str = _opt("split",
        "patches that their class does not fill; split: positives of each other; leave-out: of no patch; together: of "
        "all patches of their class",
        "Method", choices=("split", "leave-out", "together"))
    inside_coverage: float = _opt(0.9, "smallest share of a patch that its class must cover to fill it", "Method",
        above=0, most=1)
    keys_per_class: int = _opt(32, "largest number of keys of a class that a step queues; 0: all", "Method", least=0)
    patch_size: int = _opt(4, "size of a patch along each axis, in the image that the network sees", "Method",
        unit="pixels", least=1)
    coverage_target: float = _opt(0.8,
        "share of the patches of a class that should qualify; it sets the coverage threshold", "Method",
        above=0, below=1)
    queue_length: int = _opt(256, "number of keys kept of each class; 0: only the keys of the batch", "Method", least=0)
    embedding_dim: int = _opt(64, "size of an embedding", "Method", least=1)
    crops_per_class: int = _opt(1, "--patches crop: largest number of crops of each class in an image", "Method",
        least=1, only=("patches", "crop"))

    steps: int = _opt(2000, "number of training steps", "Training", least=1)
    warmup: int = _opt(-1, "steps at the start that use only labelled images; -1: a quarter of all steps", "Training",
        unit="steps", least=-1)
    batch_size: int = _opt(8, "images in a step; after the warm-up half of them are unlabelled", "Training", least=2)
    learning_rate: float = _opt(2e-3, "learning rate of AdamW at the start; it decays polynomially to 0", "Training",
        above=0)
    weight_decay: float = _opt(1e-4, "weight decay of AdamW", "Training", least=0)
    network: str = _opt("unet", "network of MONAI", "Training", choices=("unet", "basicunet", "dynunet", "segresnet"))
    channels: str = _opt("16,32,64,128,256",
        "channels of each level, from the outside in; basicunet: five levels; segresnet: doubled at each level",
        "Training", items=int, least=1)
    init: str = _opt("", "folder of another run, from whose weights the training starts", "Training")
    flips: str = _opt("none", "axes along which images are mirrored at random", "Training", choices=("none", "all"))
    rotation: float = _opt(20.0, "largest angle of the random rotation", "Training", unit="degrees", least=0)
    scaling: float = _opt(0.15, "largest random change of size, as a share of the size", "Training", least=0)
    seed: int = _opt(0, "seed of everything random", "Training", least=0, most=2**32 - 1)
    amp: bool = _opt(False, "compute in bfloat16 where PyTorch's autocast does", "Training")
    device: str = _opt("auto", "cpu, cuda or cuda:1; auto: a GPU if there is one, otherwise the CPU", "Training",
        weights=False)
    workers: int = _opt(-1,
        "number of processes that prepare batches; 0: the training process does it; -1: measured at the start",
        "Training", least=-1, weights=False)
    checkpoint_every: int = _opt(200, "steps between checkpoints", "Training", unit="steps", least=1, weights=False)
    validate_every: int = _opt(500, "steps between validations; 0: none", "Training", unit="steps", least=0,
        weights=False)
    # fmt: on

    def __post_init__(self) -> None:
        problems = []
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            problem = _wrong_type(value, type(DEFAULTS[name])) or option.problem(value)
            if problem:
                problems.append(f"{flag(name)} {problem}, got {_written(value)}")
        problems += [] if problems else self._disagreements()
        if problems:
            raise UserError(*problems)

    def _disagreements(self) -> list[str]:
        """The problems of options that do not fit each other."""
        problems = []
        for name, option in OPTIONS.items():
            if option.only is not None and getattr(self, name) != DEFAULTS[name]:
                other, value = option.only
                if getattr(self, other) != value:
                    problems.append(f"{flag(name)} needs {flag(other)} {value}, got {getattr(self, other)}")
        for name in ("image_size", "spacing"):
            if len(numbers_in(getattr(self, name), float)) not in (0, 1, self.spatial_dims):
                got = getattr(self, name)
                problems.append(f"{flag(name)} must be one number or {self.spatial_dims}, got {got!r}")
        if self.spacing and self.whole_slices:
            problems.append("--spacing and --slices whole exclude each other: whole slices are scaled to --image-size")
        if self.labels and self.num_classes:
            problems.append("--labels and --num-classes exclude each other")
        if self.labels:
            try:
                parse_labels(self.labels)
            except UserError as error:
                problems += error.lines
        window = numbers_in(self.window, float)
        if window and (len(window) != 2 or window[1] <= 0):
            problems.append(f"--window must be LEVEL,WIDTH with a width > 0, like 40,400, got {self.window!r}")
        if window and self.normalise not in ("auto", "ct"):
            problems.append(f"--window and --normalise {self.normalise} exclude each other")
        problems += [*self._channels_that_do_not_fit(), *self._folds_that_do_not_fit()]
        if self.semi and self.warmup >= self.steps:
            problems.append(
                f"--warmup must be less than --steps {self.steps}, or --method {self.method} would never use an "
                f"unlabelled image, got {self.warmup}"
            )
        return problems or self._sizes_that_do_not_fit()

    def _channels_that_do_not_fit(self) -> list[str]:
        channels = self.channel_list
        if len(channels) < 2:
            return [f"--channels must have at least two numbers, got {self.channels!r}"]
        if self.network == "dynunet" and len(channels) < 3:
            return [f"--channels must have at least three numbers for --network dynunet, got {self.channels!r}"]
        if self.network == "basicunet" and len(channels) != 5:
            return [f"--channels must have five numbers for --network basicunet, got {self.channels!r}"]
        doubled = [channels[0] * 2**level for level in range(len(channels))]
        if self.network == "segresnet" and (channels != doubled or channels[0] % 8):
            return [
                "--channels must begin with a multiple of 8 and double from each to the next for --network segresnet, "
                f"like 16,32,64,128, got {self.channels!r}"
            ]
        return []

    def _folds_that_do_not_fit(self) -> list[str]:
        if not self.folds:
            alone = self.fold and not self.split_file
            return [f"--fold {self.fold} needs --folds, or a --split-file with folds"] if alone else []
        problems = []
        if self.folds < 2:
            problems.append(f"--folds must be at least 2, or 0 for none, got {self.folds}")
        elif self.fold >= self.folds:
            problems.append(f"--fold must be 0 to {self.folds - 1} with --folds {self.folds}, got {self.fold}")
        if self.split_file:
            problems.append("--folds and --split-file exclude each other")
        if self.validation >= 0:
            problems.append(f"--folds and --validation {self.validation} exclude each other: the fold takes its place")
        return problems

    def _sizes_that_do_not_fit(self) -> list[str]:
        step = 2 ** (len(self.channel_list) - 1)
        if any(size % step for size in self.size):
            return [f"--image-size must be a multiple of {step} along each axis, got {self.size}"]
        if all(size == step for size in self.size):  # the deepest level has one pixel, which normalises to 0
            levels = len(self.channel_list)
            return [
                f"--image-size must exceed {step} along an axis, since {levels} --channels divide it by {step}, got "
                f"{self.size}"
            ]
        if any(self.patch_size > size or self.patch_size % 2 for size in self.size):
            return [f"--patch-size must be even and at most --image-size {self.size}, got {self.patch_size}"]
        return []

    @property
    def size(self) -> tuple[int, ...]:
        numbers = numbers_in(self.image_size, int) or ([128] if self.spatial_dims == 2 else [32, 48, 32])
        return tuple(numbers * self.spatial_dims if len(numbers) == 1 else numbers)

    @property
    def target_spacing(self) -> tuple[float, ...] | None:
        """mm along each axis that the network sees; None: unchanged."""
        numbers = numbers_in(self.spacing, float)
        return tuple(numbers * self.spatial_dims if len(numbers) == 1 else numbers) if numbers else None

    @property
    def whole_slices(self) -> bool:
        """Whether slices are scaled to :attr:`size`. False for "auto", which a run replaces before it reads volumes."""
        return self.spatial_dims == 2 and self.slices == "whole"

    @property
    def level_and_width(self) -> tuple[float, float] | None:
        numbers = numbers_in(self.window, float)
        return (numbers[0], numbers[1]) if numbers else None

    @property
    def channel_list(self) -> list[int]:
        return numbers_in(self.channels, int)

    @property
    def semi(self) -> bool:
        """Whether unlabelled images are used."""
        return self.method != "supervised"

    @property
    def contrast(self) -> bool:
        return self.method == "patchcl"

    @property
    def strong_images(self) -> int:
        """The number of strong views of an unlabelled image."""
        return self.strong_views if self.consistency == "weak-to-strong" else 1

    @property
    def warmup_steps(self) -> int:
        return self.steps // 4 if self.warmup < 0 else self.warmup


# The settings of the paper and of its authors' code (method, sections 6 to 9).
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "consistency": "weak-to-strong",
        "strong_views": 1,
        "feature_dropout": 0.0,
        "clean_pseudo_labels": "none",
        "loss": "gaussian",
        "hard_negatives": True,
        "patches": "crop",
        "patch_size": 32,
        "crops_per_class": 2,
        "contrast_weight": 0.5,
        "contrast_schedule": "constant",
        "ema_decay": 0.999,
        "anchors": "all",
        "anchors_per_class": 0,
        "anchor_order": "random",
        "keys_per_class": 0,
        "mixed_patches": "together",
        "coverage_target": 0.8,
        "queue_length": 4096,
        "embedding_dim": 128,
    }
}
OPTIONS: dict[str, Option] = {field.name: field.metadata["option"] for field in dataclasses.fields(TrainConfig)}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """Saved options, with those that older versions lacked, at the value that tells what these versions did."""
    return {"slices": "whole" if saved.get("spatial_dims") == 2 else DEFAULTS["slices"], **saved}


def with_preset(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a preset, overridden by those given. Options of the preset that then have no effect are left out.

    Raises:
        UserError: no such preset.
    """
    if not name:
        return given
    if name not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {name}")
    options = {**PRESETS[name], **given}
    needs = {option: OPTIONS[option].only for option in options if option not in given}
    return {
        option: value
        for option, value in options.items()
        if (need := needs.get(option)) is None or options.get(need[0], DEFAULTS[need[0]]) == need[1]
    }


def numbers_in(text: str, kind: type[Number]) -> list[Number]:
    """The numbers of an option that is a list; none of an empty text.

    Raises:
        ValueError: a part is not a number, such as `1 1 3`.
    """
    return [kind(part) for part in text.split(",")] if text.strip() else []


def _written(value: Any) -> str:
    return str(value) if isinstance(value, str) and value.isidentifier() else repr(value)


def _wrong_type(value: Any, wanted: type) -> str:
    """A message if an option's value has the wrong type; empty if not. An int may stand for a float."""
    fits = isinstance(value, (int, float) if wanted is float else wanted) and isinstance(value, bool) == (
        wanted is bool
    )
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return "" if fits else f"must be {words[wanted]}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_toml(path: Path) -> dict[str, Any]:
    """The options of a TOML file, by the names of :class:`TrainConfig` (dashes may stand for underscores).

    Raises:
        UserError: the file cannot be read, or has an unknown option or a value of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from error
    options = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in OPTIONS:
            raise UserError(f"{path}: unknown option {key!r}; pglcl train --help lists them")
        if name in options:
            raise UserError(f"{path}: has the option {name} twice, with a dash and with an underscore")
        options[name] = _converted(path, key, value, type(DEFAULTS[name]))
    return options


def _converted(path: Path, key: str, value: Any, wanted: type) -> Any:
    """A list becomes text with commas, and a whole number becomes a float where the option is one."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if type(value) is not wanted:
        raise UserError(f"{path}: {key} must be of type {wanted.__name__}, got {value!r}")
    return value
