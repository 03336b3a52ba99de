"""`hf-safefilter estimate`: what scoring will take, before weights are loaded."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .score import add_row_arguments, rows_and_scorer

if TYPE_CHECKING:
    from ..estimate import Estimate


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `estimate`."""
    p = commands.add_parser(
        "estimate",
        parents=[common],
        help="tell the time, memory and disk that score will take",
        description="Tell rows, tokens, time, peak memory and disk of scoring, with score's arguments, before weights are "
        "loaded or downloaded. Time and memory come from a trial on this machine of the model's first blocks.",
    )
    p.add_argument("data", help="a Hub id, a folder, or a json, jsonl, csv or parquet file")
    add_row_arguments(p)
    p.add_argument("--rows", type=int, help="rows of the whole, where DATA is a part that stands for it")
    p.add_argument("--sample", type=int, default=1000, help="rows to read (default: 1000)")
    p.add_argument("--no-trial", action="store_true", help="only count: no time, no memory, a few seconds")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Estimate and tell."""
    for name in ("rows", "sample"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    rows, scorer = rows_and_scorer(args)
    from ..estimate import estimate_scoring

    say = (lambda text: None) if args.quiet else lambda text: print(text, file=sys.stderr, flush=True)
    found = estimate_scoring(rows, scorer, rows=args.rows, sample=args.sample, trial=not args.no_trial, say=say)
    print(json.dumps(found.as_dict()) if args.json else shown(found))
    return 0


def shown(found: Estimate) -> str:
    """The estimate as text, with what is free on this machine beside it."""
    import psutil

    low, high = found.tokens_interval
    read = "all read" if found.sampled == found.rows else f"{found.sampled:,} read"
    lines = [("rows", f"{found.rows:,} ({read}; {found.unscorable:.1%} of these cannot be scored)")]
    lines += [("", f"{count:,} of them: {reason}") for reason, count in list(found.reasons.items())[:3]]
    width = f"{low:,} to {high:,}, of which in responses" if low != high else "in responses"
    lines.append(("tokens", f"{found.tokens:,} ({width} {found.response_tokens:,})"))
    lines.append(
        ("model", f"{found.parameters:,} parameters in {found.layers} blocks, {_size(found.weights)} in {found.dtype}")
    )
    lines.append(("download", "unknown" if found.download is None else _size(found.download)))
    if found.fit_seconds is not None and found.score_seconds is not None:
        both = found.fit_seconds + found.score_seconds
        threads = f" with {found.threads} thread{'s' * (found.threads > 1)}" if found.device == "cpu" else ""
        parts = f"anchors {_time(found.fit_seconds)}, rows {_time(found.score_seconds)}"
        lines.append(("time", f"{_time(both)}: {parts}, on {found.device}{threads}"))
    if found.device_memory is not None:
        lines.append(("GPU memory", _size(found.device_memory)))
    if found.memory is not None:
        free = psutil.virtual_memory().available
        short = "; THIS IS NOT ENOUGH" if free < found.memory else ""
        lines.append(("memory", f"{_size(found.memory)} at the peak ({_size(free)} free{short})"))
    free = shutil.disk_usage(Path()).free
    short = "; THIS IS NOT ENOUGH" if free < found.disk + (found.download or 0) else ""
    lines.append(("disk", f"{_size(found.disk)} at most, output and cache together ({_size(free)} free here{short})"))
    if found.measured:
        lines.append(("measured", f"{found.measured}; loading the model comes on top"))
    lines += [("remark", remark) for remark in found.remarks]
    return "\n".join(f"{name:10}  {text}" for name, text in lines)


def _size(count: int) -> str:
    """Bytes in the unit that people read."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
