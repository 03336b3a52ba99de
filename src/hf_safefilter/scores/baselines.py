"""What a score must beat before it means anything: length, loss and format, which need no anchors and no idea.

    risk_baseline_length           target tokens
    risk_baseline_loss             mean loss over them, in nats
    risk_baseline_first_token_loss loss of the first of them
    risk_baseline_list             1 where the response has at least two lines that open with -, *, a bullet or "1."
    risk_baseline_math             1 where it computes: digits around an operator or an equals sign, LaTeX, or GSM8K's ####

Higher is called riskier as for every score; whether it is so is what the baselines are there to test.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.passes import Needs, Reference, Signals
from .base import Score

_LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+\S", re.MULTILINE)
_MATH = re.compile(r"\d\s*[+*/×÷=^]\s*[\d$(]|\d\s+[-−]\s+\d|\\(?:frac|sqrt|boxed|times|cdot)\b|^####", re.MULTILINE)


@dataclass(frozen=True)
class BaselineScore(Score):
    """The five `risk_baseline_...` columns."""

    name: ClassVar[str] = "baseline"
    version: ClassVar[int] = 1

    @property
    def needs(self) -> Needs:
        """Losses and the response's text."""
        return Needs(loss=True, text=True)

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The baselines."""
        return [f"risk_baseline_{name}" for name in ("length", "loss", "first_token_loss", "list", "math")]

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """As they are."""
        return {
            "risk_baseline_length": signals.tokens.double(),
            "risk_baseline_loss": signals.loss,
            "risk_baseline_first_token_loss": signals.first_loss,
            "risk_baseline_list": torch.tensor([is_list(text) for text in signals.texts], dtype=torch.float64),
            "risk_baseline_math": torch.tensor([is_math(text) for text in signals.texts], dtype=torch.float64),
        }


def is_list(text: str) -> bool:
    """Whether a response is in list format: at least two lines open with a bullet or a number."""
    return len(_LIST_LINE.findall(text)) >= 2


def is_math(text: str) -> bool:
    """Whether a response computes."""
    return _MATH.search(text) is not None
