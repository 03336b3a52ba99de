"""Scoring in shards: many processes and machines on one folder, any of which may be killed at any moment.

    plan.json                 what is scored, with what, in how many shards; every worker must agree with it
    reference/                the fitted anchors, fitted by the first worker, read by all
    work/00003/000512.parquet a piece: the rows from 512 on of shard 3, until the shard is complete; with its seal
    shards/00003-of-00010.parquet   a complete shard: its rows with their scores, and `row_index`
    records/00003.json        written last: what the shard holds, and the SHA-256 of its file

A shard is a contiguous range of rows, whatever the number of workers. A worker claims one by a lock that the system takes back
when the process dies. Pieces have fixed boundaries and are scored in the same calls whoever scores them, so the files are the
same however often the work was interrupted. Everything appears by renaming a file that was written whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from filelock import FileLock, Timeout

from .errors import EvaluationError, InputError, first_line
from .files import write_atomically
from .pieces import (
    ROW_INDEX,
    Tally,
    check_columns,
    is_whole,
    read_piece,
    row_groups,
    rows_in_a_call,
    score_piece,
    tidy,
    write_piece,
    write_rows,
)
from .reference import DESCRIPTION, Description
from .shard_plan import PLAN_FILE, Plan, agree, identity, read_plan

if TYPE_CHECKING:
    from datasets import Dataset

    from .scorer import SafetyRiskScorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A shard that another process has claimed: who (host and process), and the seconds since it last finished a piece."""

    shard: int
    who: str
    idle: float


class ShardedRun:
    """A folder of shards; made by `open`."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan

    @classmethod
    def open(
        cls, folder: str | Path, ds: Dataset, scorer: SafetyRiskScorer, num_shards: int, *, data: str, name: str = "",
        on_hub: bool = False,
        piece_rows: int = 256,
    ) -> ShardedRun:  # fmt: skip
        """Start a run in a folder, or join the one that is there.

        Args:
            folder: for all workers the same.
            ds: all rows.
            scorer: what to score with. Its weights are not read here.
            num_shards: whatever the number of workers; a few times as many keep all of them busy to the end.
            data: a fingerprint of the rows' content; the folder is refused with other rows.
            name, on_hub: of the data, for the account; whether that is a dataset on the Hub.
            piece_rows: how many rows are lost at most when a worker is killed.

        Raises:
            InputError: the folder holds shards of other rows, another scorer or another division, and which it is.
        """
        folder = Path(folder)
        if num_shards > len(ds):
            raise InputError(f"{num_shards} shards for {len(ds)} rows: use at most as many as there are rows")
        check_columns(ds.column_names)
        plan = Plan(len(ds), num_shards, piece_rows, data, name, on_hub, identity(scorer))
        for part in ("", "work", "shards", "records", "locks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "locks" / "plan.lock"):
            tidy(folder, PLAN_FILE)
            if (folder / PLAN_FILE).exists():
                agree(read_plan(folder), plan, folder)
            else:
                plan.save(folder)
        return cls(folder, plan)

    def prepare(self, scorer: SafetyRiskScorer, rank: int | None = None) -> SafetyRiskScorer:
        """The scorer with the folder's fitted anchors: fitted now if this is the first worker, waited for otherwise."""
        if scorer.reference is not None:
            return scorer
        from .session import close_sessions

        folder = self.folder / "reference"
        lock = FileLock(self.folder / "locks" / "reference.lock")
        owner = self.folder / "locks" / "reference.owner"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for %s, which fits the anchors", _read_text(owner) or "another process")
            lock.acquire()
        try:
            if not (folder / DESCRIPTION).is_file():
                tidy(folder)
                owner.write_text(_who())
                scorer.save_reference(folder, rank)
                close_sessions()  # what was fitted is read back, like everywhere else
        finally:
            lock.release()
        ready = copy.copy(scorer)
        ready.reference = Description.read(folder)
        return ready

    def complete(self) -> list[int]:
        """The shards that are done."""
        return [i for i in range(self.plan.num_shards) if self._record(i).is_file()]

    def work(
        self, ds: Dataset, scorer: SafetyRiskScorer, shards: Iterable[int], *, rank: int | None = None,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> list[Held]:  # fmt: skip
        """Score those of these shards that are not complete and not another's.

        Args:
            ds: all rows.
            scorer: from `prepare`.
            shards: in this order.
            rank: the worker's number on this machine, which picks its GPU.
            progress: told how many more rows are there.

        Returns:
            The shards that others held.
        """
        held = []
        for shard in shards:
            with self._claimed(shard) as holder:
                if holder is not None:
                    held.append(holder)
                elif not self._record(shard).is_file():
                    self._score(ds, scorer, shard, rank, progress)
                else:
                    shutil.rmtree(self._work(shard), ignore_errors=True)  # its worker was killed after the record
        return held

    def _score(
        self, ds: Dataset, scorer: SafetyRiskScorer, shard: int, rank: int | None, progress: Callable[[int], object]
    ) -> None:
        started = time.time()
        folder = self._work(shard)
        folder.mkdir(exist_ok=True)
        target = self._file(shard)
        tidy(folder)
        tidy(target.parent, target.name)
        tidy(self.folder / "records", self._record(shard).name)
        rows, call, scored_here = ds.with_format("arrow"), rows_in_a_call(scorer), 0
        for start, stop in self.plan.pieces(shard):
            path = folder / f"{start:012d}.parquet"
            mark = f"{self.plan.fingerprint} {start} {stop}"
            if not is_whole(path, mark):
                calls = (rows[at : min(at + call, stop)] for at in range(start, stop, call))
                write_piece(score_piece(calls, scorer, start, rank), path, mark)
                scored_here += stop - start
            progress(stop - start)
        start, stop = self.plan.range(shard)
        files = [folder / f"{at:012d}.parquet" for at, _ in self.plan.pieces(shard)]
        tally = Tally()
        first = next(n for n in scorer.result_columns if n.startswith("risk_") and n != "risk_status")

        def tables() -> Iterator[pa.Table]:
            for path in files:
                table = read_piece(path)
                tally.add(table, first)
                yield table

        digest = write_rows(tables(), target)
        record = {
            "shard": shard, "start": start, "stop": stop, "rows": stop - start, "tokens": tally.tokens,
            "unscored": dict(tally.unscored.most_common()), "plan": self.plan.fingerprint, "data": self.plan.data,
            "sha256": digest, "rows_scored_last": scored_here, "seconds": round(time.time() - started, 3), "worker": _who(),
        }  # fmt: skip
        write_atomically(self._record(shard), (json.dumps(record, indent=1) + "\n").encode("utf-8", "backslashreplace"))
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _claimed(self, shard: int) -> Iterator[Held | None]:
        """Claim a shard for this process; yields who has it where another does."""
        path = self.folder / "locks" / f"{shard:05d}.lock"
        owner = path.with_suffix(".owner")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield Held(shard, _read_text(owner) or "another process", self._idle(shard, owner))
            return
        try:
            owner.write_text(_who())
            yield None
        finally:
            lock.release()

    def _idle(self, shard: int, owner: Path) -> float:
        """Seconds since a shard's worker last showed a sign of life."""
        times = [p.stat().st_mtime for p in (owner, *self._work(shard).glob("*.parquet")) if p.exists()]
        return max(0.0, time.time() - max(times, default=time.time()))

    def _work(self, shard: int) -> Path:
        return self.folder / "work" / f"{shard:05d}"

    def _file(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:05d}-of-{self.plan.num_shards:05d}.parquet"

    def _record(self, shard: int) -> Path:
        return self.folder / "records" / f"{shard:05d}.json"


def merge(folder: str | Path, out: Path) -> dict[str, Any]:
    """All shards as one parquet file, rows in the order of the input; returns the account of the whole run.

    Raises:
        InputError: `out` is no parquet file.
        EvaluationError: shards are missing, damaged, or of another plan, and which; nothing is written then.
    """
    if out.suffix != ".parquet":
        raise InputError(f"cannot write {str(out)!r}: merge writes .parquet")
    plan = read_plan(folder)
    run = ShardedRun(Path(folder), plan)
    if missing := sorted(set(range(plan.num_shards)) - set(run.complete())):
        raise EvaluationError(
            f"{len(missing)} of {plan.num_shards} shards are missing ({_listed(missing)}): run the same score command again"
        )
    records = [_checked_record(run, shard) for shard in range(plan.num_shards)]
    out.parent.mkdir(parents=True, exist_ok=True)
    columns: list[str] = []

    def tables() -> Iterator[pa.Table]:
        for record in records:
            at = record["start"]
            for table in row_groups(run._file(record["shard"])):
                if table[ROW_INDEX].to_pylist() != list(range(at, at := at + len(table))):
                    raise _damaged(run, record["shard"], "its rows are not those of its place")
                columns[:] = columns or table.column_names
                yield table
            if at != record["stop"]:
                raise _damaged(run, record["shard"], "rows are missing at its end")

    # Beside the file: the shards may be where nothing can be written.
    with FileLock(out.with_name(f".{out.name}.lock")):
        tidy(out.parent, out.name)
        write_rows(tables(), out)
    rows, unscored = records[-1]["stop"], Counter[str]()
    for record in records:
        unscored.update(record["unscored"])
    return {
        "data": plan.name, "data_on_hub": plan.on_hub, "rows": rows, "scored": rows - unscored.total(),
        "unscored": dict(unscored.most_common()),
        "tokens": sum(r["tokens"] for r in records), "seconds": round(sum(r["seconds"] for r in records), 2),
        "score_columns": [n for n in columns if n.startswith("risk_") and n != "risk_status"],
        **plan.scorer, "fingerprint": plan.fingerprint, "shards": plan.num_shards,
    }  # fmt: skip


def _checked_record(run: ShardedRun, shard: int) -> dict[str, Any]:
    """A shard's record, after its file was found to be the one that it tells of."""
    path = run._file(shard)
    try:
        record: dict[str, Any] = json.loads(run._record(shard).read_text("utf-8"))
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        wrong = [name for name, want in zip(("start", "stop"), run.plan.range(shard), strict=True) if record[name] != want]
        if record["plan"] != run.plan.fingerprint or wrong:
            raise _damaged(run, shard, "it is of another run")
        if found != record["sha256"]:
            raise _damaged(run, shard, f"{path} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(run, shard, first_line(error)) from None
    return record


def _damaged(run: ShardedRun, shard: int, why: str) -> EvaluationError:
    return EvaluationError(f"shard {shard} is damaged: {why}; delete {run._record(shard)} and run the same score command again")


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")[:200]
    except (OSError, ValueError):
        return ""


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
