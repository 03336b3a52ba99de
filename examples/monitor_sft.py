"""Fine-tune a model on harmless rows and watch it stop refusing, with TRL's SFTTrainer or with plain Trainer.

python examples/monitor_sft.py                                             # SFTTrainer, only warns
python examples/monitor_sft.py --trainer plain --on-breach restore         # Trainer, puts the last safe weights back

SmolLM2-135M-Instruct refuses nothing as published, so it is first taught to (a few minutes, once), on the built-in anchors'
refusals. The harmful prompts that are checked were in neither training set.
"""

import argparse
from importlib import resources
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_safefilter import AnchorSet, RefusalRateCallback
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.session import harmless_requests


def make_trainer(kind: str, model, tokenizer, rows: Dataset, **options):
    """LoRA on prompt and completion rows; only completions are learned."""
    options |= {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "logging_steps": 5, "save_strategy": "no"}
    options |= {"use_cpu": not torch.cuda.is_available(), "bf16": False}  # the weights are already
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    if kind == "sft":
        config = SFTConfig(max_length=128, gradient_checkpointing=False, **options)
        return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)

    def encode(row: dict) -> dict:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        return {"input_ids": ids[:128], "labels": ([-100] * start + ids[start:])[:128]}

    model, config, collator = get_peft_model(model, lora), TrainingArguments(**options), DataCollatorForSeq2Seq(tokenizer)
    rows = rows.map(encode, remove_columns=rows.column_names)
    return Trainer(model, config, train_dataset=rows, processing_class=tokenizer, data_collator=collator)


def chat(row: dict) -> dict:
    """A row as TRL's conversational prompt and completion."""
    return {part: [{"role": role, "content": row[part]}] for part, role in (("prompt", "user"), ("completion", "assistant"))}


def main() -> None:
    """Align, then fine-tune under watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["sft", "plain"], default="sft")
    parser.add_argument("--on-breach", choices=["warn", "stop", "restore"], default="warn")
    parser.add_argument("--min-refusal-rate", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--aligned", default="monitored/aligned", help="the model that refuses, made if not there")
    parser.add_argument("--out", default="monitored")
    args = parser.parse_args()
    sample = str(resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl")
    harmless = [chat(row) for row in Dataset.from_json(sample).shuffle(seed=0)]
    if not Path(args.aligned).is_dir():
        refusals = [chat(d) for side in AnchorSet.load().safe for d in side]
        lessons = Dataset.from_list(refusals + [chat(d) for d in harmless_requests()] + harmless[:64])
        options = {"output_dir": args.out, "learning_rate": 5e-4, "num_train_epochs": 3, "report_to": "none"}
        aligner = make_trainer("plain", *load(named_spec(demo_model()), "cpu"), lessons, **options)
        aligner.train()
        aligner.model.merge_and_unload().save_pretrained(args.aligned)
        aligner.processing_class.save_pretrained(args.aligned)
    options = {"output_dir": args.out, "learning_rate": args.lr, "max_steps": args.steps, "report_to": "tensorboard"}
    trainer = make_trainer(args.trainer, *load(named_spec(args.aligned), "cpu"), Dataset.from_list(harmless[64:]), **options)
    watch = {"judge": "keyword_prefix", "every": 5, "margin_every": 1, "min_refusal_rate": args.min_refusal_rate}
    trainer.add_callback(RefusalRateCallback(trainer, on_breach=args.on_breach, **watch))
    trainer.train()


if __name__ == "__main__":
    main()
