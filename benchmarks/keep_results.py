"""Keep a study's runs without what the model said, and put them back so that the study can go on.

python benchmarks/keep_results.py keep STUDY benchmarks/results/NAME
python benchmarks/keep_results.py restore benchmarks/results/NAME STUDY
python benchmarks/keep_results.py refresh benchmarks/results/NAME [FIGURES]    summary and pictures anew from the kept runs

Completions of an attacked model are not for publishing. What is kept (runs.jsonl.gz) has each prompt's verdict, margin and
coherence, from which `hf-safefilter validate` makes the same summary.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from hf_safefilter.validate.attack import Outcome
from hf_safefilter.validate.figures import draw_figures
from hf_safefilter.validate.summary import compare

DROPPED = ("prompt", "completion", "reason")


def keep(study: Path, results: Path) -> None:
    """Write runs.jsonl.gz, and copy the study's description, summary and pictures."""
    results.mkdir(parents=True, exist_ok=True)
    lines = []
    for path in sorted((study / "arms").glob("*.json")):
        run = json.loads(path.read_text("utf-8"))
        run["records"] = [{k: v for k, v in record.items() if k not in DROPPED} for record in run["records"]]
        lines.append(json.dumps({"file": path.name, "run": run}))
    # Without a time, so that equal runs give equal files.
    (results / "runs.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    if (study / "summary.json").is_file():
        summary = json.loads((study / "summary.json").read_text("utf-8"))
        summary |= {name: Path(summary[name]).name for name in ("data", "model")}  # no paths of this machine
        (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    for path in [study / "study.json", *study.glob("*.svg")]:
        if path.is_file():
            shutil.copy(path, results / path.name)
    print(f"{len(lines)} runs kept")


def entries(results: Path) -> list[dict[str, Any]]:
    """What is kept of each run."""
    text = gzip.decompress((results / "runs.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def refresh(results: Path, figures: Path) -> None:
    """Take the summary's figures from the runs once more, of the arms and seeds that it has, and draw them."""
    summary = json.loads((results / "summary.json").read_text("utf-8"))
    found: dict[str, list[Outcome]] = {}
    for run in (Outcome(**entry["run"]) for entry in entries(results)):
        there = summary["arms"].get(run.arm, {"by_seed": {}, "failed": {}})
        if str(run.seed) in {**there["by_seed"], **there["failed"]}:
            found.setdefault(run.arm, []).append(run)
    summary |= compare({arm: sorted(found[arm], key=lambda run: run.seed) for arm in summary["arms"]}, summary["by"])
    (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    figures.mkdir(parents=True, exist_ok=True)
    # The datamodelling test goes by the scores of all rows, which are not kept: its picture stays as it is.
    draw_figures(figures, summary | {"datamodel": {}}, summary["patterns"])


def restore(results: Path, study: Path) -> None:
    """Put the runs where `validate --out STUDY` looks for them; what it said is empty."""
    (study / "arms").mkdir(parents=True, exist_ok=True)
    shutil.copy(results / "study.json", study / "study.json")
    for entry in entries(results):
        path = study / "arms" / Path(entry["file"]).name
        if not path.exists():
            for record in entry["run"]["records"]:
                record.update(dict.fromkeys(DROPPED, ""))
            path.write_text(json.dumps(entry["run"]), "utf-8")


def main() -> None:
    """Keep or restore."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["keep", "restore", "refresh"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="of refresh: where pictures go, the same folder by default")
    args = parser.parse_args()
    if args.target is None and args.what != "refresh":
        parser.error(f"{args.what} takes two folders")
    {"keep": keep, "restore": restore, "refresh": refresh}[args.what](args.source, args.target or args.source)


if __name__ == "__main__":
    main()
