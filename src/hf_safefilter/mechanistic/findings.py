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

from .analyses import Row
from .compare import draw_pictures

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
    """By seed, the mean of a column over the rows in which each column of `where` is its value, or one of several."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if _fits(row, where) and row.get(value) is not None:
            found.setdefault(row["seed"], []).append(float(row[value]))
    return {seed: mean(values) for seed, values in found.items()}


def _fits(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(row.get(k) in v if isinstance(v, range | tuple | list) else row.get(k) == v for k, v in where.items())


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


def upper_layers(depth: int) -> range:
    """The blocks of the last third, where the paper sees the most."""
    return range(depth - math.ceil(depth / 3), depth)


def summarize(tables: Tables, depth: int) -> dict[str, Any]:
    """Each finding's verdict and numbers.

    Args:
        tables: the study's, rows with `seed` and `model`.
        depth: the model's blocks.
    """
    upper = upper_layers(depth)
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
    def gain(model: str, update: str = "tuned") -> BySeed:
        return per_seed(tables["gain"], "gain", model=model, update=update, layer=upper)

    differences = {f"{m} over 1": {s: v - 1 for s, v in gain(m).items()} for m in MEDIUM}
    # At the same activations: there a random update's gain is not 1 either.
    differences |= {f"{m} over {c}": less(gain(m), gain(m, c)) for m in MEDIUM for c in ("random", *CONTROLS)}
    return claim(differences, gain={m: estimate(gain(m)) for m in (*CONTROLS, *TUNED)})


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
    """Draw a picture for each finding, means over seeds with their intervals; see `draw_pictures`."""
    upper, both, overall = upper_layers(depth), ("none", "all"), {"outcome": "all"}
    runs, model = (*CONTROLS, *TUNED), ("model",)
    # Table, value, axis, lines, label, "nothing", which rows.
    wanted: dict[str, tuple[str, str, str, tuple[str, ...], str, float | None, dict[str, Any]]] = {
        "A1_A2_refusals": ("rates", "null", "kind", model, "refused", None, {}),
        "A1_A2_answers": ("rates", "instruct", "kind", model, "answered truly", None, {}),
        "A3_separation": ("separation", "gap_normalised", "layer", model, "gap in tau / distance of the means", 0, {}),
        "A4_gain": ("gain", "gain", "layer", model, "the update on unsafe / on safe prompts", 1, {"update": "tuned"}),
        "A5_column_space": (
            "alignment", "excess", "layer", ("model", "basis"), "outside the column space, over a random direction", 0,
            {"update": "tuned", "model": (*CONTROLS, *MEDIUM)},
        ),
        "A6_sensitivity": (
            "groups", "mean", "group", model, "log2 of local sensitivity over the base's", 0,
            {"measure": "sensitivity_logit", "model": runs} | overall,
        ),
        "A7_jailbreaks": (
            "groups", "mean", "group", model, "tau / distance of the means: nearer to safe prompts", 0,
            {"measure": "tau", "layer": upper, "model": TUNED} | overall,
        ),
        "A8_refusals": ("shift", "null_unsafe", "alpha", model, "unsafe refused", None, {"part": both, "model": MEDIUM}),
        "A8_answers": ("shift", "instruct_safe", "alpha", model, "safe answered truly", None, {"part": both, "model": MEDIUM}),
        "soft_tokens": ("attack", "success", "radius", model, "unsafe answered truly", None, {"model": TUNED}),
    }  # fmt: skip
    return draw_pictures(
        folder,
        {
            name: (_over_seeds(tables[table], value, (*by, axis), where), value, axis, by, label, nothing)
            for name, (table, value, axis, by, label, nothing, where) in wanted.items()
        },
    )


def _over_seeds(rows: Sequence[Mapping[str, Any]], value: str, by: Sequence[str], where: Mapping[str, Any]) -> list[Row]:
    """A row for each combination of the columns `by`, with the value's mean and interval over seeds."""
    points = dict.fromkeys(tuple(row[b] for b in by) for row in rows if _fits(row, where) and row.get(value) is not None)
    found: list[Row] = []
    for point in points:
        here = dict(zip(by, point, strict=True))
        e = estimate(per_seed([row for row in rows if _fits(row, here)], value, **where))
        low, high = e["interval"] or (None, None)
        found.append({**here, value: e["mean"], f"{value}_low": low, f"{value}_high": high})
    return found
