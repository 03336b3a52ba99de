"""What watching refusals costs beside training: the margin, and a generated check.

One real `Trainer` run on SmolLM2-135M-Instruct (full fine-tuning, AdamW, batches of 8 rows of 256 tokens), in which every step
is followed by a margin over the 64 built-in harmful prompts, and steps in turn by a check of the same 64, 32 tokens each, and
by one of them with their 64 look-alikes. Times are of one process, in turns; medians and ranges of ratios to the median step.

python benchmarks/monitor_cost.py                       # bfloat16 weights
python benchmarks/monitor_cost.py --dtype float32 --bf16      # float32 weights under autocast, as Trainer's bf16=True
python benchmarks/monitor_cost.py --lora
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

from hf_safefilter.cli.demo import demo_model
from hf_safefilter.cli.show import table
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.refusal.monitor import RefusalMonitor

ROWS, TOKENS, MARGIN_EVERY = 8, 256, 10


class Clock(TrainerCallback):
    """Times steps, margins and checks, each in turn."""

    def __init__(self, tokenizer, accelerator) -> None:
        self.accelerator = accelerator
        self.steps: list[float] = []
        self.times: dict[str, list[float]] = {}
        harmful = RefusalMonitor(tokenizer, benign_prompts=None, margin=False)
        both = RefusalMonitor(tokenizer)
        self.works = {
            "margin, 64 prompts": both.margin,
            "check, 64 prompts x 32 tokens": lambda model: harmful.check(model, perplexity=False),
            "check and margin, 128 prompts (the default)": both.check,
        }
        self.last = 0.0

    def on_step_begin(self, args, state, control, **_) -> None:
        # From the last step's end, so that what lies between steps counts as training.
        self.last = self.last or time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.steps.append(time.perf_counter() - self.last)
        for k, (name, work) in enumerate(self.works.items()):
            if k == 0 or state.global_step % 2 == k - 1:
                started = time.perf_counter()
                with self.accelerator.autocast():
                    work(model)
                self.times.setdefault(name, []).append(time.perf_counter() - started)
        self.last = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=11)
    args = parser.parse_args()
    model, tokenizer = load(named_spec(demo_model(), dtype=args.dtype), "cpu")
    if args.lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        model.enable_input_require_grads()
    ids = torch.randint(0, 40_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    with tempfile.TemporaryDirectory() as folder:
        # A learning rate of nearly nothing: the model must go on answering at full length.
        options = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=ROWS, max_steps=args.steps, learning_rate=1e-9,
            save_strategy="no", report_to="none", disable_tqdm=True, bf16=args.bf16,
            gradient_checkpointing=args.gradient_checkpointing,
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=data, processing_class=tokenizer)
        clock = Clock(tokenizer, trainer.accelerator)
        trainer.add_callback(clock)
        trainer.train()
    # The first step and the first of each work warm caches up.
    step = statistics.median(clock.steps[1:])
    print(f"a training step of {ROWS} x {TOKENS} tokens: {step:.2f} s (median of {len(clock.steps) - 1})")
    lines = []
    for name, times in clock.times.items():
        ratios = sorted(t / step for t in times[1:])
        line = {
            "": name,
            "n": len(ratios),
            "training steps": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        }
        if name.startswith("margin"):
            share = statistics.median(ratios) / MARGIN_EVERY
            line["of training time, every 10 steps"] = (
                f"{share:.2%} ({ratios[0] / MARGIN_EVERY:.2%} to {ratios[-1] / MARGIN_EVERY:.2%})"
            )
        lines.append({"of training time, every 10 steps": "", **line})
    print(table(lines, ["", "n", "training steps", "of training time, every 10 steps"], {"": 60}))


if __name__ == "__main__":
    main()
