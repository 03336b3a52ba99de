"""`hf-safefilter publish`: a scored dataset on the Hub."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .files import account_beside, read_rows


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `publish`."""
    p = commands.add_parser(
        "publish",
        parents=[common],
        help="put scored rows on the Hub, privately",
        description="Push scored rows with a dataset card, in one commit. Private unless --public is given. The token is "
        "that of hf auth login, or HF_TOKEN.",
    )
    p.add_argument("data", help="score's output folder, or a file or folder with scored rows")
    p.add_argument("repo_id", help="user/name on the Hub")
    p.add_argument("--public", action="store_true", help="for everyone to see")
    p.add_argument("--license", help="of the rows, as the Hub names licenses, such as cc-by-4.0")
    p.add_argument("--source", help="Hub id of the dataset that the rows come from, whose license they then have")
    p.add_argument("--by", metavar="COLUMN", help="score column that the card filters by")
    p.add_argument("--split", help="split of the dataset (default: train)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read and push."""
    from ..hub import check_repo_id, push_scored_to_hub

    check_repo_id(args.repo_id)  # reading may take long
    address = push_scored_to_hub(
        read_rows(args.data, args.split),
        args.repo_id,
        private=not args.public,
        run=account_beside(args.data),
        license=args.license,
        source=args.source,
        by=args.by,
    )
    print(json.dumps({"url": address, "private": not args.public}) if args.json else f"published {address}")
    return 0
