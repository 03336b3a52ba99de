"""`hf-safefilter select` and `filter`: the riskiest rows of a scored dataset, or the dataset without them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .files import check_output, read_rows, write_rows


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `select` and `filter`."""
    for name, what in (
        ("select", "write the riskiest rows, highest risk first"),
        ("filter", "write the rows without the riskiest ones, in their order"),
    ):
        p = commands.add_parser(name, parents=[common], help=what, description=f"{what.capitalize()}.")
        p.add_argument("data", help="score's output folder, or a file or folder with scored rows")
        p.add_argument("-o", "--out", required=True, type=Path, help="file to write: .parquet, .jsonl or .csv")
        p.add_argument("-k", type=int, help="how many rows")
        p.add_argument("--fraction", type=float, help="what share of the rows, 0 to 1")
        p.add_argument("--threshold", type=float, help="rows whose score is at least this")
        p.add_argument("--by", action="append", metavar="COLUMN", help="score column; given twice or more, their mean rank")
        p.add_argument("--unscored", default="error", help="rows without a score: error, keep or drop (default: error)")
        p.add_argument("--split", help="split of the dataset (default: train)")
        p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Choose and save."""
    check_output(args.out)
    from ..select import filter_risky, select_risky

    scored = read_rows(args.data, args.split)
    choose = select_risky if args.command == "select" else filter_risky
    chosen = choose(scored, k=args.k, fraction=args.fraction, threshold=args.threshold, by=args.by, unscored=args.unscored)
    write_rows(chosen, args.out)
    account = {"command": args.command, "rows": len(scored), "written": len(chosen), "out": str(args.out)}
    print(json.dumps(account) if args.json else f"{len(chosen)} of {len(scored)} rows written to {args.out}")
    return 0
