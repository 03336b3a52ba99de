"""The package's errors: each says what was wrong, where, and how to fix it, in one line."""

from __future__ import annotations


def readable(text: str) -> str:
    """Text from outside with control characters spelled out: on a terminal they could move, hide or rewrite what is shown."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class SafefilterError(Exception):
    """Base of every error that this package raises on purpose; `exit_code` is what the CLI ends with."""

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(readable(str(message)))


class InputError(SafefilterError, ValueError):
    """An argument, a column or a file is wrong; the caller can fix it (exit code 1)."""

    exit_code = 1


class EvaluationError(SafefilterError, RuntimeError):
    """The input was fine, but the work could not be done (exit code 2)."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: the first that holds anything, or the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


class UnscorableRow(Exception):
    """One row cannot be scored; the message becomes its `risk_status`. It never leaves the scorer."""

    def __init__(self, message: object = "") -> None:
        super().__init__(readable(str(message)))
