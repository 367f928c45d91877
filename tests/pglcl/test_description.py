"""A data folder that gives the names of the training another meaning is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pglcl.cli import main
from pglcl.description import Description
from pglcl.errors import UserError
from pglcl.layouts import open_folder
from pglcl.model import load_model
from pglcl.predict import Predictor
from pglcl.train import Training

from tests.pglcl.folders import describe, nnunet, tiny


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [
        (("T1", "T2"), ("t1 ", "T2"), False),
        (("T1", "T2"), ("T2", "T1"), True),
        (("T1", "T2"), ("t1w", "t2w"), False),
        (("T1", "T2"), (), False),
        (("image", "channel_t2", "channel_flair"), ("image", "channel_flair", "channel_t2"), True),
    ],
)
def test_channels_at_other_places_are_a_contradiction(
    first: tuple[str, ...], second: tuple[str, ...], differ: bool
) -> None:
    lines = Description(first).contradictions(Description(second))
    assert [f"in the training {', '.join(first)}" in line for line in lines] == [True] * differ


def test_names_with_other_values_are_a_contradiction() -> None:
    began = Description((), {"background": (0,), "liver": (1,), "lung": (10, 11)})
    assert Description.from_state(json.loads(json.dumps(began.state()))) == began
    assert began.contradictions(Description((), {"Liver": (1,), "lung": (11,), "spleen": (5,)})) == []
    lines = began.contradictions(Description((), {"spleen": (1,), "Liver": (2,)}))
    assert lines == ["the class 'liver' has the value 2, in the training 1"]


def test_data_that_contradict_the_training_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = nnunet(tmp_path / "data", channels=2), tmp_path / "run"
    Training(root, run, tiny(steps=4), quiet=True).run()
    assert Description.of(open_folder(root)).channels == ("MR0", "MR1")
    other = Path(shutil.copytree(root, tmp_path / "other"))
    assert main(["evaluate", str(run), str(other), "-o", str(tmp_path / "scores")]) == 0
    describe(other, channel_names={"0": "MR1", "1": "MR0"}, labels={"background": 0, "cube": 1, "ball": 2})
    capsys.readouterr()
    for arguments in (["evaluate", str(run), str(other)], ["report", str(run), "--data", str(other)]):
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            f"pglcl: {other}: channels are MR1, MR0, in the training MR0, MR1",
            f"pglcl: {other}: the class 'ball' has the value 2, in the training 1",
            f"pglcl: {other}: the class 'cube' has the value 1, in the training 2",
        ]
    describe(other, channel_names={"0": "MR1", "1": "MR0"})
    swapped = load_model(run)
    swapped.description = Description.of(open_folder(other))
    with pytest.raises(UserError, match="runs that are averaged must agree: of run 2, channels are MR1, MR0, in"):
        Predictor([load_model(run), swapped])
    with pytest.raises(UserError, match="channels are MR1, MR0, in the training MR0, MR1"):
        Training(other, tmp_path / "new", tiny(steps=4, init=str(run)), quiet=True).run()
