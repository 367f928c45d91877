"""The demo writes into a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pglcl.cli import main
from pglcl.demo import NAME, check_folder, write_template
from pglcl.errors import UserError
from pglcl.train import Interrupted, Training


def test_the_demo_refuses_a_folder_with_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "split.json"
    mine.write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "holds files that pglcl demo did not write" in capsys.readouterr().err
    assert main(["demo", "--output", str(mine)]) == 2
    assert "must be a folder" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_a_folder_is_recognised_as_the_demos_by_its_dataset_json(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    (tmp_path / "new").rmdir()
    described = tmp_path / "data" / "dataset.json"
    described.parent.mkdir()
    for text in ('{"name": "MNI152"}', "[]", "{"):
        described.write_text(text)
        with pytest.raises(UserError, match="holds files that pglcl demo did not write"):
            check_folder(tmp_path)
    described.write_text(json.dumps({"name": NAME}))
    check_folder(tmp_path)


def test_the_folder_of_a_killed_demo_can_be_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nilearn")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pglcl.demo.nib.save", killed)
    with pytest.raises(KeyboardInterrupt):
        write_template(tmp_path / "data")
    check_folder(tmp_path)  # the next demo may use it again


def test_a_stopped_demo_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Training) -> None:
        raise Interrupted("stopped after step 3")

    monkeypatch.setattr("pglcl.demo.write_template", lambda folder: {"test": []})
    monkeypatch.setattr(Training, "run", stop)
    assert main(["demo", "--output", str(tmp_path / "demo"), "-q"]) == 130
    assert capsys.readouterr().err == "pglcl: stopped\n"
