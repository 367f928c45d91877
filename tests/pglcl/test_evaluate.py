"""Runs that are evaluated."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from pglcl.evaluate import evaluate_run
from pglcl.score_files import read_scores
from pglcl.train import Training

from tests.pglcl.folders import save, tiny, volume


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
