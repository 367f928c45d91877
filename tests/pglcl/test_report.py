"""The report: its content, for any names and files."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from pglcl.cli import main
from pglcl.figures import Picture, curves, outline
from pglcl.layouts import Case
from pglcl.predict import Predictor
from pglcl.report import _chosen, _chosen_patches, _metric_rows, _ranked
from pglcl.score_files import Evaluation, Subject, read_scores
from pglcl.scores import Score
from pglcl.train import Training

from tests.pglcl.folders import plain, tiny

Trained = tuple[Path, Path]
# Mathematics of matplotlib, HTML, a long word, letters that its font lacks.
NAMES = ["p08_$x^$", "<img src=x>&amp;", "x" * 120, "肝臓_ß"]


class Page(HTMLParser):
    """Tags that are open and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[1], tmp_path / "run"))


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    root = plain(tmp_path / "data & <b>", 8)
    for old, new in zip(("case02", "case03", "case04", "case05"), NAMES, strict=True):
        for kind in ("images", "labels"):
            (root / kind / f"{old}.nii.gz").rename(root / kind / f"{new}.nii.gz")
    split = {"labelled": ["case00", "case01"], "unlabelled": ["case06", "case07"], "test": NAMES}
    (tmp_path / "split.json").write_text(json.dumps(split))
    run = tmp_path / "run $1_$ <i>"
    config = tiny(split_file=str(tmp_path / "split.json"), method="supervised", steps=2, warmup=0)
    Training(root, run, config, quiet=True).run()
    assert main(["report", str(run), "-q"]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.words)
    for name in (*NAMES, run.name, root.name):
        assert name in text
    assert {"b", "i", "script"} & set(page.tags) == {"i"}  # the squares of the legend
    assert page.tags.count("img") == (page.tags.count("figure"))


def test_the_report_has_split_scores_and_pictures(run: Path, trained: Trained) -> None:
    (run / "scores_test.json").unlink(missing_ok=True)
    assert main(["report", str(run), "-q"]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.words)
    split = json.loads((run / "split.json").read_text())
    for patients in split.values():
        assert all(patient in text for patient in patients)
    assert "not recorded" not in text
    for words in (
        "Scores of each patient, the worst first (2)", "Training time", "40 of 40", "median HD95", "The worst and best",
        "stray piece", "largest pieces alone, Dice", "Patients of each part of the split",
    ):  # fmt: skip
        assert words.lower() in text.lower()
    assert "unfinished" not in text.lower()
    assert "median test volume" not in text  # two volumes have no median
    assert page.tags.count("caption") == page.tags.count("table") - 3  # the folded ones have a summary
    sizes = re.findall(r"alt='(?:image|truth|entropy \[nats\])' src='data:image/png;base64,([^']+)'", _row(run))
    assert len({_size(data) for data in sizes}) == 1


@pytest.mark.parametrize(("options", "says", "panels"), [
    ({}, "positives, of the same class and similar entropy, both filled or both not filled by it", 3),
    ({"guidance": False}, "not guided (--no-guidance)", 3),
    ({"loss": "gaussian"}, "--loss gaussian compares patches with statistics of classes", 0),
    ({"method": "semi"}, "--method semi has no contrast", 0),
])  # fmt: skip
def test_the_report_says_which_patches_a_run_chose(options: dict, says: str, panels: int) -> None:
    view = SimpleNamespace(
        model=SimpleNamespace(config=tiny(**options)),
        case=SimpleNamespace(name="c"),
        disparity=lambda: [Picture("data:,", "a", "a")] * 3,
    )
    section = "".join(_chosen_patches(view))
    assert says in section
    assert section.count("<img") == panels


def _row(run: Path) -> str:
    """The panels of the worst volume."""
    text = (run / "report.html").read_text()
    return text[text.index("<h3>worst") : text.index("<h3>best")]


def _size(data: str) -> tuple[int, int]:
    import base64

    header = base64.b64decode(data)[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


def test_the_scores_of_the_other_volumes_are_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted = Predictor.__call__

    def predict(self: Predictor, case: Case, *rest: Any) -> Any:
        if case.name == "case05":
            raise MemoryError
        return predicted(self, case, *rest)

    monkeypatch.setattr(Predictor, "__call__", predict)
    for path in run.glob("scores_*"):
        path.unlink()
    assert main(["report", str(run), "-q"]) == 2
    kept = run / "scores_test_unfinished.csv"
    said = capsys.readouterr().err
    assert "pglcl: case05 was not scored: out of memory" in said
    assert f"pglcl: {kept}: the scores of the other 1 volumes\n" in said
    found = read_scores(kept.with_suffix(".json"))
    assert found is not None
    assert list(found.subject.files) == ["case04"]
    assert not (run / "report.html").exists()
    kept.with_suffix(".json").write_text("of another program")
    assert main(["report", str(run), "-q"]) == 2
    assert f"the scores of the other 1 volumes are not kept: {kept}: exists" in capsys.readouterr().err
    for ending in (".csv", ".md", ".json"):
        kept.with_suffix(ending).unlink()
    assert main(["report", str(run), "-q"]) == 2
    monkeypatch.setattr(Predictor, "__call__", predicted)
    assert main(["report", str(run), "-q"]) == 0
    assert sorted(path.name for path in run.glob("scores_*.csv")) == ["scores_test.csv"]  # complete ones replace them


def test_a_fold_is_reported_by_its_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no test patients, and its training ends with the advice to call report."""
    root, run = plain(tmp_path / "data"), tmp_path / "run"
    options = {"folds": 3, "validation": -1, "test": -1, "method": "supervised", "steps": 2, "warmup": 0}
    Training(root, run, tiny(**options), quiet=True).run()
    assert main(["report", str(run), "-q"]) == 0, capsys.readouterr().err
    words = "".join(Page((run / "report.html").read_text()).words)
    assert "Scores on the validation volumes" in words
    assert (
        "This run has no test patients. Scores are those of the validation patients, which also chose the best" in words
    )
    assert "test volume" not in words
    assert (run / "scores_validation.json").exists()


def test_volumes_that_are_shown_differ() -> None:
    cases = [Case(f"c{i}", f"p{i}", (), None) for i in range(4)]
    for count, expected in ((1, ["only"]), (2, ["worst", "best"]), (3, ["worst", "median", "best"])):
        chosen = _chosen(cases[:count])
        assert list(chosen) == expected
        assert len({case.name for case in chosen.values()}) == count
    scores = [
        Score(f"p{i}", f"c{i}", 1, 1, dice, 0.0, 0.0, "ok") for i, dice in enumerate((0.5, 0.2, float("nan"), 0.9))
    ]
    subject = Subject("r", "m", 1, 1, "test", "/d", {}, [], [])
    ranked = _ranked(cases, Evaluation(subject, scores, {}, "mm"))
    assert [case.name for case in ranked] == ["c1", "c0", "c3"]


@pytest.mark.parametrize(("name", "text", "code", "says"), [
    ("config.json", "", 2, "not readable as JSON"),
    ("config.json", "[1]", 2, "must be a JSON object"),
    ("config.json", '{"data": 3}', 2, "data must be the path of a folder"),
    ("config.json", '{"data": "/nowhere"}', 2, "/nowhere: not found, the data of"),
    ("split.json", "[]", 2, "must be a JSON object"),
    ("split.json", '{"test": {"a": 1}}', 2, "labelled must be a list of patients, got None"),
    ("split.json", "[" * 100000, 2, "not readable as JSON"),
    ("environment.json", "3", 0, "not an object"),
    ("environment.json", "\x00", 0, "not readable as JSON"),
    ("metrics.jsonl", "3\n[]\n{\"step\": \"a\"}\nnull\n{\"step\": 1, \"segmentation\": \"x\"}", 0, ""),
    ("metrics.jsonl", "", 0, "metrics.jsonl: has no row of a step"),
    ("scores_test.json", "{}", 0, ""),
])  # fmt: skip
def test_damaged_files_of_a_run_are_named(
    name: str, text: str, code: int, says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_text(text)
    assert main(["report", str(run), "-q"]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    shown = error if code else (run / "report.html").read_text()
    assert says in shown
    if name == "scores_test.json":
        assert (run / name).read_text() == text  # the file of another program stays
        assert main(["report", str(run)]) == 0
        assert "pglcl: the scores are in the report alone: " in capsys.readouterr().err


def test_metrics_that_are_not_text_are_a_problem(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    rows, problem = _metric_rows(run)
    assert rows == []
    assert problem.startswith("metrics.jsonl: ")


def test_commands_on_a_missing_run_print_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"report": [], "evaluate": [str(tmp_path)], "predict": [str(tmp_path), "-o", "x"]}
    more["export"] = ["--format", "torchscript"]
    for command, arguments in more.items():
        assert main([command, str(tmp_path / "run"), *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "run" in lines[0]


def test_data_that_were_moved(run: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """report and a resumed training say how the new place is given."""
    there, gone = str(trained[0]), tmp_path / "gone"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(gone)}))
    for command in (["report", str(run)], ["train", "--resume", str(run)]):
        assert main(command) == 2
        assert f"{gone}: not found, the data of {run}; if they were moved, --data says" in capsys.readouterr().err
    assert main(["report", str(run), "--data", there]) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (4, 5)])
def test_outlines_of_a_class_that_fills_its_slice(shape: tuple[int, int]) -> None:
    """matplotlib refuses to outline a row of pixels, and finds no outline where nothing lies outside."""
    figure, axis = plt.subplots()
    axis.imshow(np.zeros(shape))
    limits = axis.get_xlim(), axis.get_ylim()
    outline(axis, np.ones(shape, bool), colors=["red"])
    (paths,) = [c.get_paths() for c in axis.collections]
    assert sum(len(path.vertices) for path in paths) >= 4
    assert (axis.get_xlim(), axis.get_ylim()) == limits
    plt.close(figure)


def test_a_page_replaces_nothing_else(run: Path, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    scan = trained[0] / "images" / "case00.nii.gz"
    other = run / "report.html"
    other.write_text("<p>mine</p>")
    for path in (run / "config.json", other, run):
        assert main(["report", str(run), "-o", str(path)]) == 2
    assert main(["report", str(run)]) == 2  # the file is not a report of ours
    assert main(["report", str(run), "-o", str(run / "config.json"), "--overwrite"]) == 2
    assert other.read_text() == "<p>mine</p>"
    assert main(["report", str(run), "--overwrite", "-q"]) == 0
    assert main(["report", str(run), "-q"]) == 0  # renewed
    test = trained[0] / "images" / f"{json.loads((run / 'split.json').read_text())['test'][0]}.nii.gz"
    assert main(["report", str(run), "-o", str(test), "--overwrite"]) == 2
    assert nib.load(test).shape
    assert np.isfinite(nib.load(scan).get_fdata()).all()
    assert json.loads((run / "config.json").read_text())


@pytest.mark.parametrize("command", ["report", "evaluate"])
def test_the_list_of_the_data_is_not_replaced(command: str, run: Path, trained: Trained, tmp_path: Path) -> None:
    """This holds for any spelling of its path, and also for labels that the command does not read."""
    listed = tmp_path / "scores_test.csv"
    rows = [f"{folder}/case{i:02d}.nii.gz" for i in range(6) for folder in ("images", "labels")]
    cells = [str(trained[0] / row) for row in rows]
    patients = [f"{a},{b},case{i:02d}" for i, (a, b) in enumerate(zip(cells[::2], cells[1::2], strict=True))]
    listed.write_text("\n".join(["image,label,patient", *patients]) + "\n")
    before = listed.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "hard").mkdir()
    os.link(listed, tmp_path / "hard" / listed.name)
    for folder in (tmp_path, tmp_path / "link", tmp_path / "hard" / ".." / "hard"):
        if command == "evaluate":
            arguments = ["evaluate", str(run), str(listed), "-o", str(folder)]
        else:
            arguments = ["report", str(run), "--data", str(listed), "-o", str(folder / listed.name)]
        assert main([*arguments, "--overwrite"]) == 2
    label = trained[0] / "labels" / "case00.nii.gz"
    assert main(["report", str(run), "-o", str(label), "--overwrite"]) == 2
    assert nib.load(label).shape
    assert listed.read_bytes() == before


def test_curves_are_drawn_for_the_metrics_that_exist() -> None:
    assert curves([]) == []
    few = [{"step": 1, "segmentation": 0.5}, {"step": 2, "validation_dice": 0.1}]
    assert [p.caption for p in curves(few)] == ["segmentation loss", "validation Dice"]
    many = [{"step": i, "contrast": 1 / (1 + i)} for i in range(500)]
    assert "from 1 at step 0 to 0.002 at step 499" in curves(many)[0].text
