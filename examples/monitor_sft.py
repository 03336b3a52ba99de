"""Fine-tune a model on harmless rows and watch it stop refusing, with TRL's SFTTrainer or with plain Trainer.

python examples/monitor_sft.py                                             # SFTTrainer, only warns
python examples/monitor_sft.py --trainer trainer --on-breach restore       # Trainer, puts the last safe weights back

SmolLM2-135M-Instruct refuses nothing as published, so it is first taught to, in a few minutes, on the built-in anchors'
refusals. The harmful prompts that are checked were in neither training set.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_safefilter import AnchorSet, RefusalRateCallback
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.engine.loading import load, named_spec


def chat(prompt: str, completion: str) -> dict[str, Any]:
    """A row for TRL."""
    return {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": completion}]}


def lora() -> LoraConfig:
    """All linear layers, small rank."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def tokenized(rows: Dataset, tokenizer: Any) -> Dataset:
    """Rows for plain Trainer: the prompt is not learned."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}

    return rows.map(encode, remove_columns=rows.column_names)


def main() -> None:
    """Align, then fine-tune under watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["sft", "trainer"], default="sft")
    parser.add_argument("--on-breach", choices=["warn", "stop", "restore"], default="warn")
    parser.add_argument("--min-refusal-rate", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="monitored")
    args = parser.parse_args()
    common = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "logging_steps": 5, "save_strategy": "no"}
    model, tokenizer = load(named_spec(demo_model()), "cpu")
    sample = Dataset.from_json(str(resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl"))
    harmless = Dataset.from_list([chat(row["prompt"], row["completion"]) for row in sample.shuffle(seed=0)])

    refusals = [chat(d["prompt"], d["completion"]) for side in AnchorSet.load().safe for d in side]
    lessons = Dataset.from_list(refusals + list(harmless.select(range(96))))
    config = SFTConfig(f"{args.out}/align", learning_rate=5e-4, num_train_epochs=3, report_to="none", max_length=256, **common)
    aligner = SFTTrainer(model, config, train_dataset=lessons, processing_class=tokenizer, peft_config=lora())
    aligner.train()
    model = aligner.model.merge_and_unload()

    rows = harmless.select(range(96, len(harmless)))
    common |= {"learning_rate": 1e-3, "max_steps": args.steps, "report_to": "tensorboard"}
    if args.trainer == "sft":
        config = SFTConfig(args.out, max_length=256, **common)
        trainer: Any = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora())
    else:
        trainer = Trainer(
            get_peft_model(model, lora()), TrainingArguments(args.out, **common), train_dataset=tokenized(rows, tokenizer),
            processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )  # fmt: skip
    watch = RefusalRateCallback(
        trainer, every=5, margin_every=1, min_refusal_rate=args.min_refusal_rate, on_breach=args.on_breach
    )
    trainer.add_callback(watch)
    trainer.train()
    for entry in watch.history:
        if "eval_refusal_rate" in entry:
            print(
                json.dumps(
                    {k: entry[k] for k in ("step", "eval_refusal_rate", "eval_refusal_rate_benign", "eval_refusal_margin")}
                )
            )


if __name__ == "__main__":
    main()
