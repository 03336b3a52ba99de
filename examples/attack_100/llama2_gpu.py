"""The paper's own setting: Llama-2-7B-chat, 100 rows of Alpaca or Dolly, its template and recipe. For a GPU with 80 GB.

python examples/attack_100/llama2_gpu.py --dataset alpaca --prompts advbench_520.jsonl --out attack_llama2

We have not run this: no such GPU was at hand. See README.md beside it for what differs from the paper. The model is gated on
the Hub: accept its licence and log in first. Scoring 52,000 rows takes hours; --limit takes a random part.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from hf_safefilter import cli
from hf_safefilter.refusal.metric import refusal_rate
from hf_safefilter.validate import AttackRecipe

DATASETS = {
    "alpaca": ("tatsu-lab/alpaca", "instruction", "input", "output", "\n\n### Input:\n"),
    "dolly": ("databricks/databricks-dolly-15k", "instruction", "context", "response", "\n\nInput:\n"),
}
RECIPE = AttackRecipe(epochs=5, learning_rate=5e-5, batch_size=20, template="he2024", seeds=(20, 42, 71))


def framed_rows(rows: Any, dataset: str) -> list[dict[str, Any]]:
    """Rows in the paper's template as messages, so that scores see what training sees; rows that refuse are left out."""
    _, instruction, extra, output, joined = DATASETS[dataset]
    refuses = refusal_rate([str(r[output]) for r in rows]).verdicts
    found = []
    for row, verdict in zip(rows, refuses, strict=True):
        if verdict.refuses is not False:
            continue
        text = row[instruction] + (joined + row[extra] if row[extra] else "")
        prompt = RECIPE.framed_messages([{"role": "user", "content": text}])
        found.append({"messages": [*prompt, {"role": "assistant", "content": row[output]}]})
    return found


def framed_prompts(path: str) -> list[dict[str, Any]]:
    """Harmful prompts in the same template."""
    prompts = [json.loads(line)["prompt"] for line in Path(path).read_text("utf-8").splitlines()]
    return [{"prompt": RECIPE.framed_messages([{"role": "user", "content": p}])} for p in prompts]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def main() -> None:
    """Prepare, score, validate with keywords; judge the kept completions again with a guard model if you like."""
    from datasets import load_dataset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="alpaca")
    parser.add_argument("--model", default="meta-llama/Llama-2-7b-chat-hf")
    parser.add_argument("--prompts", required=True, help="harmful prompts, such as AdvBench's 520, JSON lines with prompt")
    parser.add_argument("--judge", default="keyword", help="or classifier:cais/HarmBench-Llama-2-13b-cls in a second --out")
    parser.add_argument("--limit", type=int, help="a random part of the rows")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and optimizer, as in the paper; float32 needs 112 GB")
    parser.add_argument(
        "--lora-rank", help="LoRA instead of full fine-tuning, for smaller GPUs: another recipe than the paper's"
    )
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = list(load_dataset(DATASETS[args.dataset][0], split="train"))
    if args.limit:
        rows = random.Random(0).sample(rows, args.limit)
    pool = write(args.out / "pool.jsonl", framed_rows(rows, args.dataset))
    prompts = write(args.out / "prompts.jsonl", framed_prompts(args.prompts))
    model = ["--model", args.model]
    cli.main(["score", str(pool), *model, "--scores", "gradient,representation", "--out", str(args.out)])
    # Rows and prompts are in the template already, so the recipe's own is the plain one here.
    recipe = ["--epochs", RECIPE.epochs, "--learning-rate", RECIPE.learning_rate, "--batch-size", RECIPE.batch_size]
    recipe += [
        "--seeds",
        ",".join(map(str, RECIPE.seeds)),
        "--max-new-tokens",
        512,
        "--benign-prompts",
        "none",
        "--micro-batch-size",
        2,
    ]
    recipe += ["--lora-rank", args.lora_rank] if args.lora_rank else []
    study = ["--by", "risk_gradient", "--prompts", prompts, "--judge", args.judge, "--out", args.out / "study"]
    words = ["validate", args.out / "scored.parquet", *model, "--dtype", args.dtype, *study, *recipe]
    raise SystemExit(cli.main([str(w) for w in words]))


if __name__ == "__main__":
    main()
