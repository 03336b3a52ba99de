"""A synthetic study's summary as the Markdown tables of docs/mechanism.md.

python benchmarks/mechanism_table.py STUDY
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# What the docs show beside the claims: a table for each, rows and columns from names with a comma between.
SHOWN = {"A3": "gap_normalised", "A4": "gain", "A5": "excess", "A6": "log2_of_base", "A7": "tau"}


def cell(found: dict[str, Any] | None, percent: bool = False) -> str:
    """A mean and its interval."""
    if not found:
        return ""
    number = (lambda x: f"{100 * x:.0f}") if percent else (lambda x: f"{x:.2f}")
    if found["interval"] is None:
        return number(found["mean"])
    low, high = found["interval"]
    return f"{number(found['mean'])} ({number(low)} to {number(high)})"


def main() -> None:
    """Print a table of rates, one of claims, and one of what is behind each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    summary = json.loads((parser.parse_args().study / "summary.json").read_text())
    print(f"seeds {summary['seeds']}\n")
    rates = summary["A2"]["rates"]
    kinds = list(next(iter(rates.values())))
    print("| model | " + " | ".join(kinds) + " |\n|" + " --- |" * (len(kinds) + 1))
    for model, of in rates.items():
        print(f"| `{model}` | " + " | ".join(cell(of[kind], percent=True) for kind in kinds) + " |")
    for name, finding in summary.items():
        if not isinstance(finding, dict):
            continue
        print(f"\n{name}: {finding['verdict']}\n\n| | mean | 95% |\n| --- | --- | --- |")
        for what, found in (finding.get("above_0") or finding["values"]).items():
            interval = (
                "" if not found or found["interval"] is None else f"{found['interval'][0]:.2f} to {found['interval'][1]:.2f}"
            )
            print(f"| {what} | {found['mean']:.2f} | {interval} |" if found else f"| {what} | | |")
        if (shown := SHOWN.get(name)) in finding:
            print(f"\n{shown}\n\n| | |\n| --- | --- |")
            for what, found in finding[shown].items():
                print(f"| {what} | {cell(found)} |")


if __name__ == "__main__":
    main()
