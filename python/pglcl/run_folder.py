"""The folder of a run: what it holds, and whether a run may go on in it.

config.json, split.json, environment.json; metrics.jsonl and tensorboard/; checkpoint.pt while it runs; model.pt, the
teacher, when it has ended.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pglcl.cases import Split
from pglcl.config import OPTIONS, TrainConfig, flag
from pglcl.errors import UserError
from pglcl.files import check_writable, load_tensors, read_json, save_tensors, write_json
from pglcl.model import TrainedModel
from pglcl.record import environment


class RunFolder:
    """One run's files.

    Args:
        path: of the folder.
        data: the folder that its volumes are in.
        config: its options.
    """

    def __init__(self, path: Path, data: Path, config: TrainConfig) -> None:
        self.path, self.data, self.config = path, data, config
        self.checkpoint, self.model = path / "checkpoint.pt", path / "model.pt"

    def open(self, *, resume: bool) -> dict[str, Any] | None:
        """Makes the folder, or finds the run in it; returns the state of its checkpoint, if there is one.

        Raises:
            UserError: a run is there and `resume` is not asked for, or its options are others.
        """
        if not (self.path / "config.json").exists():
            check_writable(self.path)
        elif not resume:
            raise UserError(
                f"{self.path}: holds a run already; add --resume to go on with it, or choose another --output"
            )
        else:
            changed = differences(read_json(self.path / "config.json"), self._options())
            if changed:
                raise UserError(f"{self.path}: is a run of another configuration:", *changed)
        return load_tensors(self.checkpoint) if resume and self.checkpoint.exists() else None

    def begin(self, split: Split) -> None:
        """Writes what is known of a run before its first step, once."""
        if (self.path / "config.json").exists():
            return
        write_json(self.path / "split.json", split.as_dict())
        write_json(self.path / "environment.json", environment())
        write_json(self.path / "config.json", self._options())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        save_tensors(self.checkpoint, state)

    def save_model(self, model: TrainedModel) -> None:
        save_tensors(self.model, model.state())

    def _options(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.config), "data": str(self.data.resolve())}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each option that changes weights and is not what the run began with."""
    kept = {name for name, option in OPTIONS.items() if not option.weights}
    return [
        f"{flag(name)}: the run has {saved.get(name)!r}, asked for is {now.get(name)!r}"
        for name in sorted({*saved, *now} - kept)
        if saved.get(name) != now.get(name)
    ]
