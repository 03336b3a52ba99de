"""Score one pool of rows in every way that might predict harm, for `hf-safefilter validate` to compare.

python benchmarks/score_variants.py --data pool.jsonl --model MODEL --adapter ADAPTER --out variants.parquet

All scores of the package on whole responses; on the first 5 and 10 response tokens; with the last blocks alone; and with
anchors adapted to the model: each anchor request answered by the model before alignment (what it says when it complies) and
after (what it says when it refuses), 12 tokens of each. Adapted openings stay in a file beside the output, and so do parts of
a pass: what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.chat import ChatEncoder
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.files import replacing
from hf_safefilter.refusal.generation import generate
from hf_safefilter.refusal.prompts import load_prompts, prompt_ids

PART = 200  # rows
GRADIENTS = ("gradient", "gradient_modulewise", "margin_step", "self_influence")


def adapted(model: str, adapter: str) -> AnchorSet:
    """The built-in requests with the model's own openings, complying and refusing."""
    anchors = AnchorSet.load()
    requests = [d["prompt"] for d in anchors.harmful]
    openings = []
    for with_adapter in (None, adapter):
        loaded, tokenizer = load(named_spec(model, adapter=with_adapter), "cpu")
        encoder = ChatEncoder(tokenizer)
        ids = [prompt_ids(encoder, c, f"anchor {i}", 2048) for i, c in enumerate(load_prompts(requests, "harmful"))]
        openings.append([a.text for a in generate(loaded, tokenizer, ids, max_new_tokens=12)])
    sides = [[{"prompt": p, "completion": c} for p, c in zip(requests, side, strict=True)] for side in openings]
    return AnchorSet(sides[0], [sides[1]], name="adapted")


def scored_in_parts(rows: Dataset, scorer: SafetyRiskScorer, folder: Path, name: str) -> Dataset:
    """All rows scored; a part that is in the folder is not scored again."""
    folder.mkdir(exist_ok=True)
    parts = []
    for start in range(0, len(rows), PART):
        path = folder / f"{name or 'whole'}-{scorer.fingerprint[:12]}-{start:06d}.parquet"
        if not path.exists():
            part = rows.select(range(start, min(start + PART, len(rows)))).map(scorer, batched=True, batch_size=50)
            with replacing(path) as temporary:
                part.to_parquet(str(temporary))
        parts.append(Dataset.from_parquet(str(path)))
    return concatenate_datasets(parts)


def main() -> None:
    """Score, column by column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", help="none for a model that is whole, such as recipe_search.py --save leaves")
    parser.add_argument("--dtype", default="auto", help="of weights, as of SafetyRiskScorer")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--name", default="", help="put after each column, such as _warm for an early checkpoint")
    parser.add_argument("--passes", default="", help="suffixes with commas between, such as ,_first10; all by default")
    parser.add_argument("--scores", default="all", help="of the pass over whole responses, with commas between")
    args = parser.parse_args()
    rows = Dataset.from_json(args.data)
    chosen = args.passes.split(",") if args.passes else None
    own, kept = None, args.out.with_suffix(".anchors.json")
    if args.adapter and (chosen is None or any("_own" in suffix for suffix in chosen)):
        if not kept.exists():
            kept.write_text(json.dumps(adapted(args.model, args.adapter).to_dict()))
        own = AnchorSet.from_dict(json.loads(kept.read_text()))
    passes = {
        "": {"scores": args.scores if args.scores == "all" else args.scores.split(",")},
        "_first10": {"scores": GRADIENTS, "max_response_tokens": 10},
        "_first5": {"scores": GRADIENTS, "max_response_tokens": 5},
        "_first10_own": {"scores": ("gradient", "margin_step"), "max_response_tokens": 10, "anchors": own},
        "_own": {"scores": ("gradient", "margin_step"), "anchors": own},
        "_last4": {"scores": ("gradient", "margin_step"), "parameters": "last-4"},
    }
    scored = Dataset.from_parquet(str(args.out)) if args.out.is_file() else rows
    for suffix, options in passes.items():
        if (chosen and suffix not in chosen) or ("_own" in suffix and own is None):
            continue
        started = time.perf_counter()
        scorer = SafetyRiskScorer(args.model, adapter=args.adapter, dtype=args.dtype, max_length=args.max_length, **options)
        found = scored_in_parts(rows, scorer, args.out.with_suffix(".parts"), suffix + args.name)
        for column in [c for c in found.column_names if c.startswith("risk_") and c != "risk_status"]:
            if not (suffix + args.name and column.startswith("risk_baseline")):
                scored = scored.add_column(column + suffix + args.name, found[column][:])
        print(f"{suffix or 'whole'}: {time.perf_counter() - started:.0f} s", flush=True)
        scored.to_parquet(str(args.out))  # after each pass: what is done is kept


if __name__ == "__main__":
    main()
