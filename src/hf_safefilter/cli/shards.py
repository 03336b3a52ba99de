"""`hf-safefilter score --num-shards` and `merge`: one run shared by processes and machines."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..accounts import RUN_FILE
from ..errors import EvaluationError, InputError
from .files import SCORED, data_fingerprint, is_on_hub


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `merge`."""
    p = commands.add_parser(
        "merge",
        parents=[common],
        help="join the shards of score --num-shards",
        description="Join the shards of score --num-shards in the order of the rows. Refuses missing, damaged or mixed shards.",
    )
    p.add_argument("folder", type=Path, help="the folder given to score as --out")
    p.add_argument("-o", "--out", required=True, type=Path, help=f"a .parquet file, or a folder for {SCORED} and {RUN_FILE}")
    p.set_defaults(run=run_merge)


def add_shard_arguments(p: argparse.ArgumentParser) -> None:
    """Add what divides `score`."""
    p.add_argument("--num-shards", type=int, help="divide the rows; run the same command as often as you like, anywhere")
    p.add_argument(
        "--shard-index", type=int,
        help="score this shard only (default: those of SLURM_ARRAY_TASK_ID or RANK first, then any that is free)",
    )  # fmt: skip
    p.add_argument("--piece-rows", type=int, default=256, help="rows between two savings of a shard (default: 256)")
    p.add_argument("--stale-minutes", type=float, default=30, help="name a worker without progress for so long (default: 30)")


def score_in_shards(args: argparse.Namespace) -> int:
    """Score the shards that fall to this process."""
    # Not at the top: score imports this module.
    from .score import rows_and_scorer

    if args.num_shards is None:
        raise InputError("--shard-index goes with --num-shards")
    shards = my_shards(args.num_shards, args.shard_index, os.environ)
    rows, scorer = rows_and_scorer(args)
    from datasets.utils import tqdm

    from ..shards import ShardedRun

    if not len(rows):
        raise InputError(f"{args.data} has no rows")
    fingerprint = data_fingerprint(args.data, args.split, args.limit)
    shared = ShardedRun.open(
        args.out,
        rows,
        scorer,
        args.num_shards,
        data=fingerprint,
        name=args.data,
        on_hub=is_on_hub(args.data),
        piece_rows=args.piece_rows,
    )
    done = set(shared.complete())
    held = []
    if not set(shards) <= done:
        rank = int(os.environ["LOCAL_RANK"]) if os.environ.get("LOCAL_RANK", "").isdecimal() else None
        ready = shared.prepare(scorer, rank)
        # At most so many: others may take some of them.
        left = sum(stop - start for start, stop in (shared.plan.range(i) for i in shards if i not in done))
        with tqdm(desc="Scoring shards", unit="row", total=left, disable=True if args.quiet else None) as bar:
            held = shared.work(rows, ready, shards, rank=rank, progress=bar.update)
    complete = shared.complete()
    held = [h for h in held if h.shard not in complete]
    account = {
        "command": "score", "out": str(args.out), "shards": args.num_shards, "complete": complete,
        "held": [{"shard": h.shard, "by": h.who, "idle_seconds": round(h.idle)} for h in held],
    }  # fmt: skip
    if args.json:
        print(json.dumps(account))
    else:
        print(f"{len(complete)} of {args.num_shards} shards are complete")
        for h in held:
            print(f"  shard {h.shard} is being scored by {h.who}, last progress {h.idle / 60:.0f} minutes ago")
        if len(complete) == args.num_shards:
            print(f"next  hf-safefilter merge {args.out} -o scored")
    if stale := [h for h in held if h.idle > 60 * args.stale_minutes]:
        raise EvaluationError(
            f"shard {stale[0].shard} makes no progress: {stale[0].who} has it, and finished nothing for "
            f"{stale[0].idle / 60:.0f} minutes; end that process and run the same command again"
        )
    return 0


def my_shards(num_shards: int, index: int | None, environment: Mapping[str, str]) -> list[int]:
    """The shards of this process, those that fall to it first: it goes on with what is free, so that none waits for a dead one.

    Raises:
        InputError: an index out of range, or a variable that is no number.
    """
    if index is not None:
        if not 0 <= index < num_shards:
            raise InputError(f"--shard-index must be from 0 to {num_shards - 1}, got {index}")
        return [index]

    def number(name: str, default: int) -> int:
        text = environment.get(name, "")
        if text and not text.isdecimal():
            raise InputError(f"{name} must be a whole number, got {text!r}")
        return int(text) if text else default

    worker, workers = number("RANK", 0), number("WORLD_SIZE", 1)
    if environment.get("SLURM_ARRAY_TASK_ID"):
        place = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
        worker += place * workers
        workers *= number("SLURM_ARRAY_TASK_COUNT", num_shards)
    own = list(range(worker, num_shards, max(1, workers)))
    mine = set(own)
    return own + [i for i in range(num_shards) if i not in mine]


def run_merge(args: argparse.Namespace) -> int:
    """Join and tell."""
    from ..shards import merge
    from .score import versions, write_json

    whole = args.out.suffix == ""
    out = args.out / SCORED if whole else args.out
    account = merge(args.folder, out) | {"versions": versions()}
    account = {"command": "score", **account}
    if out.name == SCORED:
        write_json(out.parent / RUN_FILE, account)
    if not account["scored"]:
        raise EvaluationError(f"none of the {account['rows']} rows has a score; reasons are in {out}, risk_status")
    if args.json:
        print(json.dumps(account))
        return 0
    print(f"{account['scored']} of {account['rows']} rows scored; wrote {out}")
    for reason, count in account["unscored"].items():
        print(f"  {count} without a score: {reason}")
    return 0
