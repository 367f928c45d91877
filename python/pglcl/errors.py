"""What a user can mend: printed as one line each, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """One or more lines that say which file or option, what was expected and what came.

    Args:
        lines: what is printed.
        everywhere: of a training on several processes: the others raise the same, so that one line is enough.
    """

    def __init__(self, *lines: str, everywhere: bool = False) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.everywhere = everywhere


class WriteError(UserError):
    """A file that cannot be written: the next one will not be either."""


def explained(error: BaseException) -> tuple[str, ...] | None:
    """The lines for an error that is none of the program's own: input, disk, memory. None for a bug."""
    if isinstance(error, UserError):
        return error.lines
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else "an allocation failed"
        return (f"out of memory: {reason}",)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        reason = error.strerror or str(error)
        return (f"{error.filename}: {reason}" if error.filename else f"the system says: {reason}",)
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch reports memory that is not there as a RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
