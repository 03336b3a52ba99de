"""Cards of what is published: our part between two marks, written anew each time; what a person wrote around it stays."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from .accounts import model_text
from .select import score_columns, score_values

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

DATA_FILE, PICTURE_FILE = "data/train-00000-of-00001.parquet", "scores.png"
BEGIN, END = "<!-- hf_safefilter: begin, written anew at each push -->", "<!-- hf_safefilter: end -->"
TAGS = ("hf_safefilter", "safety")


def scored_card(
    ds: Dataset,
    by: str,
    repo_id: str,
    account: Mapping[str, Any] | None,
    license: str | list[str] | None,
    source: str | None,
    old: str | None,
    *,
    picture: bool,
) -> str:
    """The card of a scored dataset; `source` is a dataset on the Hub, `old` the card that is there."""
    lines = []
    for name in score_columns(ds):
        values = score_values(ds, [name])
        known = values[~np.isnan(values)]
        quantiles = np.quantile(known, [0.05, 0.5, 0.95]).tolist() if len(known) else [float("nan")] * 3
        lines.append({"name": name, "scored": len(known), "quantiles": quantiles})
    status = ds["risk_status"][:] if "risk_status" in ds.column_names else []
    missing = np.isnan(score_values(ds, [by]))
    reasons = Counter(why for why, no in zip(status, missing, strict=False) if no) if len(status) else Counter()
    shown = {
        "rows": len(ds), "by": by, "repo_id": repo_id, "columns": lines, "reasons": reasons.most_common(10),
        "model": model_text(account), "anchors": (account or {}).get("anchors") or {},
        "source": source or (account or {}).get("data"), "license": license,
        "picture": PICTURE_FILE if picture else None, "unscored": bool(missing.any()),
    }  # fmt: skip
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILE}]}]
    metadata: dict[str, Any] = {"configs": configs}
    metadata |= {"license": license} if license else {}
    metadata |= {"source_datasets": [source]} if source else {}
    return card("scored_card.md.jinja", shown, repo_id, metadata, old)


def license_of(text: str | None) -> str | list[str] | None:
    """The license that a card's metadata names."""
    from huggingface_hub import DatasetCard

    if not text:
        return None
    try:
        found = DatasetCard(text, ignore_metadata_errors=True).data.to_dict().get("license")
    except ValueError:  # its head is no YAML mapping
        return None
    names = found if isinstance(found, list) else [found]
    return found if found and all(isinstance(name, str) for name in names) else None


def card(template: str, values: Mapping[str, Any], repo_id: str, metadata: Mapping[str, Any], old: str | None) -> str:
    """A card with our part from a template; metadata of the old card that is not ours stays, too."""
    from huggingface_hub import DatasetCard, DatasetCardData
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    source = resources.files(__package__).joinpath("assets", "templates", template).read_text("utf-8")
    section = f"{BEGIN}\n{environment.from_string(source).render(values)}\n{END}"
    there = DatasetCard(old, ignore_metadata_errors=True) if old else None
    data = (there.data.to_dict() if there else {}) | dict(metadata)
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *TAGS]))
    text = there.text if there else f"# {repo_id}\n"
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    return f"---\n{DatasetCardData(**data, ignore_metadata_errors=True)}\n---\n{text}"


def plain(text: Any) -> str:
    """Text from outside on one line of a card, as code that neither Markdown nor HTML reads."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split()).replace("`", "'").replace("|", "¦")
    return f"`{line[:200]}`" if line else "not said"


def histogram(values: np.ndarray, by: str) -> bytes | None:
    """A histogram as PNG; `None` where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no histogram in the card: pip install matplotlib")
        return None
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(values[np.isfinite(values)], bins=60, color="#5b7fb5")
    axes.set_xlabel(f"{by} (higher is riskier)", parse_math=False)
    axes.set_ylabel("rows")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()
