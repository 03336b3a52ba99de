"""Does the refusal margin predict the refusal rate that generation finds? From runs that `RefusalRateCallback` watched.

python benchmarks/margin_prediction.py RUN/refusal_checks [MORE ...] [--figure docs/figures/monitoring.svg]

For each run: Spearman's correlation of margin and refusal rate over its checks; and within checks, the chance that a refused
prompt has a larger margin than an answered one (AUROC, pooled over the checks' pairs), with intervals from 2,000
bootstrap samples of the prompts (seed 0). `--figure` draws the rate with its interval, over-refusal and the margin per step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_safefilter.cli.show import table


def read(folder: Path) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """History, and the harmful prompts' margins and verdicts, [checks, prompts] each; -1 where a verdict is missing."""
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text("utf-8").splitlines()]
    margins, verdicts = [], []
    for file in sorted(folder.glob("step-*.jsonl")):
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        harmful = [row for row in rows if row["side"] == "harmful"]
        margins.append([row["margin"] for row in harmful])
        verdicts.append([-1 if row["refuses"] is None else int(row["refuses"]) for row in harmful])
    return history, np.array(margins), np.array(verdicts)


def auroc(margins: np.ndarray, verdicts: np.ndarray) -> float:
    """Of pairs of a refused and an answered prompt in one check, the share in which the refused one's margin is larger."""
    right = pairs = 0.0
    for values, said in zip(margins, verdicts, strict=True):
        difference = values[said == 1][:, None] - values[said == 0][None, :]
        right += (difference > 0).sum() + (difference == 0).sum() / 2
        pairs += difference.size
    return right / pairs if pairs else float("nan")


def draw(runs: list[tuple[str, list[dict[str, Any]]]], figure: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.6 * len(runs), 5.2), layout="constrained")
    axes = picture.subplots(2, len(runs), squeeze=False, sharex="col", sharey="row")
    for column, (title, history) in enumerate(runs):
        checks = [e for e in history if "eval_refusal_rate" in e]
        steps = [e["step"] for e in checks]
        upper, lower = axes[0][column], axes[1][column]
        upper.fill_between(
            steps, [e["eval_refusal_rate_low"] for e in checks], [e["eval_refusal_rate_high"] for e in checks], alpha=0.2, lw=0
        )
        upper.plot(steps, [e["eval_refusal_rate"] for e in checks], "o-", ms=4, label="harmful prompts (95%)")
        upper.plot(steps, [e.get("eval_refusal_rate_benign") for e in checks], "s--", ms=3, label="harmless look-alikes")
        upper.set_title(title, fontsize=10)
        upper.set_ylim(-0.02, 1.02)
        lower.plot(
            *zip(*[(e["step"], e["eval_refusal_margin"]) for e in history if "eval_refusal_margin" in e], strict=True), ".-"
        )
        lower.set_xlabel("step")
    axes[0][0].set_ylabel("refusal rate")
    axes[1][0].set_ylabel("refusal margin, nats per token")
    axes[0][0].legend(fontsize=8)
    figure.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    lines, runs = [], []
    for folder in args.runs:
        history, margins, verdicts = read(folder)
        checks = [e for e in history if "eval_refusal_rate" in e]
        rate, margin = (np.array([e[k] for e in checks]) for k in ("eval_refusal_rate", "eval_refusal_margin"))
        generator = np.random.default_rng(0)
        draws = [generator.integers(0, margins.shape[1], margins.shape[1]) for _ in range(2000)]
        low, high = np.nanquantile([auroc(margins[:, d], verdicts[:, d]) for d in draws], [0.025, 0.975])
        mixed = ((verdicts == 1).any(axis=1) & (verdicts == 0).any(axis=1)).sum()
        name = folder.parent.name if folder.name == "refusal_checks" else folder.name
        lines.append(
            {
                "run": name,
                "checks": len(checks),
                "refusal rate": f"{rate[0]:.2f} to {rate[-1]:.2f}",
                "margin": f"{margin[0]:+.2f} to {margin[-1]:+.2f}",
                "Spearman over checks": f"{pd.Series(margin).rank().corr(pd.Series(rate).rank()):.2f}",
                "AUROC within checks": f"{auroc(margins, verdicts):.2f} ({low:.2f} to {high:.2f}; {mixed} checks)",
            }
        )
        runs.append((name, history))
    print(table(lines, list(lines[0]), {"AUROC within checks": 60}))
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
