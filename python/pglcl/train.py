"""A training run: its order of events, its loop, and what each rank does."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from pglcl.batches import StepBatches, loader
from pglcl.cases import cases_of, split_patients
from pglcl.config import TrainConfig
from pglcl.errors import UserError, wrong_content
from pglcl.files import Unchanged, write_json
from pglcl.launcher import is_first_process
from pglcl.layouts import Case, open_folder
from pglcl.learner import Learner, validation_dice
from pglcl.limits import check_resources
from pglcl.lock import FolderLock
from pglcl.memory import keep_freed_memory
from pglcl.model import TrainedModel, choose_device, initial_model, load_model
from pglcl.organs import organs_of_masks
from pglcl.postprocess import Organ
from pglcl.prepare import decide_slices
from pglcl.progress import Progress
from pglcl.ranks import Ranks, device_of_rank, launched_ranks
from pglcl.record import MetricsLog, Profile
from pglcl.run_folder import RunFolder, patients_read_by
from pglcl.stopping import StopRequest
from pglcl.training_data import cases_read, files_of_cases, load_training_data
from pglcl.workers import choose_workers

LOG_EVERY = 10  # steps; reading a loss waits for the device


class Interrupted(Exception):
    """A signal stopped the training (Ctrl-C, SIGTERM). The checkpoint is written."""


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
        self.lock: FolderLock | None = None  # held by the first rank alone
        self.device = device_of_rank(choose_device(config.device))
        self.profile = Profile(self.device, profile)
        self.progress = Progress(config.steps, quiet=quiet or not is_first_process())
        self.stop = StopRequest()
        self.validation = Unchanged(())  # on the first rank: the files that each validation reads again

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            UserError: an error that a user can mend.
            Interrupted: a signal asked to stop; the checkpoint is written.
        """
        with launched_ranks(self.device) as ranks:
            self._run(ranks)

    def _run(self, ranks: Ranks) -> None:
        with contextlib.ExitStack() as held:
            with ranks.together():
                check_resources(self.config, self.device, ranks.on_machine)
                if ranks.is_first:
                    self.lock = held.enter_context(FolderLock(self.output))
                    self.folder.open(resume=self.resume, ranks=ranks.size)
            self._run_in_folder(ranks)

    def _run_in_folder(self, ranks: Ranks) -> None:
        folder, progress = self.folder, self.progress
        # Only the first rank looks into the folder: the others could find what it has just written.
        folder.config, folder.record = ranks.from_first((folder.config, folder.record))
        state = None
        with ranks.together():
            data_folder = open_folder(self.root)
            folder.config = decide_slices(folder.config, data_folder.cases)
            split = folder.split or split_patients(data_folder, folder.config)
            cases = cases_read(data_folder, split) if ranks.is_first else []
            read = Unchanged(files_of_cases(cases))
            if ranks.is_first and folder.record is not None:
                state = folder.resume(self.root, cases)
        if ranks.from_first(state is not None and state["step"] == folder.config.steps and folder.model.exists()):
            progress.print_line(
                f"{self.output}: this run is finished and needs no resume; a larger --steps would continue it"
            )
            return
        state = self._state_of_all(ranks, state)
        with ranks.together():
            data = load_training_data(self.root, folder.config, split, progress=progress)
            initial = None
            if state is None:
                found = data.survey
                initial = initial_model(folder.config, found.channels, found.labels, found.description)
            if ranks.is_first and folder.record is None:
                if initial is not None:
                    self._warn_of_seen_patients(
                        cases_of(data_folder, (*split.validation, *split.test), with_label=True)
                    )
                    if initial.resolution and (other := found.resolution.other_sizes(initial.resolution)):
                        progress.print_line(f"--init {folder.config.init}: {other}")
                folder.begin(split, self.root, cases, ranks.size, initial)
            elif ranks.is_first:
                if state is None:
                    folder.check_initial(initial)
                for note in folder.notes():
                    progress.print_line(note)
            read.check()  # all files are read and hashed by now
            if ranks.is_first:
                self.validation = read.only(files_of_cases(data.validation))
        self.config = folder.config = ranks.from_first(folder.config)
        folder.record = ranks.from_first(folder.record)
        learner = Learner(self.config, data, ranks, self.profile)
        if initial is not None:
            learner.start_from(initial)
            progress.print_line(f"{self.config.init}: the training starts from its weights of step {initial.step}")
        first = 0 if state is None else self._restore(learner, state)
        if ranks.is_first:
            folder.go_on(first)
            if state is None:
                folder.save_checkpoint(learner.state(0))  # from now on, there is always a checkpoint that loads
        if first < self.config.steps:
            self._train(learner, first)
        self._save_models(learner)
        if ranks.is_first:
            self._show_profile(self.config.steps - max(first, self.config.warmup_steps))

    def _warn_of_seen_patients(self, held_out: list[Case]) -> None:
        """Prints a line when the run of `--init` was trained on patients that are held out now."""
        seen = patients_read_by(Path(self.config.init), held_out)
        if seen:
            names = ", ".join(seen[:5]) + (", ..." if len(seen) > 5 else "")
            self.progress.print_line(
                f"--init {self.config.init}: that run read images of {len(seen)} patients that are now held out: "
                f"{names}; their scores say nothing about new patients"
            )

    def _state_of_all(self, ranks: Ranks, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The state of the first rank. The others read it from the checkpoint."""
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
            raise UserError(f"{self.folder.checkpoint}: does not fit this run: {wrong_content(error)}") from error

    def _train(self, learner: Learner, first: int) -> None:
        """Trains from step `first` on."""
        config, data, ranks, progress = self.config, learner.data, learner.ranks, self.progress
        if self.device.type == "cpu":
            keep_freed_memory()
        batches = StepBatches(data.labelled, data.unlabelled, config, ranks.rank, semi=config.semi)
        with ranks.together():
            workers = choose_workers(batches, learner.student, self.device, ranks.on_machine, progress)
        log = MetricsLog(self.output, first) if ranks.is_first else None
        volumes = f"{len(data.labelled)} labelled and {len(data.unlabelled)} unlabelled volumes"
        progress.start(first, f"{config.method}, {volumes}")
        source = loader(batches, first, workers)
        try:
            with self.stop:
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
        """Does what is due after `done` steps: a line of the log, a validation, a checkpoint, a stop."""
        config, ranks = self.config, learner.ranks
        last = done == config.steps
        if done % LOG_EVERY == 0 or last:
            numbers = {name: float(value) for name, value in losses.items()}
            if not all(math.isfinite(v) for v in numbers.values()):
                raise UserError(f"step {done}: a loss is not finite: {numbers}. Try a smaller --learning-rate")
            self.progress.step(done, numbers)
            if self.lock:
                self.lock.check()
            if log:
                log.write({"step": done, **numbers})
        if config.validate_every and (done % config.validate_every == 0 or last):
            self._check_validation(ranks)
            dice = validation_dice(learner, done)
            self.progress.validated(done, dice)
            if dice > learner.best["dice"]:
                learner.best = {"step": done, "dice": dice}
                if ranks.is_first:
                    self.folder.save_model(learner.model(done), self.folder.best)
            if log and not math.isnan(dice):
                log.write({"step": done, "validation_dice": dice})
        if done % LOG_EVERY == 0:
            self.stop.look_at_parent()
        # Ranks stop together. They have to wait for each other to agree on it, so they do it every LOG_EVERY steps.
        stopping = self.stop.asked if ranks.size == 1 else done % LOG_EVERY == 0 and ranks.any_rank(self.stop.asked)
        if ranks.is_first and (done % config.checkpoint_every == 0 or last or stopping):
            self.folder.save_checkpoint(learner.state(done))
        if stopping and not last:
            # A launcher gives the first rank little time once another one has ended.
            ranks.from_first("the checkpoint is written")
            raise Interrupted(f"stopped after step {done}; --resume continues from there")

    def _check_validation(self, ranks: Ranks) -> None:
        """Raises UserError when a validation volume has changed since the run began."""
        with ranks.together():
            self.validation.check(self.folder.hash_of)

    def _save_models(self, learner: Learner) -> None:
        """Saves the last model and the best one, each with the classes whose masks keep only the largest component."""
        last = learner.model(self.config.steps)
        models = [last]
        if learner.best["step"] and learner.best["step"] != last.step:
            with learner.ranks.together():
                models.append(load_model(self.output, str(self.device), "best"))
        self._check_validation(learner.ranks)
        for model in models:
            model.organs = organs_of_masks(model, learner.data, learner.ranks)
        if not learner.ranks.is_first:
            return
        if learner.best["step"]:
            self.folder.save_model(models[-1], self.folder.best)
        self.folder.save_model(last, self.folder.model)  # last of all: it shows that the run has ended
        if learner.best["step"]:
            best = f"step {learner.best['step']:.0f}, a validation Dice of {100 * learner.best['dice']:.1f} %"
            self.progress.print_line(f"best.pt: {best}; model.pt: step {last.step}, the last")
        if last.organs is None:
            self.progress.print_line(
                "masks are kept as predicted: without validation patients, it is not known for which classes keeping "
                "only the largest component helps"
            )
        else:
            names = ", ".join(_in_words(organ, last) for organ in last.organs) or "no class"
            self.progress.print_line(
                f"masks keep only the largest component of {names}: the validation patients score no worse with it"
            )

    def _show_profile(self, steps: int) -> None:
        if self.profile.enabled:
            rows = self.profile.rows(max(1, steps))
            write_json(self.output / "profile.json", [list(row) for row in rows])
            shown = [[name, f"{ms:.1f}", f"{share:.1%}"] for name, ms, share in rows]
            self.progress.table("Time of a step", ["section", "ms", "share"], shown)


def _in_words(organ: Organ, model: TrainedModel) -> str:
    """An organ by its class; several classes by all of them."""
    names = [model.class_names[label] for label in organ]
    return names[0] if len(names) == 1 else "all classes together"
