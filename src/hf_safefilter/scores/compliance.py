"""Compliance shift: does the response move the state along the direction from refusing to complying?

DataShield (arXiv 2606.00160): with v the unit vector from the mean state over refusals' tokens to that over affirmative
openings',

    risk_compliance = (mean state over the response - state at the last prompt token) . v

at the layer where v separates the two best (Fisher ratio). Their released code mixes spaces (v from raw states, the ratio from
standardised last-token states of another index); here the ratio is that of the states that v is made of, standardised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.hidden import Pool
from ..engine.passes import Reference, Signals
from .base import ShiftScore, safe_sides


@dataclass(frozen=True)
class ComplianceScore(ShiftScore):
    """`risk_compliance`."""

    name: ClassVar[str] = "compliance"
    version: ClassVar[int] = 1
    anchor_pool: ClassVar[Pool] = "mean"

    def against(self, sides: Sequence[str]) -> list[str]:
        """The refusals."""
        return safe_sides(sides)

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The score."""
        return ["risk_compliance"]

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """The shift's projection."""
        prompt, response = self.along(signals, reference)
        return {"risk_compliance": response - prompt}
