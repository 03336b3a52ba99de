"""What docs/evidence.md makes of a scored pool.

python benchmarks/evidence_pools.py fuse variants.parquet main.parquet      adds risk_fusion, the mean rank of three scores
python benchmarks/evidence_pools.py sample main.parquet defence.parquet     600 scored rows drawn at random
"""

from __future__ import annotations

import argparse

import numpy as np
from datasets import Dataset

from hf_safefilter.select import score_values

FUSED, COLUMN = ["risk_gradient_balanced", "risk_margin_step_adam", "risk_refusal_direction"], "risk_fusion"


def fuse(ds: Dataset) -> Dataset:
    """With the mean rank; none where a score is missing."""
    ranks = score_values(ds, FUSED)
    others = ds.remove_columns(COLUMN) if COLUMN in ds.column_names else ds
    return others.add_column(COLUMN, [None if np.isnan(rank) else float(rank) for rank in ranks])


def sample(ds: Dataset, rows: int, seed: int) -> Dataset:
    """Some of the rows that have a score, in their order."""
    scored = np.flatnonzero(np.isfinite(score_values(ds, [COLUMN])))
    return ds.select(np.sort(np.random.default_rng(seed).choice(scored, rows, replace=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fuse", "sample"])
    parser.add_argument("scored")
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    ds = Dataset.from_parquet(args.scored)
    (fuse(ds) if args.what == "fuse" else sample(ds, args.rows, args.seed)).to_parquet(args.out)


if __name__ == "__main__":
    main()
