"""Print `folder;version;cuda` of the torch to build against, without importing it.

pip isolates a build: the environment's own packages are hidden from it. Their folder still shows in sysconfig, and
torch's version file says the rest, so that the extension is compiled against the torch it will run with.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path


def torch_folder(wanted: str | None = None) -> Path | None:
    """The torch package in `wanted`, the environment's site-packages or on the path, in that order."""
    places = [Path(wanted)] if wanted else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    places += [Path(entry) / "torch" for entry in sys.path if entry]
    for place in places:
        if (place / "version.py").is_file() and (place / "include").is_dir():
            return place
    return None


def torch_versions(folder: Path) -> tuple[str, str]:
    """(version, CUDA version or "none") as torch's own version file has them."""
    text = (folder / "version.py").read_text()

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}(?:\s*:[^=]+)?\s*=\s*['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
        return match.group(1) if match else None

    version = value("__version__")
    if version is None:
        raise SystemExit(f"{folder / 'version.py'} names no version")
    return version, value("cuda") or "none"


if __name__ == "__main__":
    found = torch_folder(sys.argv[1] if len(sys.argv) > 1 else None)
    if found is None:
        sys.exit(1)
    print(";".join([str(found), *torch_versions(found)]))
