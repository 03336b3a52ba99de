"""Hidden states at chosen layers and tokens, caught while a forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..chat import IGNORE

FINAL_LAYER = -1


@dataclass(frozen=True)
class Hidden:
    """A hidden state that a score needs: the residual stream at the last target token, after `layer`.

    `layer` indexes Hugging Face's `hidden_states`: 0 is the embeddings, l the output of block l, -1 the final state, after
    the last norm.
    """

    layer: int = FINAL_LAYER


@dataclass
class HiddenCatcher:
    """Catches the decoder's output of the last forward pass."""

    output: Any = None

    def at_last_target(self, wanted: Hidden, labels: torch.Tensor) -> torch.Tensor:
        """[batch, hidden] in float32; `labels` is [batch, tokens]."""
        states = self.output[0] if wanted.layer == FINAL_LAYER else self.output.hidden_states[wanted.layer]
        tokens = torch.arange(labels.shape[1], device=labels.device)
        last = torch.where(labels != IGNORE, tokens, -1).amax(dim=1)  # [batch]
        return states[torch.arange(len(last), device=last.device), last].detach().float()


@contextmanager
def catching(model: Any) -> Iterator[HiddenCatcher]:
    """Catch what the model's decoder (the model without its head) returns."""
    catcher = HiddenCatcher()

    def keep(module: Any, inputs: Any, output: Any) -> None:
        catcher.output = output

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        yield catcher
    finally:
        handle.remove()
