"""Our own: how far one training step on the row would lower the refusal margin, to first order.

The margin is the log-probability (per token, over the anchors' first tokens) of the refusals minus that of the affirmative
openings, on the same harmful requests. With g the row's gradient and n its target tokens, a step of learning rate 1 lowers it
by

    risk_margin_step          = <g, margin'>          plain SGD, the row's mean loss
    risk_margin_step_sum      = n <g, margin'>        the sum of its tokens' losses: what a row adds to a step over a batch
    risk_margin_step_adam     = <P g, margin'>        with an Adam-like diagonal preconditioner P fitted on the anchors
    risk_margin_step_adam_sum = n <P g, margin'>

See `engine/margin.py` for P. Unlike a cosine these keep the gradient's length: a row with a large loss moves more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.margin import MARGIN, MARGIN_ADAM
from ..engine.passes import Needs, Reference, Signals
from .base import AnchorGradientScore


@dataclass(frozen=True)
class MarginStepScore(AnchorGradientScore):
    """`risk_margin_step`, `risk_margin_step_sum`, `risk_margin_step_adam`, `risk_margin_step_adam_sum`."""

    name: ClassVar[str] = "margin_step"
    version: ClassVar[int] = 1

    @property
    def needs(self) -> Needs:
        """Inner products with the margin's gradient."""
        return Needs(gradient=True, directions=True, margin=True, anchor_tokens=self.anchor_tokens)

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The four scores."""
        return ["risk_margin_step", "risk_margin_step_sum", "risk_margin_step_adam", "risk_margin_step_adam_sum"]

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Sums over parameters."""
        sgd, adam = (signals.dots[name].sum(dim=1) for name in (MARGIN, MARGIN_ADAM))
        tokens = signals.tokens.double()
        return {
            "risk_margin_step": sgd,
            "risk_margin_step_sum": tokens * sgd,
            "risk_margin_step_adam": adam,
            "risk_margin_step_adam_sum": tokens * adam,
        }
