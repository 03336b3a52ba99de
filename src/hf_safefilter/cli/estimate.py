"""`hf-safefilter estimate`: what scoring will take, before weights are loaded."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..errors import InputError
from .score import add_row_arguments, rows_and_scorer


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
    print(json.dumps(found.as_dict()) if args.json else found)
    return 0
