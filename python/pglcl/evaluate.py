"""Scores per class and volume: Dice, HD95 and average surface distance; tables with bootstrap intervals."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from pglcl.cases import PARTS, cases_of, distance_unit
from pglcl.description import Description
from pglcl.errors import UserError
from pglcl.files import Unchanged, fingerprint, read_json, write_json, write_text
from pglcl.formats import read_source
from pglcl.labels import IGNORE
from pglcl.layouts import Case, DataFolder, open_folder
from pglcl.model import UNKNOWN_VOXELS, TrainedModel, load_model, weights_hash
from pglcl.outputs import check_outputs
from pglcl.postprocess import components, stray_components
from pglcl.predict import Predictor, Report
from pglcl.progress import Volumes
from pglcl.run_folder import split_differences
from pglcl.training_data import files_behind, files_of, files_of_cases
from pglcl.volumes import read_label

METRICS = ("dice", "hd95", "asd")
# A row of the summary: a class, its index and label value, counts; for every metric the mean, deviation and interval.
Row = dict[str, Any]


@dataclass
class Score:
    """The scores of one class of one volume.

    class_index: the network's number of the class, from 1 on. label_value: its value in label files; for merged
    classes, the value that masks get. dice: a share. hd95, asd: in the unit of the spacing. status: ok; absent (not in
    the truth, scores are NaN); missed (in the truth, not predicted). false_positive_voxels: of an absent class.
    stray_components: pieces of the prediction that touch no voxel of the truth.
    """

    patient: str
    case: str
    class_index: int
    label_value: int
    dice: float
    hd95: float
    asd: float
    status: str
    false_positive_voxels: int = 0
    stray_components: int = 0


def score_volume(
    prediction: Tensor,
    truth: Tensor,
    num_classes: int,
    spacing: Sequence[float],
    *,
    patient: str,
    case: str,
    values: Sequence[int] = (),
    distances: bool = True,
) -> list[Score]:
    """Scores of the classes from 1 on.

    A class that the truth lacks has no score (NaN, which means leave out, as in MONAI) and is counted as absent. A
    class that the truth has and the prediction lacks gets the worst possible scores: Dice 0, and the diagonal of the
    volume for each distance.

    Args:
        prediction: (X, Y, Z) whole numbers.
        truth: (X, Y, Z) whole numbers.
        num_classes: K, with background.
        spacing: voxel size along each axis; distances have its unit.
        patient: the name of the patient.
        case: the name of the volume.
        values: the label value of each class in files; default: its number.
        distances: whether to compute HD95, ASD and stray components, which takes most of the time.
    """
    diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(truth.shape, spacing)))
    scores = []
    for k in range(1, num_classes):
        of_class = (patient, case, k, values[k] if values else k)
        p, t = prediction == k, truth == k
        predicted, present = bool(p.any()), bool(t.any())
        if not present:
            pieces = components(prediction, k)
            scores.append(Score(*of_class, math.nan, math.nan, math.nan, "absent", int(p.sum()), pieces))
            continue
        if not predicted:
            worst = diagonal if distances else math.nan
            scores.append(Score(*of_class, 0.0, worst, worst, "missed"))
            continue
        dice = 2 * int((p & t).sum()) / (int(p.sum()) + int(t.sum()))
        hd95 = asd = math.nan
        if distances:
            first, second = surface_distances(*_around(p, t, spacing))
            hd95 = float(max(np.percentile(first, 95), np.percentile(second, 95)))
            asd = float((first.sum() + second.sum()) / (len(first) + len(second)))
        stray = stray_components(prediction, truth, k) if distances else 0
        scores.append(Score(*of_class, dice, hd95, asd, "ok", 0, stray))
    return scores


def _around(p: Tensor, t: Tensor, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Cuts two masks (X, Y, Z) to the box around both, one voxel wider. Returns them and the spacing of their axes.

    Distances are the same as in the whole volume, and take less memory. An axis of a single voxel is dropped:
    otherwise every pixel of an image would lie on a surface.
    """
    either = p | t
    box, kept = [], []
    for axis in range(either.ndim):
        rows = either.movedim(axis, 0).flatten(1).any(dim=1).nonzero()
        box.append(slice(max(0, int(rows[0]) - 1), int(rows[-1]) + 2))
        if either.shape[axis] > 1:
            kept.append(axis)
    kept = kept if len(kept) > 1 else list(range(either.ndim))
    dropped = [axis for axis in range(either.ndim) if axis not in kept]
    first, second = (mask[tuple(box)].squeeze(dropped).numpy() for mask in (p, t))
    return first, second, [float(spacing[axis]) for axis in kept]


def surface_distances(p: np.ndarray, t: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The distance of each surface voxel of `p` from the surface of `t`, and of each of `t` from `p`, float64.

    The surface of a mask consists of its voxels that share a face with a voxel outside it, or with the border of the
    volume. HD95 and the average distance are computed from these distances. MONAI computes the same ones, but takes 40
    bytes a voxel instead of 12.

    Args:
        p, t: masks, bool, of the same shape; neither is empty.
        spacing: voxel size along each axis.
    """
    of_p, of_t = (mask & ~ndimage.binary_erosion(mask) for mask in (p, t))
    return _distances(of_p, of_t, spacing), _distances(of_t, of_p, spacing)


def _distances(start: np.ndarray, end: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """(N,): the distance of each voxel of `start` from the nearest voxel of `end`."""
    nearest = ndimage.distance_transform_edt(~end, sampling=spacing, return_distances=False, return_indices=True)
    places = np.nonzero(start)
    squares = np.zeros(len(places[0]))
    for axis, place in enumerate(places):
        squares += ((nearest[axis][places] - place) * spacing[axis]) ** 2
    distances: np.ndarray = np.sqrt(squares)
    return distances


def patient_means(scores: Sequence[Score], metric: str, class_index: int | None = None) -> dict[str, float]:
    """Each patient's mean over volumes (and over classes, if `class_index` is None). A missing score is left out."""
    values: dict[str, list[float]] = {}
    for score in scores:
        value = getattr(score, metric)
        if (class_index is None or score.class_index == class_index) and not math.isnan(value):
            values.setdefault(score.patient, []).append(value)
    return {patient: float(np.mean(v)) for patient, v in values.items()}


def bootstrap_interval(values: Sequence[float], *, draws: int = 10000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, which are drawn with replacement; NaN if there are none."""
    if len(values) == 0:
        return math.nan, math.nan
    data, random = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = data[random.integers(0, len(data), (draws, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(scores: Sequence[Score], class_names: dict[int, str], unit: str) -> list[Row]:
    """A row per class and one for their mean. For each metric: mean, deviation and interval over patients."""
    rows = []
    classes = dict(sorted((score.class_index, score.label_value) for score in scores))
    for k in [*classes, None]:
        own = [s for s in scores if k is None or s.class_index == k]
        row: Row = {
            "class": "mean" if k is None else class_names.get(k, f"class {k}"),
            "class_index": k,
            "label_value": None if k is None else classes[k],
            "patients": len({s.patient for s in own}),
            "volumes": len({s.case for s in own}),
            "absent": sum(s.status == "absent" for s in own),
            "missed": sum(s.status == "missed" for s in own),
            "stray": sum(s.stray_components for s in own),
            "unit": unit,
        }
        for metric in METRICS:
            values = list(patient_means(own, metric).values())
            row[metric] = float(np.mean(values)) if values else math.nan
            row[f"{metric}_median"] = float(np.median(values)) if values else math.nan
            row[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            row[f"{metric}_interval"] = bootstrap_interval(values)
        rows.append(row)
    return rows


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


def score_case(model: TrainedModel, case: Case, *, distances: bool = True) -> list[Score]:
    """The scores of one labelled case by one model."""
    return _score(Predictor([model]), case, distances=distances)


def _score(predictor: Predictor, case: Case, *, distances: bool = True, report: Report | None = None) -> list[Score]:
    mask, truth, spacing = _predicted(predictor, case, report)
    labels = predictor.models[0].labels
    values = [values[0] for values in labels.values]
    of_case: dict[str, Any] = {"patient": case.patient, "case": case.name, "values": values, "distances": distances}
    return score_volume(mask, truth, len(labels), spacing, **of_case)


def predicted_and_true(predictor: Predictor, case: Case) -> tuple[Tensor, Tensor]:
    """The predicted and the true mask (X, Y, Z) of a labelled case; both are -1 where the truth is to be ignored."""
    return _predicted(predictor, case, None)[:2]


def _predicted(predictor: Predictor, case: Case, report: Report | None) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    assert case.label is not None
    prediction, prepared = predictor(case, report)
    spacing = prepared.spacing
    mask = prediction.mask()
    del prediction, prepared  # before the truth is read: both may be large
    truth = torch.from_numpy(read_label(case.label, case.images[0], predictor.models[0].labels))
    ignored = truth == IGNORE
    if ignored.any():
        mask = torch.where(ignored, IGNORE, mask.int())
    return mask, truth, spacing


# --- the subject of scores ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What is scored: a model, patients, their files, and the way of scoring.

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
        unlike: how voxels clearly differ in size from those of the training, by case; without the other cases.
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

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def differences(self, other: Subject) -> list[str]:
        """How `other` differs from this subject; empty if its scores may be shown for this one."""
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

    def title(self) -> str:
        """One line for people. It tells of an unfinished run, of missing patients and of other voxel sizes."""
        text = f"{self.run}, {self.part}: {len(self.files)} volumes of {len(self.patients)} patients, step {self.step}"
        if not self.finished:
            text += f" of {self.steps}: UNFINISHED"
        if self.missing:
            text += f"; WITHOUT {len(self.missing)} missing patients: {', '.join(self.missing)}"
        if self.unlike:
            text += f"; {len(self.unlike)} WITH OTHER VOXELS THAN THE TRAINING: {', '.join(self.unlike)}"
        return text


def file_hash(path: Path) -> str:
    """SHA-256 of an image: of its file; if it has several files, of their names and hashes."""
    files = sorted(files_of(path))
    hashes = [str(fingerprint(file)["sha256"]) for file in files]
    if files == [path]:
        return hashes[0]
    listed = "".join(f"{file.relative_to(path.parent)} {digest}\n" for file, digest in zip(files, hashes))
    return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()


def read_split(run: Path) -> dict[str, list[str]]:
    """The patients of each part, from the run's split.json.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = run / "split.json"
    content = read_json(path)
    lists = [content.get(part) if isinstance(content, dict) else None for part in PARTS]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
        raise UserError(f"{path}: must be an object with lists of patients: {', '.join(PARTS)}")
    return {part: names for part, names in zip(PARTS, lists) if names is not None}


def part_to_score(run: Path) -> str:
    """The part of a run's split whose scores say most: the test; validation where it is empty, as for a fold."""
    split = read_split(run)
    return next((part for part in ("test", "validation", "labelled") if split[part]), "test")


def _split_of(run: Path, model: TrainedModel) -> dict[str, list[str]]:
    """The patients of each part.

    Raises:
        UserError: split.json is not the split of the training, so the model may have seen its test patients.
    """
    split = read_split(run)
    lines = split_differences(run / "split.json", split, model.split) if model.split else []
    if lines:
        raise UserError(f"{run}: its split was edited after the run began:", *lines)
    return split


def subject_of(
    run: Path,
    predictor: Predictor,
    folder: DataFolder,
    part: str = "test",
    *,
    allow_missing: bool = False,
) -> tuple[Subject, list[Case]]:
    """The subject of an evaluation, and its cases.

    Raises:
        UserError: an unknown part, or no case to score; without `allow_missing`, a patient that `folder` lacks; a
            folder whose description contradicts that of the training.
    """
    if part not in (*PARTS, "all"):
        raise UserError(f"--part must be {', '.join(PARTS)} or all, got {part}")
    model = predictor.models[0]
    lines = model.description.contradictions(Description.of(folder)) if model.description else []
    if lines:
        raise UserError(*(f"{folder.root}: {line}" for line in lines))
    patients = folder.patients if part == "all" else _split_of(run, model)[part]
    cases = cases_of(folder, patients, with_label=True)
    there = {case.patient for case in cases}
    missing = [p for p in patients if p not in there] if part not in ("all", "unlabelled") else []
    if missing and not allow_missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{folder.root}: has no labelled volume of {len(missing)} of the {len(patients)} patients of the part "
            f"{part!r}: {some}; add --allow-missing to score the others"
        )
    if not cases:
        raise UserError(f"{folder.root}: no labelled volume in the part {part!r}")
    files = {case.name: [file_hash(path) for path in (*case.images, case.label) if path is not None] for case in cases}
    unlike = {case.name: predictor.unlike_training(read_source(case.images[0])) for case in cases}
    return Subject(
        run=run.resolve().name,
        id=_id_of(run),
        model=weights_hash(model.network),
        step=model.step,
        steps=model.config.steps,
        part=part,
        data=str(folder.root.resolve()),
        files=files,
        patients=sorted(there),
        missing=missing,
        tta=predictor.tta,
        postprocess=predictor.postprocess,
        unlike={name: how for name, how in unlike.items() if how},
    ), cases


def _id_of(run: Path) -> str:
    try:
        return str(read_json(run / "run.json")["id"])
    except (UserError, KeyError, TypeError):
        return ""


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
        """Writes the CSV, the Markdown and the JSON file. Returns the evaluation with their paths."""
        as_csv, as_text, as_json = files
        write_text(as_csv, scores_csv(self.scores, self.class_names, self.unit))
        write_text(as_text, self.table() + "\n")
        content = {
            "format": FORMAT,
            "subject": {**vars(self.subject), "finished": self.subject.finished},
            "unit": self.unit,
            "class_names": {str(k): name for k, name in self.class_names.items()},
            "summary": self.summary,
            "scores": [{**vars(s), "class": self.class_names.get(s.class_index, "")} for s in self.scores],
        }
        write_json(as_json, without_nan(content))
        return replace(self, files=tuple(files))


FORMAT = "pglcl scores 2"


def score_files(folder: Path, part: str, weights: str = "last") -> tuple[Path, Path, Path]:
    """The paths of the CSV, the Markdown and the JSON file."""
    name = f"scores_{part}" + ("" if weights == "last" else f"_{weights}")
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
        found = Evaluation(subject, scores, names, str(content["unit"]), score_files(path.parent, subject.part))
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


def evaluate_run(
    run: Path,
    root: Path,
    *,
    part: str = "test",
    device: str = "auto",
    output: Path | None = None,
    allow_missing: bool = False,
    tta: str = "none",
    postprocess: str = "auto",
    weights: str = "last",
    overwrite: bool = False,
    quiet: bool = True,
) -> Evaluation:
    """Scores the model of `run` on a part of its split and saves scores_<part>.csv, .md and .json.

    Args:
        run: the folder that training wrote.
        root: the data folder.
        part: of the run's split: labelled, unlabelled, validation or test; or "all", every labelled volume.
        device: as for training.
        output: the folder of the score files; default: the run.
        allow_missing: score the patients that `root` has, even if the split names others.
        tta, postprocess: as :class:`pglcl.predict.Predictor` takes them.
        weights: as :func:`pglcl.model.load_model` takes them; the files of "best" end in _best.
        overwrite: replace files even if they are not earlier scores of this run and data.
        quiet: show no progress.

    Raises:
        UserError: nothing to score, patients missing, files in the way, or data that do not fit the model.
    """
    predictor = Predictor([load_model(run, device, weights)], tta=tta, postprocess=postprocess)
    folder = open_folder(root)
    before = Unchanged(files_of_cases(folder.cases))
    subject, cases = subject_of(run, predictor, folder, part, allow_missing=allow_missing)
    files = score_files(output or run, part, weights)
    read = files_behind(folder, folder.cases)
    check_outputs(files, inputs=read, overwrite=overwrite, renewed=may_renew(files, subject))
    found = score_cases(predictor, subject, cases, distance_unit(folder, cases), quiet=quiet)
    before.only(files_of_cases(cases)).check()  # so that the hashes in the score files are those of the files scored
    return found.save(files)


def score_cases(
    predictor: Predictor, subject: Subject, cases: Sequence[Case], unit: str, *, quiet: bool = True
) -> Evaluation:
    """Scores cases, without saving the scores."""
    scores: list[Score] = []
    with Volumes("scoring", len(cases), quiet=quiet) as progress:
        for case in cases:
            scores += _score(predictor, case, report=progress.start(case.name))
    model = predictor.models[0]
    notes = [f"{name}: {how}" for name, how in subject.unlike.items()]
    notes += [] if model.resolution else [f"{subject.run}: {UNKNOWN_VOXELS}"]
    return Evaluation(subject, scores, model.class_names, unit, notes=tuple(notes))
