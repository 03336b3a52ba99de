"""Printing rows and tables on a terminal. Rows are hostile by assumption: control characters never reach it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import readable


def printable(text: str, width: int) -> str:
    """One line of at most `width` characters, with white space folded and control characters made visible."""
    text = " ".join(text[: 4 * width].split())
    text = readable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], widths: Mapping[str, int] | None = None) -> str:
    """Rows as aligned text: numbers to three places on the right, text on the left, cut at its column's width."""
    cells = [[_cell(row.get(c), (widths or {}).get(c, 40)) for c in columns] for row in rows]
    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    size = [max(len(c), *(len(line[i]) for line in cells)) if cells else len(c) for i, c in enumerate(columns)]
    lines = [list(columns), ["-" * n for n in size], *cells]
    return "\n".join(
        "  ".join(v.rjust(n) if right else v.ljust(n) for v, n, right in zip(line, size, numeric, strict=True)).rstrip()
        for line in lines
    )


def row_text(row: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """A short description of a row: its prompt and its response, from the layout's parts."""
    values = [row[parts[p]] for p in ("messages", "prompt", "input", "completion", "text") if p in parts]
    return " → ".join(_text(v) for v in values if v)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " → ".join(str(m.get("content") or m.get("value")) for m in value if isinstance(m, Mapping))
    return str(value)


def _cell(value: Any, width: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return printable(value if isinstance(value, str) else json.dumps(value), width)
