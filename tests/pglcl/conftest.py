"""Fixtures that several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from pglcl.train import Training

from tests.pglcl.folders import plain, tiny


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data folder and a run that ended on it. Tests leave both as they are; `run_of` gives a copy."""
    root, run = plain(tmp_path_factory.mktemp("plain")), tmp_path_factory.mktemp("runs") / "run"
    Training(root, run, tiny(steps=40, warmup=15, flips="all"), quiet=True).run()
    return root, run
