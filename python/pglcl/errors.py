"""Errors that a user can correct. They are printed without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """One or more lines that say which file or option, what was expected and what came.

    Args:
        lines: what is printed.
        everywhere: in a training on several processes: all raise the same error, so only one of them prints it.
    """

    def __init__(self, *lines: str, everywhere: bool = False) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.everywhere = everywhere


class WriteError(UserError):
    """A file cannot be written. Neither can the next one, so commands stop here."""


def explained(error: BaseException) -> tuple[str, ...] | None:
    """The lines that explain an error of the input, the disk or the memory; None for a bug of the program."""
    if isinstance(error, UserError):
        return error.lines
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else "an allocation failed"
        return (f"out of memory: {reason}",)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        reason = error.strerror or str(error)
        return (f"{error.filename}: {reason}" if error.filename else f"error of the operating system: {reason}",)
    return None


def first_line(error: BaseException) -> str:
    """The line of an error message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "SimpleITK" in lines[0]:  # the first line is the place in the sources of SimpleITK
        return lines[-1].removeprefix("ITK ERROR: ")
    return lines[0] if lines else repr(error)


def wrong_content(error: Exception) -> str:
    """The reason why the content of a file does not suit: a missing entry, or the message of the error."""
    return f'has no entry "{error.args[0]}"' if isinstance(error, KeyError) else first_line(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch lacked memory, which it reports as a RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
