"""PEP 517 backend: setuptools, told to build against the torch that the environment already holds.

Only where no torch is installed does the isolated build ask for one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from find_torch import torch_folder
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the backend's interface)
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

TORCH_REQUIREMENT = "torch>=2.13"


def _torch_if_missing() -> list[str]:
    return [] if torch_folder() else [TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_if_missing()]


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_sdist(config_settings)
