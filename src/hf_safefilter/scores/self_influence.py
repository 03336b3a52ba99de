"""Self-influence: how much a step on the row changes its own loss, the squared norm of its gradient.

Guan et al. 2025 (arXiv 2505.06843). With g the gradient of the mean loss over the response and n its tokens:

    risk_self_influence   = |g|^2
    risk_self_influence_n = log(|g|^2 + 1) + log(n + 1)

The mean loss makes the first a detector of short answers; the second is their cure. The "+ 1" ties it to the scale of the loss
and of the model: where |g|^2 is far below 1 only the length is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.passes import Needs, Reference, Signals
from .base import Score


@dataclass(frozen=True)
class SelfInfluenceScore(Score):
    """`risk_self_influence` and `risk_self_influence_n`."""

    name: ClassVar[str] = "self_influence"
    version: ClassVar[int] = 1

    @property
    def needs(self) -> Needs:
        """The gradient's norm."""
        return Needs(gradient=True)

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The two scores."""
        return ["risk_self_influence", "risk_self_influence_n"]

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """From the squared norm and the number of target tokens."""
        squared = signals.norm.square()
        return {
            "risk_self_influence": squared,
            "risk_self_influence_n": squared.log1p() + signals.tokens.double().log1p(),
        }
