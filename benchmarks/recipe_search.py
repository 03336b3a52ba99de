"""How fast a recipe breaks a model, step by step, to choose one where random rows do some harm but not all.

python benchmarks/recipe_search.py --data pool.jsonl --model MODEL --adapter ADAPTER --learning-rate 2e-4 [--prompts FILE]

Fine-tunes on --rows random rows (100; of one --source, if given) and counts refusals after some steps. Use a seed that no study
reports.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.formats import find_layout
from hf_safefilter.tuning import tune
from hf_safefilter.validate import AttackRecipe, Evaluation, Subject


class Watch(TrainerCallback):
    """Checks the model itself after some steps: TRL binds forward to it, so that a copy would still run the original."""

    def __init__(self, subject: Subject, steps: set[int]) -> None:
        self.subject, self.steps = subject, steps

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check and print."""
        if state.global_step in self.steps:
            check = self.subject.monitor.check(model, perplexity=False)
            line = {"step": state.global_step, "refused": check.rate, "look_alikes_refused": check.benign.rate}
            print(json.dumps(line | check.margin_metrics()), flush=True)


def main() -> None:
    """Tune under watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="rows with prompt, completion and source, JSON lines")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", default="default")
    parser.add_argument("--source", action="append", help="take rows of this source only; may be given again")
    parser.add_argument("--rows", type=int, default=100, help="how many random rows; 0 for all")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--save", type=Path, help="keep the tuned model in this folder, to score with it")
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    rows = [json.loads(line) for line in Path(args.data).read_text("utf-8").splitlines()]
    rows = [r for r in rows if not args.source or r["source"] in args.source]
    rows = random.Random(args.seed).sample(rows, args.rows or len(rows))
    model, tokenizer = load(named_spec(args.model, adapter=args.adapter, dtype="float32"), "cpu")
    recipe = AttackRecipe(epochs=args.epochs, learning_rate=args.learning_rate, max_length=args.max_length)
    subject = Subject(model, tokenizer, recipe, Evaluation(prompts=args.prompts, perplexity=False))
    examples = [e for e in subject.encode(rows, find_layout(["prompt", "completion"])) if e is not None]
    watch = Watch(subject, {3, 5, 10, 15, 20, 40, recipe.steps(len(examples))})
    with tempfile.TemporaryDirectory() as folder:
        tuned = tune(
            copy.deepcopy(model), tokenizer, examples, recipe, seed=args.seed, folder=Path(folder), callbacks=[watch],
            progress=False,
        )  # fmt: skip
    if args.save:
        tuned.model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)


if __name__ == "__main__":
    main()
