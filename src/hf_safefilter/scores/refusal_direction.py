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
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..engine.hidden import Hidden
from ..engine.passes import HARMLESS, Needs, Reference, Signals
from .base import Fitted, Score, States, check_layer, fisher_ratio, unit


@dataclass(frozen=True)
class RefusalDirectionScore(Score):
    """`risk_refusal_direction` and `risk_refusal_direction_shift`.

    Args:
        layer: `"fisher"` (chosen among all layers when the anchors are fitted), an index of `hidden_states`, or a share of the
            depth.

    Raises:
        InputError: not a layer.
    """

    name: ClassVar[str] = "refusal_direction"
    version: ClassVar[int] = 1

    layer: float | Literal["fisher"] = "fisher"

    def __post_init__(self) -> None:
        if self.layer != "fisher":
            check_layer(self.layer)

    @property
    def needs(self) -> Needs:
        """States of the prompt's end and of the response; which layer's is known when the anchors are fitted."""
        return Needs(harmless=True) | (Needs() if self.layer == "fisher" else self._at(self.layer))

    def _at(self, layer: float) -> Needs:
        return Needs(hidden=frozenset({Hidden(layer, "mean"), Hidden(layer, "prompt")}))

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The two scores."""
        return ["risk_refusal_direction", "risk_refusal_direction_shift"]

    def anchor_states(self, depth: int) -> frozenset[Hidden]:
        """States at the prompt's end, at every layer where one is to be chosen."""
        layers = range(1, max(depth, 2)) if self.layer == "fisher" else [self.layer]
        return frozenset(Hidden(layer, "prompt") for layer in layers)

    def fit(self, states: States, depth: int) -> dict[str, torch.Tensor]:
        """The layer and the unit vector r."""
        wanted = sorted(self.anchor_states(depth), key=lambda h: h.layer)
        best = max(wanted, key=lambda h: fisher_ratio(states["harmful"][h], states[HARMLESS][h]))
        difference = states["harmful"][best].mean(dim=0) - states[HARMLESS][best].mean(dim=0)
        return {"layer": torch.tensor(float(best.layer)), "direction": unit(difference)}

    def row_needs(self, fitted: Fitted) -> Needs:
        """States at the fitted layer."""
        return self._at(float(fitted["layer"]))

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Projections on r."""
        fitted = reference.fitted[self.name]
        layer = float(fitted["layer"])
        prompt, response = signals.hidden[Hidden(layer, "prompt")], signals.hidden[Hidden(layer, "mean")]
        return {
            "risk_refusal_direction": prompt @ fitted["direction"],
            "risk_refusal_direction_shift": (prompt - response) @ fitted["direction"],
        }
