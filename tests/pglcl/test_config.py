"""The table of options: the values that each may have, and the other options that it needs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from pglcl.config import DEFAULTS, OPTIONS, PRESETS, TrainConfig, flag, read_toml, with_preset
from pglcl.errors import UserError

from tests.pglcl.folders import tiny


def test_the_defaults_are_allowed_and_the_warm_up_is_a_share() -> None:
    config = TrainConfig()
    assert config.warmup_steps == config.steps // 4
    assert TrainConfig(steps=300).warmup_steps == 75
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert all(option.help and option.group for option in OPTIONS.values())


@pytest.mark.parametrize("name", [name for name, value in DEFAULTS.items() if isinstance(value, float)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=flag(name)):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", [name for name, value in DEFAULTS.items() if type(value) is int])
@pytest.mark.parametrize("value", [-2, 10**20])
def test_whole_numbers_have_bounds(name: str, value: int) -> None:
    with pytest.raises(UserError, match=flag(name)):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 10**19}, "--seed must be at most 4294967295, got 10000000000000000000"),
        ({"slice_axis": 7}, "--slice-axis must be at most 2, got 7"),
        ({"spacing": "1e-6", "spatial_dims": 3}, "--spacing must be at least 0.01, got '1e-6'"),
        ({"spacing": "1 1 3", "spatial_dims": 3}, "--spacing must be numbers separated by commas, got '1 1 3'"),
        ({"channels": "16,,64"}, "--channels must be numbers separated by commas, got '16,,64'"),
        ({"spacing": "nan", "spatial_dims": 3}, "--spacing must be a finite number, got nan"),
        ({"channels": "4"}, "--channels must have at least two numbers"),
        ({"channels": "4,-8"}, "--channels must be at least 1, got '4,-8'"),
        ({"channels": "4,x"}, "--channels must be numbers separated by commas"),
        ({"image_size": "4", "channels": "4,8,8"}, "--image-size must exceed 4 along an axis"),
        ({"temperature": math.nan}, "--temperature must be a number > 0, got nan"),
        ({"confidence": 1.0, "consistency": "weak-to-strong"}, "--confidence must lie between 0 and 1, got 1.0"),
        ({"steps": 300, "warmup": 500}, "--warmup must be less than --steps 300, or --method patchcl would never use"),
        ({"steps": 500, "warmup": 500, "method": "semi"}, "--warmup must be less than --steps 500"),
        ({"hard_negatives": True}, "--hard-negatives needs --loss gaussian, got infonce"),
        ({"temperature": 0.7, "loss": "gaussian"}, "--temperature needs --loss infonce, got gaussian"),
        ({"confidence": 0.5}, "--confidence needs --consistency weak-to-strong, got copy-paste"),
        ({"crops_per_class": 2}, "--crops-per-class needs --patches crop, got pooled"),
        ({"network": "vnet"}, "--network must be one of unet, basicunet, dynunet, segresnet, got vnet"),
        (
            {"network": "basicunet", "channels": "4,8,8"},
            "--channels must have five numbers for --network basicunet, got '4,8,8'",
        ),
        (
            {"network": "dynunet", "channels": "4,8"},
            "--channels must have at least three numbers for",
        ),
        (
            {"network": "segresnet", "channels": "8,8,16"},
            "--channels must begin with a multiple of 8 and double from each to the next",
        ),
        ({"network": "segresnet", "channels": "4,8,16"}, "--channels must begin with a multiple of 8"),
        ({"fold": 1}, "--fold 1 needs --folds, or a --split-file with folds"),
        ({"folds": 5, "fold": 5, "validation": -1}, "--fold must be 0 to 4 with --folds 5, got 5"),
        ({"folds": 1, "validation": -1}, "--folds must be at least 2, or 0 for none, got 1"),
        ({"folds": 5, "split_file": "a.json", "validation": -1}, "--folds and --split-file exclude each other"),
        ({"folds": 5, "validation": 2}, "--folds and --validation 2 exclude each other"),
        ({"spacing": "1", "slices": "whole"}, "--spacing and --slices whole exclude each other"),
        ({"spacing": "1,1,3"}, "--spacing must be one number or 2, got '1,1,3'"),
        ({"slices": "whole", "spatial_dims": 3}, "--slices needs --spatial-dims 2, got 3"),
        ({"slices": "half"}, "--slices must be one of auto, crop, whole, got half"),
        ({"steps": "100"}, "--steps must be a whole number, got '100'"),
        ({"batch_size": 4.5}, "--batch-size must be a whole number, got 4.5"),
        ({"labelled": True}, "--labelled must be a whole number, got True"),
        ({"shuffle": "no"}, "--shuffle must be true or false, got no"),
        ({"learning_rate": None}, "--learning-rate must be a number, got None"),
        ({"channels": [4, 8, 8]}, "--channels must be text, got [4, 8, 8]"),
    ],
)
def test_one_line_names_option_expectation_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(**options)
    (line,) = caught.value.lines
    assert message in line


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(steps=0, labelled=0, method="magic")
    assert [line.split()[0] for line in caught.value.lines] == ["--labelled", "--method", "--steps"]


def test_a_warm_up_does_not_matter_without_unlabelled_images() -> None:
    assert tiny(method="supervised", warmup=100).warmup_steps == 100


def test_toml_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("steps = 7\r\nlearning-rate = 1\r\n", encoding="utf-8-sig")
    assert read_toml(tmp_path / "a.toml") == {"steps": 7, "learning_rate": 1.0}


def test_deeply_nested_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text("steps = " + "[" * 5000)
    with pytest.raises(UserError, match=r"deep\.toml: not readable as TOML"):
        read_toml(tmp_path / "deep.toml")


def test_the_preset_has_the_settings_of_the_paper() -> None:
    """The settings of the paper and its code (method, sections 6 and 9)."""
    config = TrainConfig(**with_preset("paper", {}))
    assert (config.loss, config.hard_negatives, config.queue_length, config.embedding_dim) == (
        "gaussian",
        True,
        4096,
        128,
    )
    assert (config.patches, config.contrast_weight, config.ema_decay) == ("crop", 0.5, 0.999)
    assert config.warmup_steps > 0  # two stages
    assert set(PRESETS["paper"]) <= set(OPTIONS)


def test_given_options_take_precedence_over_a_preset() -> None:
    config = TrainConfig(**with_preset("paper", {"queue_length": 7, "consistency": "copy-paste", "loss": "infonce"}))
    assert (config.queue_length, config.consistency) == (7, "copy-paste")
    assert not config.hard_negatives  # it would have no effect
    assert with_preset("", {"steps": 3}) == {"steps": 3}
    with pytest.raises(UserError, match="--preset must be one of paper, got nature"):
        with_preset("nature", {})
    with pytest.raises(UserError, match="--strong-views needs --consistency weak-to-strong"):
        TrainConfig(**with_preset("paper", {"strong_views": 1, "consistency": "copy-paste"}))
