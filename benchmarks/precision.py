"""How far two runs of `hf-safefilter score` on the same rows agree: in two dtypes, say, or with two batch sizes.

python benchmarks/precision.py REFERENCE OTHER      (folders or files that `score` wrote)

Prints a Markdown table: how far scores moved, beside their spread in the reference; Spearman's rank correlation, with an
interval from 2,000 bootstrap samples of the rows (seed 0); how many of the reference's ten riskiest rows the other's ten hold.
"""

from __future__ import annotations

import argparse

import numpy as np

from hf_safefilter.cli.files import read_rows
from hf_safefilter.select import score_columns


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort(kind="stable").argsort(kind="stable")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("other")
    args = parser.parse_args()
    reference, other = read_rows(args.reference), read_rows(args.other)
    n = min(len(reference), len(other))
    samples = np.random.default_rng(0).integers(0, n, (2000, n))
    print(f"{n} rows, {sum(reference['total_tokens'][:n])} tokens\n")
    print("| column | largest move | median move | spread (std) | Spearman (95%) | of the top 10 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for column in [c for c in score_columns(reference) if c in other.column_names]:
        x, y = np.array(reference[column][:n], float), np.array(other[column][:n], float)
        moved = np.abs(x - y)
        low, high = np.percentile([spearman(x[i], y[i]) for i in samples], [2.5, 97.5])
        kept = len({*np.argsort(-x)[:10]} & {*np.argsort(-y)[:10]})
        print(
            f"| `{column}` | {moved.max():.4f} | {np.median(moved):.4f} | {x.std():.4f} "
            f"| {spearman(x, y):.3f} ({low:.3f} to {high:.3f}) | {kept} |"
        )


if __name__ == "__main__":
    main()
