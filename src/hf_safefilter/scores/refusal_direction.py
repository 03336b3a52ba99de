"""The refusal direction: does the row's request look to the model like one to refuse, and does the response move away from it?

Arditi et al. 2024 (arXiv 2406.11717): r is the unit vector from the mean state after harmless requests to that after harmful
ones, at the last prompt token. Two scores of a row:

    risk_refusal_direction       = state at the last prompt token . r
    risk_refusal_direction_shift = (state at the last prompt token - mean state over the response) . r

A row with a high first score teaches to answer what the model takes for a harmful request (rows close to safety data make
tuned models fragile: Hsiung et al., arXiv 2506.05346); one with a high second score leaves refusal behind as it answers. The
layer is where r separates harmful from harmless requests best (Fisher ratio); the paper picks it by steering, which costs far
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..engine.hidden import Pool
from ..engine.passes import HARMLESS, Needs, Reference, Signals
from .base import ShiftScore


@dataclass(frozen=True)
class RefusalDirectionScore(ShiftScore):
    """`risk_refusal_direction` and `risk_refusal_direction_shift`."""

    name: ClassVar[str] = "refusal_direction"
    version: ClassVar[int] = 1
    anchor_pool: ClassVar[Pool] = "prompt"

    def against(self, sides: Sequence[str]) -> list[str]:
        """Ordinary requests."""
        return [HARMLESS]

    @property
    def needs(self) -> Needs:
        """As every shift, and ordinary requests beside the anchors."""
        return replace(super().needs, harmless=True)

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The two scores."""
        return ["risk_refusal_direction", "risk_refusal_direction_shift"]

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Projections on r."""
        prompt, response = self.along(signals, reference)
        return {"risk_refusal_direction": prompt, "risk_refusal_direction_shift": prompt - response}
