"""The normalisation of intensities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pglcl.errors import UserError
from pglcl.intensity import RGB_MEAN, RGB_STD, Channel, Intensity, Measured, choose_intensity, measure

FLOAT, BYTES, SHORT = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int16)


def test_percentile_and_zscore_normalise_each_channel_by_itself() -> None:
    x = torch.randn(2, 9, 9, 9) * torch.tensor([3.0, 50.0])[:, None, None, None] + 7
    for kind in ("percentile", "zscore"):
        y = Intensity((Channel(kind),) * 2, "")(x)
        torch.testing.assert_close(y.mean(dim=(1, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(y.std(dim=(1, 2, 3)), torch.ones(2), atol=1e-2, rtol=0)
        assert torch.isfinite(Channel(kind)(torch.full((1, 4, 4, 4), 5.0))).all()
    assert torch.equal(Intensity((Channel("none"),) * 2, "")(x), x)


def ct_case(seed: int, *, padding: float = -1024) -> Measured:
    """Air and padding around an organ of about 60 HU."""
    random = np.random.default_rng(seed)
    data = np.full((1, 20, 20, 20), padding, np.float32)
    data[0, 2:18, 2:18] = -1000
    organ = np.zeros((20, 20, 20), bool)
    organ[5:15, 5:15, 5:15] = True
    data[0, organ] = random.normal(60, 20, organ.sum()).round()
    return measure(data, SHORT, organ)


@pytest.mark.parametrize("padding", [-1024, -2048, -3024])
def test_ct_is_measured_on_the_labelled_foreground(padding: float) -> None:
    cases = [ct_case(seed, padding=padding) for seed in range(3)]
    chosen = choose_intensity("auto", None, (), cases)
    (channel,) = chosen.channels
    assert channel.kind == "ct"
    assert "Hounsfield" in chosen.reason
    values = np.concatenate([m.foreground[0] for m in cases if m.foreground is not None]).astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5])
    np.testing.assert_allclose([channel.low, channel.high, channel.mean, channel.std],
                               [low, high, values.mean(), values.std()])  # fmt: skip
    x = torch.tensor([-3024.0, -1000.0, 60.0, 3000.0]).view(1, 4, 1, 1)
    y = chosen(x).flatten()
    np.testing.assert_allclose(y, (np.array([low, low, 60, high]) - values.mean()) / values.std(), rtol=1e-5)
    assert Intensity.from_state(chosen.state()) == chosen


def test_ct_does_not_count_padding_in_the_foreground() -> None:
    data = np.zeros((1, 10, 10, 10), np.float32)
    data[0, :5], data[0, 5:] = -3024, np.arange(500).reshape(5, 10, 10) % 100
    measured = measure(data, SHORT, np.ones((10, 10, 10), bool))
    (channel,) = choose_intensity("ct", None, (), [measured]).channels
    assert channel.low >= 0


def test_scaled_whole_numbers_count_by_their_scaled_values() -> None:
    """By the slope in its header: values are what counts, not the type that stores them."""
    scaled = measure(np.linspace(-900, 900, 125, dtype=np.float32).reshape(1, 5, 5, 5), SHORT, None)
    assert scaled.hounsfield == (False,)
    for values in (np.arange(192) / 255, np.arange(192) * 2.0, np.arange(192) - 1.0):
        shares = measure(values.astype(np.float32).reshape(3, 8, 8, 1), BYTES, None)
        assert choose_intensity("auto", None, (), [shares]).channels == (Channel("percentile"),) * 3


@pytest.mark.parametrize(("kind", "scale", "fits"), [
    ("zscore", 1e30, False), ("zscore", 1e-25, False), ("zscore", 1e10, True), ("zscore", 0, True),
    ("percentile", 2e38, False), ("percentile", 1e-35, False), ("percentile", 1e-25, True), ("percentile", 1e25, True),
])  # fmt: skip
def test_a_range_that_float32_cannot_standardise_is_refused(kind: str, scale: float, fits: bool) -> None:
    """The network would see 0 everywhere, without a word."""
    x = (np.random.default_rng(0).random((1, 6, 6, 6)) * scale).astype(np.float32)
    problem = Intensity((Channel(kind),), "").problem(x)
    assert problem == "" if fits else f"which {kind} cannot normalise" in problem
    if fits and scale:
        assert 0.5 < float(Channel(kind)(torch.from_numpy(x)).std()) < 2


def test_auto_chooses_by_description_and_values() -> None:
    grey = measure(np.random.default_rng(0).random((1, 5, 5, 5), np.float32), FLOAT, None)
    colour = measure(np.arange(3 * 64, dtype=np.float32).reshape(3, 8, 8, 1), BYTES, None)
    low = measure(np.linspace(-2000, 2000, 125, dtype=np.float32).reshape(1, 5, 5, 5), FLOAT, None)
    for case, modalities, kinds in (
        (grey, (), ["percentile"]),
        (low, (), ["percentile"]),  # not whole numbers
        (colour, (), ["rgb"] * 3),
        (grey, ("MRI",), ["percentile"]),
        (grey, ("noNorm",), ["none"]),
        (grey, ("zscore",), ["zscore"]),
    ):
        chosen = choose_intensity("auto", None, modalities, [case])
        assert [channel.kind for channel in chosen.channels] == kinds
        assert chosen.reason.startswith("auto: ")
    both = measure(np.stack([np.full((6, 6, 6), v, np.float32) + np.arange(6) for v in (10, 90)]), FLOAT,
                   np.ones((6, 6, 6), bool))  # fmt: skip
    assert [c.kind for c in choose_intensity("auto", None, ("CT", "PET"), [both]).channels] == ["ct", "percentile"]


def test_rgb_and_window_use_fixed_constants() -> None:
    colour = measure(np.arange(3 * 64, dtype=np.float32).reshape(3, 8, 8, 1), BYTES, None)
    y = choose_intensity("rgb", None, (), [colour])(torch.full((3, 1, 1, 1), 255.0)).flatten()
    np.testing.assert_allclose(y, (1 - np.array(RGB_MEAN)) / np.array(RGB_STD), rtol=1e-5)
    grey = measure(np.random.default_rng(0).random((1, 5, 5, 5), np.float32), FLOAT, None)
    window = choose_intensity("auto", (40, 400), (), [grey])
    y = window(torch.tensor([-1000.0, -160.0, 40.0, 240.0, 2000.0]).view(1, 5, 1, 1)).flatten()
    assert y.tolist() == [-1, -1, 0, 1, 1]
    assert window.reason == "--window 40,400"


def test_ct_and_rgb_refuse_data_that_do_not_suit_them() -> None:
    grey = measure(np.random.default_rng(0).random((1, 5, 5, 5), np.float32), FLOAT, None)
    flat = measure(np.ones((1, 5, 5, 5), np.float32), FLOAT, np.ones((5, 5, 5), bool))
    with pytest.raises(UserError, match="rgb needs images with three channels, got 1"):
        choose_intensity("rgb", None, (), [grey])
    with pytest.raises(UserError, match="no labelled volume has any"):
        choose_intensity("ct", None, (), [grey])
    with pytest.raises(UserError, match="the labelled foreground has only one value, 1"):
        choose_intensity("ct", None, (), [flat])
