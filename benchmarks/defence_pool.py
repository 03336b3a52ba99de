"""A smaller scored pool for the defence's runs: rows drawn at random of those with a score.

python benchmarks/defence_pool.py variants.parquet defence.parquet [--rows 600] [--by risk_fusion] [--seed 7]
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scored")
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--by", default="risk_fusion")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    table = pq.read_table(args.scored)
    risk = np.array([np.nan if v is None else v for v in table[args.by].to_pylist()])
    taken = np.random.default_rng(args.seed).choice(np.flatnonzero(np.isfinite(risk)), args.rows, replace=False)
    pq.write_table(table.take(np.sort(taken)), args.out)


if __name__ == "__main__":
    main()
