"""Evaluates a run: predicts the volumes of a part of its split, scores them and writes the scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pglcl.case_scores import score_case, true_mask
from pglcl.cases import PARTS, cases_of, distance_unit
from pglcl.description import Description
from pglcl.errors import UserError, explained
from pglcl.files import Unchanged, fingerprint, read_json
from pglcl.formats import read_source
from pglcl.layouts import Case, DataFolder, open_folder
from pglcl.model import UNKNOWN_VOXELS, TrainedModel, load_model, weights_hash
from pglcl.outputs import check_outputs
from pglcl.predict import Predictor
from pglcl.progress import Volumes
from pglcl.run_folder import read_split, seen_in_training, split_differences
from pglcl.score_files import Evaluation, Subject, may_renew, score_files
from pglcl.scores import Score
from pglcl.training_data import files_behind, files_of, files_of_cases

# --- the subject of scores ------------------------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """SHA-256 of an image: of its file; if it has several files, of their names and hashes."""
    files = sorted(files_of(path))
    hashes = [str(fingerprint(file)["sha256"]) for file in files]
    if files == [path]:
        return hashes[0]
    listed = "".join(f"{file.relative_to(path.parent)} {digest}\n" for file, digest in zip(files, hashes))
    return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()


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


# --- a run ----------------------------------------------------------------------------------------------------------


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
        UserError: nothing to score, patients missing, files in the way, or data that are damaged or do not fit the
            model. If volumes whose files are sound could not be scored, the scores of the others have been saved, in
            files whose names end in _unfinished.
    """
    predictor = Predictor([load_model(run, device, weights)], tta=tta, postprocess=postprocess)
    folder = open_folder(root)
    before = Unchanged(files_of_cases(folder.cases))
    subject, cases = subject_of(run, predictor, folder, part, allow_missing=allow_missing)
    files = score_files(output or run, part, weights)
    for_others = score_files(output or run, part, weights, unfinished=True)
    read = files_behind(folder, folder.cases)

    def check(paths: tuple[Path, Path, Path]) -> tuple[Path, Path, Path]:
        check_outputs(paths, inputs=read, overwrite=overwrite, renewed=may_renew(paths, subject))
        return paths

    for paths in (files, for_others):
        check(paths)
    try:
        found = score_cases(predictor, subject, cases, distance_unit(folder, cases), quiet=quiet)
        found = replace(found, notes=(*found.notes, *seen_in_training(run, subject.part, cases, subject.files)))
    except Unfinished as error:
        scored = [case for case in cases if case.name in error.others.subject.files]
        before.only(files_of_cases(scored)).check()
        path = error.others.save(check(for_others)).files[0]
        raise UserError(*error.lines, f"{path}: the scores of the other {len(scored)} volumes") from error
    before.only(files_of_cases(cases)).check()  # so that the hashes in the score files are those of the files scored
    saved = found.save(check(files))  # once more: another evaluation may have written them meanwhile
    for path in for_others:  # of an earlier evaluation, which these scores complete
        path.unlink(missing_ok=True)
    return saved


class Unfinished(UserError):
    """Volumes could not be scored although their files can be read, for example for want of memory.

    Args:
        lines: which volumes, and why.
        others: the scores of the other volumes.
    """

    def __init__(self, *lines: str, others: Evaluation) -> None:
        super().__init__(*lines)
        self.others = others


def score_cases(
    predictor: Predictor, subject: Subject, cases: Sequence[Case], unit: str, *, quiet: bool = True
) -> Evaluation:
    """Scores cases, without saving the scores. Every file is read before the first prediction.

    Raises:
        UserError: a line for each problem of the files, or no case could be scored.
        Unfinished: some cases could not be scored.
    """
    subject = subject.with_unlike(_check(predictor, cases, quiet=quiet))
    scores: list[Score] = []
    unscored: dict[str, tuple[str, ...]] = {}
    with Volumes("scoring", len(cases), quiet=quiet) as progress:
        for case in cases:
            try:
                scores += score_case(predictor, case, report=progress.start(case.name))
            except Exception as error:
                unscored[case.name] = _lines_of(error)
    model = predictor.models[0]
    notes = [f"{name}: {how}" for name, how in subject.unlike.items()]
    notes += [] if model.resolution else [f"{subject.run}: {UNKNOWN_VOXELS}"]
    if unscored:
        subject = subject.without({name: "; ".join(lines) for name, lines in unscored.items()}, scores)
    found = Evaluation(subject, scores, model.class_names, unit, notes=tuple(notes))
    if unscored:
        lines = [f"{name} was not scored: {line}" for name, lines in unscored.items() for line in lines]
        raise Unfinished(*lines, others=found) if scores else UserError(*lines)
    return found


def _check(predictor: Predictor, cases: Sequence[Case], *, quiet: bool) -> dict[str, str]:
    """Reads every image and label, so that a damaged one is named before hours are spent on the others.

    Returns how the intensities of cases clearly differ from those of the training.
    """
    lines: list[str] = []
    unlike: dict[str, str] = {}

    def read_image(case: Case) -> None:
        if how := predictor.check(case):
            unlike[case.name] = how

    with Volumes("checking", len(cases), quiet=quiet) as progress:
        for case in cases:
            report = progress.start(case.name)
            for read in (read_image, lambda case: true_mask(predictor, case)):
                try:
                    read(case)
                except Exception as error:
                    lines += [line for line in _lines_of(error) if line not in lines]
            report(1.0)
    if lines:
        raise UserError(*lines, "nothing was scored")
    return unlike


def _lines_of(error: Exception) -> tuple[str, ...]:
    """The message for an error of the input, the disk or the memory. A bug is raised again and stops the command."""
    lines = explained(error)
    if lines is None:
        raise error
    return lines
