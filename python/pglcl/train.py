"""A training run: folders, checkpoints, and the loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pglcl.batches import StepBatches, loader
from pglcl.cases import (
    Split,
    cases_of,
    count_classes,
    distance_unit,
    inspect_case,
    split_patients,
)
from pglcl.config import TrainConfig, flag
from pglcl.contrast import PatchContrast
from pglcl.errors import UserError
from pglcl.evaluate import Score, patient_means, score_case
from pglcl.files import check_writable, load_tensors, read_json, save_tensors, write_json
from pglcl.layouts import Case, DataFolder, open_folder
from pglcl.model import SegmentationNetwork, TrainedModel, choose_device, update_teacher
from pglcl.prepare import Prepared, choose_slice_axis, prepare
from pglcl.progress import Progress
from pglcl.ranks import _agree, _any, average_gradients, process_group, rank_of
from pglcl.record import Profile, _Log, environment
from pglcl.step import Step
from pglcl.volumes import read_label

# What may differ when a run is resumed: it changes no weight.
FREE = {"device", "workers", "checkpoint_every", "validate_every"}


LOG_EVERY = 10  # steps; reading a loss waits for the device


class Interrupted(Exception):
    """Ctrl-C or a polite kill, after the checkpoint was written."""


@dataclasses.dataclass
class Data:
    """The volumes of a run, read and prepared. Those of the test are not among them."""

    folder: DataFolder
    split: Split
    num_classes: int
    channels: int
    slice_axis: int | None
    labelled: list[Prepared]
    unlabelled: list[Prepared]
    validation: list[Case]


def load_data(root: Path, config: TrainConfig, split: Split | None = None, *, progress: Progress | None = None) -> Data:
    """Reads what training needs, and checks all of it first: every problem is named before an hour is spent."""
    folder = open_folder(root)
    split = split or split_patients(folder, config)
    labelled = cases_of(folder, split.labelled, with_label=True)
    unlabelled = cases_of(folder, split.unlabelled)
    validation = cases_of(folder, split.validation, with_label=True)
    if progress:
        progress.say(f"{folder.root}: reading {len(labelled) + len(unlabelled)} volumes")
    problems, empty = [], 0
    for case in labelled:
        report = inspect_case(case, config.num_classes or None)
        problems += report.problems
        empty += not any(report.label_voxels.get(k) for k in report.label_voxels if k > 0) and not report.problems
    for case in unlabelled:  # their label files, if there are any, are none of our business
        problems += inspect_case(dataclasses.replace(case, label=None)).problems
    if problems:
        raise UserError(*problems, f"{len(problems)} problems; pglcl inspect {root} lists those of the whole folder")
    if labelled and empty == len(labelled):
        raise UserError(f"{root}: the labels of all {len(labelled)} labelled volumes are empty")
    if config.method != "supervised" and not unlabelled:
        raise UserError(f"{root}: no unlabelled volume is left for --method {config.method}; use --method supervised")
    num_classes = count_classes(folder, config, (read_label(c.label, c.images[0]) for c in labelled if c.label))
    # Checked once more, now that the number of classes is known.
    first = prepare(labelled[0], config, num_classes, None if config.spatial_dims == 3 else 2, label=False)
    slice_axis = choose_slice_axis(config, first.volume.data.shape[1:])
    pools: list[list[Prepared]] = [[], []]
    use_unlabelled = config.method != "supervised"
    for pool, cases, with_label in ((0, labelled, True), (1, unlabelled if use_unlabelled else [], False)):
        for case in cases:
            pools[pool].append(prepare(case, config, num_classes, slice_axis, label=with_label))
    channels = {len(p.image) for pool in pools for p in pool}
    if len(channels) > 1:
        raise UserError(f"{root}: volumes have different numbers of channels: {sorted(channels)}")
    return Data(folder, split, num_classes, channels.pop(), slice_axis, pools[0], pools[1], validation)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{flag(name)}: the run has {saved.get(name)!r}, asked for is {now.get(name)!r}"
        for name in sorted({*saved, *now} - FREE)
        if saved.get(name) != now.get(name)
    ]


class Training:
    """One run in its folder.

    config.json, split.json, environment.json; metrics.jsonl and tensorboard/; checkpoint.pt while it runs; model.pt,
    the teacher, when it has ended.
    """

    def __init__(
        self,
        root: Path,
        output: Path,
        config: TrainConfig,
        *,
        resume: bool = False,
        profile: bool = False,
        quiet: bool = False,
    ) -> None:
        self.root, self.output, self.config, self.resume = root, output, config, resume
        self.device = choose_device(config.device)
        if self.device.type == "cuda" and "LOCAL_RANK" in os.environ:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.profile = Profile(self.device, profile)
        self.quiet = quiet
        self.stop = False
        self.is_main = int(os.environ.get("RANK", "0")) == 0

    # --- folders and checkpoints ------------------------------------------------------------------------------------

    def _open_run(self) -> dict[str, Any] | None:
        """Makes the folder, or finds the checkpoint in it; returns that, if any."""
        now = {**dataclasses.asdict(self.config), "data": str(self.root.resolve())}
        config_file = self.output / "config.json"
        if config_file.exists():
            if not self.resume:
                raise UserError(
                    f"{self.output}: holds a run already; add --resume to go on with it, or choose another --output"
                )
            changed = differences(read_json(config_file), now)
            if changed:
                raise UserError(f"{self.output}: is a run of another configuration:", *changed)
        else:
            check_writable(self.output)
        path = self.output / "checkpoint.pt"
        if self.resume and path.exists():
            return load_tensors(path)
        return None

    def _write_run(self, data: Data) -> None:
        write_json(self.output / "split.json", data.split.as_dict())
        write_json(self.output / "environment.json", environment())
        write_json(self.output / "config.json", {**dataclasses.asdict(self.config), "data": str(self.root.resolve())})

    def _model(self, data: Data, step: int) -> TrainedModel:
        names = data.folder.class_names or {0: "background"}
        return TrainedModel(self.teacher, self.config, data.num_classes, data.channels, data.slice_axis, names, step)

    def _checkpoint(self, data: Data, step: int) -> None:
        state: dict[str, Any] = {
            "step": step,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model": self._model(data, step).state(),
        }
        if self.contrast is not None:
            state["contrast"] = self.contrast.state_dict()
        save_tensors(self.output / "checkpoint.pt", state)

    def _restore(self, state: dict[str, Any]) -> int:
        try:
            self.student.load_state_dict(state["student"])
            self.teacher.load_state_dict(state["model"]["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.contrast is not None:
                self.contrast.load_state_dict(state["contrast"])
            return int(state["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.output / 'checkpoint.pt'}: does not fit this run: {reason}") from error

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        with process_group(self.device) as group:
            self._run(group)
            self.contrast = None  # it holds the group, whose threads end with its last holder

    def _run(self, group: Any) -> None:
        config = self.config
        rank = rank_of(group)
        main = rank == 0
        problem: list[str] = []
        state = None
        try:
            if main or self.resume:
                state = self._open_run()
        except UserError as error:
            problem = list(error.lines)
        _agree(problem, group)
        progress = Progress(config.steps, quiet=self.quiet or not main)
        data = load_data(self.root, config, progress=progress)
        if main and not (self.output / "config.json").exists():
            self._write_run(data)

        torch.manual_seed(config.seed)
        arguments = (config.spatial_dims, data.channels, data.num_classes, config.channel_list, config.embedding_dim)
        self.student = SegmentationNetwork(*arguments).to(self.device)
        self.teacher = SegmentationNetwork(*arguments).to(self.device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.contrast = PatchContrast(config, data.num_classes, group).to(self.device) if config.contrast else None
        trained = self.student if config.contrast else self.student.unet
        self.optimizer = torch.optim.AdamW(
            trained.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
        )
        first = self._restore(state) if state is not None else 0
        if first >= config.steps:
            progress.say(f"{self.output}: this run has ended; nothing to resume")
            if main and not (self.output / "model.pt").exists():
                save_tensors(self.output / "model.pt", self._model(data, config.steps).state())
            return

        if main and state is None:
            self._checkpoint(data, 0)  # from now on there is always one that loads
        semi = config.method != "supervised"
        batches = StepBatches(data.labelled, data.unlabelled, config, rank, semi=semi)
        workers = config.workers if config.workers >= 0 else self._choose_workers(batches, group, progress)
        log = _Log(self.output, first) if main else None
        progress.start(
            first, f"{config.method}, {len(data.labelled)} labelled and {len(data.unlabelled)} unlabelled volumes"
        )
        try:
            with self._asked_to_stop():
                self._train(data, loader(batches, first, workers), first, trained, group, progress, log)
        finally:
            progress.stop()
            if log:
                log.close()
        if main:
            save_tensors(self.output / "model.pt", self._model(data, config.steps).state())
            write_json(self.output / "finished.json", {"steps": config.steps, "unit": distance_unit(data.folder)})
            if self.profile.enabled:
                rows = self.profile.rows(max(1, config.steps - max(first, config.warmup)))
                write_json(self.output / "profile.json", [list(row) for row in rows])
                progress.table(
                    "Time of a step", ["section", "ms", "share"], [[n, f"{ms:.1f}", f"{s:.1%}"] for n, ms, s in rows]
                )

    def _train(
        self,
        data: Data,
        source: Iterator[dict[str, Tensor]],
        first: int,
        trained: nn.Module,
        group: Any,
        progress: Progress,
        log: _Log | None,
    ) -> None:
        config, rank = self.config, rank_of(group)
        step_losses = Step(self.student, self.teacher, self.contrast, config, self.profile)
        for step in range(first, config.steps):
            with self.profile("data"):
                batch = {name: t.to(self.device, non_blocking=True) for name, t in next(source).items()}
            for options in self.optimizer.param_groups:
                options["lr"] = config.learning_rate * (1 - step / config.steps) ** 0.9
            # Every random draw of a step comes from this: a resumed run draws the same.
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step * 101 + rank)
            self.optimizer.zero_grad(set_to_none=True)
            losses = step_losses(batch, step, generator)
            with self.profile("update"):
                average_gradients(trained, group)
                self.optimizer.step()
                update_teacher(self.teacher, self.student, config.ema_decay, step)
            done = step + 1
            if done % LOG_EVERY == 0 or done == config.steps:
                numbers = {name: float(value) for name, value in losses.items()}
                if not all(math.isfinite(v) for v in numbers.values()):
                    raise UserError(f"step {done}: a loss is not a number: {numbers}. Try a smaller --learning-rate")
                progress.step(done, numbers)
                if log:
                    log.write({"step": done, **numbers})
            if config.validate_every and (done % config.validate_every == 0 or done == config.steps):
                dice = self._validate(data, group)
                progress.validated(done, dice)
                if log and not math.isnan(dice):
                    log.write({"step": done, "validation_dice": dice})
            # Ranks stop together; they ask each other now and then only.
            stopping = self.stop if group is None else done % LOG_EVERY == 0 and _any(self.stop, group, self.device)
            if rank == 0 and (done % config.checkpoint_every == 0 or done == config.steps or stopping):
                self._checkpoint(data, done)
            if stopping and done < config.steps:
                raise Interrupted(f"stopped after step {done}; --resume goes on from there")

    def _choose_workers(self, batches: StepBatches, group: Any, progress: Progress) -> int:
        """The number with which steps are fastest: workers keep the network fed, but take cores from it."""
        cores = (os.cpu_count() or 1) // (1 if group is None else dist.get_world_size(group))
        network = copy.deepcopy(self.student)
        seconds: dict[int, float] = {}
        for workers in sorted({0, 1, min(2, cores - 1), min(4, cores - 1)}):
            if workers < 0 or (workers > 0 and cores < 2):
                continue
            source = loader(batches, max(0, len(batches) - 40), workers)
            start, counted = time.perf_counter(), 0
            for step in range(min(14, len(batches))):
                if step == 4 or step == len(batches) - 1:  # the first ones fill the pipeline
                    start, counted = time.perf_counter(), 0
                batch = next(source)
                images = torch.cat([batch["image"], batch.get("strong", batch["image"][:0])]).to(self.device)
                network(images).mean().backward()
                counted += 1
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            seconds[workers] = (time.perf_counter() - start) / counted
            del source
        best = min(seconds, key=lambda w: seconds[w])
        measured = ", ".join(f"{1e3 * s:.0f} ms with {w}" for w, s in seconds.items())
        progress.say(f"workers that prepare batches: {best} (a step of the bare network takes {measured})")
        return best

    @contextlib.contextmanager
    def _asked_to_stop(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the step end and writes a checkpoint; the second one does not wait."""

        def ask(number: int, frame: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True

        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _validate(self, data: Data, group: Any) -> float:
        """Mean Dice of the teacher on the validation patients; each rank takes its share of them."""
        rank, world = rank_of(group), 1 if group is None else dist.get_world_size(group)
        scores: list[Score] = []
        for case in data.validation[rank::world]:
            scores += score_case(self._model(data, 0), case, distances=False)
        means = list(patient_means(scores, "dice").values())
        if group is None:
            return float(np.mean(means)) if means else math.nan
        total = torch.tensor([sum(means), float(len(means))], dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=group)
        return float(total[0] / total[1]) if total[1] else math.nan
