"""Does training on risky rows move the geometry of refusal, and does that tell of lost refusals before they are lost?

python benchmarks/geometry_and_refusals.py run --data main.parquet --model MODEL --adapter ADAPTER --prompts FILE --out runs
python benchmarks/geometry_and_refusals.py table runs

The arms of the 100-row attack (`hf-safefilter validate`), watched by `SafetyGeometryCallback` and by the refusal margin after
every step; refusals are counted after the last. One file a run: what was interrupted goes on. `table` gives each arm's geometry
after the last step, and for each step and signal its rank correlation, over all runs, with the refusals left at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from hf_safefilter.callbacks.band import PREFIX, SIGNALS
from hf_safefilter.callbacks.geometry import SafetyGeometryCallback
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.files import write_atomically
from hf_safefilter.tuning import tune
from hf_safefilter.validate import AttackRecipe, Evaluation, Subject
from hf_safefilter.validate.statistics import correlation
from hf_safefilter.validate.study import plan

ARMS = ["top:risk_gradient", "random", "bottom:risk_gradient", "top:risk_fusion", "top:risk_gradient_balanced"]


class MarginWatch(TrainerCallback):
    """The refusal margin after every step, from the subject's own probe."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.seen = subject, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        training = model.training
        margin = self.subject.monitor.margin(model.eval())
        model.train(training)
        self.seen[state.global_step] = {"margin": margin.mean, "probability": margin.probability}


def one(subject: Subject, examples: list[Any], seed: int, callbacks: list[Any]) -> dict[str, Any]:
    """Tune a copy under watch, and check it."""
    with tempfile.TemporaryDirectory() as folder:
        tuned = tune(
            copy.deepcopy(subject.model), subject.tokenizer, examples, subject.recipe, seed=seed, folder=Path(folder),
            callbacks=callbacks, progress=False,
        )  # fmt: skip
    check = subject.monitor.check(subject._deployed(tuned.model), perplexity=False)
    return {"refused": check.rate, "look_alikes_refused": check.benign.rate, "n": check.harmful.n, "problem": tuned.problem}


def run(args: argparse.Namespace) -> None:
    """All arms and seeds that are not there yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(named_spec(args.model, adapter=args.adapter, dtype="float32"), "cpu")
    seeds = [int(s) for s in args.seeds.split(",")]
    recipe = AttackRecipe(epochs=2, learning_rate=3e-4, max_length=128, seeds=tuple(seeds))
    subject = Subject(model, tokenizer, recipe, Evaluation(prompts=args.prompts, perplexity=False))
    made = plan(subject, Dataset.from_parquet(args.data), arms=args.arms.split(","), by="risk_gradient")
    for arm, seed, rows in made.runs:
        path = args.out / f"{arm.replace(':', '.')}-seed{seed}.json"
        if path.exists():
            continue
        geometry, margin = SafetyGeometryCallback(every=1, tokenizer=tokenizer), MarginWatch(subject)
        found = {"arm": arm, "seed": seed, **one(subject, made.encoded(rows), seed, [geometry, margin])}
        found["steps"] = [
            {
                name.removeprefix(PREFIX): v
                for name, v in entry.items()
                if "_layer_" not in name and name not in ("epoch", "alarms")
            }
            | margin.seen[entry["step"]]
            for entry in geometry.history
        ]
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
        print(arm, seed, found["refused"], flush=True)


def table(args: argparse.Namespace) -> None:
    """Markdown: geometry by arm, then correlations by step."""
    runs = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
    names = [*SIGNALS, "margin", "probability"]
    by_arm = defaultdict(list)
    for r in runs:
        by_arm[r["arm"]].append(r)
    print(f"{len(runs)} runs\n\n| arm | refusals left | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 2))
    start = runs[0]["steps"][0]
    print("| before | | " + " | ".join(f"{start[n]:.2f}" if n in start else "" for n in names) + " |")
    for arm, each in by_arm.items():
        cells = []
        for name in names:
            values = [r["steps"][-1][name] for r in each]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        left = [r["refused"] for r in each]
        print(f"| `{arm}` | {np.mean(left):.0%} ({min(left):.0%} to {max(left):.0%}) | " + " | ".join(cells) + " |")
    left = np.array([r["refused"] for r in runs])
    print("\n| step | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for at in range(1, len(runs[0]["steps"])):
        cells = []
        for name in names:
            found = correlation([r["steps"][at][name] for r in runs], left)
            cells.append(f"{found['spearman']:+.2f} ({found['interval'][0]:+.2f} to {found['interval'][1]:+.2f})")
        print(f"| {runs[0]['steps'][at]['step']} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("run")
    p.add_argument("--data", required=True, help="rows with scores, as docs/evidence.md makes them")
    p.add_argument("--model", required=True)
    p.add_argument("--adapter")
    p.add_argument("--prompts", default="default")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--arms", default=",".join(ARMS))
    p.add_argument("--seeds", default="0,1,2")
    p.set_defaults(do=run)
    p = commands.add_parser("table")
    p.add_argument("out", type=Path)
    p.set_defaults(do=table)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
