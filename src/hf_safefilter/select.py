"""Choosing rows by their scores: the riskiest ones, or the set without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Unscored = Literal["error", "keep", "drop"]

# The column used where the user names none: the first of these that is there. Balanced before the paper's own weights,
# because those push short answers to the bottom whatever they say (see docs/scores.md).
DEFAULT_ORDER = ("risk_gradient_balanced", "risk_gradient", "risk_representation_balanced", "risk_representation")


def select_risky(
    ds: Dataset,
    *,
    k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    by: str | Sequence[str] | None = None,
    unscored: Unscored = "error",
) -> Dataset:
    """The riskiest rows, highest risk first; rows of equal risk in dataset order.

    Args:
        ds: a scored dataset.
        k: how many rows.
        fraction: what share of the scored rows, 0 to 1, rounded to the nearest whole row.
        threshold: rows whose score is at least this; with a single column only.
        by: a score column, or several, ranked each and compared by the mean of their ranks. By default the first of
            `risk_gradient_balanced`, `risk_gradient`, `risk_representation_balanced`, `risk_representation` that is there.
        unscored: what to do with rows that have no score: `"error"`, `"drop"` them from the result, or `"keep"` them in it,
            after the others.

    Raises:
        InputError: not exactly one of `k`, `fraction`, `threshold`; a budget or column that does not fit; rows without a score.
    """
    risk = _risk(ds, by, unscored, threshold)
    chosen = _riskiest(risk, k, fraction, threshold)
    if unscored == "keep":
        chosen = [*chosen, *np.flatnonzero(np.isnan(risk)).tolist()]
    return ds.select(chosen)


def filter_risky(
    ds: Dataset,
    *,
    k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    by: str | Sequence[str] | None = None,
    unscored: Unscored = "error",
) -> Dataset:
    """The dataset without its riskiest rows, in its order. The complement of `select_risky` with the same arguments.

    Args:
        ds: a scored dataset.
        k, fraction, threshold, by: which rows to remove, as in `select_risky`.
        unscored: what to do with rows that have no score: `"error"`, `"drop"` them too, or `"keep"` them in their places.

    Raises:
        InputError: as `select_risky`.
    """
    risk = _risk(ds, by, unscored, threshold)
    removed = set(_riskiest(risk, k, fraction, threshold))
    if unscored == "drop":
        removed |= set(np.flatnonzero(np.isnan(risk)).tolist())
    return ds.select([i for i in range(len(ds)) if i not in removed])


def score_columns(ds: Dataset) -> list[str]:
    """The score columns of a dataset, `risk_...`, sorted."""
    return sorted(c for c in ds.column_names if c.startswith("risk_") and c != "risk_status")


def default_score(columns: Sequence[str]) -> str:
    """The score column to use where the user names none.

    Raises:
        InputError: no score column, or several of which none is in `DEFAULT_ORDER`.
    """
    for name in DEFAULT_ORDER:
        if name in columns:
            return name
    if len(columns) == 1:
        return columns[0]
    if columns:
        raise InputError(f"several score columns: choose with by=..., one or more of {', '.join(columns)}")
    raise InputError("the dataset has no risk_... column: score it first, scored = ds.map(scorer, batched=True)")


def _risk(ds: Any, by: str | Sequence[str] | None, unscored: str, threshold: float | None) -> np.ndarray:
    """Risk [rows] in float64, higher is riskier, NaN where a row has no score: the score itself, or mean ranks."""
    from datasets import Dataset

    if not isinstance(ds, Dataset):
        hint = {
            "DatasetDict": "choose a split: ds['train']",
            "IterableDataset": "rows must be compared with each other: save the scored rows and load them as a Dataset",
        }.get(type(ds).__name__, "score and load it with the datasets library")
        raise InputError(f"expected a datasets.Dataset, got {type(ds).__name__}; {hint}")
    if unscored not in get_args(Unscored):
        raise InputError(f"unscored must be one of {', '.join(get_args(Unscored))}, got {unscored!r}")
    names = [default_score(score_columns(ds))] if by is None else [by] if isinstance(by, str) else list(by)
    if not names:
        raise InputError("by names no column")
    if len(names) > 1 and threshold is not None:
        raise InputError("a threshold needs a single column: mean ranks have no scale; use k or fraction")
    risk = score_values(ds, names)
    missing = np.isnan(risk)
    if missing.any() and unscored == "error":
        first = int(np.flatnonzero(missing)[0])
        why = f" ({ds[first]['risk_status']})" if "risk_status" in ds.column_names else ""
        raise InputError(
            f"{int(missing.sum())} of {len(ds)} rows have no score, row {first} first{why}; "
            "pass unscored='drop' or unscored='keep'"
        )
    return risk


def score_values(ds: Any, names: Sequence[str]) -> np.ndarray:
    """Risk [rows] in float64 by a column, or by several ranked each (mean rank); NaN where a row lacks one of them.

    Raises:
        InputError: no such column, or one that does not hold numbers.
    """
    columns = np.stack([_values(ds, name) for name in names])  # [columns, rows]
    if len(names) == 1:
        return columns[0]
    missing = np.isnan(columns).any(axis=0)
    risk = np.full(len(ds), np.nan)
    risk[~missing] = np.mean([ranks(column[~missing]) for column in columns], axis=0)
    return risk


def _values(ds: Dataset, name: str) -> np.ndarray:
    if name not in ds.column_names:
        known = ", ".join(score_columns(ds)) or "none"
        raise InputError(f"no column {name!r} in the dataset; its score columns: {known}")
    # Through Arrow format, which honours select, filter and shuffle; `ds.data` does not.
    column = ds.select_columns([name]).with_format("arrow")[:][name]
    try:
        return column.to_numpy().astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(f"the column {name!r} does not hold numbers but {ds.features[name]}") from None


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 for the smallest value; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation of two sequences; NaN where one is constant."""
    a, b = (ranks(np.asarray(v, dtype=float)) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def _riskiest(risk: np.ndarray, k: int | None, fraction: float | None, threshold: float | None) -> list[int]:
    """Row indices within the budget, highest risk first, ties in dataset order."""
    given = {n: v for n, v in (("k", k), ("fraction", fraction), ("threshold", threshold)) if v is not None}
    if len(given) != 1:
        raise InputError(f"give exactly one of k, fraction and threshold; got {', '.join(given) or 'none'}")
    scored = np.flatnonzero(~np.isnan(risk))
    order = scored[np.argsort(-risk[scored], kind="stable")]
    if threshold is not None:
        if not _is_number(threshold):
            raise InputError(f"threshold must be a number, got {threshold!r}")
        return order[risk[order] >= threshold].tolist()
    if fraction is not None:
        if not _is_number(fraction) or not 0 <= fraction <= 1:
            raise InputError(f"fraction must be between 0 and 1, got {fraction!r}")
        k = math.floor(fraction * len(scored) + 0.5)
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 0:
        raise InputError(f"k must be a whole number of at least 0, got {k!r}")
    if k > len(scored):
        raise InputError(f"k={k}, but only {len(scored)} rows have a score")
    return order[:k].tolist()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and not math.isnan(value)
