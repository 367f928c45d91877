"""One HTML file that shows what a run learned. It loads nothing from elsewhere and needs no script."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pglcl.cases import PARTS, distance_unit
from pglcl.errors import UserError
from pglcl.evaluate import Unfinished, part_to_score, score_cases, subject_of
from pglcl.figures import CURVES, Picture, Shown, colour, curves, embeddings
from pglcl.files import Unchanged, opened, read_json, write_text
from pglcl.layouts import Case, DataFolder, open_folder
from pglcl.model import TrainedModel, load_model
from pglcl.outputs import check_outputs
from pglcl.predict import Predictor
from pglcl.progress import duration
from pglcl.record import read_metrics
from pglcl.run_folder import data_of, data_there, read_split, seen_in_training
from pglcl.score_files import Evaluation, Subject, may_renew, number_or_dash, read_scores, score_files
from pglcl.scores import METRICS, patient_means
from pglcl.training_data import files_behind, files_of_cases

GENERATOR = "<meta name=generator content=pglcl>"
FIGURE_VOLUMES = 6  # volumes that embeddings are taken from
WORST = 3  # volumes whose outlines are shown
OPEN_ROWS = 12  # patients: a longer table is folded

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --page: Canvas; --shadow: #0005; }
@media (prefers-color-scheme: dark) { :root { --shadow: #fff5; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 64rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; margin-bottom: .8rem; }
.row.three { grid-template-columns: repeat(3, 1fr); } .row.two { grid-template-columns: repeat(2, 1fr); }
@media (max-width: 46rem) { .row { grid-template-columns: repeat(2, 1fr); }
  .row.three, .row.two.wide { grid-template-columns: 1fr; } }
figure { margin: 0; } figcaption { font-size: .875rem; line-height: 1.35; padding-top: .2rem; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
.single img { max-width: 44rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; background:
  linear-gradient(to right, var(--page) 30%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 30%, transparent) right / 3rem 100% no-repeat local,
  radial-gradient(farthest-side at 0 50%, var(--shadow), transparent) left / 1rem 100% no-repeat scroll,
  radial-gradient(farthest-side at 100% 50%, var(--shadow), transparent) right / 1rem 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid Highlight; }
.hint { display: none; font-size: .875rem; margin: .3rem 0; }
@media (max-width: 32rem) { .hint { display: block; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; font-size: .875rem; padding: .3rem .6rem; }
td, th { padding: .35rem .6rem; border-top: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th { font-weight: 600; } th[scope=row], th:first-child, table.text td { text-align: left; }
table.text td { white-space: normal; } td small { display: block; opacity: .8; }
tr.mean > * { font-weight: 600; border-top-width: 2px; }
p.note { margin: .25rem 0 .6rem; opacity: .85; }
p.warning { border-left: 4px solid #D55E00; padding: .4rem .8rem; background: var(--soft); font-weight: 600; }
ul.key { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .4rem 0; }
.key i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em;
  vertical-align: -.1em; }
details { margin: .5rem 0; } details summary { cursor: pointer; padding: .2rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .4rem 0; } dd { margin: 0; }
@media (max-width: 46rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def write_report(
    run: Path,
    data: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    *,
    overwrite: bool = False,
    quiet: bool = True,
    print_line: Callable[[str], None] | None = None,
) -> Path:
    """Writes the report of a run on its test volumes, which are scored first if they are not yet.

    A run without test patients, such as that of a fold, is shown on its validation volumes, or else on labelled ones.

    Args:
        run: the folder that training wrote.
        data: the data folder; default: that of the run.
        output: the HTML file; default: report.html in the run, which replaces an earlier report.
        device: as for training.
        overwrite: replace `output` if it exists.
        quiet: show no progress.
        print_line: gets a line if other files stand where new scores would be kept.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: the run, the data or a patient is missing or damaged, or a file is in the way.
    """
    path = output or run / "report.html"
    predictor = Predictor([load_model(run, device)])
    folder = open_folder(data or data_there(run))
    before = Unchanged(files_of_cases(folder.cases))
    subject, cases = subject_of(run, predictor, folder, part_to_score(run))
    before = before.only(files_of_cases(cases))
    read = files_behind(folder, folder.cases)
    mine = output is None and _is_report(path)
    check_outputs([path], inputs=[*read, *_files_of(run)], overwrite=overwrite, renewed=lambda _: mine)
    found = _scores(run, predictor, subject, cases, distance_unit(folder, cases), before, quiet, print_line)
    page = _page(run, predictor, folder, cases, found)
    before.check()
    write_text(path, page)
    return path


def _files_of(run: Path) -> list[Path]:
    """The files of the run except its report, which the page must not replace."""
    return [file for file in run.iterdir() if file.name != "report.html"]


def _is_report(path: Path) -> bool:
    """Whether `path` is an earlier report."""
    try:
        with opened(path) as file:
            return GENERATOR.encode() in file.read(1000)
    except (OSError, UserError):
        return False


def _scores(
    run: Path,
    predictor: Predictor,
    subject: Subject,
    cases: Sequence[Case],
    unit: str,
    before: Unchanged,
    quiet: bool,
    print_line: Callable[[str], None] | None,
) -> Evaluation:
    """The scores that the run keeps, if they are of the same subject; otherwise new ones."""
    files = score_files(run, subject.part)
    kept = read_scores(files[-1])
    whole = kept is not None and all(file.is_file() for file in kept.files)
    if kept is not None and whole and not subject.differences(kept.subject):
        unlike = {**subject.unlike, **kept.subject.unlike}  # an older version may not have noted all of it
        return dataclasses.replace(kept, subject=dataclasses.replace(subject, unlike=unlike))
    for_others = score_files(run, subject.part, unfinished=True)
    try:
        found = score_cases(predictor, subject, cases, unit, quiet=quiet)
    except Unfinished as error:
        scored = [case for case in cases if case.name in error.others.subject.files]
        before.only(files_of_cases(scored)).check()
        raise UserError(*error.lines, *_kept(error.others, for_others)) from error
    before.check()
    try:
        check_outputs(files, renewed=may_renew(files, subject))
        found = found.save(files)
    except UserError as error:  # scores of other data, and files of other programs, stay as they are
        if print_line:
            print_line(f"the scores are in the report alone: {error.lines[0]}")
        return found
    if may_renew(for_others, subject)(for_others[0]):  # these scores complete them
        for path in for_others:
            path.unlink(missing_ok=True)
    return found


def _kept(others: Evaluation, files: Sequence[Path]) -> list[str]:
    """Saves the scores of the volumes that could be scored; the line that says so, or why they are lost."""
    count = len(others.subject.files)
    try:
        check_outputs(files, renewed=may_renew(files, others.subject))
        path = others.save(files).files[0]
    except UserError as error:
        return [f"the scores of the other {count} volumes are not kept: {error.lines[0]}"]
    return [f"{path}: the scores of the other {count} volumes"]


# --- the page -------------------------------------------------------------------------------------------------------


def _page(run: Path, predictor: Predictor, folder: DataFolder, cases: Sequence[Case], found: Evaluation) -> str:
    model, subject = predictor.models[0], found.subject
    ranked = _ranked(cases, found)
    views = {case.name: Shown(predictor, case) for case in {c.name: c for c in _chosen(ranked).values()}.values()}
    worst = [views.get(case.name) or Shown(predictor, case) for case in ranked[:WORST]]
    middle = views[_chosen(ranked)["median" if len(ranked) > 2 else "best" if len(ranked) > 1 else "only"].name]
    rows, problem = _metric_rows(run)
    title = f"{run.resolve().name}: {model.config.method}"
    named = " and ".join(", ".join(_chosen(ranked)).rsplit(", ", 1))
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=note>{_text(_subtitle(run, model, folder))}</p>",
        *_warnings(run, folder, subject, cases),
        f"<h2>Scores on the {subject.part} volumes</h2>",
        _score_table(found),
        _patient_table(found),
        "<h2>Training</h2>",
        _facts(model, subject, rows),
        *([_warning(problem)] if problem else []),
        _pictures(curves(rows), "three" if len(CURVES) > 2 else "two"),
        _split_lists(run),
        f"<h2>The {_text(named)} {subject.part} volume{'s' if len(ranked) > 1 else ''}</h2>",
        _legend(model),
        "<p class=note>The slice with the most foreground: image, truth, prediction, and the entropy of the "
        "prediction in nats.</p>",
        *(
            f"<h3>{_text(kind)}: {_text(case.name)}</h3>{_pictures(views[case.name].overlay())}"
            for kind, case in _chosen(ranked).items()
        ),
        "<h2>Outlines and stray pieces of the worst volumes</h2>",
        "<p class=note>Dashed white: truth. Coloured: the prediction as it is, and with only the largest piece of "
        "every class (--postprocess largest-component). Red: the pieces that this removes. The slice shown has the "
        "most voxels of such pieces, or, if there are none, the most errors.</p>",
        *(f"<h3>{_text(view.case.name)}</h3>{_pictures(view.islands(), 'two')}" for view in worst),
        *_chosen_patches(middle),
        "<h2>Embeddings of patches</h2>",
        f"<p class=note>First two principal components of the projected patches of {subject.part} volumes, coloured by "
        "their true class.</p>",
        _legend(model, background=True),
        _pictures([embeddings(model, ranked[:FIGURE_VOLUMES])], "single"),
        "<h2>Configuration</h2>",
        _details(run, model, subject),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f"{GENERATOR}"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _chosen_patches(view: Shown) -> list[str]:
    """The section of the patches that the contrast pairs, or a sentence why there is no picture."""
    config = view.model.config
    title = "<h2>Entropy, disparity, and the pairs of patches</h2>"
    if not config.contrast:
        return [title, f"<p class=note>No picture: --method {config.method} has no contrast and pairs no patches.</p>"]
    if config.loss != "infonce":
        note = f"No picture: --loss {config.loss} compares patches with statistics of classes, not with other patches."
        return [title, f"<p class=note>{note}</p>"]
    similar = " and similar entropy" if config.guidance else ""
    mixed = {
        "split": ", both filled or both not filled by it",
        "leave-out": ", both filled by it",
        "together": "",
    }[config.mixed_patches]
    distant = " that differ enough in entropy" if config.guidance and config.min_negative_disparity else ""
    note = (
        "Average entropy of the patches, each over the class that covers most of it; its disparity from one anchor "
        "(white). As in training, a patch counts once for each class that it holds, and has a box for each. "
        f"Solid: positives, of the same class{similar}{mixed}. Dashed: negatives, of another class{distant}."
    )
    if not config.guidance:
        note = f"This run was not guided (--no-guidance): its pairs do not depend on entropy. {note}"
    return [
        title,
        f"<p class=note>{note}</p>",
        f"<h3>{_text(view.case.name)}</h3>",
        _pictures(view.disparity(), "three"),
    ]


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _warning(text: str) -> str:
    return f"<p class=warning role=alert>{_text(text)}</p>"


def _warnings(run: Path, folder: DataFolder, subject: Subject, cases: Sequence[Case]) -> list[str]:
    found = []
    if not subject.finished:
        found.append(f"This run is unfinished: step {subject.step} of {subject.steps}.")
    if subject.part != "test":
        seen = "which also chose the best weights" if subject.part == "validation" else "on which it was trained"
        found.append(f"This run has no test patients. Scores are those of the {subject.part} patients, {seen}.")
    found += [f"{name}: {how}." for name, how in subject.unlike.items()]
    found += [f"{line}." for line in seen_in_training(run, subject.part, cases, subject.files)]
    with contextlib.suppress(UserError):
        own = data_of(run)
        if own.resolve() != folder.root.resolve():
            found.append(f"Scores and images come from {folder.root}; the run was trained on {own}.")
    return [_warning(text) for text in found]


def _subtitle(run: Path, model: TrainedModel, folder: DataFolder) -> str:
    config = model.config
    counts = ", ".join(f"{len(patients)} {part}" for part, patients in read_split(run).items())
    base = "" if config.method == "supervised" else f", base {config.consistency}"
    contrast = f", {config.loss} loss on {config.patches} patches" if config.method == "patchcl" else ""
    name = folder.root.resolve().name
    return f"{name}: {counts} patients{base}{contrast}, {config.steps} steps, seed {config.seed}"


def _table(caption: str, head: Sequence[str], body: Iterable[str]) -> str:
    """A table that scrolls on its own where it is wider than the screen, with a cue that it does."""
    columns = "".join(f"<th scope=col>{name}" for name in head)
    return (
        f"<p class=hint aria-hidden=true>The table scrolls sideways →</p><div class=scroll tabindex=0 role=region "
        f"aria-label='{_text(caption)}'><table><caption>{_text(caption)}</caption><thead><tr>{columns}</thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _score_table(found: Evaluation) -> str:
    names = {"dice": "Dice", "hd95": f"HD95 [{found.unit}]", "asd": f"ASD [{found.unit}]"}
    body = []
    for row in found.summary:
        cells = ""
        for metric in METRICS:
            digits = 3 if metric == "dice" else 2
            low, high = row[f"{metric}_interval"]
            cells += f"<td>{number_or_dash(row[metric], digits)} ± {number_or_dash(row[f'{metric}_std'], digits)}"
            cells += f"<small>{number_or_dash(low, digits)} to {number_or_dash(high, digits)}</small>"
            if metric == "hd95":
                cells += f"<td>{number_or_dash(row['hd95_median'], digits)}"
        kind = " class=mean" if row["class_index"] is None else ""
        counts = "".join(f"<td>{row[name]}" for name in ("absent", "missed", "stray"))
        body.append(f"<tr{kind}><th scope=row>{_text(row['class'])}{cells}{counts}")
    note = (
        "Mean ± deviation over patients; below, the 95 % bootstrap interval of the mean. Absent: not in the truth, so "
        "without a score. Missed: in the truth, but not predicted; it gets the worst possible scores. Stray pieces: "
        "components of the prediction that touch no voxel of the truth."
    )
    dice, hd95, asd = names.values()
    head = ["class", dice, hd95, "median HD95", asd, "absent", "missed", "stray pieces"]
    return f"{_table(found.subject.title(), head, body)}<p class=note>{note}</p>"


def _patient_table(found: Evaluation) -> str:
    """A row for each patient, the worst first."""
    labels = sorted({score.class_index for score in found.scores})
    by_class = {label: patient_means(found.scores, "dice", label) for label in labels}
    overall = {metric: patient_means(found.scores, metric) for metric in METRICS}
    patients = sorted(found.subject.patients, key=lambda p: overall["dice"].get(p, math.inf))
    head = [
        "patient", "Dice", *(f"Dice, {_text(_class_name(found.class_names, k))}" for k in labels),
        f"HD95 [{found.unit}]", f"ASD [{found.unit}]", "missed", "stray pieces",
    ]  # fmt: skip
    body = []
    for patient in patients:
        cells = [number_or_dash(overall["dice"].get(patient, math.nan), 3)]
        cells += [number_or_dash(by_class[k].get(patient, math.nan), 3) for k in labels]
        cells += [number_or_dash(overall[metric].get(patient, math.nan), 2) for metric in ("hd95", "asd")]
        own = [score for score in found.scores if score.patient == patient]
        cells += [str(sum(s.status == "missed" for s in own)), str(sum(s.stray_components for s in own))]
        body.append(f"<tr><th scope=row>{_text(patient)}" + "".join(f"<td>{cell}" for cell in cells))
    opened = " open" if len(patients) <= OPEN_ROWS else ""
    values = list(overall["hd95"].values())
    median = f" Median HD95 over patients: {statistics.median(values):.2f} {found.unit}." if values else ""
    return (
        f"<details{opened}><summary>Scores of each patient, the worst first ({len(patients)})</summary>"
        f"{_table('Mean over the volumes of each patient', head, body)}<p class=note>{median}</p></details>"
    )


def _class_name(names: dict[int, str], k: int) -> str:
    return names.get(k, "background" if k == 0 else f"class {k}")


def _legend(model: TrainedModel, *, background: bool = False) -> str:
    items = [
        f"<li><i style='background:{colour(k)}'></i>{_text(_class_name(model.class_names, k))}"
        for k in range(0 if background else 1, model.num_classes)
    ]
    return f"<ul class=key aria-label='Colours of the classes'>{''.join(items)}</ul>"


def _pictures(pictures: Sequence[Picture], columns: str = "") -> str:
    """Pictures side by side where there is room."""
    figures = "".join(
        f"<figure><img alt='{_text(p.text)}' src='{p.url}'><figcaption>{_text(p.caption)}</figcaption></figure>"
        for p in pictures
    )
    return f"<div class='{'single' if columns == 'single' else f'row {columns}'.strip()}'>{figures}</div>"


def _metric_rows(run: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of metrics.jsonl; and what is wrong with the file, or nothing."""
    path = run / "metrics.jsonl"
    try:
        rows = read_metrics(run)
    except UserError as error:
        return [], f"{path.name}: cannot be read: {error.lines[0]}"
    return rows, "" if rows else f"{path.name}: has no row of a step"


def _facts(model: TrainedModel, subject: Subject, rows: Sequence[dict[str, Any]]) -> str:
    seconds = max((row["seconds"] for row in rows if "seconds" in row), default=math.nan)
    validation = [(row["validation_dice"], row["step"]) for row in rows if "validation_dice" in row]
    facts = {
        "Steps": f"{subject.step} of {subject.steps}" + ("" if subject.finished else " (unfinished)"),
        "Training time": "not recorded" if math.isnan(seconds) else duration(seconds),
        "Device": model.config.device,
        "Voxels of the training": model.resolution.describe() if model.resolution else "not recorded",
    }
    if validation:
        best = max(validation)
        facts["Validation Dice"] = f"{validation[-1][0]:.3f} last, {best[0]:.3f} best at step {best[1]}"
    return "<dl>" + "".join(f"<dt>{_text(name)}<dd>{_text(value)}" for name, value in facts.items()) + "</dl>"


def _split_lists(run: Path) -> str:
    split = read_split(run)
    items = "".join(f"<dt>{part} ({len(split[part])})<dd>{_text(', '.join(split[part])) or 'none'}" for part in PARTS)
    return f"<details><summary>Patients of each part of the split</summary><dl>{items}</dl></details>"


def _details(run: Path, model: TrainedModel, subject: Subject) -> str:
    def listed(values: dict[str, Any]) -> str:
        return "".join(f"<tr><th scope=row>{_text(k)}<td>{_text(v)}" for k, v in values.items())

    try:
        environment = read_json(run / "environment.json")
    except UserError as error:
        environment = {"environment.json": error.lines[0]}
    if not isinstance(environment, dict):
        environment = {"environment.json": "not an object"}
    scored = {"data": subject.data, "weights (SHA-256)": subject.model, "postprocess": subject.postprocess}
    tables = {"Options": vars(model.config), "Versions and machine": environment, "What was scored": scored}
    return "".join(
        f"<details><summary>{name}</summary><table class=text>{listed(values)}</table></details>"
        for name, values in tables.items()
    )


# --- which volumes are shown ----------------------------------------------------------------------------------------


def _ranked(cases: Sequence[Case], found: Evaluation) -> list[Case]:
    """The cases from the worst Dice to the best; those without any class have no score and are left out."""
    by_case: dict[str, list[float]] = {}
    for score in found.scores:
        if not math.isnan(score.dice):
            by_case.setdefault(score.case, []).append(score.dice)
    scored = [case for case in cases if case.name in by_case]
    return sorted(scored, key=lambda case: statistics.fmean(by_case[case.name])) or list(cases)


def _chosen(ranked: Sequence[Case]) -> dict[str, Case]:
    """Worst, median and best, as far as they differ."""
    if len(ranked) == 1:
        return {"only": ranked[0]}
    if len(ranked) == 2:
        return {"worst": ranked[0], "best": ranked[1]}
    return {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
