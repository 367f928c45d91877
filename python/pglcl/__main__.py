"""``python -m pglcl`` and the command ``pglcl``."""

from __future__ import annotations

import io
import os
import sys

from pglcl import MissingPackages, require_packages
from pglcl.stopping import remember_interrupts


def prepare_streams() -> None:
    """Standard streams that take whatever is printed.

    One that was closed (`>&-`, some job schedulers) becomes the null device, or the next file that is opened would get
    its number, and with it what native libraries print. Signs that the encoding of the terminal lacks are spelled out.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, since those below it are open
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def main() -> int:
    prepare_streams()
    remember_interrupts()
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no advice to authors of distributed programs
    try:
        require_packages(*(["nilearn"] if sys.argv[1:2] == ["demo"] else []))
    except MissingPackages as error:
        print(error, file=sys.stderr)
        return 3
    try:
        from pglcl.cli import main as run

        return run()
    except KeyboardInterrupt:  # while PyTorch is imported, say
        print("pglcl: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
