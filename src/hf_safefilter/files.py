"""Files that a reader never sees half of, and what a folder of results says of itself."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, first_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp's files are for their owner alone; an output gets the mode that any new file would get.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write flat rows as Parquet in one step; a column that a row lacks is null there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), temporary)


def read_json(path: Path) -> Any:
    """What a file of a run holds.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({first_line(error)}): delete it, and it is made again") from None


def agree(path: Path, description: Mapping[str, Any]) -> None:
    """Write what a study is, or check that it is the one that is there.

    Raises:
        InputError: the folder holds another study.
    """
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        write_atomically(path, text.encode())
        return
    there = read_json(path)
    for name, value in json.loads(text).items():
        kept = there.get(name) if isinstance(there, dict) else None
        if not isinstance(there, dict) or kept != value:
            which = _first_difference(kept, value)
            raise InputError(f"{path.parent} holds a study with another {name.replace('_', ' ')}{which}: use another folder")


def _first_difference(there: Any, here: Any) -> str:
    """Which part of two dicts differs, in brackets; nothing where that is not to be told."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in here:
            if name in there and there[name] != here[name]:
                return f" ({name}: {there[name]!r} there, {here[name]!r} here)"
    return ""
