"""Shared fixtures. Every test of an op runs on the CPU, and on a GPU too where one is visible."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")

DEVICES = ["cpu"]
if torch.cuda.is_available():
    from pglcl_ext import build_info

    if build_info()["cuda_built"]:
        DEVICES.append("cuda")

ROOT = Path(__file__).parent.parent


def data_folder() -> Path | None:
    """Real volumes for the tests that want them: PGLCL_DATA, or shared/data beside the repository."""
    for place in (os.environ.get("PGLCL_DATA"), ROOT.parent / "shared" / "data", ROOT / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    return None


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
