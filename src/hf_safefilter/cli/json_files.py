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
    with path.open("rb") as file:
        # An array, or an object over several lines, is read by another parser, which takes anything but depth.
        by_line = _is_by_line(file.readline() if path.suffix == ".json" else b"{}")
        file.seek(0)
        for number, line in enumerate(file, 1):
            # The mark at the start of a file belongs to no line.
            start = line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] if number == 1 else line.lstrip()[:1]
            if by_line and start not in (b"{", b"") and not (number == 1 and start == b"["):
                raise InputError(f"{path}: line {number} is no JSON object ({line[:40]!r}); write one row a line, as {{...}}")
            if number == 1 and start == b"[":
                by_line = False
            if line.count(b"[") + line.count(b"{") > _BRACKETS:
                _check_depth(path, number, line)


def _is_by_line(first: bytes) -> bool:
    try:
        return isinstance(json.loads(first), dict)
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
