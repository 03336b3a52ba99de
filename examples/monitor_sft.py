"""Fine-tune a model on harmless rows and watch it stop refusing, with TRL's SFTTrainer or with plain Trainer.

python examples/monitor_sft.py                                             # SFTTrainer, only warns
python examples/monitor_sft.py --trainer plain --on-breach restore         # Trainer, puts the last safe weights back

SmolLM2-135M-Instruct refuses nothing as published, so it is first taught to, in a few minutes, on the built-in anchors'
refusals. The harmful prompts that are checked were in neither training set.
"""

import argparse
import json
from importlib import resources

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_safefilter import AnchorSet, RefusalRateCallback
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.session import harmless_requests

LENGTH = 128


def make_trainer(kind: str, model, tokenizer, rows: Dataset, out: str, **options):
    """LoRA on prompt and completion rows; only completions are learned."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    options |= {"output_dir": out, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "logging_steps": 5}
    options |= {"save_strategy": "no", "use_cpu": not torch.cuda.is_available(), "bf16": False}  # the weights are already
    if kind == "sft":
        config = SFTConfig(max_length=LENGTH, gradient_checkpointing=False, **options)
        return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)

    def encode(row: dict) -> dict:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        return {"input_ids": ids[:LENGTH], "labels": ([-100] * start + ids[start:])[:LENGTH]}

    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    rows = rows.map(encode, remove_columns=rows.column_names)
    model, config = get_peft_model(model, lora), TrainingArguments(**options)
    return Trainer(model, config, train_dataset=rows, processing_class=tokenizer, data_collator=collator)


def chat(row: dict) -> dict:
    """A row as TRL's conversational prompt and completion."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def main() -> None:
    """Align, then fine-tune under watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["sft", "plain"], default="sft")
    parser.add_argument("--on-breach", choices=["warn", "stop", "restore"], default="warn")
    parser.add_argument("--min-refusal-rate", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="monitored")
    args = parser.parse_args()
    model, tokenizer = load(named_spec(demo_model()), "cpu")
    sample = Dataset.from_json(str(resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl")).shuffle(seed=0)
    harmless = [chat(row) for row in sample]

    refusals = [chat(d) for side in AnchorSet.load().safe for d in side]
    lessons = Dataset.from_list(refusals + [chat(d) for d in harmless_requests()] + harmless[:64])
    aligner = make_trainer("plain", model, tokenizer, lessons, f"{args.out}/align", learning_rate=5e-4, num_train_epochs=3)
    aligner.train()
    model = aligner.model.merge_and_unload()

    options = {"learning_rate": args.lr, "max_steps": args.steps, "seed": args.seed, "report_to": "tensorboard"}
    trainer = make_trainer(args.trainer, model, tokenizer, Dataset.from_list(harmless[64:]), args.out, **options)
    watch = RefusalRateCallback(
        trainer,
        judge="keyword_prefix",
        every=5,
        margin_every=1,
        min_refusal_rate=args.min_refusal_rate,
        on_breach=args.on_breach,
    )
    trainer.add_callback(watch)
    trainer.train()
    for entry in watch.history:
        if "eval_refusal_rate" in entry:
            print(
                json.dumps({k: round(v, 4) for k, v in entry.items() if "_rate" in k or k in ("step", "eval_refusal_margin")})
            )


if __name__ == "__main__":
    main()
