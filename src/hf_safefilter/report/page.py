"""The report as one HTML file: no request leaves it, and nothing in it runs but our own script.

Rows are hostile by assumption. Templates escape what they print; rows reach the script as JSON in a data block, in which `<`
is written `\\u003c`, and the script shows them as text only. A content security policy names our script and style by hash,
so that nothing else could run or load even if something slipped through.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_atomically
from .content import Content, gather

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Report:
    """A page: `html` is the whole file. In a notebook it shows itself."""

    html: str
    content: Content

    def save(self, path: str | Path) -> Path:
        """Write the page in one step; returns the path.

        Raises:
            InputError: the folder is missing or cannot be written.
        """
        path = Path(path)
        try:
            # Lone surrogates, which JSON may hold, have no UTF-8.
            write_atomically(path, self.html.encode("utf-8", "replace"))
        except OSError as error:
            raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
        return path

    def _repr_html_(self) -> str:
        # An own document: the notebook's styles and scripts and the page's do not meet.
        return f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" width="100%" height="800"></iframe>'


def scored_report(
    ds: Dataset,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    by: str | None = None,
    columns: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | str | Path | None = None,
    monitor: str | Path | None = None,
    validate: str | Path | None = None,
) -> Report:
    """One self-contained page about a scored dataset: histograms, riskiest rows, what they share, how to filter.

    Args:
        ds: a scored dataset.
        out: where to write the page, if anywhere.
        title, by, columns, run, monitor, validate: see `gather`.

    Raises:
        InputError: see `gather`; or the page cannot be written.
    """
    content = gather(ds, title=title, by=by, columns=columns, run=run, monitor=monitor, validate=validate)
    report = Report(render(content), content)
    if out is not None:
        report.save(out)
    return report


def render(content: Content) -> str:
    """The page's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_safefilter", "assets/report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.0f}%"
    assets = resources.files("hf_safefilter") / "assets" / "report"
    script, style = ((assets / name).read_text("utf-8") for name in ("report.js", "report.css"))
    values = asdict(content)
    rows = {
        name: values[name] for name in ("columns", "correlations", "shown", "values", "prompts", "responses", "heat", "history")
    }
    rows |= {"rows": content.rows, "scored": content.scored, "by": content.by}
    return environment.get_template("report.html.jinja").render(
        **values,
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        data=_data_block(rows),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_block(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings say."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
