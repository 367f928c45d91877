"""Prints `folder;version;cuda;target` of the torch to build against, without importing it.

`target` is the oldest supported torch as the macro TORCH_TARGET_VERSION has it.

An isolated build does not see the packages of the environment that asked for it. Their folders are still known: pip
leaves them in sysconfig, and other front ends in environment variables. Torch's version file tells the rest. So the
extension is compiled against the torch that it will run with, and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def _constant(file: Path, name: str) -> str | None:
    """The text that a Python file assigns to `name`, without running the file."""
    pattern = rf"^{name}(?:\s*:[^=]+)?\s*=\s*['\"]([^'\"]+)['\"]"
    match = re.search(pattern, file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return match.group(1) if match else None


OLDEST_TORCH = _constant(Path(__file__).parents[1] / "pglcl_ext" / "_library.py", "OLDEST_TORCH") or ""
TORCH_REQUIREMENT = f"torch>={OLDEST_TORCH}"
TORCH_TARGET_VERSION = "0x" + "".join(f"{int(number):02x}" for number in OLDEST_TORCH.split(".")) + 12 * "0"


class NoTorch(SystemExit):
    """There is no torch to build against. The message is one line and names a command that works."""


def find_torch(wanted: str | None = None) -> Path | None:
    """The folder of the torch package to build against.

    Args:
        wanted: the folder that the user names (``PGLCL_TORCH_DIR``). By default, the first torch in: the packages of
            the running interpreter, the environments of ``UV_PROJECT_ENVIRONMENT``, ``VIRTUAL_ENV`` and
            ``CONDA_PREFIX``, the first virtual environment on ``PATH``.

    Returns:
        The folder, or None if there is no torch.

    Raises:
        NoTorch: `wanted` is no torch package, or the torch that was found is too old.
    """
    if wanted:
        if not _is_torch(Path(wanted)):
            raise NoTorch(
                f"pglcl-ext: PGLCL_TORCH_DIR={wanted} is no folder of a torch package (.../site-packages/torch)"
            )
        return _new_enough(Path(wanted).resolve())
    for place in _package_folders():
        if _is_torch(place / "torch"):
            return _new_enough(place / "torch")
    return None


def torch_versions(folder: Path) -> tuple[str, str]:
    """(version, CUDA version or "none") from torch's own version file."""
    version, cuda = (_constant(folder / "version.py", name) for name in ("__version__", "cuda"))
    if version is None:
        raise NoTorch(f"pglcl-ext: {folder / 'version.py'} names no version")
    return version, cuda or "none"


def _is_torch(folder: Path) -> bool:
    return (folder / "version.py").is_file() and (folder / "include").is_dir()


def _new_enough(folder: Path) -> Path:
    version, _ = torch_versions(folder)
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if numbers < [int(number) for number in OLDEST_TORCH.split(".")]:
        raise NoTorch(
            f"pglcl-ext: needs {TORCH_REQUIREMENT}, found {version} in {folder}; pip install '{TORCH_REQUIREMENT}'"
        )
    return folder


def _package_folders() -> Iterator[Path]:
    """Folders that may hold the packages of the environment that the extension is built for, the likeliest first."""
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    yield from (Path(entry) for entry in sys.path if entry)
    if _sees_system_packages():
        yield from (Path(entry) for entry in site.getsitepackages([sys.base_prefix]))
        yield Path(site.getusersitepackages())
    for prefix in _environments():
        yield prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        yield prefix / "Lib" / "site-packages"


def _sees_system_packages() -> bool:
    if sys.prefix == sys.base_prefix:
        return True
    settings = Path(sys.prefix) / "pyvenv.cfg"
    return settings.is_file() and bool(
        re.search(r"^include-system-site-packages\s*=\s*true\s*$", settings.read_text(), re.MULTILINE | re.IGNORECASE)
    )


def _environments() -> Iterator[Path]:
    """Environments that the caller has set. uv replaces VIRTUAL_ENV, but leaves an activated environment on PATH."""
    for variable in ("UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    for entry in os.environ.get("PATH", "").split(os.pathsep):
        prefix = Path(entry).parent
        if (prefix / "pyvenv.cfg").is_file() and prefix != Path(sys.prefix):
            yield prefix
            return


if __name__ == "__main__":
    found = find_torch(sys.argv[1] if len(sys.argv) > 1 else None)
    if found is None:
        raise NoTorch("pglcl-ext: no torch found to build against: install it, or set PGLCL_TORCH_DIR to its folder")
    print(";".join([str(found), *torch_versions(found), TORCH_TARGET_VERSION]))
