"""What the synthetic study's tables say of each of the paper's findings, over seeds, and a picture of it.

Findings go by the names of the acceptance list: A1 and A2 say that the models do what they were trained to, A3 to A8 are the
paper's claims. A claim is taken apart into differences that should be above 0. It `holds` where the 95% interval of each lies
above 0, it is `in the right direction` where each mean does, else it `does not hold`. Intervals are Student's over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..errors import InputError
from ..files import replacing

Row = dict[str, float | int | str | None]
Tables = Mapping[str, Sequence[Mapping[str, Any]]]
BySeed = dict[int, float]

METHODS = ("sft", "dpo", "unlearn")
JAILBREAKS = ("jb_co_task", "jb_co_text", "jb_misgen")
MEDIUM = [f"{method}-medium" for method in METHODS]
TUNED = [f"{method}-{size}" for method in METHODS for size in ("medium", "small")]
CONTROLS = ("benign", "new")  # more of the safe instructions; safe instructions with an operator to learn

# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom; beyond, the last, which is too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def per_seed(rows: Sequence[Mapping[str, Any]], value: str, **where: Any) -> BySeed:
    """By seed, the mean of a column over the rows in which each column of `where` is (or, for a range, is in) its value."""
    found: dict[int, list[float]] = {}
    for row in rows:
        fits = all(row.get(k) in v if isinstance(v, range) else row.get(k) == v for k, v in where.items())
        if fits and row.get(value) is not None:
            found.setdefault(row["seed"], []).append(float(row[value]))
    return {seed: mean(values) for seed, values in found.items()}


def less(a: BySeed, b: BySeed) -> BySeed:
    """`a` less `b`, seed by seed."""
    return {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}


def estimate(values: BySeed) -> dict[str, Any]:
    """`mean`, `interval` (95%, Student's over seeds; `None` with one seed) and the `values`; empty where there are none."""
    found = [values[seed] for seed in sorted(values)]
    if not found:
        return {}
    half = _T[min(len(found) - 1, len(_T)) - 1] * stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return {
        "mean": mean(found),
        "interval": None if half is None else [mean(found) - half, mean(found) + half],
        "values": found,
    }


def claim(differences: Mapping[str, BySeed], **shown: Any) -> dict[str, Any]:
    """A claim that each of these is above 0, its verdict, and what else is worth showing."""
    estimates = {name: estimate(values) for name, values in differences.items()}
    known = [e for e in estimates.values() if e]
    verdict = "does not hold"
    if len(known) < len(estimates):
        verdict = "not measured"
    elif all(e["interval"] and e["interval"][0] > 0 for e in known):
        verdict = "holds"
    elif all(e["mean"] > 0 for e in known):
        verdict = "in the right direction"
    return {"verdict": verdict, "above_0": estimates, **shown}


def summarize(tables: Tables, depth: int) -> dict[str, Any]:
    """Each finding's verdict and numbers.

    Args:
        tables: the study's, rows with `seed` and `model`.
        depth: the model's blocks; "upper" are those of the last third.
    """
    upper = range(math.ceil(2 * depth / 3), depth)
    rate = lambda of, model, kind: per_seed(tables["rates"], of, model=model, kind=kind)  # noqa: E731
    able = {f"instruct {kind}": rate("instruct", "base", kind) for kind in ("safe", "unsafe")}
    able |= {f"not null {kind}": {s: 1 - v for s, v in rate("null", "base", kind).items()} for kind in ("safe", "unsafe")}
    tuned = {f"{m} {of} {k}": rate(of, m, k) for m in MEDIUM for of, k in (("null", "unsafe"), ("instruct", "safe"))}
    every = {
        model: {f"{of} {kind}": estimate(rate(of, model, kind)) for kind in ("safe", "unsafe", *JAILBREAKS, "new")
                for of in ("instruct", "null")}
        for model in ("base", *CONTROLS, *TUNED)
    }  # fmt: skip
    return {
        "A1": _gate(able, 0.98),
        "A2": _gate(tuned, 0.95, rates=every),
        "A3": _separation(tables, upper),
        "A4": _gain(tables, upper),
        "A5": _alignment(tables),
        "A6": _sensitivity(tables),
        "A7": _jailbreaks(tables, upper),
        "A8": _scaling(tables),
    }


def _gate(values: Mapping[str, BySeed], least: float, **shown: Any) -> dict[str, Any]:
    """Whether every seed reaches a share."""
    passed = all(v >= least for by_seed in values.values() for v in by_seed.values())
    verdict = "holds" if passed else "does not hold"
    return {"verdict": verdict, "least": least, "values": {n: estimate(v) for n, v in values.items()}, **shown}


def _separation(tables: Tables, upper: range) -> dict[str, Any]:
    gap = {m: per_seed(tables["separation"], "gap_normalised", model=m, layer=upper) for m in ("base", *CONTROLS, *TUNED)}
    differences = {"sft-medium over base": less(gap["sft-medium"], gap["base"])}
    differences["unlearn-medium over sft-medium"] = less(gap["unlearn-medium"], gap["sft-medium"])
    differences |= {f"{m}: medium over small": less(gap[f"{m}-medium"], gap[f"{m}-small"]) for m in METHODS}
    raw = {m: estimate(per_seed(tables["separation"], "gap", model=m, layer=upper)) for m in gap}
    areas = {m: estimate(per_seed(tables["separation"], "auroc", model=m, layer=upper)) for m in gap}
    return claim(differences, gap_normalised={m: estimate(v) for m, v in gap.items()}, gap=raw, auroc=areas)


def _gain(tables: Tables, upper: range) -> dict[str, Any]:
    gain = {m: per_seed(tables["gain"], "gain", model=m, update="tuned", layer=upper) for m in (*CONTROLS, *TUNED)}
    differences = {f"{m} over 1": {s: v - 1 for s, v in gain[m].items()} for m in MEDIUM}
    differences |= {f"{m} over {c}": less(gain[m], gain[c]) for m in MEDIUM for c in CONTROLS}
    return claim(differences, gain={m: estimate(v) for m, v in gain.items()})


def _alignment(tables: Tables) -> dict[str, Any]:
    def excess(model: str, update: str, basis: str) -> BySeed:
        return per_seed(tables["alignment"], "excess", model=model, update=update, basis=basis)

    differences = {
        f"{m} over {c}, {basis}": less(excess(m, "tuned", basis), excess(m, c, basis))
        for m in MEDIUM for c in ("random", *CONTROLS) for basis in ("full", "energy90")
    }  # fmt: skip
    shown = {f"{m}, {b}": estimate(excess(m, "tuned", b)) for m in (*CONTROLS, *TUNED) for b in ("full", "energy90")}
    return claim(differences, excess=shown)


def _sensitivity(tables: Tables) -> dict[str, Any]:
    kinds = ("sensitivity_logit", "sensitivity_log_probability")
    values = {
        (m, kind, group): per_seed(tables["groups"], "mean", model=m, measure=kind, group=group, outcome="all")
        for m in (*CONTROLS, *TUNED) for kind in kinds for group in ("safe", "unsafe")
    }  # fmt: skip
    differences = {}
    for m in MEDIUM:
        differences[f"{m}: down on unsafe"] = {s: -v for s, v in values[m, kinds[0], "unsafe"].items()}
        differences[f"{m}: up on safe"] = values[m, kinds[0], "safe"]
    return claim(differences, log2_of_base={", ".join(key): estimate(v) for key, v in values.items()})


def _jailbreaks(tables: Tables, upper: range) -> dict[str, Any]:
    def of(model: str, group: str, value: str = "mean", measure: str = "tau") -> BySeed:
        where = {"measure": measure, "group": group, "outcome": "all", "layer": upper}
        return per_seed(tables["groups"], value, model=model, **where)

    differences = {}
    for m in MEDIUM:
        for jailbreak in JAILBREAKS:
            differences[f"{m}: {jailbreak} over unsafe"] = less(of(m, jailbreak), of(m, "unsafe"))
            differences[f"{m}: safe over {jailbreak}"] = less(of(m, "safe"), of(m, jailbreak))
            # Where nearly all or no attacks succeed there is no telling: then a seed may be missing.
            if told := of(m, jailbreak, "auroc"):
                differences[f"{m}: {jailbreak}, auroc of success over 0.5"] = {s: v - 0.5 for s, v in told.items()}
    groups = ("safe", "unsafe", *JAILBREAKS)
    return claim(differences, tau={f"{m}, {g}": estimate(of(m, g)) for m in TUNED for g in groups})


def _scaling(tables: Tables) -> dict[str, Any]:
    def at(model: str, alpha: float, value: str, part: str = "all") -> BySeed:
        return per_seed(tables["shift"], value, model=model, alpha=alpha, part=part if alpha else "none")

    alphas = sorted({row["alpha"] for row in tables["shift"]})
    differences = {}
    for m in MEDIUM:
        differences[f"{m}: refusals at 1 over 0.5"] = less(at(m, 1, "null_unsafe"), at(m, 0.5, "null_unsafe"))
        differences[f"{m}: refusals at 0.5 over 0"] = less(at(m, 0.5, "null_unsafe"), at(m, 0, "null_unsafe"))
    for jailbreak in JAILBREAKS:
        name = f"null_{jailbreak}"
        differences[f"sft-medium: {jailbreak} refused at 1.25 over 1"] = less(
            at("sft-medium", 1.25, name), at("sft-medium", 1, name)
        )
    values = {
        f"{m}, {part}, {alpha:g}": {v: estimate(at(m, alpha, v, part)) for v in ("null_unsafe", "instruct_safe")}
        for m in MEDIUM for part in ("all", "mlp", "attention") for alpha in alphas
    }  # fmt: skip
    return claim(differences, rates=values)


def draw_findings(folder: Path, tables: Tables, depth: int) -> list[Path]:
    """Draw a picture for each finding, means over seeds with their intervals; returns the paths.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures need matplotlib: run  pip install 'hf-safefilter[validate]'") from error
    upper, layers = range(math.ceil(2 * depth / 3), depth), range(depth)
    every = ("base", *CONTROLS, *TUNED)
    alphas = sorted({row["alpha"] for row in tables["shift"]})
    kinds = ("safe", "unsafe", *JAILBREAKS)

    def line(table: str, value: str, axis: str, points: Sequence[Any], **where: Any) -> dict[Any, dict[str, Any]]:
        return {x: estimate(per_seed(tables[table], value, **{axis: x}, **where)) for x in points}

    # Name: the curves, what is on either axis, and where the value that says "nothing" lies.
    pictures: dict[str, tuple[dict[str, dict[Any, dict[str, Any]]], str, str, float | None]] = {
        "A1_A2_refusals": ({m: line("rates", "null", "kind", kinds, model=m) for m in every}, "", "refused", None),
        "A1_A2_answers": ({m: line("rates", "instruct", "kind", kinds, model=m) for m in every}, "", "answered truly", None),
        "A3_separation": (
            {m: line("separation", "gap_normalised", "layer", layers, model=m) for m in every},
            "layer", "safe less unsafe tau / distance of means", 0,
        ),
        "A4_gain": (
            {m: line("gain", "gain", "layer", layers, model=m, update="tuned") for m in (*CONTROLS, *TUNED)},
            "layer", "change of unsafe / of safe inputs", 1,
        ),
        "A5_column_space": (
            {
                f"{m}, {b}": line("alignment", "excess", "layer", layers, model=m, update="tuned", basis=b)
                for m in (*CONTROLS, *MEDIUM) for b in ("full", "energy90")
            },
            "layer", "outside of the column space, over random", 0,
        ),
        "A6_sensitivity": (
            {
                m: line("groups", "mean", "group", kinds, model=m, measure="sensitivity_logit", outcome="all")
                for m in (*CONTROLS, *TUNED)
            },
            "", "log2 of sensitivity, tuned / base", 0,
        ),
        "A7_jailbreaks": (
            {m: line("groups", "mean", "group", kinds, model=m, measure="tau", outcome="all", layer=upper) for m in TUNED},
            "", "tau / distance of means, upper layers", 0,
        ),
        "A8_scaling": (
            {
                f"{m}, {what}": {0: line("shift", value, "alpha", [0], model=m)[0]}
                | line("shift", value, "alpha", [a for a in alphas if a], model=m, part="all")
                for m in MEDIUM for what, value in (("unsafe refused", "null_unsafe"), ("safe answered", "instruct_safe"))
            },
            "alpha", "share", None,
        ),
        "soft_tokens": (
            {m: line("attack", "success", "radius", sorted({r["radius"] for r in tables["attack"]}), model=m) for m in TUNED},
            "radius of the soft tokens, in mean embeddings", "unsafe answered truly", None,
        ),
    }  # fmt: skip
    paths = []
    for name, (curves, x, y, nothing) in pictures.items():
        figure = Figure(figsize=(8, 4), layout="constrained")
        _curves(figure.add_subplot(), curves, x, y, nothing)
        path = folder / f"{name}.svg"
        # Without a date and random names, so that equal results give equal files.
        with replacing(path) as temporary, rc_context({"svg.hashsalt": name}):
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        paths.append(path)
    return paths


def _curves(ax: Any, curves: Mapping[str, Mapping[Any, Mapping[str, Any]]], x: str, y: str, nothing: float | None) -> None:
    """Means with intervals, curves a little apart so that they do not hide each other."""
    if nothing is not None:
        ax.axhline(nothing, color="#888", linewidth=0.8)
    for i, (name, points) in enumerate(curves.items()):
        known = {at: e for at, e in points.items() if e}
        by_name = any(isinstance(at, str) for at in points)
        places = [list(points).index(at) if by_name else at for at in known]
        shift = (i - len(curves) / 2) * 0.06 if by_name else 0
        spread = [[abs((e["interval"] or [e["mean"]] * 2)[side] - e["mean"]) for e in known.values()] for side in (0, 1)]
        ax.errorbar(
            [p + shift for p in places], [e["mean"] for e in known.values()], yerr=spread, fmt="o" if by_name else "o-",
            markersize=4, capsize=2, label=name,
        )  # fmt: skip
        if by_name:
            ax.set_xticks(range(len(points)), [at.replace("_", " ") for at in points])
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
