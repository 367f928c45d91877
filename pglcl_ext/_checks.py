"""Checks the arguments of the public functions and of the ops, for every device, in eager mode and while tracing.

A message names the argument, what was expected and what came. Only `check_known_labels` reads a tensor's elements,
since the program would have to wait for a GPU.

These checks take as long as a small op. In eager mode, `OpFunction.checked` runs those of tensors only if the op has
refused them itself (csrc/checks.h). Numbers, names and flags are checked here alone, before the op.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pglcl_ext._arguments import (
    BoundsArguments,
    Choice,
    ContrastArguments,
    ContrastNumbers,
    ContrastOptions,
    GaussianArguments,
    Side,
    StatisticsArguments,
)

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
LARGEST = sys.float_info.max
LEAST_TEMPERATURE = 1e-100
MOST_ROWS = 2**31
LONGEST = 2**63  # of int64


# --- numbers and names ----------------------------------------------------------------------------------------------


def check_number(name: str, value: Any) -> float:
    """`value` as a float or int. A tensor is refused, since no gradient would flow to it."""
    if type(value) is float or (type(value) is int and abs(value) <= LARGEST):
        return value
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got a tensor of shape {tuple(value.shape)}: it would get no gradient, so a "
            f"parameter would never be trained. Pass {name}.item(). To learn a scale, multiply the embeddings by it"
        )
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be within the range of a float (below {LARGEST:.1e}), got {value}") from error


def check_positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    """A finite number above 0; with `or_zero`, at least 0."""
    number = check_number(name, value)
    in_range = number >= 0 if or_zero else number > 0
    if not (in_range and number <= LARGEST):
        raise ValueError(f"{name} must be a finite number {'>= 0' if or_zero else '> 0'}, got {value}")
    return number


def check_temperature(value: Any) -> float:
    """A temperature that is large enough for its squared reciprocal to be finite."""
    number = check_positive("temperature", value)
    if number < LEAST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {LEAST_TEMPERATURE}, got {value}")
    return number


def check_integer(name: str, value: Any, *, least: int = -LONGEST) -> int:
    """An int of 64 bits, at least `least`."""
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return value  # type: ignore[return-value]
        if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        value = operator.index(value)
    if not least <= value:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if not value < LONGEST:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value}")
    return value  # type: ignore[no-any-return]


def check_bound(name: str, value: Any) -> float:
    """A bound on disparities: at least 0; it may be infinite."""
    number = check_number(name, value)
    if number != number:
        raise ValueError(f"{name} must be a number, got nan")
    if number < 0:
        raise ValueError(f"{name} must be at least 0, as disparities are, got {value}")
    return number


def check_choice(name: str, value: Any, choices: Any) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def check_reduction(reduction: Any) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


# --- tensors --------------------------------------------------------------------------------------------------------


def dtype_name(t: Tensor) -> str:
    """The dtype as users write it: int64 for torch.int64."""
    return str(t.dtype).removeprefix("torch.")


def check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")
    if type(t).__name__ == "DTensor":  # by its name, since torch.distributed.tensor takes long to import
        raise TypeError(
            f"{name} must be a tensor of one process, got a DTensor. Pass its full_tensor(), or its to_local() if each "
            "rank holds some of its rows"
        )


def check_floating(name: str, t: Any) -> None:
    check_tensor(name, t)
    if t.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype_name(t)}")


def check_device(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {t.device}")


def check_same_dtype(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {dtype_name(like)}, got {dtype_name(t)}")


def check_embeddings(name: str, t: Any, rows: str) -> None:
    """(rows, D) floating point. `rows` is the letter of that number in messages, here and below."""
    check_floating(name, t)
    if t.dim() != 2:
        raise ValueError(f"{name} must have shape ({rows}, D), got {tuple(t.shape)}")
    # A number of rows that varies is not asked, since that would be a condition of the graph. The kernel looks again.
    if not torch.compiler.is_compiling() and isinstance(t.shape[0], int) and t.shape[0] >= MOST_ROWS:
        raise ValueError(f"{name} must have fewer than 2^31 rows, got {t.shape[0]}")


def check_labels(name: str, t: Any, rows: str, like_name: str, like: Tensor) -> None:
    """(rows,) int64, with as many rows as `like`."""
    check_tensor(name, t)
    if t.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {dtype_name(t)}")
    if t.dim() != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"{name} must have shape ({rows},) = ({like.shape[0]},), got {tuple(t.shape)}")
    check_device(name, t, like_name, like)


def check_descriptors(name: str, t: Any, rows: str, like_name: str, like: Tensor) -> int:
    """(rows,) or (rows, C) floating point, with as many rows as `like`; returns C."""
    check_floating(name, t)
    if t.dim() not in (1, 2) or t.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name} must have shape ({rows},) or ({rows}, C) with {rows} = {like.shape[0]}, got {tuple(t.shape)}"
        )
    if t.dim() == 2 and t.shape[1] == 0:
        raise ValueError(f"{name} must have at least one channel, got {tuple(t.shape)}")
    check_device(name, t, like_name, like)
    return 1 if t.dim() == 1 else t.shape[1]


def check_same_channels(name: str, channels: int, like_name: str, like_channels: int) -> None:
    if channels != like_channels:
        raise ValueError(f"{name} must have as many channels as {like_name}, {like_channels}, got {channels}")


# --- patch_statistics -----------------------------------------------------------------------------------------------


def per_dimension(name: str, value: Any, dims: int) -> list[int]:
    """An int or a sequence of ints, as a list. An int counts for each of `dims` dimensions."""
    if type(value) is int or (isinstance(value, (torch.SymInt, numbers.Integral)) and not isinstance(value, bool)):
        return [check_integer(name, value)] * dims
    if isinstance(value, (bool, str)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {type(value).__name__}")
    return [check_integer(f"every entry of {name}", entry) for entry in value]


def check_image(name: str, t: Any, channels: str) -> None:
    """(B, channels, H, W) or (B, channels, D, H, W)."""
    check_floating(name, t)
    if t.dim() not in (4, 5):
        expected = f"(B, {channels}, H, W) or (B, {channels}, D, H, W)"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(t.shape)}")


def check_patch_grid(image: Sequence[int], patch_size: list[int], stride: list[int]) -> None:
    """Checks that patches fit into an image of this size, in pixels."""
    for name, value in (("patch_size", patch_size), ("stride", stride)):
        if len(value) != len(image):
            raise ValueError(f"{name} must have one entry per spatial dimension ({len(image)}), got {value}")
        for entry in value:
            if entry <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
    for extent, size in zip(image, patch_size):
        if size > extent:
            raise ValueError(f"patch_size must not exceed the image, {tuple(image)}, got {patch_size}")


def check_same_space(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """Checks that images have the batch, the size and the device of others."""
    if t.dim() != like.dim() or t.shape[0] != like.shape[0] or t.shape[2:] != like.shape[2:]:
        expected = f"({like.shape[0]}, K, {', '.join(map(str, like.shape[2:]))})"
        raise ValueError(f"{name} must have the batch and space of {like_name}, {expected}, got {tuple(t.shape)}")
    check_device(name, t, like_name, like)


def check_statistics(x: StatisticsArguments) -> None:
    check_image("input", x.input, "K")
    if x.input.shape[1] < 2:
        raise ValueError(f"input must have at least two classes (dimension 1), got {tuple(x.input.shape)}")
    check_patch_grid(x.input.shape[2:], x.patch_size, x.stride)
    check_statistics_options(x)


def check_statistics_options(x: StatisticsArguments) -> None:
    check_flag("probabilities", x.probabilities)
    check_flag("normalize", x.normalize)


# --- class-aware patches --------------------------------------------------------------------------------------------


def check_coverage(coverage: Any, classes: int, like: Tensor) -> Any:
    """A threshold of coverage: a number, 0 for None, or a tensor with one number for each class."""
    if coverage is None:
        return 0.0
    if not isinstance(coverage, Tensor):
        number = check_number("coverage", coverage)
        if number != number:
            raise ValueError("coverage must be a number, got nan")
        return number * 1.0  # an int may have more than 64 bits
    check_floating("coverage", coverage)
    if coverage.shape not in ((), (classes,)):
        raise ValueError(f"coverage must be a number or have shape (K,) = ({classes},), got {tuple(coverage.shape)}")
    if coverage.dim() or coverage.device.type != "cpu":  # PyTorch compares a number on the CPU with any device
        check_device("coverage", coverage, "the images", like)
    return coverage


def check_class_labels(labels: Any, images: Tensor, classes: int) -> None:
    """(B, *S) int64, or weights (B, classes, *S), of images (B, C, *S)."""
    check_tensor("labels", labels)
    batch, space = images.shape[0], tuple(images.shape[2:])
    if labels.is_floating_point():
        shape: tuple[int, ...] = (batch, classes, *space)
        if tuple(labels.shape) != shape:
            raise ValueError(f"labels must have shape (B, K, *S) = {shape} as weights, got {tuple(labels.shape)}")
        check_floating("labels", labels)
    else:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, or weights in floating point, got {dtype_name(labels)}")
        if tuple(labels.shape) != (batch, *space):
            raise ValueError(f"labels must have shape (B, *S) = {(batch, *space)}, got {tuple(labels.shape)}")
    check_device("labels", labels, "images", images)


# --- semantic_disparity ---------------------------------------------------------------------------------------------


def check_disparity(a: Any, b: Any, names: tuple[str, str] = ("a", "b")) -> None:
    channels = []
    for name, t, rows in zip(names, (a, b), "NM"):
        check_tensor(name, t)
        if t.dim() not in (1, 2):
            check_floating(name, t)
            raise ValueError(f"{name} must have shape ({rows},) or ({rows}, C), got {tuple(t.shape)}")
        channels.append(check_descriptors(name, t, rows, name, t))
    check_device(names[1], b, names[0], a)
    check_same_channels(names[1], channels[1], names[0], channels[0])
    check_same_dtype(names[1], b, names[0], a)


def check_disparity_bounds(x: BoundsArguments) -> None:
    check_disparity(x.descriptors, x.key_descriptors, ("descriptors", "key_descriptors"))
    check_labels("labels", x.labels, "N", "descriptors", x.descriptors)
    check_labels("key_labels", x.key_labels, "M", "key_descriptors", x.key_descriptors)
    check_integer("num_positives" if x.positives else "num_negatives", x.wanted, least=1)


# --- patch_contrast -------------------------------------------------------------------------------------------------


PAIRS_BY_RULE = ("max_positive_disparity", "min_negative_disparity", "num_positives", "num_negatives")


def check_choice_of_pairs(descriptors: Any, options: ContrastOptions) -> None:
    """Checks that the options that choose the pairs fit each other."""
    no_bounds = options.max_positive_disparity is None and options.min_negative_disparity is None
    if no_bounds and options.num_positives is None and options.num_negatives is None:
        return  # the usual case, found soon
    rule = {name: getattr(options, name) for name in PAIRS_BY_RULE}
    given = [name for name, value in rule.items() if value is not None]
    if options.positive_mask is not None or options.negative_mask is not None:
        raise ValueError(
            f"positive_mask and negative_mask choose all pairs and exclude {', '.join(given)}: pass masks alone, or no "
            "masks"
        )
    for bound, count in (("max_positive_disparity", "num_positives"), ("min_negative_disparity", "num_negatives")):
        if rule[bound] is not None and rule[count] is not None:
            raise ValueError(f"{bound} and {count} exclude each other, got both: pass one of them")
        if rule[count] is not None:
            check_integer(count, rule[count], least=1)
        if rule[bound] is not None and not isinstance(rule[bound], Tensor):
            check_bound(bound, rule[bound])
    if descriptors is None:
        raise ValueError(f"descriptors must be given for {', '.join(given)}, got None")


def check_keys_come_together(keys: Any, key_labels: Any, key_descriptors: Any) -> None:
    """Checks that keys come with labels, and that labels and descriptors of keys come with keys."""
    if (keys is None) != (key_labels is None):
        raise ValueError(
            f"keys and key_labels must be given together, got only {'key_labels' if keys is None else 'keys'}"
        )
    if keys is None and key_descriptors is not None:
        raise ValueError("key_descriptors must be given with keys, got only key_descriptors")


def check_sides(anchors: Side, keys: Side | None) -> None:
    """The anchors, and the keys if they are given."""
    z = anchors.embeddings
    check_embeddings("anchors", z, "N")
    check_labels("labels", anchors.labels, "N", "anchors", z)
    channels = 1
    if anchors.descriptors is not None:
        channels = check_descriptors("descriptors", anchors.descriptors, "N", "anchors", z)
    if keys is None:
        return
    k = keys.embeddings
    check_keys_come_together(*keys)
    check_embeddings("keys", k, "M")
    if k.shape[1] != z.shape[1]:
        raise ValueError(f"keys must have shape (M, D) with D = {z.shape[1]}, got {tuple(k.shape)}")
    check_same_dtype("keys", k, "anchors", z)
    check_device("keys", k, "anchors", z)
    check_labels("key_labels", keys.labels, "M", "keys", k)
    if (anchors.descriptors is None) != (keys.descriptors is None):
        got = "key_descriptors" if anchors.descriptors is None else "descriptors"
        raise ValueError(f"descriptors and key_descriptors must be given together when keys are, got only {got}")
    if keys.descriptors is not None:
        others = check_descriptors("key_descriptors", keys.descriptors, "M", "keys", k)
        check_same_channels("key_descriptors", others, "descriptors", channels)


def check_mask(name: str, mask: Any, anchors: Tensor, keys: Tensor) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {dtype_name(mask)}")
    n, m = anchors.shape[0], keys.shape[0]
    if mask.dim() != 2 or mask.shape[0] != n or mask.shape[1] != m:
        raise ValueError(f"{name} must have shape (N, M) = ({n}, {m}), got {tuple(mask.shape)}")
    check_device(name, mask, "anchors", anchors)


def check_bounds(name: str, bounds: Any, anchors: Tensor) -> None:
    """One bound for each anchor, (N,)."""
    check_floating(name, bounds)
    if bounds.dim() != 1 or bounds.shape[0] != anchors.shape[0]:
        n = anchors.shape[0]
        raise ValueError(f"{name} must be a number or have shape (N,) = ({n},), got {tuple(bounds.shape)}")
    check_device(name, bounds, "anchors", anchors)


def check_masks(choice: Choice, anchors: Tensor, keys: Tensor) -> None:
    positive, negative = choice.positive_mask, choice.negative_mask
    if positive is None and negative is None:
        return
    if positive is None or negative is None:
        got = "positive_mask" if negative is None else "negative_mask"
        raise ValueError(f"positive_mask and negative_mask must be given together, got only {got}")
    check_mask("positive_mask", positive, anchors, keys)
    check_mask("negative_mask", negative, anchors, keys)


def check_contrast(x: ContrastArguments) -> None:
    check_sides(x.anchors, x.keys)
    z = x.anchors.embeddings
    check_masks(x.choice, z, z if x.keys is None else x.keys.embeddings)
    if x.choice.positive_bounds is not None:
        check_bounds("max_positive_disparity", x.choice.positive_bounds, z)
    if x.choice.negative_bounds is not None:
        check_bounds("min_negative_disparity", x.choice.negative_bounds, z)
    check_contrast_numbers(x.numbers)


def check_contrast_numbers(x: ContrastNumbers) -> None:
    check_temperature(x.temperature)
    check_positive("negative_weight", x.negative_weight, or_zero=True)
    check_bound("max_positive_disparity", x.positive_bound)
    check_bound("min_negative_disparity", x.negative_bound)
    check_integer("ignore_index", x.ignore_index)


# --- gaussian_contrast ----------------------------------------------------------------------------------------------


def check_gaussian(x: GaussianArguments) -> None:
    check_embeddings("anchors", x.anchors, "N")
    check_labels("labels", x.labels, "N", "anchors", x.anchors)
    check_tensor("counts", x.counts)
    if x.counts.dtype != torch.int64:
        raise TypeError(f"counts must be int64, got {dtype_name(x.counts)}")
    if x.counts.dim() != 1 or x.counts.shape[0] == 0:
        raise ValueError(f"counts must have shape (K,) with at least one class, got {tuple(x.counts.shape)}")
    check_device("counts", x.counts, "anchors", x.anchors)
    for name, t in (("means", x.means), ("covariances", x.covariances)):
        check_floating(name, t)
        check_device(name, t, "anchors", x.anchors)
    d, k = x.anchors.shape[1], x.counts.shape[0]
    lead = (k, k) if x.means.dim() == 3 else (k,)
    if tuple(x.means.shape) != (*lead, d):
        expected = f"(K, D) = ({k}, {d}) or (K, K, D) = ({k}, {k}, {d})"
        raise ValueError(f"means must have shape {expected}, got {tuple(x.means.shape)}")
    if tuple(x.covariances.shape) != (*lead, d, d):
        shape = "(K, K, D, D)" if x.means.dim() == 3 else "(K, D, D)"
        got = tuple(x.covariances.shape)
        raise ValueError(f"covariances must have shape {shape} = {(*lead, d, d)}, like the means, got {got}")
    check_gaussian_numbers(x)


def check_gaussian_numbers(x: GaussianArguments) -> None:
    check_temperature(x.temperature)
    check_positive("covariance_scale", x.covariance_scale, or_zero=True)
    if x.covariance_scale / x.temperature / x.temperature / 2 > LARGEST:  # the square may exceed it
        got = f"covariance_scale = {x.covariance_scale} and temperature = {x.temperature}"
        raise ValueError(f"covariance_scale / (2 temperature^2) must be a finite number, got {got}")
    check_positive("negative_weight", x.negative_weight, or_zero=True)
    check_integer("ignore_index", x.ignore_index)


def check_known_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Checks that labels lie in [0, K) or are `ignore_index`. This reads them."""
    bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, K) = [0, {classes}) or be ignore_index = {ignore_index}, got {int(labels[at])} "
            f"at index {at}"
        )
