"""LARF: layer-aware representation filtering, in the middle of the model instead of at its end.

Li et al. 2025 (arXiv 2507.18631): the state h at the row's last token after one sensitive layer, its mean cosine to unsafe
anchors minus that to safe ones. With unit vectors that is one inner product: `risk_larf = h/|h| . (mean unit harmful - mean
unit safe)`.

Their layer is the one whose scaled weights change refusals most (`refusal.larf_layer`): layer 10 of Llama-3.1's 32.
Without that search the default is the same share of the depth. The layer is an index of `hidden_states`: the output of block l
counted from 1, as in their code, where the scaled block with index l, from 0, is the one that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.hidden import Hidden
from ..engine.passes import Needs, Reference, Signals
from .base import Score, States, check_layer, safe_sides, unit


@dataclass(frozen=True)
class LarfScore(Score):
    """`risk_larf`.

    Args:
        layer: an index of `hidden_states`, or a share of the depth.

    Raises:
        InputError: not a layer.
    """

    name: ClassVar[str] = "larf"
    version: ClassVar[int] = 1

    layer: float = 10 / 32

    def __post_init__(self) -> None:
        check_layer(self.layer)

    @property
    def needs(self) -> Needs:
        """One layer's state at the last target token."""
        return Needs(hidden=frozenset({Hidden(self.layer)}))

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The score."""
        return ["risk_larf"]

    def fit(self, states: States, depth: int) -> dict[str, torch.Tensor]:
        """Mean unit state of the harmful side minus that of the safe sides."""
        mean = {side: unit(of_side[Hidden(self.layer)]).mean(dim=0) for side, of_side in states.items()}
        safe = torch.stack([mean[side] for side in safe_sides(list(mean))]).mean(dim=0)
        return {"direction": mean["harmful"] - safe}

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """The unit state's inner product with the direction."""
        return {"risk_larf": unit(signals.hidden[Hidden(self.layer)]) @ reference.fitted[self.name]["direction"]}
