"""PEP 517 backend: setuptools, which builds against the torch that the environment already holds.

Without a torch, the build requires one from pip, which shows the environment that it installs into. Other front ends
hide that environment. They might download gigabytes of another torch than the one that will run, so the build stops.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from find_torch import TORCH_REQUIREMENT, NoTorch, find_torch  # noqa: E402
from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import (  # noqa: E402, F401  (the backend's interface)
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)

NOT_BUILT = ("build", "dist", ".git", ".venv*", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "*.so", "runs")


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*_torch_if_missing(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*_torch_if_missing(), *build_meta.get_requires_for_build_editable(config_settings)]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    with _writable_sources():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    with _writable_sources():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    with _writable_sources():
        return build_meta.build_sdist(sdist_directory, config_settings)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    if not _can_write(ROOT):
        raise SystemExit(
            f"pglcl-ext: {ROOT} is read-only, and an editable install compiles into it; use pip install {ROOT}"
        )
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _torch_if_missing() -> list[str]:
    if find_torch(os.environ.get("PGLCL_TORCH_DIR")):
        return []
    if "PIP_BUILD_TRACKER" in os.environ:  # set by pip for every build
        return [TORCH_REQUIREMENT]
    raise NoTorch(
        f"pglcl-ext: no torch found to build against. Install {TORCH_REQUIREMENT} into an environment, then activate "
        "that environment or set PGLCL_TORCH_DIR=.../site-packages/torch, and repeat this command"
    )


def _can_write(folder: Path) -> bool:
    """Whether a file can be made in `folder`. Permissions do not tell this for a read-only mount."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _writable_sources() -> Iterator[None]:
    """Works in the folder of the sources, or in a copy if they are read-only, since setuptools writes beside them."""
    if _can_write(ROOT):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="pglcl-ext-") as temporary:
        copy = Path(temporary) / "sources"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_BUILT))
        for path in (copy, *copy.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
        previous = Path.cwd()
        os.chdir(copy)
        try:
            yield
        finally:
            os.chdir(previous)
