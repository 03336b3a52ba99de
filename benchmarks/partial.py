"""What is lost by taking less than the whole gradient: rank correlations of cheaper forms of `gradient` with the full one.

    python benchmarks/partial.py alpaca_en_demo.json --rows 60

SmolLM2-135M-Instruct, one process, the built-in anchors. What each form costs is in `score_cost.py --partial`.
"""

from __future__ import annotations

import argparse

import numpy as np
from correlation import spearman

from hf_safefilter import SafetyRiskScorer
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.cli.files import read_rows
from hf_safefilter.cli.show import table

FORMS = {
    "whole, directions exact": {},
    "directions factored at 0.9": {"direction_energy": 0.9},
    "first 10 response tokens": {"max_response_tokens": 10},
    "last 7 of 30 blocks": {"parameters": "last-7"},
    "head": {"parameters": "head"},
}
COLUMNS = ("risk_gradient_balanced", "risk_gradient", "risk_gradient_modulewise", "risk_margin_step", "risk_margin_step_adam")
SCORES = ("gradient", "gradient_modulewise", "margin_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    rows = read_rows(args.data, None).select(range(args.rows))
    samples = np.random.default_rng(0).integers(0, args.rows, (1000, args.rows))
    found = {}
    for name, options in FORMS.items():
        settings = {"direction_energy": 1.0, "dtype": args.dtype, "batch_tokens": 1024, **options}
        scorer = SafetyRiskScorer(demo_model(), scores=SCORES, **settings)
        scored = rows.map(scorer, batched=True, batch_size=args.rows)
        found[name] = np.array([scored[c][:] for c in COLUMNS], dtype=float)
    whole = next(iter(found.values()))
    lines = []
    for name, values in list(found.items())[1:]:
        line = {"form": name}
        for i, column in enumerate(COLUMNS):
            pair = np.stack([whole[i], values[i]])
            low, high = np.percentile([spearman(pair[:, s])[0, 1] for s in samples], [2.5, 97.5])
            line[column.removeprefix("risk_")] = f"{spearman(pair)[0, 1]:.3f} ({low:.3f} to {high:.3f})"
        lines.append(line)
    print(f"{args.rows} rows, {args.dtype}: Spearman correlation with the whole gradient's score (95% by bootstrap)\n")
    print(table(lines, list(lines[0])))


if __name__ == "__main__":
    main()
