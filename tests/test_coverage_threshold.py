"""CoverageThreshold: the share that it finds, its state, and errors."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from pglcl_ext import CoverageThreshold


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_threshold_converges_to_its_share(target: float) -> None:
    g = torch.Generator().manual_seed(0)
    threshold = CoverageThreshold(3, target=target)
    laws = [lambda u: u, lambda u: u**3, lambda u: 0.2 + 0.1 * u]
    tail = []
    for step in range(3000):
        labels = torch.randint(0, 3, (60,), generator=g)
        u = torch.rand(60, generator=g).clamp(min=1e-6)
        coverage = torch.stack([law(u) for law in laws])[labels, torch.arange(60)]
        threshold.update(coverage, labels)
        if step >= 1000:
            tail.append(threshold.value.clone())
    exact = torch.tensor([law(torch.tensor(1 - target)) for law in laws])
    torch.testing.assert_close(torch.stack(tail).mean(dim=0), exact, atol=0.02, rtol=0)
    u = torch.rand(100000, generator=g)
    for k, law in enumerate(laws):  # the share above the threshold, not the one below it
        assert abs((law(u) > threshold.value[k]).float().mean() - target) < 0.12


def test_too_large_a_share_raises_the_threshold() -> None:
    threshold = CoverageThreshold(2, initial=0.5, target=0.8)
    threshold.update(torch.tensor([0.9, 0.9, 0.1]), torch.tensor([0, 0, 1]))
    assert threshold.value[0] > 0.5  # all above, more than 0.8
    assert threshold.value[1] < 0.5  # none
    before = threshold.value.clone()
    threshold.update(torch.tensor([0.0, 0.7, 0.7]), torch.tensor([0, -1, 5]))  # none of them is a patch of its class
    assert torch.equal(threshold.value, before)


def test_patches_covered_whole_always_qualify() -> None:
    for threshold in (CoverageThreshold(1), CoverageThreshold(1, initial=1.0)):
        assert threshold.value < 1
        for _ in range(1000):
            threshold.update(torch.ones(10), torch.zeros(10).long())
            assert threshold.value < 1


def test_threshold_state_survives_bit_for_bit(tmp_path) -> None:
    threshold, other = CoverageThreshold(2), CoverageThreshold(2)
    batches = [(torch.rand(20), torch.randint(0, 2, (20,))) for _ in range(8)]
    for batch in batches[:4]:
        threshold.update(*batch)
    torch.save(threshold.state_dict(), tmp_path / "t.pt")
    other.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True))
    for batch in batches[4:]:
        threshold.update(*batch)
        other.update(*batch)
    assert torch.equal(threshold.value, other.value)
    assert set(threshold.state_dict()) == {"value", "updates"}


def test_bad_options_are_refused_by_name() -> None:
    for options in ({"initial": 2.0}, {"target": 1.0}, {"gain": 0.0}, {"num_classes": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CoverageThreshold(**{"num_classes": 2, **options})
    for options in ({"initial": "0.5"}, {"target": None}, {"num_classes": 2.0}, {"gain": torch.ones(())}):
        with pytest.raises(TypeError, match=next(iter(options))):
            CoverageThreshold(**{"num_classes": 2, **options})
    assert CoverageThreshold(2, initial=0.25).value.tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("message", "coverage", "labels"),
    [
        (r"labels must have shape \(N,\) = \(3,\), got \(4,\)", torch.rand(3), torch.zeros(4).long()),
        ("coverage must have shape", torch.rand(3, 2), torch.zeros(3).long()),
        ("coverage must be a tensor, got list", [0.5], torch.zeros(1).long()),
        ("coverage must be float64", torch.ones(3).long(), torch.zeros(3).long()),
        ("labels must be int64, got float32", torch.rand(3), torch.zeros(3)),
        (
            "labels must be on the device of coverage, cpu, got meta",
            torch.rand(3),
            torch.zeros(3, device="meta").long(),
        ),
    ],
)
def test_bad_updates_are_refused_and_change_nothing(message: str, coverage, labels) -> None:
    threshold = CoverageThreshold(2)
    with pytest.raises((ValueError, TypeError), match=message):
        threshold.update(coverage, labels)
    assert threshold.value.tolist() == [0.5, 0.5]


def test_classes_are_those_of_patches_alone() -> None:
    with pytest.raises(TypeError, match="batch must be PatchRows or a PatchBatch, got tuple"):
        CoverageThreshold(3).coverage_and_classes((torch.rand(3), torch.arange(3)))  # type: ignore[arg-type]


def test_a_module_made_on_the_meta_device_can_be_reset() -> None:
    with torch.device("meta"):
        threshold = CoverageThreshold(3, initial=1.0)
    threshold.to_empty(device="cpu").reset_parameters()
    made = CoverageThreshold(3, initial=1.0)
    assert torch.equal(threshold.value, made.value)
    assert (made.value < 1).all()
    assert torch.equal(threshold.updates, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": np.uint8(255)},  # and one more is 0 in eight bits
        {"num_classes": 3, "gain": Fraction(1, 2), "target": Fraction(4, 5), "initial": Fraction(1, 2)},
        {"num_classes": np.int64(3), "gain": np.float32(0.5), "ignore_index": np.int8(-1)},
        {"num_classes": 3, "gain": 10**30},  # has more than 64 bits
    ],
)
def test_numpy_numbers_and_fractions_count_as_numbers(options: dict) -> None:
    threshold = CoverageThreshold(**options)
    plain = CoverageThreshold(int(options["num_classes"]), gain=float(options.get("gain", 0.5)))
    batch = torch.rand(20), torch.randint(-1, 3, (20,))
    for one in (threshold, plain):
        one.update(*batch)
    assert torch.equal(threshold.value, plain.value)


def test_thresholds_are_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        threshold = CoverageThreshold(2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert threshold.value.dtype == torch.float32
