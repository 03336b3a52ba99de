"""Parquet files of scored rows, with a checksum for each page, and what tells a piece of one that is whole.

They appear by renaming a file that was written whole, so that a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError
from .files import replacing, write_atomically

if TYPE_CHECKING:
    from .scorer import SafetyRiskScorer

ROW_INDEX = "row_index"
SEAL = ".seal"
# Rows in a call of the scorer; see `hf-safefilter score`.
_CALL_GRADIENT, _CALL = 64, 256


def rows_in_a_call(scorer: SafetyRiskScorer) -> int:
    """How many rows a scorer is given at once: scores do not depend on it, but rounding does."""
    return _CALL_GRADIENT if scorer.needs.gradient else _CALL


def check_columns(names: Iterable[str]) -> None:
    """Raise `InputError` where the rows have a column that is added here."""
    if ROW_INDEX in names:
        raise InputError(f"the dataset has a column {ROW_INDEX!r} already: rename it, shards and streams add their own")


@dataclass
class Tally:
    """What scored tables hold together: rows, tokens, and why rows have no score."""

    rows: int = 0
    tokens: int = 0
    unscored: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.Table, score: str) -> None:
        """Count a table's rows; those without the column `score` have none."""
        self.rows += len(table)
        self.tokens += sum(n or 0 for n in table["total_tokens"].to_pylist())
        pairs = zip(table[score].to_pylist(), table["risk_status"].to_pylist(), strict=True)
        self.unscored.update(why for value, why in pairs if value is None)


def score_piece(tables: Iterable[pa.Table], scorer: SafetyRiskScorer, start: int, rank: int | None = None) -> pa.Table:
    """Tables of rows, each a call of the scorer, with their scores and their places from `start` on."""
    scored = pa.concat_tables([scorer(table, rank) for table in tables], promote_options="permissive")
    return scored.append_column(ROW_INDEX, pa.array(range(start, start + len(scored)), pa.int64()))


def write_rows(tables: Iterable[pa.Table], path: Path, schema: pa.Schema | None = None) -> str:
    """Write tables of the same columns as one file (in a schema, by default the first one's); returns its SHA-256."""
    from datasets.table import table_cast

    with replacing(path) as temporary:
        writer = None
        for table in tables:
            if writer is None:
                schema = described(table.schema if schema is None else schema)
                writer = pq.ParquetWriter(temporary, schema, write_page_checksum=True)
            writer.write_table(
                table_cast(table, schema)
            )  # pyarrow's own breaks lists of objects with a part that is always null
        if writer is not None:
            writer.close()
        return _digest(temporary)


def write_piece(table: pa.Table, path: Path, mark: str) -> None:
    """Write a piece, and then its seal: a text file beside it with its SHA-256 and which run and rows these are.

    Checksums of pages do not cover the names and types of columns, at the end of the file.
    """
    digest = write_rows([table], path)
    write_atomically(path.with_suffix(SEAL), f"{digest} {mark}".encode())


def is_whole(path: Path, mark: str) -> bool:
    """Whether a piece is there, is these rows of this run, and is what was written; a damaged one is as good as none."""
    try:
        return path.with_suffix(SEAL).read_bytes() == f"{_digest(path)} {mark}".encode()
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
