"""The account of a scoring run (`run.json`), as `hf-safefilter score` writes it, read back to be shown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, first_line

RUN_FILE = "run.json"


def read_account(run: Mapping[str, Any] | str | Path | None) -> dict[str, Any] | None:
    """An account given as such, or read from its file or folder.

    Raises:
        InputError: no such file, or not the account of a scoring run.
    """
    if run is None:
        return None
    where = "the account"
    if not isinstance(run, Mapping):
        path = Path(run) / RUN_FILE if Path(run).is_dir() else Path(run)
        where = str(path)
        try:
            run = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the account of a scoring run from {path}: {first_line(error)}") from None
    if not isinstance(run, Mapping) or "score_columns" not in run:
        raise InputError(f"{where} is not the account of a scoring run: it has no 'score_columns'")
    return dict(run)


def model_text(account: Mapping[str, Any] | None) -> str:
    """The model that was scored with, in a line: its name, file, adapter, and the start of each fingerprint."""
    spec = (account or {}).get("model")
    if not isinstance(spec, Mapping):
        return ""
    parts = []
    for what in ("model", "adapter"):
        source = spec.get(what)
        if isinstance(source, Mapping) and source.get("name"):
            name = without_folders(source["name"])
            file = f" ({spec['gguf_file']})" if what == "model" and spec.get("gguf_file") else ""
            parts.append(
                f"{'' if what == 'model' else 'adapter '}{name}{file} {str(source.get('fingerprint', ''))[:12]}".strip()
            )
    return ", ".join(parts)


def without_folders(value: Any) -> Any:
    """Absolute paths cut to their last part, all through a value: where files lie is nobody's business."""
    if isinstance(value, Mapping):
        return {name: without_folders(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(v) for v in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]", value)):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value
