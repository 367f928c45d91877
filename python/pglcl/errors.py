"""What a user can mend: printed as one line each, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """One or more lines that say which file or option, what was expected and what came."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
