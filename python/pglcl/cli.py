"""The command line: ``pglcl inspect | train | predict | evaluate | report | demo``."""

from __future__ import annotations

import dataclasses
import inspect as inspection
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pglcl.config import TrainConfig, read_toml
from pglcl.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a folder of NIfTI volumes, few of them labelled, to a segmentation model.",
)

DataArgument = Annotated[
    Path,
    typer.Argument(
        help="an ACDC folder, a Decathlon task (dataset.json), or images/ beside labels/", show_default=False
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="the folder that pglcl train wrote", show_default=False)]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU where there is one")]


def console() -> Console:
    return Console(highlight=False, soft_wrap=True, markup=False)


@app.command()
def inspect(
    data: DataArgument,
    num_classes: Annotated[int, typer.Option(help="classes with background; 0: from dataset.json, or not checked")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="a row for every volume")] = False,
) -> None:
    """Lists what is in a data folder and everything that is wrong with it."""
    from pglcl.cases import inspect_folder
    from pglcl.layouts import open_folder
    from pglcl.progress import print_table

    out = console()
    folder = open_folder(data)
    reports = inspect_folder(folder, num_classes or None)
    labels = sum(r.case.label is not None for r in reports)
    out.print(
        f"{data}: layout {folder.layout}, {len(reports)} volumes of {len(folder.patients)} patients, "
        f"{labels} with labels"
    )
    voxels: dict[int, int] = {}
    for report in reports:
        for label, count in report.label_voxels.items():
            voxels[label] = voxels.get(label, 0) + count
    total = sum(voxels.values()) or 1
    classes = [[str(k), folder.class_names.get(k, ""), f"{n / total:.2%}"] for k, n in sorted(voxels.items())]
    if classes:
        print_table(out, "Labels", ["value", "name", "share of voxels"], classes)
    if verbose:
        rows = []
        for r in reports:
            shape, spacing = "x".join(map(str, r.shape)), "x".join(f"{s:.3g}" for s in r.spacing)
            low, high = r.intensity
            rows.append(
                [r.case.name, shape, spacing, str(r.channels), f"{low:g} to {high:g}", "yes" if r.case.label else "no"]
            )
        print_table(out, "Volumes", ["name", "voxels", "spacing mm", "channels", "intensity", "label"], rows)
    for report in reports:
        for note in report.notes:
            out.print(f"note: {note}")
    problems = [line for report in reports for line in report.problems]
    for line in problems:
        out.print(f"problem: {line}")
    out.print("no problem found" if not problems else f"{len(problems)} problems")
    if problems:
        raise typer.Exit(1)


def _train(ctx: typer.Context, data: Path, output: Path, **options: Any) -> None:
    """Trains a model and scores nothing: `pglcl evaluate` does, on the volumes kept for the test."""
    from pglcl.train import Interrupted, Training

    config_file, resume = options.pop("config"), options.pop("resume")
    profile, quiet, threads = options.pop("profile"), options.pop("quiet"), options.pop("threads")
    if config_file is not None:
        given = {
            n
            for n in options
            if ctx.get_parameter_source(n) is not None and ctx.get_parameter_source(n).name != "DEFAULT"
        }
        for name, value in read_toml(config_file).items():
            if name not in given:  # flags win
                options[name] = value
    if threads:
        import torch

        torch.set_num_threads(threads)
    training = Training(data, output, TrainConfig(**options), resume=resume, profile=profile, quiet=quiet)
    try:
        training.run()
    except Interrupted as reason:
        console().print(f"{output}: {reason}")
        raise typer.Exit(130) from None
    if training.is_main:
        console().print(f"{output}: done. Next: pglcl evaluate {output} {data}; pglcl report {output}")


def _train_signature() -> inspection.Signature:
    """The options of TrainConfig as typer reads them: name, type, default and help have one place."""
    parameter = inspection.Parameter
    keyword = parameter.KEYWORD_ONLY
    parameters = [
        parameter("ctx", keyword, annotation=typer.Context),
        parameter("data", keyword, annotation=DataArgument),
        parameter(
            "output",
            keyword,
            annotation=Annotated[Path, typer.Option("--output", "-o", help="folder of the run", show_default=False)],
        ),
        parameter(
            "config",
            keyword,
            default=None,
            annotation=Annotated[Path | None, typer.Option(help="TOML file with any of these options; flags win")],
        ),
        parameter(
            "resume",
            keyword,
            default=False,
            annotation=Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")],
        ),
        parameter(
            "profile",
            keyword,
            default=False,
            annotation=Annotated[bool, typer.Option("--profile", help="print where a step's time goes")],
        ),
        parameter(
            "quiet",
            keyword,
            default=False,
            annotation=Annotated[bool, typer.Option("--quiet", "-q", help="print nothing")],
        ),
        parameter(
            "threads",
            keyword,
            default=0,
            annotation=Annotated[int, typer.Option(help="CPU threads of this process; 0: PyTorch's choice")],
        ),
    ]
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"]
        kind = type(field.default)
        flag = "--" + field.name.replace("_", "-")
        names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        extra: dict[str, Any] = {"rich_help_panel": field.metadata["group"]}
        option = typer.Option(*names, help=text, **extra)
        parameters.append(parameter(field.name, keyword, default=field.default, annotation=Annotated[kind, option]))
    return inspection.Signature(parameters)


_signature = _train_signature()
_train.__signature__ = _signature  # type: ignore[attr-defined]
_train.__annotations__ = {p.name: p.annotation for p in _signature.parameters.values()}
app.command("train")(_train)


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(help="NIfTI files, or folders of them", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the masks", show_default=False)],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="also write the probability of every class")
    ] = False,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="also write the entropy of the prediction, in nats")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Writes a mask for every image, in its geometry. A broken file is skipped, and the exit code is not 0."""
    from pglcl.files import check_writable
    from pglcl.layouts import group_inputs
    from pglcl.model import load_model
    from pglcl.predict import predict_case, write_prediction

    out = console()
    model = load_model(run, device)
    cases = group_inputs(images)
    check_writable(output)
    failed = 0
    for case in cases:
        try:
            p, prepared = predict_case(model, case)
        except UserError as error:
            failed += 1
            for line in error.lines:
                _complain(f"skipped: {line}")
            continue
        written = write_prediction(p, prepared, output, with_probabilities=probabilities, with_entropy=entropy)
        out.print(str(written[0]))
    if failed:
        _complain(f"{failed} of {len(cases)} images skipped")
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: RunArgument,
    data: DataArgument,
    part: Annotated[str, typer.Option(help="part of the run's split: test, validation, labelled; or all")] = "test",
    device: DeviceOption = "auto",
) -> None:
    """Scores the run's model: Dice, HD95 and average surface distance, per class and patient, as CSV and table."""
    from pglcl.evaluate import evaluate_run, table

    if part not in ("test", "validation", "labelled", "unlabelled", "all"):
        raise UserError(f"--part must be test, validation, labelled, unlabelled or all, got {part}")
    rows = evaluate_run(run, data, part=part, device=device)
    console().print(
        table(rows, title=f"{run}, {part}: {rows[-1]['volumes']} volumes of {rows[-1]['patients']} patients")
    )
    console().print(f"{run / f'scores_{part}.csv'}")


@app.command()
def report(
    run: RunArgument,
    data: Annotated[
        Path | None, typer.Option(help="the data folder, where it is no longer where the run found it")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the HTML file; default: report.html in the run")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Writes one self-contained HTML file: scores, curves, overlays, entropy and disparity, embeddings, options."""
    from pglcl.report import write_report

    console().print(str(write_report(run, data, output, device)))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the runs")] = Path("pglcl-demo"),
    steps: Annotated[int, typer.Option(help="training steps of each of the two runs")] = 400,
) -> None:
    """Trains on slices of the MNI152 brain template, supervised alone and with patch-wise contrast, and compares."""
    from pglcl.demo import run_demo

    run_demo(output, steps)


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; what a user can mend is printed as one line each."""
    # What MONAI says to its own developers.
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        for line in error.lines:
            _complain(f"pglcl: {line}")
        return 2
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else 1
    return 0
