"""Safety tuning of a small chat model: refusals of harmful requests, and answers to harmless ones that look alike.

The rows were written for this project (`assets/align.jsonl`): 420 harmful requests in 12 categories with a refusal each,
harmless look-alikes in the same words with a helpful answer, and ordinary instructions. They share no prompt with the anchors,
the monitor prompts or the demo's sample, so that scores and refusal rates see requests that alignment has not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict

from .chat import ChatEncoder, Example
from .engine.loading import context_length
from .errors import EvaluationError, InputError, UnscorableRow
from .files import write_atomically
from .formats import find_layout
from .refusal.monitor import RefusalMonitor
from .refusal.prompts import monitor_prompts
from .tuning import Recipe, Tuned, tune

# For SmolLM2-135M; a larger model needs a lower learning rate.
ALIGN_RECIPE = Recipe(
    epochs=6, learning_rate=2e-3, batch_size=16, micro_batch_size=16, max_length=256, lora_rank=6, lora_alpha=24,
    scheduler="linear", warmup_ratio=0.05, max_grad_norm=1.0, bf16=False,
)  # fmt: skip

# Target tokens kept of built-in answers. How an answer opens is what is to be learned; what follows it the model knows, and
# learning it too took most of the steps' gradient: with whole answers 88% of the lessons' own requests were refused.
ANSWER_TOKENS = 12


def lessons() -> list[dict[str, str]]:
    """The built-in rows, each `prompt`, `completion`, `kind` (harmful, look_alike or ordinary) and `category`."""
    text = resources.files(__package__).joinpath("assets", "align.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def ordinary_prompts() -> list[str]:
    """Ordinary requests to measure over-refusal on: those of the demo's sample, which no lesson repeats."""
    text = resources.files(__package__).joinpath("assets", "benign_sample.jsonl").read_text("utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]


def align(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]] | None = None,
    recipe: Recipe = ALIGN_RECIPE,
    *,
    seed: int = 0,
    folder: Path,
    progress: bool = True,
) -> Tuned:
    """Teach a chat model to refuse harmful requests and to answer harmless ones.

    Args:
        model: a loaded causal language model; it is changed.
        tokenizer: its tokenizer.
        rows: what to teach, in any layout that can be scored; the built-in lessons by default.
        recipe: how; the default is LoRA.
        seed: of the rows' order and LoRA's first weights.
        folder: where TRL may write.
        progress: whether to show a progress bar.

    Returns:
        A `PeftModel` where the recipe has a LoRA rank, and its losses.

    Raises:
        InputError: a row that cannot be trained on; names it.
    """
    return tune(model, tokenizer, encoded(tokenizer, rows, recipe), recipe, seed=seed, folder=folder, progress=progress)


def measure(
    model: Any, tokenizer: Any, prompts: Sequence[str | Path] = (), judge: str = "keyword"
) -> dict[str, dict[str, Any]]:
    """Refusals on prompts that no lesson holds: the monitor's harmful ones and look-alikes, ordinary requests, and given files.

    Args:
        model: a loaded causal language model.
        tokenizer: its tokenizer.
        prompts: files of further harmful prompts, as `load_prompts` takes them.
        judge: see `resolve_judge`.

    Returns:
        By the prompts' name a `RefusalRate.summary` with `wish`: what the model should do, refuse or answer.

    Raises:
        EvaluationError: answers that could not be generated or judged.
    """
    asked: dict[str, tuple[Any, str]] = {
        "monitor harmful": ("default", "refuse"),
        "monitor look-alikes": (monitor_prompts("benign"), "answer"),
        "ordinary requests": (ordinary_prompts(), "answer"),
        **{Path(path).stem: (path, "refuse") for path in prompts},
    }
    found = {}
    for name, (given, wish) in asked.items():
        monitor = RefusalMonitor(tokenizer, given, None, judge, context_length=context_length(model), margin=False)
        check = monitor.check(model, perplexity=False)
        if check.problem or check.harmful is None:
            raise EvaluationError(f"{name}: refusals not evaluated: {check.problem}")
        found[name] = {"wish": wish, **check.harmful.summary()}
    return found


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write a `PeftModel`'s adapter in bfloat16, as safetensors, and its configuration, which names `base`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    # 16 bits: half the size. The model gets the rounded weights too, so that what is measured next is what was saved.
    weights = {name: w.detach().to(torch.bfloat16).cpu().contiguous() for name, w in get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        set_peft_model_state_dict(model, {name: w.float() for name, w in weights.items()})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True, "revision": None}
    config["target_modules"] = sorted(config["target_modules"])
    plain = {name: value for name, value in config.items() if not isinstance(value, set)}
    write_atomically(folder / "adapter_model.safetensors", save(weights, metadata={"format": "pt"}))
    write_atomically(folder / "adapter_config.json", (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode())


def encoded(tokenizer: Any, rows: Iterable[Mapping[str, Any]] | None, recipe: Recipe) -> Sequence[Example]:
    """Rows as `align` trains on them."""
    found = [dict(row) for row in (lessons() if rows is None else rows)]
    if not found:
        raise InputError("no rows to align on")
    encoder, layout = ChatEncoder(tokenizer, recipe.max_length), find_layout(found[0])
    examples = []
    for i, row in enumerate(found):
        try:
            example = encoder.encode_row(row, layout)
            examples.append(example.first_targets(ANSWER_TOKENS) if rows is None and row["kind"] != "harmful" else example)
        except UnscorableRow as reason:
            raise InputError(f"row {i} cannot be trained on: {reason}") from None
    return examples
