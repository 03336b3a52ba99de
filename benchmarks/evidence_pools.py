"""What docs/evidence.md makes of a scored pool.

python benchmarks/evidence_pools.py fuse variants.parquet main.parquet      adds mean ranks, and the gradient score's sides
python benchmarks/evidence_pools.py join main.parquet more.parquet ... out.parquet   adds score columns of the same rows
python benchmarks/evidence_pools.py sample main.parquet defence.parquet     600 scored rows drawn at random
python benchmarks/evidence_pools.py again pool.jsonl benchmarks/results/views again.parquet   risk_again: kept top rows first
python benchmarks/evidence_pools.py again sample.parquet benchmarks/results/defence again.parquet --arm filtered:0.2 (removed)
python benchmarks/evidence_pools.py scores main.parquet benchmarks/results/scores.parquet     the scores without the rows
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from keep_results import entries

from hf_safefilter.files import replacing
from hf_safefilter.select import score_columns, score_values

HASH = "row_sha256"
COLUMN, OTHERS = "risk_fusion", ["risk_margin_step_adam", "risk_refusal_direction"]


def fuse(ds: Dataset) -> Dataset:
    """With the columns added; none where a score is missing."""
    paper, balanced = score_values(ds, ["risk_gradient"]), score_values(ds, ["risk_gradient_balanced"])
    # H - (S1 + S2) and H - (S1 + S2) / 2, of the cosines to the harmful and the two safe sides.
    added = {
        COLUMN: score_values(ds, ["risk_gradient_balanced", *OTHERS]),
        "risk_fusion_paper": score_values(ds, ["risk_gradient", *OTHERS]),
        "risk_harmful_only": 2 * balanced - paper,
        "risk_away_from_safe": paper - balanced,
    }
    ds = ds.remove_columns([name for name in added if name in ds.column_names])
    for name, values in added.items():
        ds = ds.add_column(name, [None if np.isnan(value) else float(value) for value in values])
    return ds


def join(ds: Dataset, more: Dataset) -> Dataset:
    """With the score columns that only the other has; both have the same rows, or the other what `bare` left of them."""
    known = more[HASH][:] if HASH in more.column_names else [digest(row) for row in more]
    if known != [digest(row) for row in ds]:
        raise SystemExit("these files have other rows")
    for name in [n for n in more.column_names if n.startswith("risk_") and n not in ds.column_names]:
        ds = ds.add_column(name, more[name][:])
    return ds


def sample(ds: Dataset, rows: int, seed: int) -> Dataset:
    """Some of the rows that have every score, in their order."""
    scored = np.isfinite([score_values(ds, [name]) for name in score_columns(ds)]).all(axis=0)
    chosen = np.random.default_rng(seed).choice(np.flatnonzero(scored), rows, replace=False)
    return ds.select(np.sort(chosen))


def again(ds: Dataset, results: Path, arm: str) -> Dataset:
    """With a score that puts the rows of a kept study's arm first, in their order, to train on them once more.

    Of a `filtered:SHARE`, the rows that it removed, all alike: the same share of the highest scores is the same filter.
    """
    rows = {entry["run"]["arm"]: entry["run"]["rows"] for entry in entries(results)}
    values = np.zeros(len(ds))
    if arm.startswith("filtered:"):
        values[np.setdiff1d(rows["all"], rows[arm])] = 1
    else:
        values[rows[arm]] = np.arange(len(rows[arm]), 0, -1)
    return ds.add_column("risk_again", values.tolist())


def bare(ds: Dataset) -> Dataset:
    """The scores, and a hash of each row to know it by; no text of it."""
    return ds.select_columns(score_columns(ds)).add_column(HASH, [digest(row) for row in ds])


def digest(row: dict[str, Any]) -> str:
    """What tells a row from others."""
    return hashlib.sha256(json.dumps([row["prompt"], row["completion"]]).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fuse", "join", "sample", "again", "scores"])
    parser.add_argument("scored")
    parser.add_argument("more", nargs="*", help="of join: further files of the same rows; of again: the kept study")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arm", default="top", help="of again: top, bottom or filtered:SHARE, with or without :COLUMN")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    ds = (Dataset.from_json if args.scored.endswith(".jsonl") else Dataset.from_parquet)(args.scored, keep_in_memory=True)
    if args.what == "again" and len(args.more) != 1:
        parser.error("again takes a file and a folder")
    if args.what not in ("again", "join") and args.more:
        parser.error(f"{args.what} takes one file")
    if args.what == "join":
        for file in args.more:
            ds = join(ds, Dataset.from_parquet(file))
    elif args.what == "again":
        ds = again(ds, Path(args.more[0]), args.arm)
    elif args.what == "sample":
        ds = sample(ds, args.rows, args.seed)
    else:
        ds = fuse(ds) if args.what == "fuse" else bare(ds)
    with replacing(args.out) as temporary:
        ds.to_parquet(str(temporary))


if __name__ == "__main__":
    main()
