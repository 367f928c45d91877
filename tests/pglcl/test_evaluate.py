"""Scores, their conventions, and the tables."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pglcl.evaluate import bootstrap_interval, patient_means, save_scores, score_volume, scores_csv, summarise, table
from pglcl.files import read_json, write_json


def ball(centre: tuple[int, int, int], radius: float, shape: tuple[int, int, int] = (24, 24, 24)) -> torch.Tensor:
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    return ((grid - torch.tensor(centre)[:, None, None, None]) ** 2).sum(dim=0) <= radius**2


def scores(prediction: torch.Tensor, truth: torch.Tensor, spacing=(1.0, 1.0, 1.0), classes: int = 3):
    return score_volume(prediction.long(), truth.long(), classes, spacing, patient="p", case="c")


def test_perfect_and_shifted() -> None:
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


def test_scores_are_json(tmp_path: Path) -> None:
    """A class without a score is null: NaN is no JSON."""
    truth = ball((10, 12, 12), 6).long()
    save_scores(score_volume(truth, truth, 3, (1.0, 1.0, 1.0), patient="p", case="c"), {}, "mm", tmp_path, "scores")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)
    assert content["scores"][1]["dice"] is None
    assert content["summary"][1]["dice_interval"] == [None, None]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "other.json", {"x": math.nan})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".partial")] == []


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 240 + ".json")
    write_json(path, 1)
    assert read_json(path) == 1


def test_bootstrap_covers_the_mean() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(random.normal(3, 1, 25), draws=400, seed=seed)
        covered += low <= 3 <= high
    assert 175 <= covered <= 200
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    assert all(math.isnan(v) for v in bootstrap_interval([]))
