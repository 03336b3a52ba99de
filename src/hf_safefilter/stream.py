"""Scoring rows that come as a stream, of unknown length, from and to disk: memory does not grow with them.

stream/plan.json             which rows, with what scorer; a run goes on only where both are the same
stream/000000000512.parquet  a piece: the rows from 512 on; a killed run goes on after the last whole one
scored.parquet               all of them, when the stream has ended; then `stream/` goes
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from .errors import InputError, first_line
from .pieces import (
    ROW_INDEX,
    Tally,
    check_columns,
    is_whole,
    read_piece,
    rows_in_a_call,
    score_piece,
    tidy,
    write_piece,
    write_rows,
)
from .shard_plan import PLAN_FILE, Plan, agree, identity, read_plan

if TYPE_CHECKING:
    from datasets import IterableDataset

    from .scorer import SafetyRiskScorer

FOLDER = "stream"


def score_stream(
    rows: IterableDataset, scorer: SafetyRiskScorer, out: Path, *, data: str, name: str = "", on_hub: bool = False,
    piece_rows: int = 256, progress: Callable[[int], object] = lambda rows: None,
) -> dict[str, Any]:  # fmt: skip
    """Score a stream of rows into a parquet file, and go on where a killed run stopped.

    Args:
        rows: read once, from where the last run stopped.
        scorer: what to score with.
        out: the file; pieces stand in `stream/` beside it until the stream has ended.
        data: a fingerprint of the rows' content: pieces of other rows are refused.
        name, on_hub: of the data, for the account; whether that is a dataset on the Hub.
        piece_rows: how many rows are lost at most by a kill, and held in memory.
        progress: told how many more rows are there.

    Returns:
        The account of the run: rows, what could not be scored and why, tokens, seconds.

    Raises:
        InputError: no rows; columns whose types change along the stream; pieces of another run; another process at work.
    """
    plan = Plan(None, 1, piece_rows, data, name, on_hub, identity(scorer))
    folder = out.parent / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.parent / f".{FOLDER}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is scoring into {str(out.parent)!r}: choose another folder") from None
    try:
        tidy(folder)
        tidy(out.parent, out.name)
        if (folder / PLAN_FILE).exists():
            agree(read_plan(folder), plan, folder)
        else:
            plan.save(folder)
        started = time.monotonic()
        pieces = list(_pieces(rows, scorer, folder, plan, progress))
        if not pieces:
            raise InputError(f"{name or 'the stream'} has no rows")
        account = _joined(pieces, out, scorer)
        shutil.rmtree(folder)
        return account | {"data": name, "data_on_hub": on_hub, "seconds": round(time.monotonic() - started, 2)}
    finally:
        lock.release()


def _pieces(
    rows: IterableDataset, scorer: SafetyRiskScorer, folder: Path, plan: Plan, progress: Callable[[int], object]
) -> Iterator[Path]:
    """The pieces in their order, those that are missing scored now; a short one is the last."""
    path = lambda start: folder / f"{start:012d}.parquet"  # noqa: E731
    mark = lambda start: f"{plan.fingerprint} {start}"  # noqa: E731
    start = 0
    while is_whole(path(start), mark(start)):
        yield path(start)
        done = pq.read_metadata(path(start)).num_rows
        progress(done)
        if done < plan.piece_rows:
            return
        start += done
    # Sizes divide, so that pieces are whole.
    batches = _batches(rows.skip(start) if start else rows, gcd(rows_in_a_call(scorer), plan.piece_rows), start)
    while tables := _take(batches, plan.piece_rows):
        write_piece(score_piece(tables, scorer, start), path(start), mark(start))
        yield path(start)
        done = sum(map(len, tables))
        progress(done)
        start += done


def _batches(rows: IterableDataset, size: int, start: int) -> Iterator[pa.Table]:
    """Tables of up to `size` rows; what a reader raises names the row that it had come to."""
    at = start
    try:
        for table in rows.with_format("arrow").iter(batch_size=size):
            check_columns(table.column_names)
            at += len(table)
            yield table
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # what readers raise for data that is not what it says it is has no bound
        raise InputError(f"the rows after row {at} cannot be read: {type(error).__name__}: {first_line(error)}") from None


def _take(batches: Iterator[pa.Table], rows: int) -> list[pa.Table]:
    """The next tables, `rows` rows together where there are so many."""
    tables: list[pa.Table] = []
    while sum(map(len, tables)) < rows and (table := next(batches, None)) is not None:
        tables.append(table)
    return tables


def _joined(pieces: list[Path], out: Path, scorer: SafetyRiskScorer) -> dict[str, Any]:
    """Write all pieces as one file; returns what they hold."""
    tally = Tally()
    risk = [n for n in scorer.result_columns if n.startswith("risk_") and n != "risk_status"]
    schema = _common_schema(pieces)

    def tables() -> Iterator[pa.Table]:
        for path in pieces:
            table, start = read_piece(path), tally.rows
            tally.add(table, risk[0])
            if table[ROW_INDEX].to_pylist() != list(range(start, tally.rows)):
                raise InputError(f"{path} holds other rows than its name says: delete the folder {str(path.parent)!r}")
            missing = [name for name in schema.names if name not in table.column_names]
            for name in missing:
                table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
            yield table.select(schema.names)

    write_rows(tables(), out, schema)
    return {
        "rows": tally.rows, "scored": tally.rows - tally.unscored.total(),
        "unscored": dict(tally.unscored.most_common()), "tokens": tally.tokens, "score_columns": risk,
    }  # fmt: skip


def _common_schema(pieces: list[Path]) -> pa.Schema:
    """What all pieces' columns can be read as: a file of JSON says a column's type anew in every block."""
    common = pq.read_schema(pieces[0]).remove_metadata()
    for path in pieces[1:]:
        schema = pq.read_schema(path).remove_metadata()
        try:
            common = pa.unify_schemas([common, schema], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise InputError(
                f"the rows from {int(path.stem)} on have columns of other types than those before ({first_line(error)}): "
                "make them one type in the data"
            ) from None
    return common
