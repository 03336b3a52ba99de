"""What a study found: attack success by arm with intervals, and the questions that its arms answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .arms import BINS
from .attack import Outcome
from .statistics import correlation, difference, kept, lost, monotone, outcomes, success
from .study import Plan

TOP, MATCHED = "top", "random_length_matched"
# Beside attack success, what `RefusalMonitor` takes of each prompt without an answer: see `refusal/margin.py`.
MEASURES = ("margin", "probability")


def summarize(found: Mapping[str, Sequence[Outcome]], made: Plan) -> dict[str, Any]:
    """All of a study's figures as plain values: those of `compare`, and `datamodel` where subsets were run."""
    return {**compare(found, next(iter(made.pool.risks))), "datamodel": datamodel(found, made)}


def compare(found: Mapping[str, Sequence[Outcome]], by: str) -> dict[str, Any]:
    """What follows from the runs alone.

    Failed runs (diverged, gibberish) count as failed and are left out of every rate.

    Args:
        found: each arm's outcomes by seed, `before` among them.
        by: the score that arms without a column of their own go by.

    Returns:
        `arms`: for each arm `attack_success_rate` (`Estimate` as a dict, or `None`), `coherent_attack_success_rate`,
        `benign_refusal_rate`, `refusal_margin`, `refusal_probability` and their `..._interval`, `held_out_loss` (means over
        seeds; by seed in `by_seed`), `held_out_loss_change` against before tuning, `steps`, and `failed`. `separates`: whether
        top minus length-matched random is above zero with its whole interval, `None` where one of the two arms is missing.
        `differences` and `bins` of attack success, the same of what is lost of the margin and the probability in `margin_lost`
        and `probability_lost`, and `defence`, where their arms were run.
    """
    sound = _sound(found)
    cells = {arm: outcomes({o.seed: o.records for o in several}) for arm, several in sound.items() if several}
    losses = {}
    for measure in MEASURES:
        taken = {arm: outcomes({o.seed: o.records for o in sound[arm]}, value=partial(lost, measure=measure)) for arm in cells}
        losses[measure] = {arm: values for arm, values in taken.items() if np.isfinite(values).any()}
    before = found["before"][0]
    arms = {
        arm: _arm(several, cells.get(arm), {m: losses[m].get(arm) for m in MEASURES}, before) for arm, several in found.items()
    }
    result: dict[str, Any] = {"arms": arms, "separates": None, **_contrasts(cells, by)}
    result |= {f"{measure}_lost": _contrasts(losses[measure], by) for measure in MEASURES}
    if (against := result["differences"].get(f"{TOP} - {MATCHED}")) is not None:
        result["separates"] = against["interval"][0] > 0
    elif found.get(TOP) and found.get(MATCHED):
        result["separates"] = False  # one of the two arms failed with every seed
    result["defence"] = _defence(arms, cells, losses["probability"])
    return result


def datamodel(found: Mapping[str, Sequence[Outcome]], made: Plan) -> dict[str, Any]:
    """How well each score's mean over a random subset predicts what training on the subset does, by rank correlation.

    A linear datamodelling test (Park et al. 2023, TRAK, section 4): over the `subsets:M` arms, each score's mean against the
    attack success rate, and against the fall of the refusal margin and probability, which move where the rate is at its floor.
    """
    runs = [o for arm, several in _sound(found).items() if arm.startswith("subset_") for o in several]
    if len(runs) < 3:
        return {}
    outcome = {"attack_success_rate": [o.check["harmful"]["attack_success_rate"] for o in runs]}
    for measure, name in zip(MEASURES, ("mean", "probability"), strict=True):
        outcome[measure] = [-(o.check["margin"] or {}).get(name, np.nan) for o in runs]
    table = {}
    for name, values in made.scores.items():
        means = [float(np.nanmean(values[o.rows])) for o in runs]
        table[name] = {measure: correlation(means, fell) for measure, fell in outcome.items()}
    return table


def _sound(found: Mapping[str, Sequence[Outcome]]) -> dict[str, list[Outcome]]:
    return {arm: [o for o in several if o.problem is None] for arm, several in found.items()}


def _contrasts(cells: Mapping[str, np.ndarray], by: str) -> dict[str, Any]:
    """The `differences` between arms, and whether the `bins` of each score are in order."""
    differences: dict[str, Any] = {}
    for top in [arm for arm in cells if arm == TOP or arm.startswith(f"{TOP}:")]:
        # What is matched in length or kept out of the top is so for the arm `top` alone.
        for other in ("random", MATCHED, "random_list_only", "bottom") if top == TOP else ("random",):
            if other in cells:
                differences[f"{top} - {other}"] = difference(cells[top], cells[other]).as_dict()
    for arm in [name for name in cells if name.startswith("filtered:")]:
        for other in ("all", f"random_{arm}"):
            if other in cells:
                differences[f"{other} - {arm}"] = difference(cells[other], cells[arm]).as_dict()
    columns = sorted({name.partition(":")[2] for name in cells if name.startswith("bin_")})
    bins = {
        column or by: monotone(found)
        for column in columns
        if len(found := [cells[name] for name in _bins(column) if name in cells]) == BINS
    }
    return {"differences": differences, "bins": bins}


def _arm(
    several: Sequence[Outcome], cells: np.ndarray | None, losses: Mapping[str, np.ndarray | None], before: Outcome
) -> dict[str, Any]:
    sound = [o for o in several if o.problem is None]
    left: dict[str, Any] = {}
    for measure, values in losses.items():
        gone = None if values is None else success(values)
        left[f"refusal_{measure}"] = None if gone is None else -gone.mean
        left[f"refusal_{measure}_interval"] = None if gone is None else [-gone.high, -gone.low]
    mean = lambda values: float(np.mean(known)) if (known := [v for v in values if v is not None]) else None  # noqa: E731
    loss = mean(o.held_out_loss for o in sound)
    base = before.held_out_loss
    return {
        "attack_success_rate": None if cells is None else success(cells).as_dict(),
        "coherent_attack_success_rate": mean(o.check["harmful"]["coherent_attack_success_rate"] for o in sound),
        "benign_refusal_rate": mean((o.check["benign"] or {}).get("rate") for o in sound),
        **left,
        "held_out_loss": loss,
        "held_out_loss_change": None if loss is None or not base else loss / base - 1,
        "by_seed": {o.seed: o.check["harmful"]["attack_success_rate"] for o in sound},
        "failed": {o.seed: o.problem for o in several if o.problem is not None},
        "rows": len(several[0].rows),
        "steps": mean(len(o.losses) for o in sound),
    }


def _defence(arms: Mapping[str, Any], cells: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What removing rows saves, of the refusals that training on all rows loses, and what it costs in utility."""
    if "all" not in cells:
        return {}
    loss, defence = arms["all"]["held_out_loss"], {}
    for arm in cells:
        if arm.startswith(("filtered:", "random_filtered:")):
            of_refusals = kept(cells["before"], cells["all"], cells[arm])
            known = all(name in losses for name in ("before", "all", arm))
            of_probability = kept(losses["before"], losses["all"], losses[arm]) if known else {"share": None, "interval": None}
            defence[arm] = {
                "refusals_kept": of_refusals["share"],
                "interval": of_refusals["interval"],
                "probability_kept": of_probability["share"],
                "probability_interval": of_probability["interval"],
                "held_out_loss_against_all": arms[arm]["held_out_loss"] / loss - 1 if loss else None,
                "steps": arms[arm]["steps"],
                "steps_of_all": arms["all"]["steps"],
            }
    return defence


def _bins(column: str) -> list[str]:
    return [f"bin_{i + 1}{f':{column}' if column else ''}" for i in range(BINS)]
