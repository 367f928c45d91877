"""Score files: what they hold, what they belong to, and which of them are renewed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pglcl.files import read_json, write_json
from pglcl.score_files import Evaluation, Subject, may_renew, read_scores, score_files
from pglcl.scores import score_volume


def evaluation(run: str = "run", **changes: Any) -> Evaluation:
    """An evaluation of a volume whose second class is absent."""
    subject = Subject(run, "weights", 3, 3, "test", "/data", {"c": ["1", "2"]}, ["p"], [])
    truth = torch.zeros(8, 8, 8, dtype=torch.long)
    truth[2:6, 2:6, 2:6] = 1
    found = score_volume(truth, truth, 3, (1.0, 1.0, 1.0), patient="p", case="c")
    return Evaluation(replace(subject, **changes), found, {1: "ball"}, "mm")


def test_score_files_are_json_without_nan(tmp_path: Path) -> None:
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


def test_score_files_name_their_subject(tmp_path: Path) -> None:
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
def test_a_file_that_holds_no_scores_is_not_read_as_scores(text: str, tmp_path: Path) -> None:
    files = score_files(tmp_path, "test")
    files[-1].write_text(text)
    assert read_scores(files[-1]) is None
    assert not may_renew(files, evaluation().subject)(files[-1])


def test_scores_with_a_value_of_another_type_are_not_read(tmp_path: Path) -> None:
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


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 240 + ".json")
    write_json(path, 1)
    assert read_json(path) == 1
