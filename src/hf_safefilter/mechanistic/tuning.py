"""Instruction pre-training of a small model, and three ways of safety tuning, for it and for any chat model.

Supervised tuning (SFT) learns the chosen answers. DPO is TRL's, with one beta, against the model as it was, and beside it the
chosen answer's loss (Pang et al. 2024): on synthetic instructions DPO alone made both answers unlikely. The paper's released
"DPO" has two betas and is in effect its unlearning. Unlearning learns the chosen answers and away from the rejected ones, until
these cost `CEILING` nats a token: without a bound it never ends.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig  # ..tuning says what to do where TRL is missing
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from ..chat import IGNORE, ChatEncoder, Example
from ..engine.backward import Targets, predicting_positions
from ..engine.loading import default_device
from ..errors import InputError, UnscorableRow
from ..formats import find_layout
from ..refusal.generation import generate
from ..tuning import Recipe, Tuned, lora_config, padding_token, train, trainer_arguments, tune
from .synthetic import NULL, SMALL, SyntheticSetting, make_split, make_tokenizer

METHODS = ("sft", "dpo", "unlearn")
BETA = 0.1  # of DPO
CHOSEN = 1.0  # weight of the chosen answer's loss beside DPO's
AWAY = 0.1  # weight of the rejected answer's loss in unlearning, as in the paper
CEILING = 8.0  # nats a token of a rejected answer beyond which unlearning is content

PRETRAINING = Recipe(
    epochs=1, learning_rate=3e-3, batch_size=128, micro_batch_size=128, scheduler="cosine", warmup_ratio=0.1, weight_decay=1e-4,
    max_grad_norm=1.0, bf16=False,
)  # fmt: skip
PRETRAINING_STEPS = 1200
SAFETY_TUNING = replace(PRETRAINING, epochs=2, batch_size=32, micro_batch_size=32)
# Found on seed 100, which no result uses: at 3e-4, 800 steps of DPO got 90% right, not telling orders of blocks apart yet. The
# paper's are 1e-4 and 1e-5, in 10,000 steps of 512.
LEARNING_RATES = {"medium": 1e-3, "small": 1e-4}
SIZES = tuple(LEARNING_RATES)


def new_model(setting: SyntheticSetting = SMALL, seed: int = 0) -> Any:
    """A `LlamaForCausalLM` of the setting's size with random weights; the random state is left alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(setting)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **setting.model,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    setting: SyntheticSetting = SMALL,
    *,
    seed: int,
    folder: Path,
    steps: int = PRETRAINING_STEPS,
    recipe: Recipe = PRETRAINING,
    progress: bool = True,
) -> Tuned:
    """Teach a new model the language: to answer every instruction truly, safe or not (the paper's "IT" model).

    The loss is on all tokens, so that it learns the grammars too.

    Args:
        setting: the language and the model's size.
        seed: of its first weights, and of rows; texts of the held-out half are not shown.
        folder: where TRL may write.
        steps: optimizer steps in all epochs together.
        recipe: how.
        progress: whether to show a progress bar.
    """
    tokenizer = make_tokenizer(setting)
    rows = make_split("pretrain", steps * recipe.batch_size // recipe.epochs, 2 * seed, setting)
    texts = [f"{row['prompt']} {row['chosen']} {tokenizer.eos_token}" for row in rows]
    examples = [Example(ids, ids) for ids in tokenizer(texts)["input_ids"]]
    model = new_model(setting, seed).to(default_device())
    return tune(model, tokenizer, examples, recipe, seed=seed, folder=folder, progress=progress)


def safety_tune(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    method: str,
    size: str = "medium",
    *,
    recipe: Recipe | None = None,
    seed: int,
    folder: Path,
    progress: bool = True,
) -> Tuned:
    """Teach a model to give the chosen answers and not the rejected ones.

    Args:
        model: a loaded causal language model, the synthetic one or any chat model; it is changed.
        tokenizer: its tokenizer, with its chat template.
        rows: each with texts `prompt`, `chosen` and `rejected`.
        method: one of `METHODS`.
        size: of the learning rate, `medium` or `small` (`LEARNING_RATES`, found for the synthetic model).
        recipe: how, instead of the above; what a chat model needs.
        seed: of the rows' order.
        folder: where TRL may write.
        progress: whether to show a progress bar.

    Returns:
        The model (a `PeftModel` where the recipe has a LoRA rank) and its losses.

    Raises:
        InputError: an unknown method or size, no rows, or a row that cannot be trained on.
    """
    from transformers import set_seed

    if method not in METHODS or size not in SIZES:
        raise InputError(f"method must be one of {', '.join(METHODS)} and size of {', '.join(SIZES)}: {method!r}, {size!r}")
    recipe = recipe or replace(SAFETY_TUNING, learning_rate=LEARNING_RATES[size])
    pairs = _encoded(tokenizer, rows, recipe.max_length)
    if method == "sft":
        chosen = [pair[0] for pair in pairs]
        return tune(model, tokenizer, chosen, recipe, seed=seed, folder=folder, progress=progress)
    set_seed(seed)
    with padding_token(tokenizer):
        trainer = _TRAINERS[method](model, tokenizer, pairs, recipe, seed=seed, folder=folder, progress=progress)
        return train(trainer)


@dataclass(frozen=True)
class AnswerRates:
    """How often a model answers truly (`instruct`) and refuses (`null`), by exact match; by row in `answered`, `refused`."""

    answered: list[bool]
    refused: list[bool]

    @property
    def n(self) -> int:
        """How many instructions."""
        return len(self.answered)

    @property
    def instruct(self) -> float:
        """Share of true answers."""
        return sum(self.answered) / len(self.answered)

    @property
    def null(self) -> float:
        """Share of refusals."""
        return sum(self.refused) / len(self.refused)


def answer_rates(model: Any, tokenizer: Any, split: Dataset) -> AnswerRates:
    """Let a synthetic model answer greedily.

    The paper gives the model the answer's own tokens as it goes, so that a refusal and a true answer can both be "right".

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        split: from `make_split`.
    """
    prompts, chosen, rejected = (list(split[name]) for name in ("prompt", "chosen", "rejected"))
    ids = tokenizer(prompts)["input_ids"]
    longest = 1 + max(len(tokenizer(text)["input_ids"]) for text in chosen)
    given = generate(model, tokenizer, ids, max_new_tokens=longest, batch_size=256)
    answers = [None if answer.truncated else answer.text for answer in given]
    nulls = [c if c.startswith(NULL) else r for c, r in zip(chosen, rejected, strict=True)]
    trues = [r if c.startswith(NULL) else c for c, r in zip(chosen, rejected, strict=True)]
    return AnswerRates(
        [a == t for a, t in zip(answers, trues, strict=True)], [a == n for a, n in zip(answers, nulls, strict=True)]
    )


def _encoded(tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int) -> list[tuple[Example, Example]]:
    """The chosen and the rejected conversation of each row."""
    encoder, pairs = ChatEncoder(tokenizer, max_length), []
    layout = find_layout(("prompt", "completion"))
    for i, row in enumerate(rows):
        try:
            chosen, rejected = (
                encoder.encode_row({"prompt": row["prompt"], "completion": row[name]}, layout)
                for name in ("chosen", "rejected")
            )
        except UnscorableRow as reason:
            raise InputError(f"row {i} cannot be trained on: {reason}") from None
        except KeyError as missing:
            raise InputError(f"row {i} has no column {missing}; preferences have prompt, chosen and rejected") from None
        pairs.append((chosen, rejected))
    if not pairs:
        raise InputError("nothing to fine-tune on: no rows")
    return pairs


def _preferences(pairs: Sequence[tuple[Example, Example]]) -> Dataset:
    """In the columns that TRL's collator reads."""

    def parts(example: Example) -> tuple[list[int], list[int]]:
        targets = example.target_positions
        return example.input_ids[: targets[0]], example.input_ids[targets[0] : targets[-1] + 1]

    chosen, rejected = ([parts(pair[side]) for pair in pairs] for side in (0, 1))
    return Dataset.from_dict(
        {"prompt_ids": [p for p, _ in chosen], "chosen_ids": [c for _, c in chosen], "rejected_ids": [r for _, r in rejected]}
    )


class _Dpo(DPOTrainer):  # type: ignore[misc]
    """TRL's, but for rows that are tokens already: the same tokens in all three methods."""

    def __init__(self, model: Any, tokenizer: Any, pairs: Any, recipe: Recipe, **where: Any) -> None:
        config = DPOConfig(
            beta=BETA, loss_type=["sigmoid", "sft"], loss_weights=[1.0, CHOSEN], max_length=None,
            **trainer_arguments(model, recipe, **where),
        )  # fmt: skip
        lora = lora_config(recipe)
        if lora is None:
            model.requires_grad_(True)
        # Without one TRL would load the model again, by a name that it may not have; LoRA can be switched off instead.
        reference = copy.deepcopy(model) if lora is None else None
        super().__init__(
            model, reference, config, train_dataset=_preferences(pairs), processing_class=tokenizer, peft_config=lora
        )

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class _Unlearning(Trainer):
    """Mean over rows of the chosen answer's loss less `AWAY` times the rejected one's, each a mean over the answer's tokens."""

    def __init__(self, model: Any, tokenizer: Any, pairs: Any, recipe: Recipe, **where: Any) -> None:
        arguments = TrainingArguments(remove_unused_columns=False, **trainer_arguments(model, recipe, **where))
        lora = lora_config(recipe)
        if lora is None:
            model.requires_grad_(True)
        else:
            model = get_peft_model(model, lora)
        collator = DataCollatorForPreference(tokenizer.pad_token_id)
        super().__init__(model, arguments, data_collator=collator, train_dataset=_preferences(pairs))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch whose first half is chosen and whose second half is rejected."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        targets = Targets.of(labels)
        with predicting_positions(model, targets.row, targets.position):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        nll = torch.nn.functional.cross_entropy(outputs.logits[0].float(), targets.token, reduction="none")
        total = nll.new_zeros(len(labels)).index_add(0, targets.row, nll)
        good, bad = (total / torch.tensor(targets.counts, device=nll.device)).chunk(2)
        loss = (good - AWAY * bad.clamp(max=CEILING)).mean()
        return (loss, outputs) if return_outputs else loss


_TRAINERS: dict[str, Any] = {"dpo": _Dpo, "unlearn": _Unlearning}
