"""How the scores rank rows beside each other and beside length, loss and format: a table and a picture.

    hf-safefilter score DATA --model MODEL --scores all --out scored
    python benchmarks/correlation.py scored [scored_2 ...] --figure docs/figures/correlation.svg

Spearman correlations over each scored dataset's rows. The table has each score against the trivial baselines, with 95%
intervals from bootstrap samples of the rows, and how much of its variation in rank the baselines explain together (R squared of
a linear regression of its ranks on theirs).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_safefilter.cli.files import read_rows
from hf_safefilter.cli.show import table
from hf_safefilter.select import score_columns


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [columns, rows] of values of that shape; equal values share their mean rank."""
    out = np.empty_like(values, dtype=float)
    for i, row in enumerate(values):
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        out[i] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return out


def spearman(values: np.ndarray) -> np.ndarray:
    """[columns, columns]; NaN where a column is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(ranks(values))


def explained(values: np.ndarray, by: np.ndarray) -> float:
    """R squared of the ranks of `values` [rows] on those of `by` [columns, rows]."""
    y, x = ranks(values[None])[0], np.vstack([ranks(by), np.ones(len(values))]).T
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(1 - residual.var() / y.var())


def load(path: str) -> tuple[list[str], np.ndarray]:
    """Score columns and their values [columns, rows], of the rows that have all of them."""
    ds: Dataset = read_rows(path, None)
    names = score_columns(ds)
    values = np.array([ds[name][:] for name in names], dtype=float)
    return names, values[:, np.isfinite(values).all(axis=0)]


def report(path: str, names: list[str], values: np.ndarray, samples: int) -> None:
    """Print the table of one dataset."""
    baselines = [i for i, name in enumerate(names) if name.startswith("risk_baseline_")]
    rng = np.random.default_rng(0)
    rows = values.shape[1]
    draws = np.stack([spearman(values[:, rng.integers(rows, size=rows)]) for _ in range(samples)])
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    found = spearman(values)
    baselines = [j for j in baselines if np.isfinite(found[j, j])]  # not those that are the same for all rows
    lines = []
    for i, name in enumerate(names):
        if not name.startswith("risk_baseline_"):
            line = {"score": name.removeprefix("risk_")}
            for j in baselines:
                short = names[j].removeprefix("risk_baseline_").replace("_", " ")
                line[short] = f"{found[i, j]:+.2f} ({low[i, j]:+.2f} to {high[i, j]:+.2f})"
            lines.append(line | {"all of them, R²": f"{explained(values[i], values[baselines]):.2f}"})
    print(f"\n{path}: {rows} rows, {samples} bootstrap samples\n")
    print(table(lines, list(lines[0])))


def draw(sets: list[tuple[str, list[str], np.ndarray]], figure: Path) -> None:
    """The matrices side by side."""
    from matplotlib.figure import Figure

    count = len(sets[0][1])
    picture = Figure(figsize=(0.42 * count * len(sets) + 4, 0.42 * count + 3), layout="constrained")
    axes = picture.subplots(1, len(sets), squeeze=False, sharey=True)[0]
    for axis, (title, names, values) in zip(axes, sets, strict=True):
        found = spearman(values)
        image = axis.imshow(found, vmin=-1, vmax=1, cmap="RdBu_r")
        labels = [name.removeprefix("risk_").replace("_", " ") for name in names]
        axis.set_xticks(range(count), labels, rotation=90, fontsize=8)
        axis.set_yticks(range(count), labels, fontsize=8)
        axis.set_title(f"{title} ({values.shape[1]} rows)", fontsize=10)
        for i in range(count):
            for j in range(count):
                if np.isnan(found[i, j]):
                    continue  # one of the two is the same for all rows
                colour = "white" if abs(found[i, j]) > 0.6 else "black"
                axis.text(j, i, f"{100 * found[i, j]:.0f}", ha="center", va="center", fontsize=6, color=colour)
    picture.colorbar(image, ax=axes, shrink=0.6, label="Spearman correlation (in the cells, times 100)")
    figure.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scored", nargs="+", help="folders written by hf-safefilter score --scores all")
    parser.add_argument("--figure", type=Path, help="where to draw the matrices")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    sets = [(Path(path).name, *load(path)) for path in args.scored]
    for title, names, values in sets:
        report(title, names, values, args.samples)
    if args.figure:
        draw(sets, args.figure)


if __name__ == "__main__":
    main()
