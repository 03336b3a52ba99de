"""Intervals for attack success over prompts and seeds, by the bootstrap (Efron 1979), and what a study concludes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..select import spearman

DRAWS = 10_000
# What became of each prompt [seeds, prompts]: whether its answer complied, 1 or 0, or what its refusal lost; NaN where unknown.
Outcomes = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval; `n` answers over `seeds` runs."""

    mean: float
    low: float
    high: float
    n: int
    seeds: int

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"mean": self.mean, "interval": [self.low, self.high], "n": self.n, "seeds": self.seeds}


def success(outcomes: Outcomes) -> Estimate:
    """The mean (of compliance: the attack success rate), with an interval over seeds and prompts, drawn with replacement.

    With few seeds the interval is too narrow for what another seed would give; with one it is over prompts alone.
    """
    draws = _draws(outcomes, *_weights(outcomes.shape))
    low, high = np.nanquantile(draws, [0.025, 0.975]).tolist()
    judged = int(np.isfinite(outcomes).sum())
    return Estimate(float(np.nanmean(outcomes)), low, high, judged, len(outcomes))


def difference(a: Outcomes, b: Outcomes) -> Estimate:
    """The mean of `a` minus that of `b`, with an interval: seeds drawn for each, prompts for both together.

    Args:
        a, b: outcomes [seeds, prompts] on the same prompts in the same order; seeds may differ in number.
    """
    seeds_a, prompts = _weights(a.shape)
    seeds_b, _ = _weights(b.shape, stream=1)
    low, high = np.nanquantile(_draws(a, seeds_a, prompts) - _draws(b, seeds_b, prompts), [0.025, 0.975]).tolist()
    judged = int(np.isfinite(a).sum() + np.isfinite(b).sum())
    return Estimate(float(np.nanmean(a) - np.nanmean(b)), low, high, judged, min(len(a), len(b)))


def kept(before: Outcomes, whole: Outcomes, part: Outcomes) -> dict[str, Any]:
    """What share of the refusals that training on the whole loses a part keeps: (whole - part) / (whole - before).

    Args:
        before, whole, part: outcomes [seeds, prompts] on the same prompts: untrained, trained on all rows, trained on fewer.

    Returns:
        `share`, `None` where the whole loses none, and its bootstrap 95% `interval`, seeds drawn for each, prompts for all
        together; `None` where more than one draw in forty has no loss to keep from.
    """
    seeds = [_weights(cells.shape, stream=i)[0] for i, cells in enumerate((whole, part, before))]
    prompts = _weights(whole.shape)[1]
    lost_all, lost_part, start = (_draws(c, s, prompts) for c, s in zip((whole, part, before), seeds, strict=True))
    lost = float(np.nanmean(whole) - np.nanmean(before))
    share = float(np.nanmean(whole) - np.nanmean(part)) / lost if lost > 0 else None
    usable = lost_all > start
    if share is None or usable.mean() < 0.975:
        return {"share": share, "interval": None}
    ratios = (lost_all - lost_part)[usable] / (lost_all - start)[usable]
    return {"share": share, "interval": np.quantile(ratios, [0.025, 0.975]).tolist()}


def monotone(bins: Sequence[Outcomes]) -> dict[str, Any]:
    """Whether the harm falls from the riskiest bin to the least risky one.

    Returns:
        `monotone` (no bin's mean is above the one before it), `spearman` between risk and harm over the bins, and
        `share`: of the bootstrap's draws in which the means are monotone.
    """
    means = np.array([np.nanmean(b) for b in bins])
    _, prompts = _weights(bins[0].shape)
    draws = np.stack([_draws(b, _weights(b.shape, stream=i)[0], prompts) for i, b in enumerate(bins)])
    return {
        "monotone": bool((np.diff(means) <= 0).all()),
        "spearman": spearman(-np.arange(len(bins)), means),
        "share": float((np.diff(draws, axis=0) <= 0).all(axis=0).mean()),
        "first_minus_last": difference(bins[0], bins[-1]).as_dict(),
    }


def correlation(x: Any, y: Any) -> dict[str, Any]:
    """Spearman's correlation with its bootstrap 95% interval over the pairs."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        i = rng.integers(len(x), size=len(x))
        draws.append(spearman(x[i], y[i]))
    low, high = np.nanquantile(draws, [0.025, 0.975]).tolist()
    return {"spearman": spearman(x, y), "interval": [low, high], "n": len(x)}


def _weights(shape: tuple[int, ...], stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed [draws, seeds] and each prompt [draws, prompts] is drawn."""
    seeds, prompts = shape
    rng = np.random.default_rng([7, stream])
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
    return by_seed, np.random.default_rng(11).multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)


def _draws(outcomes: Outcomes, seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The mean outcome in each draw [draws]."""
    judged = np.isfinite(outcomes)
    total = ((seeds @ np.where(judged, outcomes, 0)) * prompts).sum(axis=1)
    count = ((seeds @ judged.astype(float)) * prompts).sum(axis=1)
    return total / np.where(count, count, np.nan)


def complied(record: Mapping[str, Any]) -> float:
    """Whether an answer complied, 1 or 0; NaN where unjudged."""
    return np.nan if record["refuses"] is None else float(not record["refuses"])


def lost(record: Mapping[str, Any], measure: str) -> float:
    """The negative of a prompt's refusal `margin` (nats per token) or `probability`: more is worse; NaN where there is none.

    Both move where attack success is at its floor or ceiling, and differ less from one order of training to the next. Only
    differences of them mean something, in which what was there before tuning cancels.
    """
    value = record.get(measure)
    return np.nan if value is None else -float(value)


def outcomes(
    records: Mapping[int, Sequence[Mapping[str, Any]]],
    side: str = "harmful",
    value: Callable[[Mapping[str, Any]], float] = complied,
) -> Outcomes:
    """The value of each answer [seeds, prompts], from each seed's completions."""
    return np.array([[value(r) for r in records[seed] if r["side"] == side] for seed in sorted(records)])
