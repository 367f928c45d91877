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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated",
        type=int,
        metavar="CAPABILITY",
        help="run the ops' CUDA code, host and device, on an emulated device of this compute capability (75, 80, 86, "
        "90) in the place of the CPU's; tests that are about the CPU's own code are left out",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--emulated") is not None:
        from tests.simt import emulator

        emulator.use(emulator.DEVICES[config.getoption("--emulated")])


ABOUT_THE_CPU = ("test_every_instruction_set", "test_same_bits_for_any_number_of_threads", "test_memory_is_linear")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--emulated") is not None:
        left_out = [item for item in items if item.name.startswith(ABOUT_THE_CPU)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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
