"""The command line: ``pglcl inspect | train | predict | evaluate | report | export | demo``.

Exit codes: 0 done; 1 done, but some images were skipped or problems were found; 2 not done: an option, a file, the disk
or the memory; 3 a package is missing; 70 a bug; 130 stopped by the user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect as inspection
import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from pglcl import launcher
from pglcl.config import DEFAULTS, OPTIONS, TrainConfig, flag, read_toml, with_preset
from pglcl.errors import UserError, WriteError, explained
from pglcl.launcher import is_first_process, own_rank
from pglcl.stopping import STOPPED

SKIPPED, REFUSED, BUG = 1, 2, 70  # exit codes; 0 is done, 3 a missing package, and STOPPED

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a folder of images, few of them labelled, to a segmentation model.",
)

DataArgument = Annotated[
    Path,
    typer.Argument(
        help="a data folder (ACDC, Decathlon, nnU-Net, KiTS, SSL4MIS, images/ beside labels/) or a .csv or .json list",
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="the folder that pglcl train wrote", show_default=False)]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto: a GPU if there is one, otherwise the CPU")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="print only errors")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace files that exist")]
TtaOption = Annotated[
    str,
    typer.Option(help="none; flips: average over mirrored images, only for a model that was trained with --flips all"),
]
PostprocessOption = Annotated[
    str,
    typer.Option(
        help="organs of which a mask keeps only the largest component. auto: all classes together, and each class, "
        "where they are one organ and score no worse with it on the run's validation patients; largest-component: each "
        "class; none: no class"
    ),
]
WeightsOption = Annotated[
    str, typer.Option(help="last: the weights of the last step; best: those with the best validation Dice")
]


class GroupedCommand(typer.core.TyperCommand):
    """A command whose ``--help`` lists the options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(row)
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def console(quiet: bool = False) -> Console:
    return Console(highlight=False, soft_wrap=True, markup=False, quiet=quiet)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command. Its errors are printed as one line each; a bug is printed with its traceback."""

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        _reading.close()
        if not is_first_process() and function is not _train:
            return  # under torchrun: ranks share training alone, the first one does everything else
        try:
            function(*arguments, **options)
        except KeyboardInterrupt:
            _complain("pglcl: stopped")
            raise typer.Exit(STOPPED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except Exception as error:
            raise typer.Exit(_explain(error)) from None

    app.command(function.__name__.strip("_"), cls=GroupedCommand)(guarded)
    return guarded


def _explain(error: Exception, what: str = "") -> int:
    """Prints the lines of an error; returns the exit code."""
    lines = explained(error)
    if lines is None:
        traceback.print_exception(error)
        _complain(f"pglcl: {what}this is a bug of pglcl: please report it with the lines above")
        launcher.tell_launcher([f"a bug of pglcl: {error!r}"])
        return BUG
    launcher.tell_launcher(lines)
    rank = own_rank()
    if is_first_process() or not (isinstance(error, UserError) and error.everywhere):
        who = "pglcl: " if is_first_process() else f"pglcl, rank {rank}: "
        for line in lines:
            _complain(f"{who}{what}{line}")
    return REFUSED


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("pglcl-ext")
        except importlib.metadata.PackageNotFoundError:
            version = "of a source folder that is not installed"
        print(f"pglcl {version}")
        raise typer.Exit


@app.callback()
def _options_of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@command
def inspect(
    data: DataArgument,
    labels: Annotated[str, typer.Option(help="values of each class, as for pglcl train")] = "",
    num_classes: Annotated[int, typer.Option(help="number of classes, as for pglcl train")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON, for programs")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="also print a row for every volume")] = False,
    quiet: QuietOption = False,
) -> None:
    """Lists what is in a data folder, which options suit it, and everything that is wrong with it."""
    import json

    from pglcl.inspect_output import print_summary
    from pglcl.inspection import declared_labels, inspect_folder, labels_of
    from pglcl.layouts import open_folder
    from pglcl.proposals import summary

    folder = open_folder(data)
    declared = declared_labels(folder, TrainConfig(labels=labels, num_classes=num_classes))
    reports = inspect_folder(folder, declared)
    found = summary(folder, reports, labels_of(folder, reports, declared))
    if as_json and not quiet:
        print(json.dumps(found, indent=1, allow_nan=False))
    elif not as_json:
        print_summary(found, console(quiet), verbose=verbose)
    if found["problems"]:
        raise typer.Exit(SKIPPED)


def _train(ctx: typer.Context, data: Path | None, output: Path | None, **options: Any) -> None:
    """Trains a model. `pglcl evaluate` then scores it on the test volumes.

    `pglcl train --resume RUN` continues a run that was stopped. It knows the data folder and the options of the run.
    """
    from pglcl.limits import check_threads
    from pglcl.train import Interrupted, Training

    names = ("config", "preset", "resume", "moved_data", "profile", "quiet", "threads")
    own = {name: options.pop(name) for name in names}
    processes = options.pop("processes")
    check_threads(own["threads"])
    if processes > 1 and launcher.PARENT not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("--processes cannot be used under torchrun; use its --nproc-per-node", everywhere=True)
        raise typer.Exit(launcher.launch(processes, sys.argv[1:]))
    given = {n: options[n] for n in options if (source := ctx.get_parameter_source(n)) and source.name != "DEFAULT"}
    if own["config"] is not None:
        given = {**read_toml(own["config"]), **given}  # flags win
    try:
        given = with_preset(own["preset"], given)
        root, run, settings = _run_asked_for(data, output, own["moved_data"], own["resume"], given)
    except UserError as error:
        raise UserError(*error.lines, everywhere=True) from None
    if own["threads"]:
        import torch

        torch.set_num_threads(own["threads"])
    training = Training(root, run, settings, resume=own["resume"], profile=own["profile"], quiet=own["quiet"])
    try:
        training.run()
    except Interrupted as reason:
        if is_first_process():
            console(own["quiet"]).print(f"{run}: {reason}")
        raise typer.Exit(STOPPED) from None
    if is_first_process():
        console(own["quiet"]).print(
            f"{run}: done. Next: pglcl evaluate {_quoted(run)} {_quoted(root)}{_part_of(run)}; "
            f"pglcl report {_quoted(run)}"
        )


def _quoted(path: Path) -> str:
    """As a shell takes it."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _part_of(run: Path) -> str:
    """The --part that `pglcl evaluate` needs: none where the run has test patients; a fold, for one, has none."""
    from pglcl.evaluate import part_to_score

    part = part_to_score(run)
    return "" if part == "test" else f" --part {part}"


def _run_asked_for(
    data: Path | None, output: Path | None, moved_data: Path | None, resume: bool, given: dict[str, Any]
) -> tuple[Path, Path, TrainConfig]:
    """The data folder, the run folder and the options. A resumed run keeps its own, except those that are given."""
    from pglcl.run_folder import data_there, read_config

    if resume and output is None:  # pglcl train --resume RUN
        data, output = None, data
    if moved_data is not None and (not resume or data is not None):
        why = "the data folder is given twice" if resume else "it needs --resume; a new run takes its folder as DATA"
        raise UserError(f"--data {moved_data}: {why}")
    if output is None:
        wanted = "--resume needs the folder of the run" if resume else "--output is missing: the folder of the run"
        raise UserError(wanted)
    data = moved_data or data
    saved = {}
    if resume and (output / "config.json").exists():
        saved = dataclasses.asdict(read_config(output))
        if given.get("spatial_dims", saved["spatial_dims"]) != saved["spatial_dims"]:
            saved["slices"] = "auto"  # or the decision for slices would be refused, instead of what was given
        data = data or data_there(output)
    if data is None:
        raise UserError(f"{output}: no run to resume there" if resume else "DATA is missing: the folder of the volumes")
    return data, output, TrainConfig(**{**saved, **given})


def _train_signature() -> inspection.Signature:
    """The signature that typer reads. Names, types, defaults and help texts come from TrainConfig, their one place."""
    keyword = inspection.Parameter.KEYWORD_ONLY
    parameters = [inspection.Parameter("ctx", keyword, annotation=typer.Context)]

    def add(name: str, kind: Any, default: Any, option: Any) -> None:
        parameters.append(inspection.Parameter(name, keyword, default=default, annotation=Annotated[kind, option]))

    data_help = "the data folder, as pglcl inspect takes it; with --resume it is not needed, since the run knows it"
    add("data", Path | None, None, typer.Argument(metavar="DATA", help=data_help, show_default=False))
    add("output", Path | None, None, typer.Option("--output", "-o", help="folder of the run", show_default=False))
    toml_help = "TOML file with any of the options below; options on the command line take precedence"
    add("config", Path | None, None, typer.Option(help=toml_help))
    preset_help = "paper: the settings of the paper and its code; options that you give take precedence"
    add("preset", str, "", typer.Option(help=preset_help))
    resume_help = "continue from the last checkpoint: pglcl train --resume RUN"
    add("resume", bool, False, typer.Option("--resume", help=resume_help))
    add("moved_data", Path | None, None, typer.Option("--data", help="with --resume: the data folder, if it was moved"))
    add("profile", bool, False, typer.Option("--profile", help="measure and print the time of each section of a step"))
    add("quiet", bool, False, typer.Option("--quiet", "-q", help="print only errors"))
    add("threads", int, 0, typer.Option(help="CPU threads of each process; 0: PyTorch's choice"))
    processes_help = "number of processes that train together on this machine, one for each GPU"
    add("processes", int, 1, typer.Option(min=1, max=64, help=processes_help))
    for name, described in OPTIONS.items():
        default = DEFAULTS[name]
        names = [f"{flag(name)}/--no-{flag(name)[2:]}"] if isinstance(default, bool) else [flag(name)]
        option = typer.Option(*names, help=described.help, metavar=described.metavar, rich_help_panel=described.group)
        add(name, type(default), default, option)
    return inspection.Signature(parameters)


_signature = _train_signature()
_train.__signature__ = _signature  # type: ignore[attr-defined]
_train.__annotations__ = {p.name: p.annotation for p in _signature.parameters.values()}
command(_train)


@command
def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(help="images, or folders of them", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the masks", show_default=False)],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="also write the probability of every class")
    ] = False,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="also write the entropy of the prediction, in nats")
    ] = False,
    ensemble: Annotated[
        list[Path] | None,
        typer.Option(help="another run, whose probabilities are averaged with those of RUN; may be repeated"),
    ] = None,
    tta: TtaOption = "none",
    postprocess: PostprocessOption = "auto",
    weights: WeightsOption = "last",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Writes a mask for every image, in the geometry of the image.

    An image that cannot be read is skipped, and the exit code is then 1.
    """
    from pglcl.layouts import group_inputs
    from pglcl.model import UNKNOWN_VOXELS, load_model
    from pglcl.predict import Predictor, Writer, data_folders
    from pglcl.progress import Volumes

    models = [load_model(path, device, weights) for path in (run, *(ensemble or []))]
    predictor = Predictor(models, tta=tta, postprocess=postprocess)
    cases = group_inputs(images)
    writer = Writer(output, models[0].labels, probabilities=probabilities, entropy=entropy, overwrite=overwrite)
    writer.check(cases, data_folders(run, images, output), images)
    for path, model in zip((run, *(ensemble or [])), models):
        if weights == "last" and not model.finished and not quiet:
            _complain(f"pglcl: {model.unfinished(path)}")
        if model.resolution is None and not quiet:
            _complain(f"pglcl: {path}: {UNKNOWN_VOXELS}")
    out, codes = console(quiet), []
    with Volumes("predicting", len(cases), quiet=quiet) as progress:
        for case in cases:
            try:
                prediction, prepared = predictor(case, progress.start(case.name))
                written = writer.write(prediction, prepared)
                out.print(str(written[0]))
                odd = predictor.odd_intensities(prepared.levels, prepared.constant, prepared.few_values)
                for how in (predictor.unlike_training(prepared.source), odd):
                    if how and not quiet:
                        _complain(f"pglcl: {case.images[0]}: {how}; its mask may be wrong")
            except WriteError:
                raise
            except Exception as error:
                codes.append(_explain(error, f"skipped {case.name}: "))
    if codes:
        _complain(f"pglcl: {len(codes)} of {len(cases)} images were skipped")
        raise typer.Exit(BUG if BUG in codes else SKIPPED)


@command
def evaluate(
    run: RunArgument,
    data: DataArgument,
    part: Annotated[str, typer.Option(help="part of the run's split: test, validation, labelled; or all")] = "test",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder of the score files; default: the run")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="score the patients that are there, even if others are missing")
    ] = False,
    tta: TtaOption = "none",
    postprocess: PostprocessOption = "auto",
    weights: WeightsOption = "last",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Scores the model of a run: Dice, HD95 and average surface distance of each class and patient, as CSV and table.

    Earlier scores of the same run and data are replaced. Any other file is kept unless you add --overwrite.
    """
    from pglcl.evaluate import evaluate_run

    found = evaluate_run(
        run,
        data,
        part=part,
        device=device,
        output=output,
        allow_missing=allow_missing,
        tta=tta,
        postprocess=postprocess,
        weights=weights,
        overwrite=overwrite,
        quiet=quiet,
    )
    for note in found.notes if not quiet else ():
        _complain(f"pglcl: {note}")
    out = console(quiet)
    out.print(found.table())
    out.print(str(found.files[0]))


@command
def report(
    run: RunArgument,
    data: Annotated[Path | None, typer.Option(help="the data folder, if it was moved after the training")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the HTML file; default: report.html in the run")
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Writes one HTML file about a run: scores, curves, overlays, entropy and disparity, embeddings, options."""
    from pglcl.report import write_report

    path = write_report(run, data, output, device, overwrite=overwrite, quiet=quiet, print_line=_unless(quiet))
    console(quiet).print(str(path))


@command
def export(
    run: RunArgument,
    kind: Annotated[str, typer.Option("--format", help="torchscript or onnx", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the file; default: model.ts or model.onnx in the run")
    ] = None,
    weights: WeightsOption = "last",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Writes the network to a file for other programs, reads it back and compares the logits."""
    from pglcl.export import export_run

    lines = _unless(quiet)
    path, difference = export_run(run, kind, output, weights=weights, overwrite=overwrite, print_line=lines)
    console(quiet).print(f"{path}: logits differ by at most {difference:.1e} of the largest")


@command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the data, the runs and the report")] = Path(
        "pglcl-demo"
    ),
    steps: Annotated[int, typer.Option(help="training steps of each of the two runs")] = 400,
    quiet: QuietOption = False,
) -> None:
    """Trains on slices of the MNI152 brain template, without and with patch-wise contrast, and compares the scores."""
    from pglcl.demo import run_demo

    run_demo(output, steps, quiet=quiet)


# While several ranks read their options, this holds back what they print about wrong ones: only the first prints it.
_reading = contextlib.ExitStack()


def _unless(quiet: bool) -> Callable[[str], None] | None:
    """Prints a line of a command to standard error, unless it is quiet."""
    return None if quiet else lambda line: _complain(f"pglcl: {line}")


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code. Each error that a user can correct is printed as one line."""
    # MONAI's warnings to its own developers, and one about images that are nearly everywhere the same.
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    warnings.filterwarnings("ignore", message="Divide by zero", module="monai")
    wrong = io.StringIO()
    if "RANK" in os.environ:
        _reading.enter_context(contextlib.redirect_stderr(wrong))
    try:
        app(args=arguments, standalone_mode=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    finally:
        _reading.close()
    if wrong.getvalue():
        launcher.tell_launcher(wrong.getvalue().splitlines()[-1:])
        if is_first_process():
            sys.stderr.write(wrong.getvalue())
    try:
        sys.stdout.flush()
    except OSError as error:  # the output could not be written
        return _explain(error)
    return code
