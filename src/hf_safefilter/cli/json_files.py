"""JSON that would end the process: pyarrow 26 and ujson crash on some files, which no `except` can catch, so we look first."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from ..errors import InputError

# A line with fewer brackets is not nested deeper.
_BRACKETS = 500


def check_json(path: Path) -> None:
    """Refuse a JSON or JSON-lines file with lines that are no objects, such as `null`, or that is nested very deeply.

    Raises:
        InputError: and which line it is.
    """
    by_line: bool | None = None  # until the first line that is not blank
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            # The mark at the start of a file belongs to no line.
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).lstrip()  # noqa: PLW2901
            if not line:
                continue
            if by_line is None and line[:1] in (b"[", b"{"):
                # An array, or an object over several lines, is read by another parser, which takes anything but depth.
                by_line = line[:1] == b"{" and (path.suffix == ".jsonl" or _is_object(line))
            elif by_line is not False and line[:1] != b"{":
                raise InputError(f"{path}: line {number} is no JSON object ({line[:40]!r}); write one row a line, as {{...}}")
            if line.count(b"[") + line.count(b"{") > _BRACKETS:
                _check_depth(path, number, line)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _check_depth(path: Path, number: int, line: bytes) -> None:
    try:
        json.loads(line)
    except RecursionError:
        raise InputError(f"{path}: line {number} is nested too deeply to be read") from None
    except ValueError:
        return  # the reader says what is wrong with it


def check_json_folder(folder: Path, limit: int = 10_000) -> None:
    """The same for the data files in a folder."""
    for path in islice(sorted(p for p in folder.rglob("*.json*") if p.suffix in (".json", ".jsonl") and p.is_file()), limit):
        check_json(path)
