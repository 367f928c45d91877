"""A training run: the loop, and who does what in it."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pglcl.batches import StepBatches, loader
from pglcl.cases import split_patients
from pglcl.config import TrainConfig
from pglcl.contrast import PatchContrast
from pglcl.errors import UserError
from pglcl.evaluate import Score, patient_means, score_case
from pglcl.files import write_json
from pglcl.launcher import own_rank, parent_has_ended
from pglcl.layouts import open_folder
from pglcl.limits import check_resources, most_workers
from pglcl.lock import FolderLock
from pglcl.model import (
    SegmentationNetwork,
    TrainedModel,
    choose_device,
    initial_model,
    load_model,
    network_for,
    update_teacher,
)
from pglcl.organs import organs_of_masks, organs_of_pseudo_labels
from pglcl.progress import Progress
from pglcl.ranks import Ranks, averaging, device_of_rank, launched_ranks
from pglcl.record import MetricsLog, Profile
from pglcl.run_folder import RunFolder
from pglcl.step import StepLoss
from pglcl.training_data import TrainingData, files_read, load_training_data

LOG_EVERY = 10  # steps; reading a loss waits for the device


class Interrupted(Exception):
    """Ctrl-C or a polite kill, after the checkpoint was written."""


class Learner:
    """Student, teacher, contrast and optimiser: what a checkpoint holds, and one step of it.

    Args:
        config: the options of the run.
        data: for its number of channels and classes.
        ranks: that train together.
        profile: of the sections of a step.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, ranks: Ranks, profile: Profile) -> None:
        self.config, self.data, self.ranks, self.profile = config, data, ranks, profile
        torch.manual_seed(config.seed)
        self.student = network_for(config, data.channels, data.num_classes).to(ranks.device)
        self.teacher = network_for(config, data.channels, data.num_classes).to(ranks.device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.contrast: PatchContrast | None = None
        if config.contrast:
            self.contrast = PatchContrast(config, data.num_classes, ranks.group).to(ranks.device)
        else:
            self.student.projection.requires_grad_(False)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.organs = organs_of_pseudo_labels(config, data)
        self.best: dict[str, float] = {"step": 0, "dice": -1.0}  # of the validations so far
        self.loss: nn.Module = StepLoss(self.student, self.teacher, self.contrast, config, self.organs, profile)
        if ranks.size > 1:
            self.loss = averaging(self.loss, config)

    def start_from(self, model: TrainedModel) -> None:
        """Student and teacher get the weights of another run, which :func:`initial_model` has compared."""
        for network in (self.student, self.teacher):
            network.load_state_dict(model.network.state_dict())

    def step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Takes step `step`, counted from 0; returns the losses, on the device."""
        config, ranks = self.config, self.ranks
        for options in self.optimizer.param_groups:
            options["lr"] = config.learning_rate * (1 - step / config.steps) ** 0.9
        # Every random draw of a step comes from this: a resumed run draws the same.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step * 101 + ranks.rank)
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor
        parts: dict[str, Tensor]
        loss, parts = self.loss(batch, step, generator)
        with self.profile("backward"):
            loss.backward()
        with self.profile("update"):
            self.optimizer.step()
            update_teacher(self.teacher, self.student, config.ema_decay, step)
        return parts

    def model(self, step: int) -> TrainedModel:
        """The teacher after `step` steps, with what it needs to know of the data."""
        found = self.data.survey
        return TrainedModel(self.teacher, self.config, found.slice_axis, found.labels, found.intensity, step)

    def state(self, step: int) -> dict[str, Any]:
        """All that a run needs to go on after `step` steps."""
        state = {
            "step": step,
            "best": self.best,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model": self.model(step).state(),
        }
        return state if self.contrast is None else {**state, "contrast": self.contrast.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises KeyError, RuntimeError or ValueError for a state of another network."""
        optimizer = state["optimizer"]
        if state["step"] and len(optimizer["state"]) != len(self.parameters):
            raise ValueError(f"its optimiser knows {len(optimizer['state'])} of {len(self.parameters)} parameters")
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["model"]["network"])
        self.optimizer.load_state_dict(optimizer)
        self.best = {name: state["best"][name] for name in ("step", "dice")}
        if self.contrast is not None:
            self.contrast.load_state_dict(state["contrast"])


class Training:
    """One run in its folder.

    Args:
        root: the data folder.
        output: the folder of the run.
        config: its options.
        resume: go on with the run that is there.
        profile: measure where a step's time goes.
        quiet: print nothing.
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
        self.folder = RunFolder(output, root, config)
        self.lock: FolderLock | None = None  # of the first rank
        self.device = device_of_rank(choose_device(config.device))
        self.profile = Profile(self.device, profile)
        self.speaks = own_rank() == 0  # known before the ranks meet
        self.progress = Progress(config.steps, quiet=quiet or not self.speaks)
        self.stop = False

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            UserError: what a user can mend.
            Interrupted: on a signal, after a checkpoint.
        """
        with launched_ranks(self.device) as ranks:
            self._run(ranks)

    def _run(self, ranks: Ranks) -> None:
        with contextlib.ExitStack() as held:
            with ranks.together():
                check_resources(self.config, self.device, ranks.size)
                if ranks.is_first:
                    self.lock = held.enter_context(FolderLock(self.output))
                    self.folder.open(resume=self.resume, ranks=ranks.size)
            self._run_in_folder(ranks)

    def _run_in_folder(self, ranks: Ranks) -> None:
        folder, progress = self.folder, self.progress
        # The first rank alone looks into the folder, or another would find what it has just written.
        folder.config, folder.record = ranks.from_first((folder.config, folder.record))
        state = None
        with ranks.together():
            data_folder = open_folder(self.root)
            split = folder.split or split_patients(data_folder, folder.config)
            if ranks.is_first and folder.record is not None:
                state = folder.resume(self.root, files_read(data_folder, split))
        if ranks.from_first(state is not None and state["step"] == folder.config.steps and folder.model.exists()):
            progress.say(f"{self.output}: this run has ended; nothing to resume. More --steps would go on with it")
            return
        state = self._state_of_all(ranks, state)
        with ranks.together():
            data = load_training_data(self.root, folder.config, split, progress=progress)
            initial = initial_model(folder.config, data.channels, data.survey.labels) if state is None else None
            if ranks.is_first and folder.record is None:
                folder.begin(split, self.root, files_read(data_folder, split), ranks.size, initial)
            elif ranks.is_first:
                if state is None:
                    folder.check_initial(initial)
                for note in folder.notes():
                    progress.say(note)
        self.config = folder.config = ranks.from_first(folder.config)
        folder.record = ranks.from_first(folder.record)
        learner = Learner(self.config, data, ranks, self.profile)
        if initial is not None:
            learner.start_from(initial)
            progress.say(f"{self.config.init}: its weights of step {initial.step} are the first ones")
        first = 0 if state is None else self._restore(learner, state)
        if ranks.is_first:
            folder.go_on(first)
            if state is None:
                folder.save_checkpoint(learner.state(0))  # from now on there is always one that loads
        if first < self.config.steps:
            self._train(learner, first)
        self._save_models(learner)
        if ranks.is_first:
            self._show_profile(self.config.steps - max(first, self.config.warmup_steps))

    def _state_of_all(self, ranks: Ranks, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The first rank's state, which the others read from its file."""
        exists = ranks.from_first(state is not None)
        with ranks.together():
            if exists and state is None:
                state = self.folder.load_checkpoint()
        return state

    def _restore(self, learner: Learner, state: dict[str, Any]) -> int:
        try:
            learner.restore(state)
            return int(state["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error.args[0] if isinstance(error, KeyError) else error).splitlines()[0]
            raise UserError(f"{self.folder.checkpoint}: does not fit this run: {reason}") from error

    def _train(self, learner: Learner, first: int) -> None:
        """The steps from `first` on."""
        config, data, ranks, progress = self.config, learner.data, learner.ranks, self.progress
        batches = StepBatches(data.labelled, data.unlabelled, config, ranks.rank, semi=config.semi)
        with ranks.together():
            most = most_workers(batches, config.workers)
        workers = config.workers if config.workers >= 0 else self._choose_workers(batches, learner, most)
        log = MetricsLog(self.output, first) if ranks.is_first else None
        volumes = f"{len(data.labelled)} labelled and {len(data.unlabelled)} unlabelled volumes"
        progress.start(first, f"{config.method}, {volumes}")
        source = loader(batches, first, workers)
        try:
            with self._asked_to_stop():
                for step in range(first, config.steps):
                    with self.profile("data"):
                        batch = {name: t.to(self.device, non_blocking=True) for name, t in next(source).items()}
                    losses = learner.step(batch, step)
                    self._after_step(learner, step + 1, losses, log)
        finally:
            progress.stop()
            if log:
                log.close()

    def _after_step(self, learner: Learner, done: int, losses: dict[str, Tensor], log: MetricsLog | None) -> None:
        """What is due when `done` steps are done: a line of the log, a validation, a checkpoint, the end."""
        config, ranks = self.config, learner.ranks
        last = done == config.steps
        if done % LOG_EVERY == 0 or last:
            numbers = {name: float(value) for name, value in losses.items()}
            if not all(math.isfinite(v) for v in numbers.values()):
                raise UserError(f"step {done}: a loss is not a number: {numbers}. Try a smaller --learning-rate")
            self.progress.step(done, numbers)
            if self.lock:
                self.lock.check()
            if log:
                log.write({"step": done, **numbers})
        if config.validate_every and (done % config.validate_every == 0 or last):
            dice = validation_dice(learner, done)
            self.progress.validated(done, dice)
            if dice > learner.best["dice"]:
                learner.best = {"step": done, "dice": dice}
                if ranks.is_first:
                    self.folder.save_model(learner.model(done), self.folder.best)
            if log and not math.isnan(dice):
                log.write({"step": done, "validation_dice": dice})
        if done % LOG_EVERY == 0 and parent_has_ended():
            self.stop = True
        # Ranks stop together; they ask each other now and then only.
        stopping = self.stop if ranks.size == 1 else done % LOG_EVERY == 0 and ranks.is_any(self.stop)
        if ranks.is_first and (done % config.checkpoint_every == 0 or last or stopping):
            self.folder.save_checkpoint(learner.state(done))
        if stopping and not last:
            raise Interrupted(f"stopped after step {done}; --resume goes on from there")

    def _save_models(self, learner: Learner) -> None:
        """The last model and the best one, each with the classes whose masks keep their largest component."""
        last = learner.model(self.config.steps)
        models = [last]
        if learner.best["step"] and learner.best["step"] != last.step:
            with learner.ranks.together():
                models.append(load_model(self.output, str(self.device), "best"))
        for model in models:
            model.organs = organs_of_masks(model, learner.data, learner.ranks)
        if not learner.ranks.is_first:
            return
        self.folder.save_model(last, self.folder.model)
        if learner.best["step"]:
            self.folder.save_model(models[-1], self.folder.best)
            best = f"step {learner.best['step']:.0f}, a validation Dice of {100 * learner.best['dice']:.1f} %"
            self.progress.say(f"best.pt: {best}; model.pt: step {last.step}, the last")
        if last.organs is None:
            self.progress.say("masks are kept as predicted: no validation patients say that islands may be removed")
        else:
            names = ", ".join(last.class_names[label] for label in last.organs) or "no class"
            self.progress.say(
                f"masks keep the largest component of {names}, as validation patients score no worse then"
            )

    def _choose_workers(self, batches: StepBatches, learner: Learner, most: int) -> int:
        """The number with which steps are fastest: workers keep the network fed, but take cores from it."""
        cores = (os.cpu_count() or 1) // learner.ranks.size
        network = copy.deepcopy(learner.student)
        seconds: dict[int, float] = {}
        for workers in sorted({0, 1, min(2, cores - 1), min(4, cores - 1)}):
            if workers == 0 or (0 < workers <= most and cores > 1):
                seconds[workers] = self._seconds_of_a_step(batches, network, workers)
        best = min(seconds, key=lambda w: seconds[w])
        measured = ", ".join(f"{1e3 * s:.0f} ms with {w}" for w, s in seconds.items())
        self.progress.say(f"workers that prepare batches: {best} (a step of the bare network takes {measured})")
        return best

    def _seconds_of_a_step(self, batches: StepBatches, network: SegmentationNetwork, workers: int) -> float:
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
        return (time.perf_counter() - start) / counted

    @contextlib.contextmanager
    def _asked_to_stop(self) -> Iterator[None]:
        """The first Ctrl-C, SIGTERM or SIGHUP lets the step end, and writes a checkpoint; the second does not wait."""

        def ask(number: int, frame: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True

        before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _show_profile(self, steps: int) -> None:
        if self.profile.enabled:
            rows = self.profile.rows(max(1, steps))
            write_json(self.output / "profile.json", [list(row) for row in rows])
            shown = [[name, f"{ms:.1f}", f"{share:.1%}"] for name, ms, share in rows]
            self.progress.table("Time of a step", ["section", "ms", "share"], shown)


def validation_dice(learner: Learner, step: int) -> float:
    """Mean Dice of the teacher on the validation patients, NaN without any; each rank takes its share of them."""
    ranks = learner.ranks
    scores: list[Score] = []
    for case in learner.data.validation[ranks.rank :: ranks.size]:
        scores += score_case(learner.model(step), case, distances=False)
    means = list(patient_means(scores, "dice").values())
    if ranks.size == 1:
        return float(np.mean(means)) if means else math.nan
    total, count = ranks.sum([sum(means), len(means)])
    return total / count if count else math.nan
