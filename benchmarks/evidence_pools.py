"""What docs/evidence.md makes of a scored pool.

python benchmarks/evidence_pools.py fuse variants.parquet main.parquet      adds mean ranks, and the gradient score's sides
python benchmarks/evidence_pools.py join main.parquet more.parquet ... out.parquet   adds score columns of the same rows
python benchmarks/evidence_pools.py sample main.parquet defence.parquet     600 scored rows drawn at random
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_safefilter.files import replacing
from hf_safefilter.select import score_values

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
    """With the score columns that only the other has; both have the same rows."""
    if any(ds[name][:] != more[name][:] for name in ("prompt", "completion")):
        raise SystemExit("these files have other rows")
    for name in [n for n in more.column_names if n.startswith("risk_") and n not in ds.column_names]:
        ds = ds.add_column(name, more[name][:])
    return ds


def sample(ds: Dataset, rows: int, seed: int) -> Dataset:
    """Some of the rows that have a score, in their order."""
    scored = np.flatnonzero(np.isfinite(score_values(ds, [COLUMN])))
    return ds.select(np.sort(np.random.default_rng(seed).choice(scored, rows, replace=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fuse", "join", "sample"])
    parser.add_argument("scored")
    parser.add_argument("more", nargs="*", help="of join: further files of the same rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    ds = Dataset.from_parquet(args.scored, keep_in_memory=True)
    if args.what != "join" and args.more:
        parser.error(f"{args.what} takes one file")
    for file in args.more:
        ds = join(ds, Dataset.from_parquet(file))
    if args.what != "join":
        ds = fuse(ds) if args.what == "fuse" else sample(ds, args.rows, args.seed)
    with replacing(args.out) as temporary:
        ds.to_parquet(str(temporary))


if __name__ == "__main__":
    main()
