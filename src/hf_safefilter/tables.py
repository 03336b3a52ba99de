"""What `datasets.map` hands to a callable and what it takes back, for each dataset format, batched or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets.formatting.formatting import LazyBatch, LazyRow

from .errors import InputError
from .formats import find_layout

# Result columns by name: their type and values, `None` where a row has none.
Columns = dict[str, tuple[pa.DataType, list[Any]]]


class Table:
    """The rows of one call: a batch (mapping of lists, Arrow table, data frame) or a single row, given back with columns added.

    Args:
        data: what `datasets.map` passed.
        columns: the user's `columns` argument, where the layout is not to be found from the column names.

    Raises:
        InputError: something that is not rows, or columns in no known layout.
    """

    def __init__(self, data: Any, columns: Mapping[str, str] | None = None) -> None:
        self.data = data
        # Names and readers first: only the layout's columns are read, of rows that may have many more.
        names, read = _reader(data)
        self.layout = find_layout(names, columns)
        parts = {name: _decoded(read, name) for name in self.layout.columns.values()}
        if isinstance(data, LazyBatch | LazyRow):
            self.batched = isinstance(data, LazyBatch)
        else:
            self.batched = not isinstance(data, Mapping) or not any(_is_one_row(part) for part in parts.values())
        self.rows: list[dict[str, Any]] = [dict(parts)]
        if self.batched:
            self.rows = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]

    def with_columns(self, columns: Columns) -> Any:
        """The result in the form that `datasets.map` takes back: for Arrow and frames all columns, else the new ones."""
        if not isinstance(self.data, Mapping):
            return self._whole_table(columns)
        # Arrow-backed datasets keep the type of a column whose first values are all null only if the nulls are typed.
        # Elsewhere the values go to the user as they are, and must be plain.
        typed = isinstance(self.data, LazyBatch | LazyRow)
        cells = {n: [_cell(v, t, typed) for v in values] for n, (t, values) in columns.items()}
        return cells if self.batched else {n: values[0] for n, values in cells.items()}

    def _whole_table(self, columns: Columns) -> Any:
        arrays = {n: pa.array(values, type=t) for n, (t, values) in columns.items()}
        if isinstance(self.data, pa.Table) or hasattr(self.data, "to_arrow"):
            table = self.data if isinstance(self.data, pa.Table) else self.data.to_arrow()
            for name, array in arrays.items():
                if name in table.column_names:
                    table = table.drop_columns([name])
                table = table.append_column(name, array)
            return table if isinstance(self.data, pa.Table) else type(self.data)(table)
        return self.data.assign(**{n: array.to_pandas().set_axis(self.data.index) for n, array in arrays.items()})


def _reader(data: Any) -> tuple[Iterable[str], Callable[[str], Any]]:
    """The names of the columns, and what reads one."""
    if hasattr(data, "to_arrow"):  # polars
        data = data.to_arrow()
    if isinstance(data, pa.Table):
        return data.column_names, lambda name: data[name].to_pylist()
    if isinstance(data, Mapping):
        return data.keys(), lambda name: data[name]
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        return list(data.columns), lambda name: data[name].tolist()
    raise InputError(
        f"the scorer takes a row or a batch as datasets.map passes it, not {type(data).__name__}; "
        "use dataset.map(scorer, batched=True)"
    )


def _decoded(read: Callable[[str], Any], name: str) -> Any:
    try:
        return read(name)
    except UnicodeDecodeError as error:  # Arrow takes any bytes for text; they are decoded here
        raise InputError(
            f"the column {name!r} holds bytes that are not UTF-8 ({error.reason}); save the data as UTF-8"
        ) from None


def _cell(value: Any, kind: pa.DataType, typed: bool) -> Any:
    if typed:
        return pa.scalar(value, type=kind)
    if value is None or pa.types.is_string(kind) or pa.types.is_list(kind):
        return value
    return np.dtype(kind.to_pandas_dtype()).type(value)


def _is_one_row(part: Any) -> bool:
    """Whether a part of a plain mapping belongs to a single row: text, null, or one conversation's messages.

    A batch holds a list of those. An empty list may be either and counts as a batch without rows.
    """
    if hasattr(part, "tolist"):
        part = part.tolist()
    if not isinstance(part, list | tuple):
        return True
    # Messages are dicts of texts; a batch from older `datasets` may hold dicts of lists.
    return bool(part) and isinstance(part[0], Mapping) and not any(isinstance(v, list) for v in part[0].values())
