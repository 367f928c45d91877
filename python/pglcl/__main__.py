"""``python -m pglcl`` and the command ``pglcl``."""

from __future__ import annotations

import os
import sys

from pglcl import MissingPackages, require_packages


def main() -> int:
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no advice to authors of distributed programs
    try:
        require_packages(*(["nilearn"] if sys.argv[1:2] == ["demo"] else []))
    except MissingPackages as error:
        print(error, file=sys.stderr)
        return 3
    from pglcl.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
