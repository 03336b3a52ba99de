"""Short greedy answers in batches, with a key-value cache, leaving the model and the random state as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..engine.backward import evaluation_mode


@dataclass(frozen=True)
class Answer:
    """A completion's text, how many tokens it has (its end among them), and whether it was cut off before it ended."""

    text: str
    tokens: int
    truncated: bool


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode, the cache flag and all random states come back afterwards.

    A monitored training run must be the same run, bit by bit, as one that is not.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    states = random.getstate(), np.random.get_state()
    use_cache = getattr(model.config, "use_cache", None)
    try:
        # Not inference mode: buffers that a model computes on the way (rotary tables) are used in training later.
        with torch.random.fork_rng(devices=devices), evaluation_mode(model), torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if use_cache is not None:
            model.config.use_cache = use_cache


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Answer]:
    """Answer prompts greedily; the model's own sampling settings and penalties do not count.

    Args:
        model: a causal language model, plain or wrapped by peft.
        tokenizer: its tokenizer.
        prompts: tokens [tokens] of each prompt.
        max_new_tokens: where answers are cut off.
        batch_size: prompts at a time, longest first. Answers do not depend on it in float32; in 16 bits a near tie between two
            tokens may fall either way.
        progress: wraps the iteration over batches.
    """
    from transformers import GenerationConfig

    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    # What is not said here would be filled in from the model's own settings.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        use_cache=True, eos_token_id=ends or None, pad_token_id=pad, temperature=1.0, top_p=1.0, top_k=50,
    )  # fmt: skip
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers: list[Answer | None] = [None] * len(prompts)
    with undisturbed(model), contiguous_head(model):
        for group in progress([order[start : start + batch_size] for start in range(0, len(order), batch_size)]):
            width = len(prompts[group[0]])
            # On the left: generation goes on from the right end.
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in group], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for i, new in zip(group, out[:, width:].tolist(), strict=True):
                end = next((n for n, token in enumerate(new) if token in ends), None)
                kept = new if end is None else new[:end]
                text = tokenizer.decode(kept, skip_special_tokens=True)
                answers[i] = Answer(text, len(kept) + (end is not None), end is None)
    return [answer for answer in answers if answer is not None]


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Give the head a dense input.

    The last positions of a batch are a strided view, and a frozen head (LoRA's) multiplies one with a copy of its weights for
    each row: 4 of the 5 seconds that a margin of SmolLM2 took on a CPU.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the model's own and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends
