"""Does one forward pass predict the refusal rate that generation finds? From runs that `RefusalRateCallback` watched.

python benchmarks/margin_prediction.py RUN/refusal_checks [MORE ...] [--figure docs/figures/monitoring.svg]

For the margin and for the probability of opening with a refusal: Spearman's correlation with the refusal rate over a run's
checks, and within checks the chance that a refused prompt has more of it than an answered one (AUROC, pooled over the checks'
pairs), with intervals from 2,000 bootstrap samples of the prompts (seed 0). `--figure` draws all three per step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_safefilter.cli.show import table

SIGNALS = ("margin", "probability")


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], np.ndarray]:
    """History, and the harmful prompts' signals and verdicts, [checks, prompts] each; -1 where a verdict is missing."""
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text("utf-8").splitlines()]
    files = [[json.loads(line) for line in f.read_text("utf-8").splitlines()] for f in sorted(folder.glob("step-*.jsonl"))]
    harmful = [[row for row in rows if row["side"] == "harmful"] for rows in files]
    signals = {s: np.array([[row[s] for row in rows] for rows in harmful]) for s in SIGNALS}
    return (
        history,
        signals,
        np.array([[-1 if row["refuses"] is None else int(row["refuses"]) for row in rows] for rows in harmful]),
    )


def auroc(values: np.ndarray, verdicts: np.ndarray) -> float:
    """Of pairs of a refused and an answered prompt in one check, the share in which the refused one has the larger value."""
    right = pairs = 0.0
    for of_check, said in zip(values, verdicts, strict=True):
        difference = of_check[said == 1][:, None] - of_check[said == 0][None, :]
        right += (difference > 0).sum() + (difference == 0).sum() / 2
        pairs += difference.size
    return right / pairs if pairs else float("nan")


def draw(runs: list[tuple[str, list[dict[str, Any]]]], figure: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.6 * len(runs), 5.2), layout="constrained")
    axes = picture.subplots(2, len(runs), squeeze=False, sharex="col", sharey="row")
    for column, (title, history) in enumerate(runs):
        checks = [e for e in history if "eval_refusal_rate" in e]
        steps, upper, lower = [e["step"] for e in checks], axes[0][column], axes[1][column]
        interval = ([e[f"eval_refusal_rate_{end}"] for e in checks] for end in ("low", "high"))
        upper.fill_between(steps, *interval, alpha=0.2, lw=0)
        upper.plot(steps, [e["eval_refusal_rate"] for e in checks], "o-", ms=4, label="refused, harmful prompts (95%)")
        upper.plot(
            steps, [e.get("eval_refusal_rate_benign") for e in checks], "s--", ms=3, label="refused, harmless look-alikes"
        )
        every = [e for e in history if "eval_refusal_margin" in e]
        upper.plot(
            [e["step"] for e in every],
            [e["eval_refusal_probability"] for e in every],
            ".:",
            label="probability of a refusal opening",
        )
        upper.set_title(title, fontsize=10)
        upper.set_ylim(-0.02, 1.02)
        lower.plot([e["step"] for e in every], [e["eval_refusal_margin"] for e in every], ".-", color="C3")
        lower.set_xlabel("step")
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
        history, signals, verdicts = read(folder)
        checks = [e for e in history if "eval_refusal_rate" in e]
        rate = pd.Series([e["eval_refusal_rate"] for e in checks])
        generator = np.random.default_rng(0)
        draws = [generator.integers(0, verdicts.shape[1], verdicts.shape[1]) for _ in range(2000)]
        name = folder.parent.name if folder.name == "refusal_checks" else folder.name
        for signal, values in signals.items():
            overall = pd.Series([e[f"eval_refusal_{signal}"] for e in checks])
            low, high = np.nanquantile([auroc(values[:, d], verdicts[:, d]) for d in draws], [0.025, 0.975])
            lines.append(
                {
                    "run": name,
                    "checks": len(checks),
                    "refusal rate": f"{rate.iloc[0]:.2f} to {rate.iloc[-1]:.2f}",
                    "signal": signal,
                    "from, to": f"{overall.iloc[0]:+.2f} to {overall.iloc[-1]:+.2f}",
                    "Spearman over checks": f"{overall.rank().corr(rate.rank()):.2f}",
                    "mean difference": f"{(overall - rate).abs().mean():.2f}" if signal == "probability" else "",
                    "AUROC within checks": f"{auroc(values, verdicts):.2f} ({low:.2f} to {high:.2f})",
                }
            )
        runs.append((name, history))
    print(table(lines, list(lines[0])))
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
