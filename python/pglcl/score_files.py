"""Score files: what scores belong to, and how scores are written as CSV, Markdown and JSON and read again."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pglcl.errors import UserError
from pglcl.files import as_json, read_json, write_texts
from pglcl.scores import Row, Score, summarise

FORMAT = "pglcl scores 2"


@dataclass(frozen=True)
class Subject:
    """All that scores depend on: a model, patients, their files, and the way of scoring.

    Score files hold their subject. A report shows them only if it is about the same subject.

    Attributes:
        run: the name of the run's folder. id: of the run; empty where it has none.
        model: SHA-256 of the weights.
        step: the step of the weights. steps: of the whole run.
        part: of the run's split, or "all".
        data: the folder that was scored.
        files: SHA-256 of every image and label file, by case.
        patients: those that are scored. missing: those that the split names and `data` lacks.
        tta, postprocess: as :class:`pglcl.predict.Predictor` takes them.
        unlike: how voxels or intensities clearly differ from those of the training, by case; without the other cases.
        unscored: why a case could not be scored. It is not in `files`.
    """

    run: str
    model: str
    step: int
    steps: int
    part: str
    data: str
    files: dict[str, list[str]]
    patients: list[str]
    missing: list[str]
    tta: str = "none"
    postprocess: str = "none"
    id: str = ""
    unlike: dict[str, str] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def differences(self, other: Subject) -> list[str]:
        """The differences of `other` from this subject; empty if its scores may be shown for this one."""
        names = {
            "model": "other weights",
            "part": f"the part {other.part!r}",
            "files": f"other files ({other.data})",
            "patients": "other patients",
            "tta": f"--tta {other.tta}",
            "postprocess": f"--postprocess {other.postprocess}",
        }
        found = [text for name, text in names.items() if getattr(self, name) != getattr(other, name)]
        if self.step != other.step:
            found.insert(0, f"step {other.step} instead of {self.step}")
        return found

    def without(self, unscored: dict[str, str], scores: Sequence[Score]) -> Subject:
        """The subject of `scores` alone, as some cases could not be scored."""
        files = {name: hashes for name, hashes in self.files.items() if name not in unscored}
        return replace(self, files=files, patients=sorted({s.patient for s in scores}), unscored=unscored)

    def with_unlike(self, more: Mapping[str, str]) -> Subject:
        """The subject, with more ways in which cases differ from the training."""
        both = {name: [how[name] for how in (self.unlike, more) if name in how] for name in self.files}
        return replace(self, unlike={name: "; ".join(ways) for name, ways in both.items() if ways})

    def title(self) -> str:
        """One line for people. It names an unfinished run, what is left out, and other voxel sizes or intensities."""
        text = f"{self.run}, {self.part}: {len(self.files)} volumes of {len(self.patients)} patients, step {self.step}"
        if not self.finished:
            text += f" of {self.steps}: UNFINISHED"
        if self.missing:
            text += f"; WITHOUT {len(self.missing)} missing patients: {', '.join(self.missing)}"
        if self.unscored:
            text += f"; WITHOUT {len(self.unscored)} volumes that could not be scored: {', '.join(self.unscored)}"
        if self.unlike:
            text += f"; {len(self.unlike)} WITH OTHER VOXELS OR INTENSITIES THAN THE TRAINING: {', '.join(self.unlike)}"
        return text


@dataclass(frozen=True)
class Evaluation:
    """Scores and their subject.

    unit: of distances: mm, pixel or voxel. files: those that hold them, the CSV first. notes: for people.
    """

    subject: Subject
    scores: list[Score]
    class_names: dict[int, str]
    unit: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> list[Row]:
        """A row per class and one for their mean."""
        return summarise(self.scores, self.class_names, self.unit)

    def table(self) -> str:
        """Markdown, under a title that says what was scored."""
        return table(self.summary, title=self.subject.title())

    def save(self, files: Sequence[Path]) -> Evaluation:
        """Writes the CSV, the Markdown and the JSON file. Returns the evaluation with their paths.

        The JSON file gets its name first: it tells whose scores the others are, also after an interruption.
        """
        content = {
            "format": FORMAT,
            "subject": {**vars(self.subject), "finished": self.subject.finished},
            "unit": self.unit,
            "class_names": {str(k): name for k, name in self.class_names.items()},
            "summary": self.summary,
            "scores": [{**vars(s), "class": self.class_names.get(s.class_index, "")} for s in self.scores],
        }
        texts = (
            scores_csv(self.scores, self.class_names, self.unit),
            self.table() + "\n",
            as_json(without_nan(content)),
        )
        write_texts(dict(zip(files, texts)))
        return replace(self, files=tuple(files))


def score_files(folder: Path, part: str, weights: str = "last", *, unfinished: bool = False) -> tuple[Path, Path, Path]:
    """The paths of the CSV, the Markdown and the JSON file."""
    name = f"scores_{part}" + ("" if weights == "last" else f"_{weights}") + "_unfinished" * unfinished
    return folder / f"{name}.csv", folder / f"{name}.md", folder / f"{name}.json"


def read_scores(path: Path) -> Evaluation | None:
    """Scores as :meth:`Evaluation.save` wrote them; None if the file is missing, damaged or of another kind."""
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            return None
        known = {field.name for field in fields(Subject)}
        subject = Subject(**{name: value for name, value in content["subject"].items() if name in known})
        scores = [_score_of(row) for row in content["scores"]]
        names = {int(k): str(name) for k, name in content["class_names"].items()}
        files = tuple(path.with_suffix(ending) for ending in (".csv", ".md", ".json"))
        found = Evaluation(subject, scores, names, str(content["unit"]), files)
        _ = found.summary  # fails on values of other types
        return found
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _score_of(row: dict[str, Any]) -> Score:
    values: dict[str, Any] = {n: math.nan if value is None else value for n, value in row.items() if n != "class"}
    return Score(**values)


def may_renew(files: Sequence[Path], subject: Subject) -> Callable[[Path], bool]:
    """A test for files that may be replaced without --overwrite: earlier scores of the same run and data."""
    old = read_scores(files[-1])
    same_data = old is not None and (old.subject.data == subject.data or old.subject.files == subject.files)
    same_run = old is not None and (old.subject.id or old.subject.run) == (subject.id or subject.run)
    mine = same_run and same_data
    return lambda path: mine


# --- tables ---------------------------------------------------------------------------------------------------------


def number_or_dash(value: float, digits: int) -> str:
    """A number with `digits` decimal places; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def table(rows: Sequence[Row], *, title: str = "") -> str:
    """The rows as a Markdown table. A dash stands for a missing value."""
    unit = rows[0]["unit"] if rows else ""
    distances = [f"HD95 [{unit}]", "95 %", "median", f"ASD [{unit}]"]
    head = ["class", "Dice", "95 %", *distances, "absent", "missed", "stray pieces"]
    rule = "| --- " + "| ---: " * (len(head) - 1) + "|"
    lines = [*([title, ""] if title else []), "| " + " | ".join(head) + " |", rule]
    for row in rows:
        cells = [row["class"].replace("|", "\\|")]
        for metric, digits in (("dice", 3), ("hd95", 2)):
            low, high = row[f"{metric}_interval"]
            cells += [
                f"{number_or_dash(row[metric], digits)} ± {number_or_dash(row[f'{metric}_std'], digits)}",
                f"{number_or_dash(low, digits)}-{number_or_dash(high, digits)}",
            ]
        cells += [
            number_or_dash(row["hd95_median"], 2),
            f"{number_or_dash(row['asd'], 2)} ± {number_or_dash(row['asd_std'], 2)}",
        ]
        cells += [str(row[name]) for name in ("absent", "missed", "stray")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores_csv(scores: Sequence[Score], class_names: dict[int, str], unit: str) -> str:
    """The scores as CSV, a row for each; `unit`, of the distances, is part of their columns' names."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = [
        "patient",
        "case",
        "class_index",
        "label_value",
        "class",
        "dice",
        f"hd95_{unit}",
        f"asd_{unit}",
        "status",
        "false_positive_voxels",
        "stray_components",
    ]
    writer.writerow(head)
    for s in scores:
        numbers = ["" if math.isnan(v) else f"{v:.6g}" for v in (s.dice, s.hd95, s.asd)]
        of_class = [s.class_index, s.label_value, class_names.get(s.class_index, f"class {s.class_index}")]
        counts = [s.false_positive_voxels, s.stray_components]
        writer.writerow([s.patient, s.case, *of_class, *numbers, s.status, *counts])
    return out.getvalue()


def without_nan(value: Any) -> Any:
    """The same lists and dictionaries with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
