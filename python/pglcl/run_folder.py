"""The folder of a run: what it holds, and whether the run may be continued in it.

config.json, the options; split.json, the patients of each part; run.json, the identity of the run and the files that it
read; environment.json; metrics.jsonl and tensorboard/; checkpoint.pt; best.pt, the teacher with the best validation
Dice; model.pt, the last teacher, once the run has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pglcl.cases import PARTS, Split
from pglcl.config import OPTIONS, TrainConfig, completed, flag
from pglcl.errors import UserError, wrong_content
from pglcl.files import (
    check_writable,
    fingerprint,
    load_tensors,
    read_json,
    read_object,
    remove_orphans,
    require_file,
    save_tensors,
    write_json,
)
from pglcl.layouts import Case
from pglcl.model import TrainedModel, weights_hash
from pglcl.record import environment, read_metrics
from pglcl.training_data import files_of, files_of_cases

STARTED = ("run.json", "split.json", "environment.json")  # written before config.json
FILES = (*STARTED, "config.json", "metrics.jsonl", "checkpoint.pt", "best.pt", "model.pt")
SHOWN = 20  # files that a message names


@dataclass(frozen=True)
class RunRecord:
    """The properties of a run that stay the same from its first step to its last.

    Its checkpoints hold all of them; a resume compares them with the JSON files.

    id: random. split: patients of each part. files: hash of every file that the run reads, by its path from the data
    folder. ranks: number of processes. threads: of each process. initial: hash of the weights of `--init`, or "".
    cases: patient, images and label of every case that the run reads, by its name; empty in runs of older versions.
    """

    id: str
    split: dict[str, list[str]]
    files: dict[str, str]
    ranks: int
    threads: int
    initial: str = ""
    cases: dict[str, list[str]] = field(default_factory=dict)


class RunFolder:
    """The files of one run.

    Args:
        path: of the folder.
        data: the folder of its volumes.
        config: the options of the command.

    Attributes:
        config: the options of the run. A resumed run keeps its own, except for options that change no weights, and for
            a larger number of steps.
        record: None before the run has begun.
    """

    def __init__(self, path: Path, data: Path, config: TrainConfig) -> None:
        self.path, self.data, self.config = path, data, config
        self.record: RunRecord | None = None
        self.checkpoint, self.model, self.best = path / "checkpoint.pt", path / "model.pt", path / "best.pt"

    @property
    def split(self) -> Split | None:
        """The patients of each part; None before the run has begun."""
        return None if self.record is None else Split(*(tuple(self.record.split[part]) for part in PARTS))

    def open(self, *, resume: bool, ranks: int) -> None:
        """Checks that the folder holds a run that can be resumed, or no run.

        Args:
            resume: whether a run may be there.
            ranks: number of processes that train together.

        Raises:
            UserError: a run is there without `resume`, or it has other options, or its files do not belong together.
        """
        remove_orphans(self.path)
        _check_files(self.path)
        if not os.path.lexists(self.path / "config.json"):
            self._check_nothing_is_lost()
            check_writable(self.path)
            return
        if not resume:
            raise UserError(
                f"{self.path}: already holds a run; add --resume to continue it, or choose another --output"
            )
        saved = read_config(self.path)
        self._compare_options(saved)
        self.record = read_record(self.path)
        if self.record.ranks != ranks:
            raise UserError(
                f"{self.path}: is a run of {self.record.ranks} processes, got {ranks}; add --processes "
                f"{self.record.ranks}, or start {self.record.ranks} with torchrun"
            )
        self._compare_split_file(saved)

    def begin(
        self, split: Split, root: Path, cases: Sequence[Case], ranks: int, initial: TrainedModel | None = None
    ) -> None:
        """Writes the files of a run before its first step; `initial` is the model that it starts from."""
        # A share of the steps becomes a number, which a larger --steps does not change.
        self.config = dataclasses.replace(self.config, warmup=self.config.warmup_steps)
        known = {_name(file, root): fingerprint(file) for file in sorted(files_of_cases(cases))}
        hashes = {name: print["sha256"] for name, print in known.items()}
        threads = torch.get_num_threads()
        described = _described(cases, root)
        self.record = RunRecord(
            secrets.token_hex(8), split.as_dict(), hashes, ranks, threads, _hash_of(initial), described
        )
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        identity = {"id": self.record.id, "started": started, "ranks": ranks, "threads": threads}
        # Written first: it shows that the files beside it are ours.
        write_json(
            self.path / "run.json", {**identity, "initial": self.record.initial, "cases": described, "files": known}
        )
        write_json(self.path / "split.json", self.record.split)
        write_json(self.path / "environment.json", environment())
        self._write_options()  # written last: from now on the folder holds a run

    def resume(self, root: Path, cases: Sequence[Case]) -> dict[str, Any] | None:
        """The state to continue from; None before the first checkpoint.

        Args:
            root: the data folder.
            cases: those that the run reads.

        Raises:
            UserError: files or cases have changed since the run began, or the checkpoint is not of this run.
        """
        assert self.record is not None
        state = self.load_checkpoint()
        read_metrics(self.path)  # raises for damaged metrics before anything is written
        changed = _changed_files(self.record.files, root, sorted(files_of_cases(cases)))
        if self.record.cases and not changed:
            changed = _changed_cases(self.record.cases, _described(cases, root))
        if changed:
            more = [f"... and {len(changed) - SHOWN} more files"] if len(changed) > SHOWN else []
            raise UserError(f"{self.path}: the data are not those that the run began with:", *changed[:SHOWN], *more)
        return state

    def check_initial(self, initial: TrainedModel | None) -> None:
        """Raises UserError when a run without a checkpoint began with other initial weights."""
        assert self.record is not None
        if _hash_of(initial) != self.record.initial:
            raise UserError(f"--init {self.config.init}: its weights are not those that {self.path} began with")

    def go_on(self, step: int) -> None:
        """Writes changed options, once all checks have passed and the run continues after `step` steps."""
        if step < self.config.steps:
            self.model.unlink(missing_ok=True)  # of fewer steps; the checkpoint holds the same teacher
        self._write_options()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, compared with the record; None before the first checkpoint.

        Raises:
            UserError: the checkpoint is missing, damaged or of another run.
        """
        assert self.record is not None
        if not self.checkpoint.exists():
            later = [path for path in (self.model, self.path / "metrics.jsonl") if path.exists()]
            if later:
                raise UserError(f"{self.checkpoint}: is missing, although {later[0].name} shows that the run has begun")
            return None
        state = load_tensors(self.checkpoint)
        check_identity(state, self.checkpoint, self.record, self.config)
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes the checkpoint: the state of the learner and the identity of the run."""
        save_tensors(self.checkpoint, {**state, "run": self._identity()})

    def save_model(self, model: TrainedModel, path: Path) -> None:
        """Writes a model to `path`, which is :attr:`model` or :attr:`best`."""
        save_tensors(path, {**model.state(), "run": self._identity()})

    def hash_of(self, file: Path) -> str:
        """The SHA-256 that a file had when the run began; "" for a file that the run does not read."""
        assert self.record is not None
        return self.record.files.get(_name(file, self.data), "")

    def notes(self) -> list[str]:
        """Lines about everything that may change the last digits of a resumed run."""
        assert self.record is not None
        notes, threads = [], torch.get_num_threads()
        if threads != self.record.threads:
            notes.append(
                f"the run began with {self.record.threads} CPU threads and continues with {threads}: the last digits "
                f"of its weights may differ; with --threads {self.record.threads} they do not"
            )
        before = read_object(self.path / "environment.json").get("torch")
        if before != torch.__version__:
            notes.append(
                f"the run began with PyTorch {before} and continues with {torch.__version__}: the last digits of its "
                "weights may differ"
            )
        return notes

    def _check_nothing_is_lost(self) -> None:
        """Raises UserError for files that a new run would replace, except those of a run killed at its start."""
        replaced: tuple[str, ...] = FILES
        if _is_start_of_a_run(self.path / "run.json"):
            replaced = tuple(name for name in FILES if name not in STARTED)
        there = [name for name in replaced if os.path.lexists(self.path / name)]
        if there:
            raise UserError(
                f"{self.path}: holds {', '.join(there)}, but no config.json of a run: a new run would replace "
                f"{'it' if len(there) == 1 else 'them'}; choose another --output"
            )

    def _identity(self) -> dict[str, Any]:
        assert self.record is not None
        return {**dataclasses.asdict(self.record), "config": dataclasses.asdict(self.config)}

    def _write_options(self) -> None:
        write_json(self.path / "config.json", {**dataclasses.asdict(self.config), "data": str(self.data.resolve())})

    def _compare_options(self, saved: TrainConfig) -> None:
        """Refuses changes of options that change weights. Accepts the other options, and more steps."""
        asked = self.config
        # A warm-up that is a share of the steps keeps the number with which the run began.
        warmup = saved.warmup if asked.warmup < 0 else asked.warmup
        names = [name for name, option in OPTIONS.items() if option.weights and name != "steps"]
        lines = [] if warmup == saved.warmup else [_difference("warmup", saved.warmup, warmup)]
        decided = ("warmup", "slices") if asked.slices == "auto" else ("warmup",)
        for name in names:
            before, now = getattr(saved, name), getattr(asked, name)
            if name not in decided and before != now:
                lines.append(_difference(name, before, now))
        if asked.steps < saved.steps:
            lines.append(f"{_difference('steps', saved.steps, asked.steps)}; a run may get more steps, but not fewer")
        if lines:
            raise UserError(f"{self.path}: the run has other options:", *lines)
        free = {name: getattr(asked, name) for name, option in OPTIONS.items() if not option.weights}
        self.config = dataclasses.replace(saved, steps=asked.steps, **free)

    def _compare_split_file(self, saved: TrainConfig) -> None:
        """Refuses a split file that was edited since the run began. It may be missing, since the run has the split."""
        path = Path(saved.split_file)
        if saved.split_file and path.exists():
            content, began = read_json(path), self.record.split if self.record else {}
            if isinstance(content, list):
                lines = _fold_differences(path, content, saved.fold, began)
            else:
                lines = split_differences(path, content, began)
            if lines:
                raise UserError(f"{self.path}: --split-file has changed since the run began:", *lines)


def _check_files(run: Path) -> None:
    """Raises UserError for a folder, pipe or the like that has the name of a file of a run."""
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            require_file(run / name)


def _is_start_of_a_run(path: Path) -> bool:
    """Whether a file is the run.json of a run, the first file that a run writes."""
    try:
        return {"id", "started", "ranks", "threads", "initial", "files"} == set(read_object(path)) - {"cases"}
    except UserError:
        return False


def read_config(run: Path) -> TrainConfig:
    """The options of a run.

    Raises:
        UserError: config.json is not what a run of this version wrote.
    """
    path = run / "config.json"
    content = completed({name: value for name, value in read_object(path).items() if name != "data"})
    unknown, missing = sorted(set(content) - set(OPTIONS)), sorted(set(OPTIONS) - set(content))
    if unknown or missing:
        wrong = f"unknown option {unknown[0]!r}" if unknown else f"no option {missing[0]!r}"
        raise UserError(f"{path}: not the options of this version of pglcl: {wrong}")
    try:
        return TrainConfig(**content)
    except UserError as error:
        raise UserError(*(f"{path}: {line}" for line in error.lines)) from None


def data_of(run: Path) -> Path:
    """The data folder of a run."""
    data = read_object(run / "config.json").get("data")
    if not isinstance(data, str):
        raise UserError(f"{run / 'config.json'}: data must be the path of a folder, got {data!r}")
    return Path(data)


def data_there(run: Path) -> Path:
    """The data folder of a run. Raises UserError if it is no longer there."""
    data = data_of(run)
    if not data.exists():
        raise UserError(f"{data}: not found, the data of {run}; if they were moved, --data says where they are now")
    return data


def read_split(run: Path) -> dict[str, list[str]]:
    """The patients of each part, from the run's split.json.

    Raises:
        UserError: the file is missing or damaged.
    """
    content = read_object(run / "split.json")
    for part in PARTS:
        patients = content.get(part)
        if not isinstance(patients, list) or not all(isinstance(patient, str) for patient in patients):
            raise UserError(f"{run / 'split.json'}: {part} must be a list of patients, got {patients!r}")
    return {part: content[part] for part in PARTS}


def read_record(run: Path) -> RunRecord:
    """The record of a run, from run.json and split.json.

    Raises:
        UserError: one of them is missing, or is not what a run wrote.
    """
    path = run / "run.json"
    if not path.exists():
        raise UserError(f"{path}: not found: the run was made by an older pglcl, or the file was removed")
    content, parts = read_object(path), read_split(run)
    try:
        files = {str(name): str(print["sha256"]) for name, print in content["files"].items()}
        numbers = (int(content["ranks"]), int(content["threads"]))
        cases = {str(name): [str(text) for text in case] for name, case in content.get("cases", {}).items()}
        return RunRecord(str(content["id"]), parts, files, *numbers, str(content["initial"]), cases)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not what a run wrote: {wrong_content(error)}") from None


def patients_read_by(run: Path, cases: Iterable[Case]) -> list[str]:
    """The patients of `cases` of whom a run read an image, whatever its name was there; none for an older run."""
    try:
        known = set(read_record(run).files.values())
    except UserError:
        return []

    def was_read(case: Case) -> bool:
        return any(fingerprint(file)["sha256"] in known for image in case.images for file in files_of(image))

    return sorted({case.patient for case in cases if was_read(case)})


def seen_in_training(run: Path, part: str, cases: Iterable[Case], hashes: Mapping[str, Sequence[str]]) -> list[str]:
    """A line about the cases of `part` with an image on which the run was trained, whatever its name was there.

    Their scores say nothing about new patients. A part that was trained on gets no line, since its name says so, and
    neither does a run of an older version, which does not know its images.

    Args:
        run: its folder.
        part: of its split, or "all".
        cases: those of `part`.
        hashes: SHA-256 of the images of each case, by its name; any other text for an image of several files.
    """
    try:
        record, config = read_record(run), read_config(run)
    except UserError:
        return []
    parts = ("labelled", "unlabelled") if config.semi else ("labelled",)
    patients = {patient for part in parts for patient in record.split[part]}
    images = [image for patient, *files, _ in record.cases.values() if patient in patients for image in files]
    within = tuple(f"{image}/" for image in images)  # of folders of DICOM slices
    known = {digest for file, digest in record.files.items() if file in images or file.startswith(within)}

    def hashes_of(case: Case) -> list[str]:
        several = [file for image in case.images if image.is_dir() for file in files_of(image)]
        return [*hashes[case.name][: len(case.images)], *(fingerprint(file)["sha256"] for file in several)]

    seen = [case.name for case in cases if not known.isdisjoint(hashes_of(case))] if known else []
    if not seen or part in parts:
        return []
    names = ", ".join(seen[:5]) + (", ..." if len(seen) > 5 else "")
    return [
        f"{run.resolve().name} was trained on the images of {len(seen)} of these volumes: {names}; their scores say "
        "nothing about new patients"
    ]


def check_identity(state: dict[str, Any], path: Path, record: RunRecord, config: TrainConfig) -> None:
    """Raises UserError when a checkpoint is of another run, or when the run's JSON files contradict it."""
    own = state.get("run")
    if not isinstance(own, dict) or not isinstance(state.get("step"), int):
        raise UserError(f"{path}: not a checkpoint of this version of pglcl: it does not name its run")
    if own.get("id") != record.id:
        raise UserError(f"{path}: belongs to the run {own.get('id')}, not to this run, {record.id}")
    folder = path.parent
    lines = split_differences(folder / "split.json", record.split, own.get("split", {}))
    if own.get("files") != record.files:
        lines.append(f"{folder / 'run.json'}: its files are not those that the run began with")
    if own.get("cases", {}) != record.cases:
        lines.append(f"{folder / 'run.json'}: its cases are not those that the run began with")
    if own.get("initial") != record.initial:
        lines.append(f"{folder / 'run.json'}: its initial weights are not those that the run began with")
    for name, before in own.get("config", {}).items():
        now = getattr(config, name, None)
        if before != now and OPTIONS[name].weights and not (name == "steps" and before < config.steps):
            lines.append(f"{folder / 'config.json'}: {_difference(name, before, now)}")
    if lines:
        raise UserError(f"{folder}: was edited after the run began:", *lines)
    if not 0 <= state["step"] <= config.steps:
        raise UserError(f"{path}: must be of step 0 to {config.steps}, got {state['step']}")


def _hash_of(model: TrainedModel | None) -> str:
    return "" if model is None else weights_hash(model.network)


def _difference(name: str, before: Any, now: Any) -> str:
    return f"{flag(name)}: the run has {before!r}, got {now!r}"


def split_differences(path: Path, now: Any, began: dict[str, list[str]]) -> list[str]:
    """A line for each part of a split that is not the one that the run began with."""
    if not isinstance(now, dict):
        return [f"{path}: must be a JSON object, got {type(now).__name__}"]
    return [
        f"{path}: {part} has {', '.join(map(str, now.get(part, []))) or 'nobody'}; the run began with "
        f"{', '.join(began.get(part, [])) or 'nobody'}"
        for part in PARTS
        if now.get(part, []) != began.get(part, [])
    ]


def _fold_differences(path: Path, folds: list[Any], fold: int, began: dict[str, list[str]]) -> list[str]:
    """As :func:`split_differences`, for nnU-Net's list of folds, one of which is the run's split.

    Unlabelled patients of the run may have been added to `train`.
    """
    now = folds[fold] if fold < len(folds) and isinstance(folds[fold], dict) else {}
    train, val = now.get("train"), now.get("val")
    if not isinstance(train, list) or not isinstance(val, list):
        return [f"{path}: fold {fold} must have the lists train and val, which the run began with"]
    lines = split_differences(path, {**began, "validation": val}, began)
    first = [p for p in train if p in began["labelled"]]
    foreign = [p for p in train if p not in (*began["labelled"], *began["unlabelled"])]
    if first != began["labelled"] or foreign:
        had = ", ".join([*began["labelled"], *began["unlabelled"]])
        lines.append(f"{path}: train has {', '.join(map(str, train)) or 'nobody'}; the run began with {had}")
    return lines


def _name(file: Path, root: Path) -> str:
    """The path of a file from the data folder, which stays the same when that folder is moved."""
    return Path(os.path.relpath(file.absolute(), root.absolute())).as_posix()


def _described(cases: Iterable[Case], root: Path) -> dict[str, list[str]]:
    """Patient, images and label of each case, by its name. Without a label, the last text is empty."""
    return {
        case.name: [
            case.patient,
            *(_name(path, root) for path in case.images),
            _name(case.label, root) if case.label else "",
        ]
        for case in cases
    }


def _changed_cases(began: dict[str, list[str]], now: dict[str, list[str]]) -> list[str]:
    """A line for each case that a list or description now describes in another way, with the same files."""
    return [
        f"{name}: the run began with {_words(began.get(name))}; it is now {_words(now.get(name))}"
        for name in sorted(set(began) | set(now))
        if began.get(name) != now.get(name)
    ]


def _words(case: list[str] | None) -> str:
    if not case:
        return "no such case"
    patient, *images, label = case
    return f"{', '.join(images)} with {f'the label {label}' if label else 'no label'}, of the patient {patient}"


def _changed_files(began: dict[str, str], root: Path, files: list[Path]) -> list[str]:
    """A line for each file that is not the one that the run began with."""
    now = {_name(file, root): file for file in files}
    lines = [f"{root / name}: was there when the run began, and is missing" for name in sorted(set(began) - set(now))]
    lines += [f"{now[name]}: was not there when the run began" for name in sorted(set(now) - set(began))]
    lines += [
        f"{now[name]}: its content has changed since the run began"
        for name in sorted(set(now) & set(began))
        if fingerprint(now[name])["sha256"] != began[name]
    ]
    return lines
