"""A kept study (or a study's folder) as the Markdown tables of docs/evidence.md.

python benchmarks/results_table.py benchmarks/results/NAME [--datamodel 12]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def spread(interval: list[float] | None, form: str = "{:.0%}") -> str:
    return "–" if interval is None else f"{form.format(interval[0])} to {form.format(interval[1])}"


def arms(summary: dict[str, Any]) -> str:
    lines = [
        "| arm | rows | seeds | attack success | 95% | each seed | coherent | refusal probability | 95% | margin | 95% | "
        "over-refusal | held-out loss |",
        "|" + " --- |" * 13,
    ]
    for name, arm in summary["arms"].items():
        if name.startswith("subset_"):
            continue
        rate = arm["attack_success_rate"] or {}
        seeds = ", ".join(f"{100 * v:.0f}" for v in arm["by_seed"].values())
        cells = [
            f"`{name}`", arm["rows"], len(arm["by_seed"]), share(rate.get("mean")), spread(rate.get("interval")), seeds,
            share(arm["coherent_attack_success_rate"]), share(arm["refusal_probability"]),
            spread(arm["refusal_probability_interval"]), f"{arm['refusal_margin']:.2f}",
            spread(arm["refusal_margin_interval"], "{:.2f}"), share(arm["benign_refusal_rate"]), f"{arm['held_out_loss']:.3f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def differences(summary: dict[str, Any]) -> str:
    lines = [
        "| difference | attack success, points | 95% | refusal probability lost, points | 95% | refusal margin lost | 95% |",
        "|" + " --- |" * 7,
    ]
    for name, found in summary["differences"].items():
        lost = summary["margin_lost"]["differences"][name]
        cells = []
        for points in (found, summary["probability_lost"]["differences"][name]):
            cells += [f"{100 * points['mean']:+.0f}", spread(points["interval"], "{:+.0%}")]
        cells += [f"{lost['mean']:+.2f}", spread(lost["interval"], "{:+.2f}")]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def datamodel(summary: dict[str, Any], count: int) -> str:
    """Scores by how well they predict the fall of the refusal probability, or of the margin where a study is older."""
    table = summary["datamodel"]
    outcomes = [o for o in ("attack_success_rate", "probability", "margin") if all(o in found for found in table.values())]
    rank = sorted(table, key=lambda name: -table[name][outcomes[1]]["spearman"])
    heads = {"attack_success_rate": "attack success", "probability": "the probability's fall", "margin": "the margin's fall"}
    lines = [
        "| score | " + " | ".join(f"with {heads[o]} | 95%" for o in outcomes) + " |",
        "|" + " --- |" * (1 + 2 * len(outcomes)),
    ]
    for name in rank if not count else [*rank[:count], *[n for n in rank[count:] if n in ("length", "list")]]:
        cells = []
        for outcome in outcomes:
            found = table[name][outcome]
            cells += [f"{found['spearman']:+.2f}", spread(found["interval"], "{:+.2f}")]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def patterns(summary: dict[str, Any]) -> str:
    names = ("list", "math", "one_line", "up_to_3_words", "opens_with_item")
    lines = [
        "| rows | " + " | ".join(n.replace("_", " ") for n in names) + " | words | sources |",
        "|" + " --- |" * (len(names) + 3),
    ]
    for group in summary["patterns"]:
        kinds = ", ".join(f"{k} {share(v)}" for k, v in group["kinds"].items())
        lines.append(
            f"| `{group['group']}` | " + " | ".join(share(group[n]) for n in names) + f" | {group['words']:.0f} | {kinds} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--datamodel", type=int, default=0, help="how many scores to list, best first; all by default")
    args = parser.parse_args()
    summary = json.loads((args.folder / "summary.json").read_text("utf-8"))
    print(arms(summary))
    if summary["differences"]:
        print("\n" + differences(summary))
    if summary["datamodel"]:
        print("\n" + datamodel(summary, args.datamodel))
    for by, found in summary["bins"].items():
        low, high = found["first_minus_last"]["interval"]
        print(f"\nBins by `{by}`: monotone {found['monotone']}, Spearman {found['spearman']:+.2f}", end=", ")
        points = 100 * found["first_minus_last"]["mean"]
        print(f"monotone in {found['share']:.0%} of draws, first minus last {points:+.0f} points ({low:+.0%} to {high:+.0%})")
        for measure in ("probability", "margin"):
            lost = summary[f"{measure}_lost"]["bins"][by]
            interval = spread(lost["first_minus_last"]["interval"], "{:+.2f}")
            print(f"the {measure} lost: monotone {lost['monotone']}, Spearman {lost['spearman']:+.2f}", end=", ")
            print(f"in {lost['share']:.0%} of draws, first minus last {lost['first_minus_last']['mean']:+.2f} ({interval})")
    for arm, found in summary["defence"].items():
        part = f"{share(found['refusals_kept'])} ({spread(found['interval'])})"
        probable = f"{share(found['probability_kept'])} ({spread(found['probability_interval'])})"
        print(f"\n`{arm}`: refusals kept {part}, of their probability {probable}", end=", ")
        print(f"held-out loss {found['held_out_loss_against_all']:+.1%}")
    print("\n" + patterns(summary))


if __name__ == "__main__":
    main()
