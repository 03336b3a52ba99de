"""`hf-safefilter report`: a scored dataset as one page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..accounts import RUN_FILE
from .files import account_beside, read_rows
from .score import columns_argument


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `report`."""
    p = commands.add_parser(
        "report",
        parents=[common],
        help="look at scored rows in one self-contained page",
        description="Write one HTML file that asks nothing of the network: histograms with a movable threshold, the riskiest "
        "rows, what they have in common, and the lines that filter them.",
    )
    p.add_argument("data", help="score's output folder, or a file or folder with scored rows")
    p.add_argument("-o", "--out", required=True, type=Path, help="the page, such as report.html")
    p.add_argument("--by", metavar="COLUMN", help="score column that rows are ordered by at first")
    p.add_argument("--title", help="of the page (default: the data's name)")
    p.add_argument("--columns", help="where the prompt and the response are, such as prompt=q,completion=a")
    p.add_argument("--split", help="split of the dataset (default: train)")
    p.add_argument(
        "--run", dest="account", type=Path, help=f"account of the scoring run (default: {RUN_FILE} beside the rows, if there)"
    )
    p.add_argument("--monitor", type=Path, help="folder of a monitored training's refusal checks, for its curves")
    p.add_argument("--validate", type=Path, help="folder of a validation, for its table")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, render, write."""
    from ..report import scored_report

    report = scored_report(
        read_rows(args.data, args.split),
        args.out,
        title=args.title or f"Scored rows of {Path(args.data).resolve().name}",
        by=args.by,
        columns=columns_argument(args.columns),
        run=args.account or account_beside(args.data),
        monitor=args.monitor,
        validate=args.validate,
    )
    content, size = report.content, args.out.stat().st_size
    if args.json:
        print(
            json.dumps({"out": str(args.out), "bytes": size, "rows": content.rows, "scored": content.scored, "by": content.by})
        )
    else:
        print(f"wrote {args.out} ({size / 1000:.0f} kB): {content.scored} of {content.rows} rows with a score, by {content.by}")
    return 0
