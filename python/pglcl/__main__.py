"""``python -m pglcl`` and the command ``pglcl``."""

from __future__ import annotations

import io
import os
import sys

from pglcl import MissingPackages, require_packages
from pglcl.stopping import STOPPED, forget_interrupts, remember_interrupts
from pglcl.unfinished import remove_unfinished


def prepare_streams() -> None:
    """Makes the standard streams accept whatever is printed.

    A closed stream (`>&-`, some job schedulers) is replaced by the null device. Otherwise the next file that is opened
    would get its number, and native libraries would print into that file. Characters that the terminal's encoding
    lacks are escaped.
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
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides advice to authors of distributed programs
    try:
        require_packages(*(["nilearn"] if sys.argv[1:2] == ["demo"] else []))
    except MissingPackages as error:
        print(error, file=sys.stderr)
        return 3
    try:
        from pglcl.cli import main as run

        return run()
    except KeyboardInterrupt:  # for example while PyTorch is imported
        print("pglcl: stopped", file=sys.stderr)
        return STOPPED
    finally:
        forget_interrupts()
        remove_unfinished()


if __name__ == "__main__":
    sys.exit(main())
