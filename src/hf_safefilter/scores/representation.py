"""Representation matching: is the row's final state close to that of complying with harmful requests?

He et al. 2024 (arXiv 2404.01099), section 3.1: the final hidden state at the row's last token, its cosine to each harmful
anchor, the mean of the `top_n` largest (their code's default is 1: the largest). The balanced, bi-directional form, which the
paper has for gradients only, subtracts the mean over the safe sets of the same quantity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.hidden import Hidden
from ..engine.passes import Needs, Reference, Signals
from ..errors import InputError
from .base import Score, States, check_count, safe_sides, unit

_STATE = Hidden()


@dataclass(frozen=True)
class RepresentationScore(Score):
    """`risk_representation` and `risk_representation_balanced`.

    Args:
        top_n: how many of the largest cosines to a side's anchors are averaged.

    Raises:
        InputError: a `top_n` under 1, or more than a side has anchors (when it is fitted).
    """

    name: ClassVar[str] = "representation"
    version: ClassVar[int] = 1

    top_n: int = 1

    def __post_init__(self) -> None:
        check_count("top_n", self.top_n)

    @property
    def needs(self) -> Needs:
        """The final hidden state at the last target token."""
        return Needs(hidden=frozenset({_STATE}))

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The two scores and the cosine to each side."""
        details = [f"representation_cosine_{side}" for side in sides]
        return ["risk_representation", "risk_representation_balanced", *details]

    def fit(self, states: States, depth: int) -> dict[str, torch.Tensor]:
        """The anchors' states, of unit length, by side."""
        for side, of_side in states.items():
            if self.top_n > len(of_side[_STATE]):
                raise InputError(f"top_n={self.top_n}, but the anchor side {side!r} has only {len(of_side[_STATE])} anchors")
        return {side: unit(of_side[_STATE]) for side, of_side in states.items()}

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Cosines to each side's nearest anchors, and their difference between sides."""
        rows = unit(signals.hidden[_STATE])  # [rows, hidden]
        anchors = reference.fitted[self.name]
        near = {side: (rows @ a.T).topk(self.top_n, dim=1).values.mean(dim=1) for side, a in anchors.items()}  # [rows]
        safe = torch.stack([near[side] for side in safe_sides(list(near))]).mean(dim=0)
        return {
            "risk_representation": near["harmful"],
            "risk_representation_balanced": near["harmful"] - safe,
            **{f"representation_cosine_{side}": cosine for side, cosine in near.items()},
        }
