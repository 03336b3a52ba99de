"""Gradient matching with each parameter's gradient normalised before summing, so that no layer rules the others.

The scoring rule of SQSD (arXiv 2605.04572): `sum_m <g_m / |g_m|, v_danger,m / |v_danger,m| - v_safety,m / |v_safety,m|>` over
modules m. They report that without it length decides (their ablation). Here m runs over the model's parameters (weights and
biases, a tied embedding once), the directions are the anchors' as in `gradient`, and the sum is divided by the number of
parameters, which makes it a mean of cosines. SQSD takes LoRA gradients at a checkpoint within a fine-tune and two trained task
vectors; this score takes the gradient at the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.passes import Needs, Reference, Signals
from .base import AnchorGradientScore, safe_sides


@dataclass(frozen=True)
class GradientModulewiseScore(AnchorGradientScore):
    """`risk_gradient_modulewise`."""

    name: ClassVar[str] = "gradient_modulewise"
    version: ClassVar[int] = 1

    @property
    def needs(self) -> Needs:
        """Norms and inner products for each parameter."""
        return Needs(gradient=True, directions=True, anchor_tokens=self.anchor_tokens)

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The score."""
        return ["risk_gradient_modulewise"]

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Mean over parameters of the cosines; a parameter without a gradient counts as 0, a row without any gives NaN."""
        norms = signals.squared_norms.clamp(min=0).sqrt()  # [rows, units]

        def cosine(side: str) -> torch.Tensor:
            lengths = norms * reference.unit_norms(side)
            return torch.where(lengths > 0, signals.dots[side] / lengths.clamp(min=1e-300), 0.0)

        safe = torch.stack([cosine(side) for side in safe_sides(list(signals.dots))]).mean(dim=0)
        risk = (cosine("harmful") - safe).mean(dim=1)
        return {"risk_gradient_modulewise": torch.where(signals.norm > 0, risk, torch.nan)}
