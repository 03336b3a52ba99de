"""How well the refusal probability and the margin, which need no answer, go with attack success, over the runs of kept studies.

python benchmarks/measures.py benchmarks/results/attack_100 benchmarks/results/subsets
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from keep_results import entries

from hf_safefilter.validate.statistics import correlation, lost, outcomes
from hf_safefilter.validate.summary import MEASURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    print("| study | runs | attack success with the " + " | with the ".join(f"{m} lost" for m in MEASURES) + " |")
    print("|" + " --- |" * 4)
    for folder in args.results:
        runs = [entry["run"] for entry in entries(folder) if entry["run"]["arm"] != "before" and not entry["run"]["problem"]]
        rates = [np.nanmean(outcomes({0: run["records"]})) for run in runs]
        cells = []
        for measure in MEASURES:
            value = partial(lost, measure=measure)
            found = correlation([np.nanmean(outcomes({0: run["records"]}, value=value)) for run in runs], rates)
            low, high = found["interval"]
            cells.append(f"{found['spearman']:+.2f} ({low:+.2f} to {high:+.2f})")
        print(f"| {folder.name} | {len(runs)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
