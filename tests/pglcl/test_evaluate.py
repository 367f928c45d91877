"""Scores, their conventions, and the tables."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from pglcl.evaluate import (
    Evaluation,
    Subject,
    bootstrap_interval,
    evaluate_run,
    may_renew,
    patient_means,
    read_scores,
    score_files,
    score_volume,
    scores_csv,
    summarise,
    table,
)
from pglcl.files import read_json, write_json
from pglcl.train import Training

from tests.pglcl.folders import save, tiny, volume


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


def evaluation(run: str = "run", **changes: Any) -> Evaluation:
    """An evaluation of a volume whose second class is absent."""
    subject = Subject(run, "weights", 3, 3, "test", "/data", {"c": ["1", "2"]}, ["p"], [])
    truth = ball((10, 12, 12), 6).long()
    found = score_volume(truth, truth, 3, (1.0, 1.0, 1.0), patient="p", case="c")
    return Evaluation(replace(subject, **changes), found, {1: "ball"}, "mm")


def test_scores_carry_class_and_label_value(tmp_path: Path) -> None:
    """Masks have the values 0, 85, 170. The classes are 1 and 2, their label values 85 and 170."""
    root = tmp_path / "data"
    for i in range(6):
        image, label = volume(i)
        save(root / "images" / f"c{i}.nii.gz", image)
        save(root / "labels" / f"c{i}.nii.gz", label * np.uint8(85))
    options = {"method": "supervised", "labelled": 2, "validation": 0, "test": 1, "steps": 1}
    Training(root, tmp_path / "run", tiny(**options, labels="0,85=ball,170"), quiet=True).run()
    found = evaluate_run(tmp_path / "run", root)
    rows = list(csv.DictReader(found.files[0].open()))
    assert [(r["class_index"], r["label_value"], r["class"]) for r in rows] == [
        ("1", "85", "ball"),
        ("2", "170", "label 170"),
    ]
    content = json.loads(found.files[-1].read_text())
    for part in ("scores", "summary"):
        shown = [(r["class_index"], r["label_value"], r["class"]) for r in content[part][:2]]
        assert shown == [(1, 85, "ball"), (2, 170, "label 170")]
    again = read_scores(found.files[-1])
    assert again is not None
    assert again.scores[1].label_value == 170


def test_distances_between_scattered_voxels() -> None:
    """Single voxels lie everywhere, so all are on a surface, and the box is the whole volume."""
    truth = torch.zeros(20, 20, 20, dtype=torch.uint8)
    truth[::2, ::2, ::2] = 1
    (found,) = score_volume(truth.roll(1, 0), truth, 2, (1.5, 2.0, 2.0), patient="p", case="c")
    assert (found.dice, found.hd95, found.asd) == (0, 1.5, 1.5)


def test_scores_are_json(tmp_path: Path) -> None:
    """A missing score is null, since JSON has no NaN."""
    evaluation().save(score_files(tmp_path, "test"))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads((tmp_path / "scores_test.json").read_text(), parse_constant=refuse)
    assert content["scores"][1]["dice"] is None
    assert content["summary"][1]["dice_interval"] == [None, None]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "other.json", {"x": math.nan})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".partial")] == []


def test_scores_say_what_they_belong_to(tmp_path: Path) -> None:
    files = score_files(tmp_path, "test")
    first = evaluation()
    first.save(files)
    again = read_scores(files[-1])
    assert again is not None
    assert again.subject == first.subject
    assert again.table() == first.table()
    assert first.subject.differences(again.subject) == []
    for change in ({"step": 2}, {"model": "others"}, {"files": {"c": ["1", "3"]}}, {"patients": ["q"]}):
        assert len(evaluation(**change).subject.differences(again.subject)) == 1
    assert "UNFINISHED" in evaluation(step=2).subject.title()
    assert "UNFINISHED" not in first.subject.title()
    assert "WITHOUT 1 missing patients: q" in evaluation(missing=["q"]).subject.title()


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "3", '{"format": "pglcl scores 2"}', '{"summary": [], "scores": []}', "[" * 100000,
    '{"format": "pglcl scores 2", "subject": [], "scores": 3, "unit": 1, "class_names": []}',
], ids=range(9))  # fmt: skip
def test_a_file_that_holds_no_scores(text: str, tmp_path: Path) -> None:
    files = score_files(tmp_path, "test")
    files[-1].write_text(text)
    assert read_scores(files[-1]) is None
    assert not may_renew(files, evaluation().subject)(files[-1])


def test_scores_with_a_value_of_another_type(tmp_path: Path) -> None:
    files = score_files(tmp_path, "test")
    evaluation().save(files)
    content = json.loads(files[-1].read_text())
    content["scores"][0]["dice"] = "high"
    files[-1].write_text(json.dumps(content))
    assert read_scores(files[-1]) is None


def test_earlier_scores_are_renewed_and_others_kept(tmp_path: Path) -> None:
    files = score_files(tmp_path, "test")
    evaluation().save(files)
    assert may_renew(files, evaluation(step=2, model="later").subject)(files[0])
    assert may_renew(files, evaluation(data="/moved").subject)(files[0])
    assert may_renew(files, evaluation(files={"c": ["1", "corrected"]}).subject)(files[0])
    assert not may_renew(files, evaluation(data="/other", files={"c": ["5"]}).subject)(files[0])
    assert not may_renew(files, evaluation(run="other").subject)(files[0])
    evaluation(id="7").save(files)
    assert may_renew(files, evaluation(run="renamed", id="7").subject)(files[0])
    assert not may_renew(files, evaluation(id="8").subject)(files[0])


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
