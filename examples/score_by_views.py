"""Four views of one question, by mean rank: the score that found the most harmful rows in docs/evidence.md.

python examples/score_by_views.py --data rows.jsonl --model MODEL [--adapter ADAPTER] --out scored.parquet
hf-safefilter filter scored.parquet --by risk_views --fraction 0.1 -o clean.parquet

The paper's gradient score over the first ten response tokens; in the last four blocks alone; and over whole responses at an
early checkpoint, the model after five training steps on 100 of the rows. And, without a gradient, how much the row's request
looks to the model like one to refuse. What is scored is kept beside --out and not scored again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_safefilter import SafetyRiskScorer
from hf_safefilter.engine.loading import default_device, load, named_spec
from hf_safefilter.files import agree, replacing
from hf_safefilter.formats import find_layout
from hf_safefilter.select import score_values
from hf_safefilter.tuning import tune
from hf_safefilter.validate import AttackRecipe, Evaluation, Subject

VIEWS = ["risk_gradient_first10", "risk_gradient_last4", "risk_gradient_warm", "risk_refusal_direction"]


def checkpoint(rows: Dataset, args: argparse.Namespace, folder: Path) -> None:
    """Tune the model for a moment, and save it."""
    model, tokenizer = load(named_spec(args.model, adapter=args.adapter, dtype="float32"), default_device())
    recipe = AttackRecipe(epochs=1, learning_rate=args.learning_rate, max_length=args.max_length)
    some = rows.select(random.Random(0).sample(range(len(rows)), min(args.rows, len(rows))))
    encoded = Subject(model, tokenizer, recipe, Evaluation(perplexity=False)).encode(some, find_layout(rows.column_names))
    examples = [example for example in encoded if example is not None]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tuned = tune(model, tokenizer, examples, recipe, seed=0, folder=Path(scratch) / "trainer")
        if tuned.problem:
            raise SystemExit(f"no early checkpoint: {tuned.problem}; lower --learning-rate")
        tuned.model.save_pretrained(Path(scratch) / "warm")
        tokenizer.save_pretrained(Path(scratch) / "warm")
        (Path(scratch) / "warm").rename(folder)


def main() -> None:
    """Score, view by view, and rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON lines in any known layout")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--anchors", default="default")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=4, help="of the view of the last blocks")
    parser.add_argument("--rows", type=int, default=100, help="of the early checkpoint")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the early checkpoint")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    rows = Dataset.from_json(args.data)
    beside = args.out.with_suffix(".views")
    beside.mkdir(parents=True, exist_ok=True)
    # An early checkpoint of other rows or another model is not to be taken for this one's.
    made_from = {name: getattr(args, name) for name in ("model", "adapter", "max_length", "rows", "learning_rate")}
    agree(beside / "warm.json", made_from | {"data": rows._fingerprint})
    if not (beside / "warm").exists():
        checkpoint(rows, args, beside / "warm")
    given = {"adapter": args.adapter, "max_length": args.max_length, "anchors": args.anchors}
    views = {
        "first10": SafetyRiskScorer(args.model, scores=("gradient", "refusal_direction"), max_response_tokens=10, **given),
        "last4": SafetyRiskScorer(args.model, scores="gradient", parameters=f"last-{args.blocks}", **given),
        "warm": SafetyRiskScorer(str(beside / "warm"), scores="gradient", **given | {"adapter": None}),
    }
    scored = rows
    for name, scorer in views.items():
        file = beside / f"{name}-{scorer.fingerprint[:12]}-{rows._fingerprint}.parquet"
        if not file.exists():
            with replacing(file) as temporary:
                rows.map(scorer, batched=True, desc=name).to_parquet(str(temporary))
        found = Dataset.from_parquet(str(file))
        if name == "first10":
            scored = scored.add_column("risk_status", found["risk_status"][:])
            scored = scored.add_column("risk_refusal_direction", found["risk_refusal_direction"][:])
        scored = scored.add_column(f"risk_gradient_{name}", found["risk_gradient"][:])
    ranks = [None if np.isnan(value) else float(value) for value in score_values(scored, VIEWS)]
    with replacing(args.out) as temporary:
        scored.add_column("risk_views", ranks).to_parquet(str(temporary))
    print(f"{args.out}: {len(rows)} rows, ranked by risk_views")


if __name__ == "__main__":
    main()
