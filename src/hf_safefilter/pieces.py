"""Parquet files of scored rows that say what they hold: a checksum for each page, and the mark of their run and rows.

They appear by renaming a file that was written whole, so that a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from .files import replacing

if TYPE_CHECKING:
    from .scorer import SafetyRiskScorer

ROW_INDEX = "row_index"
_MARK = b"hf_safefilter.piece"
# Rows in a call of the scorer; see `hf-safefilter score`.
_CALL_GRADIENT, _CALL = 64, 256


def rows_in_a_call(scorer: SafetyRiskScorer) -> int:
    """How many rows a scorer is given at once: scores do not depend on it, but rounding does."""
    return _CALL_GRADIENT if scorer.needs.gradient else _CALL


def score_piece(tables: Iterable[pa.Table], scorer: SafetyRiskScorer, start: int, rank: int | None = None) -> pa.Table:
    """Tables of rows, each a call of the scorer, with their scores and their places from `start` on."""
    scored = pa.concat_tables([scorer(table, rank) for table in tables], promote_options="permissive")
    return scored.append_column(ROW_INDEX, pa.array(range(start, start + len(scored)), pa.int64()))


def write_piece(tables: Iterable[pa.Table], path: Path, mark: str, schema: pa.Schema | None = None) -> str:
    """Write tables as one file (in a schema, by default the first one's); returns its SHA-256.

    Args:
        tables: of the same columns.
        path: the file.
        mark: which run and rows these are; "" for none.
        schema: of the file, where the tables' own may differ.
    """
    with replacing(path) as temporary:
        writer = None
        for table in tables:
            if writer is None:
                schema = described(table.schema if schema is None else schema)
                schema = schema.with_metadata({**schema.metadata, **({_MARK: mark.encode()} if mark else {})})
                writer = pq.ParquetWriter(temporary, schema, write_page_checksum=True)
            writer.write_table(table.cast(schema))
        if writer is not None:
            writer.close()
        with temporary.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, mark: str, rows: int | None = None) -> bool:
    """Whether a file is there with this mark, these many rows (if said), and undamaged; a damaged one is as good as none."""
    try:
        table = read_piece(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return (table.schema.metadata or {}).get(_MARK) == mark.encode() and rows in (None, len(table))


def read_piece(path: Path) -> pa.Table:
    """A file's rows, with every checksum looked at."""
    return pq.read_table(path, page_checksum_verification=True, memory_map=False, partitioning=None)


def row_groups(path: Path) -> Iterator[pa.Table]:
    """A file's row groups one by one: it may be larger than memory."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for i in range(file.num_row_groups):
            yield file.read_row_group(i)


def described(schema: pa.Schema) -> pa.Schema:
    """A schema that `datasets` reads back with the types that it has here, and with nothing else that it told."""
    from datasets import Features

    metadata = Features.from_arrow_schema(schema).arrow_schema.metadata
    return schema.with_metadata(metadata)


def tidy(folder: Path, name: str = "") -> None:
    """Remove what a worker left that was killed while it wrote (this file); call it under the lock of those files."""
    for left in folder.glob(f".{name}*.tmp"):
        left.unlink(missing_ok=True)
