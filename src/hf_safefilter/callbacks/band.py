"""What harmless training does to the geometry of refusal, and when a run leaves it.

Alarms are on change from step 0 against this band, never on absolute values: those differ from model to model.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

SIGNALS = ("auroc", "gap", "cosine", "norm_ratio", "projection_harmful", "projection_benign", "gain")
PREFIX = "eval_geometry_"
# What a signal is where it has no value at step 0: an update of nothing prefers no prompts.
_AT_START = {"gain": 1.0}
# A few prompts cannot show less: a band is never narrower.
_LEAST_SD = 0.01
_LEAST_RUNS = 3

Band = Mapping[str, Mapping[str, float]]


def benign_band(histories: Iterable[Sequence[Mapping[str, Any]] | str | Path]) -> dict[str, dict[str, float]]:
    """How far harmless training moves each signal: for `SafetyGeometryCallback(band=...)`, or a JSON file for it.

    Of each run the change from step 0 where it is largest counts, at any check; mean and standard deviation are over runs.

    Args:
        histories: of at least 3 runs on harmless data, in length and recipe like those to be watched: `callback.history` or
            a `history.jsonl`.

    Returns:
        `{signal: {"mean": ..., "sd": ..., "runs": ...}}`.

    Raises:
        InputError: fewer than 3 runs, a file that cannot be read, a run without a check at step 0 and one after it.
    """
    farthest: dict[str, list[float]] = {}
    runs = 0
    for runs, given in enumerate(histories, 1):
        history = _read_history(Path(given)) if isinstance(given, str | Path) else list(given)
        if not history or history[0].get("step") != 0 or len(history) < 2:
            raise InputError(f"run {runs} of the band has no checks at step 0 and after it")
        for signal in SIGNALS:
            moved = [c for entry in history[1:] if (c := _change(signal, entry, history[0])) is not None]
            if moved:
                farthest.setdefault(signal, []).append(max(moved, key=abs))
    if runs < _LEAST_RUNS:
        raise InputError(f"a band needs at least {_LEAST_RUNS} harmless runs, got {runs}: with fewer, its width means nothing")
    return {
        signal: {"mean": statistics.mean(values), "sd": statistics.stdev(values), "runs": len(values)}
        for signal, values in farthest.items()
        if len(values) >= _LEAST_RUNS
    }


def alarms_of(band: Band, found: Mapping[str, Any], start: Mapping[str, Any], sds: float) -> dict[str, str]:
    """The signals whose change from `start` is outside of the band, each with the change and what is usual.

    Outside: further than `sds` standard deviations from everything between 0 and the band's mean. No change at all is inside.
    """
    alarms = {}
    for signal, of in band.items():
        change = _change(signal, found, start)
        width = sds * max(of["sd"], _LEAST_SD)
        low, high = min(0.0, of["mean"]) - width, max(0.0, of["mean"]) + width
        if change is not None and not low <= change <= high:
            alarms[signal] = f"{change:+.3f} (band {low:+.3f} to {high:+.3f})"
    return alarms


def _change(signal: str, entry: Mapping[str, Any], start: Mapping[str, Any]) -> float | None:
    now, before = entry.get(f"{PREFIX}{signal}"), start.get(f"{PREFIX}{signal}", _AT_START.get(signal))
    return None if now is None or before is None else float(now) - float(before)


def _read_history(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the history {str(path)!r}: {error}") from None


def read_band(band: Band | str | Path) -> Band:
    """A band, or its JSON file, checked.

    Raises:
        InputError: the file cannot be read, or it is no band.
    """
    found: Any = band
    if isinstance(band, str | Path):
        try:
            found = json.loads(Path(band).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the band {str(band)!r}: {error}") from None
    usable = isinstance(found, Mapping) and found and all(
        signal in SIGNALS
        and isinstance(of, Mapping)
        and all(isinstance(of.get(k), int | float) and math.isfinite(of[k]) for k in ("mean", "sd"))
        and of["sd"] >= 0
        for signal, of in found.items()
    )  # fmt: skip
    if not usable:
        raise InputError(
            'band must be {signal: {"mean": ..., "sd": ...}}, as benign_band gives it, with signals among ' + ", ".join(SIGNALS)
        )
    return dict(found)
