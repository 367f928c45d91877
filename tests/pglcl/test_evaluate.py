"""Runs that are evaluated."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pglcl import case_scores, evaluate
from pglcl.errors import UserError
from pglcl.evaluate import evaluate_run
from pglcl.layouts import Case
from pglcl.predict import Predictor
from pglcl.report import write_report
from pglcl.score_files import read_scores
from pglcl.train import Training

from tests.pglcl.folders import save, tiny, volume


@pytest.fixture
def copied(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """A data folder, a run on it and the names of its test volumes, of which there are two."""
    root, run = (Path(shutil.copytree(path, tmp_path / path.name)) for path in trained)
    return root, run, sorted(json.loads((run / "split.json").read_text())["test"])


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


@pytest.mark.parametrize("renamed", [1, 2])
def test_an_evaluation_that_is_interrupted_while_it_saves_can_be_repeated(
    renamed: int, copied: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run, _ = copied
    for path in run.glob("scores_*"):
        path.unlink()
    replace, count = os.replace, iter(range(1, 100))

    def interrupted(*arguments: Any) -> None:
        replace(*arguments)
        if next(count) == renamed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run, root)
    assert len(list(run.glob("scores_*"))) == renamed
    write_report(run, root, quiet=True)  # it scores anew what is not whole
    found = evaluate_run(run, root)
    assert all(path.is_file() for path in found.files)
    assert len(list(run.glob("scores_*"))) == 3
    assert not list(run.glob(".partial*"))


def test_damaged_files_are_named_before_the_first_prediction(
    copied: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run, (first, last) = copied
    image, label = root / "images" / f"{last}.nii.gz", root / "labels" / f"{first}.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # its header is whole
    truth = nib.load(label)
    save(label, np.asarray(truth.dataobj) + np.uint8(7), truth.affine)

    def predict(*_: Any) -> None:
        raise AssertionError("a volume was predicted")

    monkeypatch.setattr(Predictor, "__call__", predict)
    with pytest.raises(UserError, match="nothing was scored") as refused:
        evaluate_run(run, root)
    assert len(refused.value.lines) == 3
    assert f"{label}: " in str(refused.value)
    assert f"{image}: " in str(refused.value)
    assert not list(run.glob("scores_*"))


def test_scores_that_another_evaluation_writes_meanwhile_stay(
    copied: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run, _ = copied
    score = evaluate.score_cases

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        found = score(*arguments, **options)
        (run / "scores_test.csv").write_text("of others")
        return found

    monkeypatch.setattr(evaluate, "score_cases", meanwhile)
    with pytest.raises(UserError, match=r"scores_test\.csv: exists"):
        evaluate_run(run, root)
    assert [path.read_text() for path in run.glob("scores_*")] == ["of others"]


def test_the_scores_of_the_other_volumes_are_kept(
    copied: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run, names = copied
    expected = {name: [s for s in evaluate_run(run, root).scores if s.case == name] for name in names}
    for path in run.glob("scores_*"):
        path.unlink()
    predicted = Predictor.__call__

    def without(name: str) -> None:
        def predict(self: Predictor, case: Case, *rest: Any) -> Any:
            if case.name == name:
                raise MemoryError
            return predicted(self, case, *rest)

        monkeypatch.setattr(Predictor, "__call__", predict)

    for one, other in (names, names[::-1]):  # the second time, the files of the first are renewed
        without(one)
        with pytest.raises(UserError, match=f"^{one} was not scored: out of memory") as refused:
            evaluate_run(run, root)
        assert sorted(path.suffix for path in run.glob("scores_*")) == [".csv", ".json", ".md"]
        kept = read_scores(run / "scores_test_unfinished.json")
        assert kept is not None
        assert f"{kept.files[0]}: the scores of the other 1 volumes" in str(refused.value)
        assert kept.scores == expected[other]
        assert (list(kept.subject.files), kept.subject.patients) == ([other], [other])
        assert f"WITHOUT 1 volumes that could not be scored: {one}" in kept.files[1].read_text()
    monkeypatch.setattr(Predictor, "__call__", predicted)
    assert evaluate_run(run, root).files[0] == run / "scores_test.csv"
    assert not list(run.glob("scores_*_unfinished.*"))  # complete scores take their place


def test_every_volume_that_cannot_be_scored_is_named(
    copied: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run, names = copied

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(case_scores, "score_volume", fail)
    with pytest.raises(UserError) as refused:
        evaluate_run(run, root)
    assert [line.split(":")[0] for line in refused.value.lines] == [f"{name} was not scored" for name in names]
    assert not list(run.glob("scores_*"))


def test_a_bug_stops_the_evaluation(copied: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    root, run, _ = copied
    monkeypatch.setattr(case_scores, "score_volume", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_run(run, root)
