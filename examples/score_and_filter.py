"""Score a fine-tuning set, look at its riskiest rows, and save it without them.

python examples/score_and_filter.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data tatsu-lab/alpaca --limit 200
python examples/score_and_filter.py --model path/to/model              # the built-in sample
"""

from __future__ import annotations

import argparse
from importlib import resources

from datasets import Dataset, load_dataset

from hf_safefilter import SafetyRiskScorer, filter_risky, select_risky


def main() -> None:
    """Score, show, filter, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--data", help="a Hub id; by default the built-in sample")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--out", default="filtered.parquet")
    args = parser.parse_args()

    if args.data:
        ds = load_dataset(args.data, split="train")
    else:
        ds = Dataset.from_json(str(resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl"))
    ds = ds.select(range(min(args.limit, len(ds))))

    scorer = SafetyRiskScorer(args.model)
    # Small batches only so that the progress bar moves; scores do not depend on them.
    scored = ds.map(scorer, batched=True, batch_size=16)

    for row in select_risky(scored, k=5, unscored="drop"):
        print(f"{row['risk_gradient_balanced']:+.3f}  {str(row)[:110]!r}")
    clean = filter_risky(scored, fraction=0.1, unscored="drop")
    clean.to_parquet(args.out)
    print(f"{len(clean)} of {len(scored)} rows saved to {args.out}")


if __name__ == "__main__":
    main()
