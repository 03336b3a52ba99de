"""What watching the geometry of refusal costs beside training.

One real `Trainer` run on SmolLM2-135M-Instruct (LoRA by default, AdamW, batches of 8 rows of 256 tokens), in which every step
is followed by one measurement of `SafetyGeometryCallback` at its defaults (32 + 32 built-in prompts, four blocks), as its own
code takes it. Times are of one process, in turns; medians and ranges of ratios to the median step.

python benchmarks/geometry_cost.py
python benchmarks/geometry_cost.py --full                 # full fine-tuning
python benchmarks/geometry_cost.py --dtype float32        # default: bfloat16 weights
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_safefilter.callbacks.geometry import SafetyGeometryCallback
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.cli.show import table
from hf_safefilter.engine.loading import load, named_spec

ROWS, TOKENS, EVERY = 8, 256, 10


class Clock(TrainerCallback):
    """Times steps. It comes before the geometry callback, whose time is not among them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.last = 0.0

    def on_step_begin(self, args, state, control, **_) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        self.steps.append(time.perf_counter() - self.last)


class Timed(SafetyGeometryCallback):
    """The callback, timed from outside: measuring, logging and writing."""

    times: list[float]

    def on_step_end(self, args, state, control, model=None, **options) -> None:
        started = time.perf_counter()
        super().on_step_end(args, state, control, model=model, **options)
        self.times = [*getattr(self, "times", []), time.perf_counter() - started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--steps", type=int, default=11)
    args = parser.parse_args()
    model, tokenizer = load(named_spec(demo_model(), dtype=args.dtype), "cpu")
    if not args.full:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    ids = torch.randint(0, 40_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=ROWS, max_steps=args.steps, learning_rate=1e-4,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=data, processing_class=tokenizer)
        clock, geometry = Clock(), Timed(trainer, every=1)
        trainer.add_callback(clock)
        trainer.add_callback(geometry)
        trainer.train()
    # The first of each warms caches up.
    step = statistics.median(clock.steps[1:])
    ratios = sorted(t / step for t in geometry.times[1:])

    def shown(scale: float, form: str) -> str:
        middle, low, high = (f"{r / scale:{form}}" for r in (statistics.median(ratios), ratios[0], ratios[-1]))
        return f"{middle} ({low} to {high})"

    print(f"a training step of {ROWS} x {TOKENS} tokens: {step:.2f} s (median of {len(clock.steps) - 1})")
    line = {
        "": f"geometry, {len(geometry._ids)} prompts, blocks {', '.join(map(str, geometry._chosen))}", "n": len(ratios),
        "training steps": shown(1, ".2f"), f"of training time, every {EVERY} steps": shown(EVERY, ".2%"),
    }  # fmt: skip
    print(table([line], list(line), {"": 60}))


if __name__ == "__main__":
    main()
