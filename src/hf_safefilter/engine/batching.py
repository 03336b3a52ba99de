"""Length-sorted micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..chat import IGNORE, Example


def default_batch_tokens(device: torch.device, dtype: torch.dtype) -> int:
    """Padded tokens in a micro-batch, where the user sets no budget: enough to keep the processor busy, little memory.

    In 16 bits rounding depends on the shape of the batch, so that a row's score would depend on its neighbours: there, on a
    CPU, rows go one by one, which costs little more (`benchmarks/score_cost.py`).
    """
    if device.type != "cpu":
        return 16384
    return 1024 if dtype.itemsize > 2 else 1


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: `input_ids`, `labels`, each [batch, tokens]."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def micro_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group row indices by length so that a group, padded to its longest row, holds at most `batch_tokens` tokens.

    A row longer than the budget goes alone. Longest first, so that a run that will not fit in memory fails at once.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def collate(examples: Sequence[Example], device: str | torch.device) -> Batch:
    """Pad to the longest row, on the right, where causal attention never looks from a real token.

    The pad id is 0 whatever the tokenizer says: its embedding reaches no signal.
    """
    width = max(len(e.input_ids) for e in examples)
    pad = lambda values, fill: values + [fill] * (width - len(values))  # noqa: E731
    return Batch(
        torch.tensor([pad(e.input_ids, 0) for e in examples], device=device),
        torch.tensor([pad(e.labels, IGNORE) for e in examples], device=device),
    )
