"""A picture for each question of a study, as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..figures import draw_svgs, plain


def draw_figures(folder: Path, summary: Mapping[str, Any], described: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw what the study's arms allow, `arms.svg`, `bins.svg`, `bins_margin.svg`, `bins_probability.svg`, `defence.svg`,
    `datamodel.svg`, `patterns.svg`.

    Returns the paths.

    Args:
        folder: where to write.
        summary: from `summarize`.
        described: from `groups`.

    Raises:
        InputError: matplotlib is not installed.
    """
    arms = {n: a for n, a in summary["arms"].items() if a["attack_success_rate"] and not n.startswith(("subset_", "bin_"))}
    plots: dict[str, Any] = {"arms": lambda ax: _intervals(ax, {n: a["attack_success_rate"] for n, a in arms.items()})}
    if summary["bins"]:
        rates = {n: a["attack_success_rate"] for n, a in summary["arms"].items()}
        plots["bins"] = lambda ax: _bins(ax, summary["bins"], rates, 100, "harmful requests answered, %", (-2, 102))
    for measure, scale, label, limits in (
        ("margin", 1, "refusal margin left, nats per token", None),
        ("probability", 100, "probability of opening with a refusal, %", (-2, 102)),
    ):
        left = {
            n: {"mean": a[f"refusal_{measure}"], "interval": a[f"refusal_{measure}_interval"]}
            for n, a in summary["arms"].items()
        }
        if bins := summary[f"{measure}_lost"]["bins"]:
            plots[f"bins_{measure}"] = partial(_bins, columns=bins, arms=left, scale=scale, label=label, limits=limits)
    if summary["defence"]:
        plots["defence"] = lambda ax: _defence(ax, arms)
    if summary["datamodel"]:
        found = {name: of["probability"] for name, of in summary["datamodel"].items()}
        plots["datamodel"] = lambda ax: _correlations(ax, found)
    plots["patterns"] = lambda ax: _patterns(ax, described)
    return draw_svgs(folder, plots)


def _intervals(ax: Any, estimates: Mapping[str, Mapping[str, Any]]) -> None:
    names = list(estimates)
    means = [100 * estimates[n]["mean"] for n in names]
    spread = [
        [max(0.0, m - 100 * estimates[n]["interval"][0]) for m, n in zip(means, names, strict=True)],
        [max(0.0, 100 * estimates[n]["interval"][1] - m) for m, n in zip(means, names, strict=True)],
    ]
    ax.errorbar(means, range(len(names)), xerr=spread, fmt="o", capsize=3, color="#b03030")
    ax.set_yticks(range(len(names)), [plain(n) for n in names])
    ax.invert_yaxis()
    ax.set_xlim(-2, 102)
    ax.set_xlabel("harmful requests answered, % (95% interval)")
    ax.grid(axis="x", alpha=0.3)


def _bins(
    ax: Any,
    columns: Iterable[str],
    arms: Mapping[str, Any],
    scale: float,
    label: str,
    limits: tuple[float, float] | None = None,
) -> None:
    for column in columns:
        found = [next(e for s in (f":{column}", "") if (e := arms.get(f"bin_{i}{s}")) is not None) for i in range(1, 6)]
        ax.plot(range(1, 6), [scale * f["mean"] for f in found], marker="o", label=plain(column))
        ax.fill_between(range(1, 6), *([scale * f["interval"][side] for f in found] for side in (0, 1)), alpha=0.15)
    ax.set_xticks(range(1, 6), ["riskiest\nfifth", "2", "3", "4", "least\nrisky"])
    ax.set_ylabel(label)
    if limits:
        ax.set_ylim(*limits)
    ax.legend()


def _defence(ax: Any, arms: Mapping[str, Any]) -> None:
    chosen = {n: a for n, a in arms.items() if n == "all" or n.startswith(("filtered:", "random_filtered:"))}
    # A line: untrained, the loss is so much higher that its point would push the others together.
    ax.axhline(100 * arms["before"]["attack_success_rate"]["mean"], color="#888", linestyle=":", label="before tuning")
    shares = sorted({name.partition(":")[2] for name in chosen if name != "all"}, key=float)
    for name, arm in chosen.items():
        x, y = arm["held_out_loss"], 100 * arm["attack_success_rate"]["mean"]
        low, high = (100 * v for v in arm["attack_success_rate"]["interval"])
        color = "#b03030" if name.startswith("filtered") else "#3060a0" if name.startswith("random") else "#303030"
        marker = "o" if name == "all" else "sD^v<>"[shares.index(name.partition(":")[2]) % 6]
        spread = [[max(0.0, y - low)], [max(0.0, high - y)]]
        ax.errorbar([x], [y], yerr=spread, fmt=marker, capsize=3, color=color, label=plain(name))
    ax.set_xlabel("held-out loss, nats per token (lower: the task was learned)")
    ax.set_ylabel("harmful requests answered, %")
    ax.set_ylim(-2, 102)
    _legend_beside(ax)  # labels at the points would lie on each other: filters of few rows end close together


def _correlations(ax: Any, found: Mapping[str, Mapping[str, Any]]) -> None:
    names = sorted(found, key=lambda n: -found[n]["spearman"])
    for i, name in enumerate(names):
        low, high = found[name]["interval"]
        ax.plot([low, high], [i, i], color="#3060a0")
        ax.plot([found[name]["spearman"]], [i], "o", color="#3060a0")
    ax.axvline(0, color="#888", linewidth=0.8)
    ax.set_yticks(range(len(names)), [plain(n) for n in names], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("rank correlation of a subset's mean score\nwith the refusal probability lost (95% interval)")


def _patterns(ax: Any, described: Sequence[Mapping[str, Any]]) -> None:
    shown = [d for d in described if not d["group"].startswith("bin_")]
    features = ("list", "math", "one_line", "opens_with_item")
    width = 0.8 / len(features)
    for j, feature in enumerate(features):
        at = [i + (j - (len(features) - 1) / 2) * width for i in range(len(shown))]
        ax.barh(at, [100 * d[feature] for d in shown], height=width, label=feature.replace("_", " "))
    ax.set_yticks(range(len(shown)), [f"{plain(d['group'])} ({d['words']:.0f} words)" for d in shown], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("% of rows (median words in brackets)")
    _legend_beside(ax)


def _legend_beside(ax: Any) -> None:
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.5)
