"""Gradient matching: would a training step on the row move the weights as a step on complying with harm would?

He et al. 2024 (arXiv 2404.01099), section 3.2, as their code computes it: the gradient of the mean loss over all parameters,
each example's divided by its norm; the anchors' over their first 10 response tokens, averaged and not normalised again. With
g the row's unit gradient and m the anchors' mean:

    risk_gradient          = g.m_harmful - g.m_safe_1 - g.m_safe_2 - ...     (their weights)
    risk_gradient_balanced = g.m_harmful - mean over safe sets of g.m_safe   (weights that sum to zero)

Their weights +1, -1, -1 do not sum to zero, so what the gradients of all openings share counts against a row, and short
answers sink to the bottom. The balanced form takes the shared part out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.passes import Needs, Reference, Signals
from .base import AnchorGradientScore, safe_sides


def balanced_weights(sides: Sequence[str]) -> dict[str, float]:
    """The weight of each side's mean cosine in `risk_gradient_balanced`; they sum to zero."""
    safe = safe_sides(sides)
    return {"harmful": 1.0, **dict.fromkeys(safe, -1 / len(safe))}


@dataclass(frozen=True)
class GradientScore(AnchorGradientScore):
    """`risk_gradient` and `risk_gradient_balanced`."""

    name: ClassVar[str] = "gradient"
    version: ClassVar[int] = 2

    @property
    def needs(self) -> Needs:
        """The row's loss, gradient norm, and inner product with each side's direction."""
        return Needs(loss=True, gradient=True, directions=True, anchor_tokens=self.anchor_tokens)

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The two scores, the mean cosine to each side's anchors, the gradient's norm and the loss."""
        details = [f"gradient_cosine_{side}" for side in sides]
        return ["risk_gradient", "risk_gradient_balanced", *details, "gradient_norm", "gradient_loss"]

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Weighted sums of the cosines; a zero gradient has none and gives NaN."""
        sides = [name for name in signals.dots if name == "harmful" or name in safe_sides([name])]
        cosine = {side: signals.dots[side].sum(dim=1) / signals.norm for side in sides}  # mean cosine to the side's anchors
        safe = torch.stack([cosine[side] for side in safe_sides(sides)])  # [safe sets, rows]
        return {
            "risk_gradient": cosine["harmful"] - safe.sum(dim=0),
            "risk_gradient_balanced": torch.stack([w * cosine[side] for side, w in balanced_weights(sides).items()]).sum(dim=0),
            **{f"gradient_cosine_{side}": values for side, values in cosine.items()},
            "gradient_norm": signals.norm,
            "gradient_loss": signals.loss,
        }
