"""Scored datasets as tables in a notebook: `%load_ext hf_safefilter`.

A selection is a plain `datasets.Dataset`, whose own display names its columns and no row. The extension shows what it holds.
Rows are hostile by assumption: everything is escaped.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .formats import find_layout
from .report.content import ordered, shorten, texts
from .select import score_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset

_ROWS, _SCORES, _LENGTH = 10, 3, 200


def load_ipython_extension(ipython: Any) -> None:
    """Let IPython show scored datasets as tables; others stay as they are."""
    formatter = ipython.display_formatter.formatters["text/html"]
    formatter.for_type_by_name("datasets.arrow_dataset", "Dataset", dataset_html)


def unload_ipython_extension(ipython: Any) -> None:
    """Show scored datasets as any others."""
    formatter = ipython.display_formatter.formatters["text/html"]
    try:
        formatter.pop("datasets.arrow_dataset.Dataset")
    except KeyError:  # it was not loaded
        return


def dataset_html(ds: Dataset, rows: int = _ROWS, columns: Mapping[str, str] | None = None) -> str | None:
    """The first rows of a scored dataset, in its order, as an HTML table; `None` for one that is not scored.

    Args:
        ds: the dataset; of a selection the first rows are the riskiest.
        rows: how many.
        columns: which columns hold the prompt and the response; see `SafetyRiskScorer`.
    """
    scores = score_columns(ds)
    try:
        layout = find_layout([c for c in ds.column_names if not c.startswith("risk_")], columns)
    except InputError:
        return None
    if not scores:
        return None
    shown = ordered(scores)[:_SCORES]
    part = ds.select(range(min(rows, len(ds))))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("prompt", "response", *shown))
    lines = []
    for (prompt, response), row in zip(texts(part, layout), part.select_columns(shown), strict=True):
        cells = "".join(f'<td style="text-align:left">{escape(shorten(t, _LENGTH))}</td>' for t in (prompt, response))
        lines.append(f"<tr>{cells}{''.join(_cell(row[name]) for name in shown)}</tr>")
    more = len(scores) - len(shown)
    caption = f"{len(part):,} of {len(ds):,} rows" + (f", {more} more score column{'s' * (more > 1)}" if more else "")
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(value: float | None) -> str:
    return f"<td>{'none' if value is None else f'{value:.4g}'}</td>"
