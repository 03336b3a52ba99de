"""Supervised fine-tuning with TRL, the same for safety tuning (`align`) and for attacks (`validate`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from .chat import Example
from .engine.backward import Targets, inputs, predicting_positions
from .engine.batching import Batch
from .engine.loading import resolve_dtype
from .errors import InputError

try:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise InputError(f"fine-tuning needs TRL: run  pip install 'hf-safefilter[trl]'  ({error})") from None


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. The defaults are those of He et al. 2024's released scripts, but for a constant learning rate.

    Args:
        epochs: passes over the rows.
        learning_rate: of AdamW.
        batch_size: rows in an optimizer step; the last step of an epoch may have fewer.
        micro_batch_size: rows computed at a time; divides `batch_size`. Changes memory and speed, and the result by rounding.
        max_length: tokens kept of each row.
        lora_rank: rank of LoRA on all linear layers; `None` trains all weights.
        lora_alpha: its scale times the rank; twice the rank by default.
        scheduler: the learning rate's, a name that transformers knows.
        warmup_ratio: share of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        max_grad_norm: where gradients are clipped; 0 never.
        bf16: multiply in bfloat16 (autocast), with weights and optimizer in float32; `None` where the device is fast at it.
            A CPU that is not takes an order of magnitude longer than in float32.
        max_steps: optimizer steps in place of those that `epochs` make, as in transformers: the rows are gone through as often
            as that takes, so that sets of different sizes are trained equally long.

    Raises:
        InputError: a number out of range, or a micro-batch that does not divide the batch.
    """

    epochs: int = 5
    learning_rate: float = 5e-5
    batch_size: int = 20
    micro_batch_size: int = 5
    max_length: int = 512
    lora_rank: int | None = None
    lora_alpha: int | None = None
    scheduler: str = "constant"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    bf16: bool | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "lora_rank", "lora_alpha", "max_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{name} must be a number of at least 0, got {value!r}")
        if self.batch_size % self.micro_batch_size:
            raise InputError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")

    def steps(self, rows: int) -> int:
        """Optimizer steps over so many rows."""
        return self.max_steps or self.epochs * math.ceil(rows / self.batch_size)

    def passes(self, rows: int) -> float:
        """How often so many rows are gone through: the epochs, or what `max_steps` makes of them."""
        return self.steps(rows) / math.ceil(rows / self.batch_size)

    def on(self, device: str) -> Self:
        """The recipe with `bf16` decided for a device type, such as `cpu`."""
        return self if self.bf16 is not None else replace(self, bf16=resolve_dtype("auto", device) == "bfloat16")

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """The inverse of `as_dict`.

        Raises:
            InputError: a name that is not a field.
        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(data) - set(known)):
            raise InputError(f"a recipe has no {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**data)


@dataclass(frozen=True)
class Tuned:
    """The trained model (plain, or a `PeftModel` where the recipe has a LoRA rank), losses [steps] in nats, what went wrong."""

    model: Any
    losses: list[float]
    problem: str | None


def tune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    callbacks: Iterable[TrainerCallback] = (),
    progress: bool = True,
) -> Tuned:
    """Fine-tune with TRL's `SFTTrainer` on the examples' target tokens.

    Args:
        model: a loaded causal language model; it is changed. In float32, unless LoRA leaves its weights alone.
        tokenizer: its tokenizer.
        examples: encoded rows; the loss of a step is the mean over all target tokens in it.
        recipe: how.
        seed: of the rows' order, dropout and LoRA's first weights.
        folder: where TRL may write.
        callbacks: for the trainer.
        progress: whether to show a progress bar.

    Returns:
        The model and its losses; `problem` says so where training diverged.

    Raises:
        InputError: no examples.
    """
    from datasets import Dataset
    from transformers import set_seed

    if not examples:
        raise InputError("nothing to fine-tune on: no rows")
    kept = [e.first_tokens(recipe.max_length) for e in examples]
    rows = Dataset.from_dict({"input_ids": [e.input_ids for e in kept], "labels": [e.labels for e in kept]})
    set_seed(seed)
    if recipe.lora_rank is None:
        model.requires_grad_(True)  # a merged adapter leaves its model frozen
    config = SFTConfig(
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        **trainer_arguments(model, recipe, seed=seed, folder=folder, progress=progress),
    )  # fmt: skip
    with padding_token(tokenizer):
        trainer = _Trainer(
            model,
            config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
            callbacks=list(callbacks),
        )
        return train(trainer)


def trainer_arguments(model: Any, recipe: Recipe, *, seed: int, folder: Path, progress: bool) -> dict[str, Any]:
    """What a recipe says to the configuration of any of TRL's trainers."""
    from transformers import TrainingArguments

    device = next(model.parameters()).device.type
    cuda, recipe = device == "cuda", recipe.on(device)
    # Renamed in transformers 5.2x, where the old name warns. TRL switches it on.
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpoints = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    return {
        "output_dir": str(folder), "num_train_epochs": recipe.epochs, "max_steps": recipe.max_steps or -1,
        "learning_rate": recipe.learning_rate,
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.batch_size // recipe.micro_batch_size,
        "lr_scheduler_type": recipe.scheduler, "warmup_steps": recipe.warmup_ratio, "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm, "bf16": recipe.bf16, "use_cpu": not cuda, checkpoints: False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": not progress, "seed": seed,
        "data_seed": seed, "dataloader_pin_memory": cuda,
    }  # fmt: skip


def lora_config(recipe: Recipe) -> Any:
    """LoRA on all linear layers, or `None` where the recipe trains all weights."""
    from peft import LoraConfig

    if recipe.lora_rank is None:
        return None
    alpha = recipe.lora_alpha or 2 * recipe.lora_rank
    return LoraConfig(r=recipe.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def train(trainer: Any) -> Tuned:
    """Let a trainer train, and say what it made."""
    trainer.remove_callback(PrinterCallback)  # without a progress bar it prints a line for each step
    trainer.train()
    # TRL leaves a forward of its own on the instance, bound to it: a deep copy of the model would run the original's weights.
    getattr(trainer.model, "get_base_model", lambda: trainer.model)().__dict__.pop("forward", None)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    trained: Any = trainer.model
    weights_finite = all(bool(torch.isfinite(p).all()) for p in trained.parameters())
    bad = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    problem = None
    if bad is not None or not weights_finite:
        problem = f"training diverged: the loss is not finite at step {bad}" if bad else "training diverged: weights not finite"
    return Tuned(trained.eval(), losses, problem)


class StepSampler(torch.utils.data.Sampler[int]):
    """A new random order of the rows for each epoch, and within each optimizer step longest first.

    A step's rows are summed, so their order in it changes rounding alone; micro-batches of like lengths need less padding.

    Args:
        lengths: of each row, in tokens.
        batch_size: rows in an optimizer step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths), generator=self.generator)
        for step in order.split(self.batch_size):
            yield from sorted(step.tolist(), key=lambda i: -self.lengths[i])


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's, but micro-batches hold rows of like lengths, and logits are computed at predicting positions only.

    TRL's own loss also takes the entropy and accuracy of every token, in float32: on a CPU that was half of a step's time
    (20 Alpaca rows, SmolLM2-135M: 32 s against 14 s).
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return StepSampler(lengths, batch * self.args.world_size, self.args.seed)

    def compute_loss(
        self, model: Any, inputs_: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed cross-entropy over the step's target tokens, divided by how many there are."""
        batch = Batch(inputs_["input_ids"], inputs_["labels"])
        targets = Targets.of(batch.labels)
        with predicting_positions(model, targets.row, targets.position):
            outputs = model(**inputs(batch, model))
        count = len(targets.row) if num_items_in_batch is None else num_items_in_batch
        loss = torch.nn.functional.cross_entropy(outputs.logits[0].float(), targets.token, reduction="sum") / count
        return (loss, outputs) if return_outputs else loss


@contextmanager
def padding_token(tokenizer: PreTrainedTokenizerBase) -> Any:
    """One for the collator where the tokenizer has none: padding has no label, so which one it is does not matter."""
    missing = tokenizer.pad_token is None
    if missing:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    try:
        yield
    finally:
        if missing:
            tokenizer.pad_token = None
