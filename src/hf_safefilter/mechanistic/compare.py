"""The analyses on real models: what tuning did to a base model, in tables and pictures.

separation.jsonl   Fig. 3   of the base and each tuned model
drift.jsonl        ours     of the refusal direction, against the base
alignment.jsonl    Fig. 4   with a random update and the controls
gain.jsonl         Fig. 5   likewise; by right singular vector in singular.jsonl
groups.jsonl       Figs. 6, 7   every group of prompts under every measure, split by success
shift.jsonl        4.6      what a measurement gives along the update
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from ..engine.layers import blocks
from ..errors import InputError
from ..figures import draw_svgs, plain
from .analyses import (
    Prompts,
    Row,
    alignment_table,
    cluster_separation,
    direction_drift,
    group_table,
    mlp_inputs,
    shift_table,
    singular_gain,
    update_gain,
)

Tables = dict[str, list[Row]]
# Rows, the value shown, the axis, what makes a line of its own, the value's label, and where it says "nothing".
Picture = tuple[list[Row], str, str, tuple[str, ...], str, float | None]


def compare(
    base: Any,
    tuned: Mapping[str, Any],
    harmful: Prompts,
    benign: Prompts,
    *,
    controls: Mapping[str, Any] | None = None,
    groups: Mapping[str, Prompts] | None = None,
    success: Mapping[str, Sequence[bool | None]] | None = None,
    layers: Sequence[float] | None = None,
    k: int = 8,
    sensitivity: bool = True,
    measure: Callable[[Any], dict[str, Any]] | None = None,
    alphas: Sequence[float] = (0, 0.5, 1, 1.5),
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Tables:
    """All analyses of each tuned model against the base.

    Args:
        base: the model before, plain.
        tuned: models after by name, plain or with a LoRA adapter.
        harmful, benign: tokens of prompts, at least 4 of each, better 64.
        controls: models tuned from the same base on harmless data, by name: what any training does.
        groups: further prompts by name, such as jailbreaks; `success`: see `group_table`.
        layers: blocks; all by default.
        k: singular vectors compared with the column space.
        sensitivity: whether to take gradients, the dearest part.
        measure: taken of the model along the update, at `alphas`; without it there is no table `shift`.
        progress: wraps the iteration over the steps.

    Returns:
        Tables by name, see this module; each row has the tuned model's name under `model`.

    Raises:
        InputError: models that do not fit together, too few prompts.
    """
    if not tuned:
        raise InputError("nothing to compare: give at least one tuned model")
    prompts = {"safe": benign, "unsafe": harmful, **(groups or {})}
    seen: dict[str, Any] = {}

    def activations(name: str, model: Any) -> None:
        seen[name] = tuple(mlp_inputs(model, prompts[side], layers) for side in ("safe", "unsafe"))

    def steps(name: str, model: Any) -> dict[str, Callable[[], list[Row]]]:
        return {
            "drift": lambda: direction_drift(seen["base"], seen[name]),
            "alignment": lambda: alignment_table(base, model, controls=controls, k=k, layers=layers),
            "gain": lambda: update_gain(base, model, *seen[name], controls=controls),
            "singular": lambda: singular_gain(base, model, *seen[name]),
            "groups": lambda: group_table(base, model, prompts, success=success, layers=layers, sensitivity=sensitivity),
        } | ({"shift": lambda: shift_table(base, model, measure, alphas)} if measure else {})

    models = {"base": base, **tuned}
    work: list[tuple[str, str]] = [(name, "separation") for name in models]
    work += [(name, table) for name, model in tuned.items() for table in steps(name, model)]
    tables: Tables = {}
    for name, table in progress(work):
        if table == "separation":
            activations(name, models[name])
            rows = cluster_separation(*seen[name])
        else:
            rows = steps(name, models[name])[table]()
        tables.setdefault(table, []).extend({"model": name, **row} for row in rows)
    return tables


def upper(base: Any, layers: Iterable[int]) -> list[int]:
    """Of these blocks the ones in the last third of the depth, where the paper sees the most; all where there are none."""
    layers, depth = sorted(set(layers)), len(blocks(base))
    return [layer for layer in layers if layer >= depth - math.ceil(depth / 3)] or layers


def summarize(tables: Tables, at: Sequence[int]) -> list[Row]:
    """A row for each model: means over the blocks `at`, of the sensitivities over prompts.

    `excess` and `gain` are of the update, with those of a random one and of each control beside them.
    """

    def average(table: str, value: str, **where: Any) -> float | None:
        rows = [r for r in tables.get(table, []) if all(r.get(name) == v for name, v in where.items())]
        values = [float(r[value]) for r in rows if r.get("layer", None) in (*at, None) and r.get(value) is not None]  # type: ignore[arg-type]
        return mean(values) if values else None

    updates = list(dict.fromkeys(str(r["update"]) for r in tables["gain"]))
    rows: list[Row] = []
    for name in dict.fromkeys(r["model"] for r in tables["separation"]):
        row: Row = {"model": name}
        row |= {value: average("separation", value, model=name) for value in ("auroc", "gap_normalised")}
        row |= {value: average("drift", value, model=name) for value in ("cosine", "norm_ratio")}
        for update in updates:
            suffix = "" if update == "tuned" else f"_{update}"
            row[f"gain{suffix}"] = average("gain", "gain", model=name, update=update)
            row[f"excess{suffix}"] = average("alignment", "excess", model=name, update=update, basis="full")
        for side in ("safe", "unsafe"):
            where = {"model": name, "measure": "sensitivity_logit", "group": side, "outcome": "all"}
            row[f"sensitivity_{side}"] = average("groups", "mean", **where)
        rows.append(row)
    return rows


def draw(folder: Path, tables: Tables) -> list[Path]:
    """A picture for each table that has something to show; see `draw_pictures`."""
    full = [r for r in tables["alignment"] if r["basis"] == "full"]
    tau = [r for r in tables["groups"] if r["measure"] == "tau" and r["outcome"] == "all"]
    sensitivity = [r for r in tables["groups"] if r["measure"] == "sensitivity_logit" and r["outcome"] == "all"]
    pictures: dict[str, Picture] = {
        "separation": (tables["separation"], "auroc", "layer", ("model",), "held-out AUROC, harmful against harmless", 0.5),
        "gap": (tables["separation"], "gap_normalised", "layer", ("model",), "gap in tau / distance of the means", 0),
        "drift": (tables["drift"], "cosine", "layer", ("model",), "cosine of the refusal direction with the base's", 1),
        "alignment": (full, "excess", "layer", ("model", "update"), "outside the column space, less the baseline", 0),
        "gain": (tables["gain"], "gain", "layer", ("model", "update"), "the update on harmful / on harmless prompts", 1),
        "tau": (tau, "mean", "layer", ("model", "group"), "tau: nearer to harmless prompts", 0),
        "sensitivity": (sensitivity, "mean", "group", ("model",), "log2 of local sensitivity over the base's", 0),
    }
    shift = tables.get("shift", [])
    # Every part's line begins at the base.
    parts = {(r["model"], r["part"]) for r in shift if r["part"] != "none"}
    starts = [r | {"part": part} for r in shift if r["part"] == "none" for model, part in sorted(parts) if model == r["model"]]  # type: ignore[type-var]
    moved = starts + [r for r in shift if r["part"] != "none"]
    for value in sorted({n for r in shift for n in r} - {"alpha", "part", "model"}):
        pictures[f"shift_{value}"] = (moved, value, "alpha", ("model", "part"), value.replace("_", " "), None)
    return draw_pictures(folder, pictures)


def draw_pictures(folder: Path, pictures: Mapping[str, Picture]) -> list[Path]:
    """Draw each picture that has something to show, `NAME.svg`; returns their paths.

    Raises:
        InputError: matplotlib is not installed.
    """
    shown = {name: picture for name, picture in pictures.items() if any(r.get(picture[1]) is not None for r in picture[0])}
    return draw_svgs(folder, {name: partial(_plot, picture) for name, picture in shown.items()})


def _plot(picture: Picture, ax: Any) -> None:
    rows, value, axis, by, label, nothing = picture
    for key in dict.fromkeys(tuple(str(r[b]) for b in by) for r in rows):
        _line(ax, [r for r in rows if tuple(str(r[b]) for b in by) == key], value, axis, ", ".join(key))
    if nothing is not None:
        ax.axhline(nothing, color="#888", linestyle=":")
    ax.set_xlabel({"alpha": "share of the update", "layer": "block", "radius": "length of the soft tokens"}.get(axis, ""))
    ax.set_ylabel(label)
    ax.legend(fontsize=8)


def _line(ax: Any, rows: Sequence[Row], value: str, axis: str, label: str) -> None:
    """Means at each point of the axis, and the interval where there is one row and it has one."""
    points: dict[Any, list[Row]] = {}
    for row in rows:
        if row.get(value) is not None:
            points.setdefault(row[axis], []).append(row)
    if not points:
        return
    x = list(points)
    y = [mean(float(r[value]) for r in of) for of in points.values()]  # type: ignore[arg-type]
    (line,) = ax.plot(x, y, "o" if isinstance(x[0], str) else "o-", markersize=3, label=plain(label))
    one = [of[0] for of in points.values() if len(of) == 1 and of[0].get(f"{value}_low") is not None]
    if len(one) < len(points):
        return
    if isinstance(x[0], str):
        ax.vlines(x, *([r[f"{value}_{end}"] for r in one] for end in ("low", "high")), color=line.get_color())
    else:
        ax.fill_between(x, *([r[f"{value}_{end}"] for r in one] for end in ("low", "high")), alpha=0.15, color=line.get_color())
