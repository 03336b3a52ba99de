"""Where refusals are decided: LARF's search for the block whose scaled weights change refusals most.

Li et al. 2025 (arXiv 2507.18631), as their code does it: for each block scale all its attention and MLP weight matrices by
alpha, let the model answer harmless prompts that look harmful, and count refusals. A block is sensitive where larger weights
make the model refuse more and smaller ones less:

    sensitivity = mean over pairs of refusals(1 + a) - refusals(1 - a)

It costs blocks x factors x prompts short generations, once a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..chat import ChatEncoder
from ..engine.layers import blocks
from ..errors import EvaluationError, InputError
from .generation import generate
from .judges import KeywordJudge
from .prompts import load_prompts, prompt_ids


@dataclass(frozen=True)
class LayerSearch:
    """`refusals[block]` by factor, how many of `prompts`; `sensitivity[block]`; `layer`, the index of `hidden_states` to use.

    The most sensitive block's own index, which is the state that this block reads, as in their code.
    """

    refusals: list[dict[float, int]]
    sensitivity: list[float]
    prompts: int

    @property
    def layer(self) -> int:
        """The most sensitive block, the first of equals."""
        return max(range(len(self.sensitivity)), key=lambda block: self.sensitivity[block])


def find_larf_layer(
    model: Any,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    *,
    changes: Sequence[float] = (0.1, 0.2, 0.3),
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> LayerSearch:
    """Scale each block's weights up and down and count refusals; the weights are put back.

    Args:
        model: a causal language model.
        encoder: renders prompts with the model's chat template.
        prompts: harmless requests that look harmful.
        changes: factors are 1 + a and 1 - a for each.
        max_new_tokens: length of the greedy answers.
        batch_size: prompts at a time.
        progress: wraps the iteration over blocks.

    Raises:
        InputError: no prompts, or a change that is not between 0 and 1.
        EvaluationError: no factor at any block changed the number of refusals, so that no layer stands out.
    """
    if not prompts:
        raise InputError("the layer search needs prompts: harmless requests that look harmful")
    if not changes or not all(0 < a < 1 for a in changes):
        raise InputError(f"changes must be between 0 and 1, got {changes!r}")
    judge = KeywordJudge("larf2025", ignore_case=True)
    ids = [prompt_ids(encoder, p, f"prompt {i}", 2**31) for i, p in enumerate(load_prompts(prompts, "benign"))]
    refusals: list[dict[float, int]] = []
    for block in progress(list(blocks(model))):
        counts = {}
        for factor in sorted({f for a in changes for f in (1 - a, 1 + a)}):
            with _scaled(block, factor):
                answers = generate(model, encoder.tokenizer, ids, max_new_tokens=max_new_tokens, batch_size=batch_size)
            counts[factor] = sum(judge.refuses(answer.text) for answer in answers)
        refusals.append(counts)
    sensitivity = [sum(c[1 + a] - c[1 - a] for a in changes) / len(changes) for c in refusals]
    if len(set(sensitivity)) == 1 and len(sensitivity) > 1:
        raise EvaluationError(
            f"no block stands out: scaling any of them changes refusals of these {len(prompts)} prompts alike "
            "(a model that never refuses, or always?)"
        )
    return LayerSearch(refusals, sensitivity, len(prompts))


@contextmanager
def _scaled(block: nn.Module, factor: float) -> Iterator[None]:
    weights = [m.weight for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
    kept = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for w in weights:
                w.mul_(factor)
        yield
    finally:
        # Copied back, not divided: the weights must be what they were, bit by bit.
        with torch.no_grad():
            for w, before in zip(weights, kept, strict=True):
                w.copy_(before)
