"""Scores of volumes and their conventions; means over patients and their intervals."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from pglcl.score_files import scores_csv, table
from pglcl.scores import bootstrap_interval, patient_means, score_volume, summarise


def ball(centre: tuple[int, int, int], radius: float, shape: tuple[int, int, int] = (24, 24, 24)) -> torch.Tensor:
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    return ((grid - torch.tensor(centre)[:, None, None, None]) ** 2).sum(dim=0) <= radius**2


def scores(prediction: torch.Tensor, truth: torch.Tensor, spacing=(1.0, 1.0, 1.0), classes: int = 3):
    return score_volume(prediction.long(), truth.long(), classes, spacing, patient="p", case="c")


def test_perfect_and_shifted_masks_have_known_scores() -> None:
    truth = ball((10, 12, 12), 6)
    perfect = scores(truth, truth)[0]
    assert (perfect.dice, perfect.hd95, perfect.asd, perfect.status) == (1, 0, 0, "ok")
    moved = scores(truth.roll(3, 0), truth, spacing=(2.0, 1.0, 1.0))[0]
    a, b = truth.roll(3, 0), truth
    assert moved.dice == pytest.approx(float(2 * (a & b).sum() / (a.sum() + b.sum())))
    assert 4 < moved.hd95 <= 6  # three voxels of 2 mm
    assert 0 < moved.asd < moved.hd95


def test_a_class_that_is_not_there_has_no_score() -> None:
    truth = ball((10, 12, 12), 6).long()
    prediction = truth.clone()
    prediction[:2] = 2
    absent = scores(prediction, truth)[1]
    assert math.isnan(absent.dice)
    assert math.isnan(absent.hd95)
    assert (absent.status, absent.false_positive_voxels) == ("absent", 2 * 24 * 24)


def test_an_empty_prediction_is_never_perfect() -> None:
    truth = ball((10, 12, 12), 6)
    missed = scores(torch.zeros_like(truth), truth, spacing=(1.0, 2.0, 3.0))[0]
    assert missed.dice == 0
    assert missed.status == "missed"
    assert missed.hd95 == pytest.approx(24 * math.sqrt(14))
    assert missed.asd == missed.hd95


def test_pieces_that_touch_no_truth_are_stray() -> None:
    truth = ball((10, 12, 12), 6).long()
    prediction = truth.clone()
    prediction[12, 12, 12] = 0
    prediction[0, 0, 0] = prediction[23, 23, 20:] = 1
    prediction[3:5, 3:5, 3:5] = 2
    one, two = scores(prediction, truth)
    assert (one.status, one.stray_components) == ("ok", 2)
    assert (two.status, two.stray_components) == ("absent", 1)
    assert scores(truth, truth)[0].stray_components == 0
    (row, _, mean) = summarise([one, two], {}, "mm")
    assert (row["stray"], mean["stray"]) == (2, 3)
    assert "stray pieces" in table([row])
    assert next(csv.DictReader(io.StringIO(scores_csv([one], {}, "mm"))))["stray_components"] == "2"


def test_summary_counts_and_means() -> None:
    truth = ball((10, 12, 12), 6).long()
    both = truth.clone()
    both[20:] = 2
    every = []
    for patient, prediction, target in (("a", truth, truth), ("a", truth.roll(2, 0), truth), ("b", truth, both)):
        every += score_volume(prediction, target, 3, (1.0, 1.0, 1.0), patient=patient, case=f"{patient}{len(every)}")
    one, two, mean = summarise(every, {1: "ball"}, "mm")
    assert (one["class"], two["class"], mean["class"]) == ("ball", "class 2", "mean")
    assert (two["absent"], two["missed"]) == (2, 1)
    assert mean["hd95_median"] == np.median(list(patient_means(every, "hd95").values()))
    by_patient = patient_means(every, "dice", 1)
    assert one["dice"] == pytest.approx(np.mean(list(by_patient.values())))  # patients count the same, not volumes
    assert two["dice"] == 0
    text = table([one, two, mean])
    assert "HD95 [mm]" in text
    assert "nan" not in table([one])
    rows = list(csv.DictReader(io.StringIO(scores_csv(every, {1: "ball"}, "mm"))))
    assert len(rows) == 6
    assert rows[1]["dice"] == ""
    assert rows[1]["status"] == "absent"


def test_scattered_voxels_have_exact_distances() -> None:
    """Single voxels lie everywhere, so all are on a surface, and the box is the whole volume."""
    truth = torch.zeros(20, 20, 20, dtype=torch.uint8)
    truth[::2, ::2, ::2] = 1
    (found,) = score_volume(truth.roll(1, 0), truth, 2, (1.5, 2.0, 2.0), patient="p", case="c")
    assert (found.dice, found.hd95, found.asd) == (0, 1.5, 1.5)


def test_a_box_around_both_masks_changes_no_score() -> None:
    """MONAI on the whole volume is the reference; masks touch the border, too."""
    noise = torch.rand(2, 24, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.9
    balls = [(ball(c, 5).roll(n, 1), ball(c, 5)) for c, n in (((12, 11, 10), 3), ((2, 3, 20), 1), ((22, 22, 2), -2))]
    for prediction, truth in (*balls, (noise[0], noise[1])):
        found = scores(prediction, truth, spacing=(2.0, 1.0, 1.5))[0]
        pair = [x[None, None].float() for x in (prediction, truth)]
        options = {"include_background": True, "spacing": [2.0, 1.0, 1.5]}
        assert found.dice == pytest.approx(float(compute_dice(*pair)))
        assert found.hd95 == pytest.approx(float(compute_hausdorff_distance(*pair, percentile=95, **options)))
        assert found.asd == pytest.approx(float(compute_average_surface_distance(*pair, symmetric=True, **options)))


def test_distances_in_an_image_are_those_of_its_outline() -> None:
    """A volume of one slice is an image: the inside of a mask lies on no surface."""
    truth = torch.zeros(40, 40, 1, dtype=torch.bool)
    truth[5:35, 5:35] = True
    prediction = truth.clone()
    prediction[5:10] = False
    found = scores(prediction, truth, spacing=(1.0, 1.0, 7.0))[0]
    flat = [x[None, None, :, :, 0].float() for x in (prediction, truth)]
    expected = compute_average_surface_distance(*flat, include_background=True, symmetric=True)
    assert found.asd == pytest.approx(float(expected))
    assert found.hd95 == 5


def test_the_bootstrap_interval_covers_the_mean_in_most_draws() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(random.normal(3, 1, 25), draws=400, seed=seed)
        covered += low <= 3 <= high
    assert 175 <= covered <= 200
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    assert all(math.isnan(v) for v in bootstrap_interval([]))
