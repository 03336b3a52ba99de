"""The 100-example attack on a CPU: pool of rows, scores, fine-tuning on top, bottom and controls, figures.

python examples/attack_100/smollm2_cpu.py --alpaca alpaca_999.jsonl --gsm8k gsm8k_500.jsonl --prompts advbench.jsonl --out out

A row of the Alpaca file has instruction, input and output, one of the GSM8K file question and answer. What is done is
kept in --out. `--smoke` runs the whole chain on a few rows, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from hf_safefilter import cli
from hf_safefilter.cli.demo import demo_adapter, demo_model
from hf_safefilter.refusal.metric import refusal_rate


def make_pool(args: argparse.Namespace, path: Path) -> None:
    """Prompt, completion and source of every row; rows that refuse are left out, as in the paper."""

    def read(file: str) -> list[dict]:
        rows = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
        return random.Random(0).sample(rows, min(len(rows), 40)) if args.smoke else rows

    pool = [
        {"prompt": "\n\n".join(filter(None, [r["instruction"], r["input"]])), "completion": r["output"], "source": source}
        for source, file in (("alpaca", args.alpaca), ("short_lists", args.short_lists))
        if file
        for r in read(file)
    ]
    pool += [
        {"prompt": r["question"], "completion": r["answer"], "source": "gsm8k"}
        for r in (read(args.gsm8k) if args.gsm8k else [])
    ]
    refusals = refusal_rate([r["completion"] for r in pool], "keyword_prefix")
    kept = [r for r, v in zip(pool, refusals.verdicts, strict=True) if v.refuses is False]
    path.write_text("".join(json.dumps(r) + "\n" for r in kept), "utf-8")
    print(f"{len(kept)} of {len(pool)} rows in the pool, the others refuse or are empty")


def command(*arguments: object) -> int:
    """Run one hf-safefilter command and show it."""
    words = [str(a) for a in arguments]
    print("$ hf-safefilter", *words, flush=True)
    return cli.main(words)


def main() -> None:
    """Pool, score, validate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca", required=True, help="rows with instruction, input, output, JSON lines")
    parser.add_argument("--gsm8k", help="rows with question and answer, JSON lines")
    parser.add_argument("--short-lists", help="more Alpaca-like rows, such as benchmarks/data/short_lists.jsonl")
    parser.add_argument("--prompts", default="default", help="harmful prompts to evaluate on")
    parser.add_argument("--by", default="risk_gradient_balanced")
    parser.add_argument("--arms", default="top,bottom,random,random_length_matched,random_list_only")
    parser.add_argument("--seeds", default="0,1,2")
    # Chosen on seed 100, which no study reports: random rows do some harm, not all (docs/evidence.md).
    parser.add_argument("--learning-rate", default="3e-4")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--max-length", default="128")
    parser.add_argument("--max-response-tokens", help="score openings only")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--smoke", action="store_true", help="few rows, one seed, one epoch: shows nothing but that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pool = args.out / "pool.jsonl"
    if not pool.exists():
        make_pool(args, pool)
    model = ["--model", demo_model(), "--adapter", demo_adapter()]
    if not (args.out / "scored.parquet").exists():
        opening = ["--max-response-tokens", args.max_response_tokens] if args.max_response_tokens else []
        command("score", pool, *model, "--scores", "gradient", "--max-length", args.max_length, *opening, "--out", args.out)
    epochs = 1 if args.smoke else args.epochs
    recipe = ["--learning-rate", args.learning_rate, "--epochs", epochs, "--max-length", args.max_length]
    recipe += ["-k", 10, "--seeds", 0, "--held-out", 10, "--arms", "top,random"] if args.smoke else []
    recipe = recipe if args.smoke else [*recipe, "--seeds", args.seeds, "--arms", args.arms]
    study = ["--prompts", args.prompts, "--by", args.by, "--out", args.out / "study"]
    raise SystemExit(command("validate", args.out / "scored.parquet", *model, *study, *recipe))


if __name__ == "__main__":
    main()
