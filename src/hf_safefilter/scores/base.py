"""What a score is: it declares the signals that it needs, and reduces them to columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch

from ..engine.hidden import Hidden, Pool
from ..engine.passes import Needs, Reference, Signals
from ..errors import InputError

# Anchors' hidden states by side, each [anchors, hidden].
States = Mapping[str, Mapping[Hidden, torch.Tensor]]
Fitted = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Score(ABC):
    """A score of rows; its fields are its options, plain values that become part of the cache key.

    A column `risk_...` is higher for riskier rows, always. Other columns are details. All are float32.
    Raise `version` whenever the same input would give another number.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the pass must collect, of rows and (hidden states, directions) of anchors."""

    @abstractmethod
    def columns(self, sides: Sequence[str]) -> list[str]:
        """The columns that `reduce` gives, for anchor sides `harmful`, `safe_1`, ...; `risk_...` first."""

    @abstractmethod
    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Reduce what the pass collected to columns, each [rows]; NaN where the score is not defined."""

    def anchor_states(self, depth: int) -> frozenset[Hidden]:
        """The anchors' hidden states that `fit` gets, for a model of `depth` blocks; by default those that rows need."""
        return self.needs.hidden

    def fit(self, states: States, depth: int) -> dict[str, torch.Tensor]:
        """What the score keeps of the anchors' states: tensors by name, saved with a fitted reference."""
        return {}

    def row_needs(self, fitted: Fitted) -> Needs:
        """What rows need once the anchors are fitted; by default `needs`. (A layer may be chosen by fitting.)"""
        return self.needs

    def key(self) -> dict[str, Any]:
        """Name, version and options."""
        return {"name": self.name, "version": self.version, **asdict(self)}


@dataclass(frozen=True)
class AnchorGradientScore(Score):
    """A score that compares gradients with anchors'.

    Args:
        anchor_tokens: how many response tokens of each anchor its gradient is taken over.

    Raises:
        InputError: an `anchor_tokens` under 1.
    """

    anchor_tokens: int = 10

    def __post_init__(self) -> None:
        check_count("anchor_tokens", self.anchor_tokens)


@dataclass(frozen=True)
class ShiftScore(Score):
    """A score of how the state moves from the prompt's end to the response, along a direction at one layer.

    Args:
        layer: `"fisher"` (the one where the anchors' groups differ most clearly, found when they are fitted), an index of
            `hidden_states`, or a share of the depth.

    Raises:
        InputError: not a layer.
    """

    # The anchors' states that the direction is made of, and the sides they are set against.
    anchor_pool: ClassVar[Pool]

    layer: float | Literal["fisher"] = "fisher"

    def __post_init__(self) -> None:
        if self.layer != "fisher":
            check_layer(self.layer)

    @abstractmethod
    def against(self, sides: Sequence[str]) -> list[str]:
        """The sides that the harmful one is set against."""

    @property
    def needs(self) -> Needs:
        """States of the prompt's end and of the response; which layer's may be known only when the anchors are fitted."""
        return Needs() if self.layer == "fisher" else self._at(self.layer)

    def _at(self, layer: float) -> Needs:
        return Needs(hidden=frozenset({Hidden(layer, "mean"), Hidden(layer, "prompt")}))

    def anchor_states(self, depth: int) -> frozenset[Hidden]:
        """States at every layer where one is to be chosen."""
        layers = range(1, max(depth, 2)) if self.layer == "fisher" else [self.layer]
        return frozenset(Hidden(layer, self.anchor_pool) for layer in layers)

    def fit(self, states: States, depth: int) -> dict[str, torch.Tensor]:
        """The layer, and the unit vector from the other sides' mean state to the harmful side's."""

        def groups(h: Hidden) -> tuple[torch.Tensor, torch.Tensor]:
            return states["harmful"][h], torch.cat([states[side][h] for side in self.against(list(states))])

        wanted = sorted(self.anchor_states(depth), key=lambda h: h.layer)
        best = max(wanted, key=lambda h: fisher_ratio(*groups(h)))
        harmful, others = groups(best)
        return {"layer": torch.tensor(float(best.layer)), "direction": unit(harmful.mean(dim=0) - others.mean(dim=0))}

    def row_needs(self, fitted: Fitted) -> Needs:
        """States at the fitted layer."""
        return self._at(float(fitted["layer"]))

    def along(self, signals: Signals, reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
        """Projections [rows] of the state at the prompt's end, and of the mean over the response."""
        fitted = reference.fitted[self.name]
        layer = float(fitted["layer"])
        prompt, response = (signals.hidden[Hidden(layer, pool)] @ fitted["direction"] for pool in ("prompt", "mean"))
        return prompt, response


def safe_sides(sides: Sequence[str]) -> list[str]:
    """The sides that are not the harmful one."""
    return [side for side in sides if side.startswith("safe_")]


def check_count(name: str, value: Any) -> None:
    """Raise `InputError` unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_layer(value: Any) -> None:
    """Raise `InputError` unless `value` is a layer: a whole number, or a share of the depth between 0 and 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or (value < 0 and value != -1):
        raise InputError(f"layer must be an index of hidden_states, -1, or a share of the depth like 0.5; got {value!r}")


def unit(x: torch.Tensor) -> torch.Tensor:
    """Each row [..., features] divided by its length."""
    return torch.nn.functional.normalize(x, dim=-1)


def fisher_ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    """How well the difference of two groups' means separates them: between-group over total scatter along it, 0 to 1.

    Features are standardised first (2606.00160's criterion, all of it in that space).

    Args:
        a, b: states [examples, hidden].
    """
    both = torch.cat([a, b]).double()
    z = (both - both.mean(dim=0)) / both.std(dim=0).clamp(min=1e-12)
    mean_a, mean_b = z[: len(a)].mean(dim=0), z[len(a) :].mean(dim=0)
    along = z @ unit(mean_a - mean_b)  # [examples]; its mean is 0
    between = len(a) * along[: len(a)].mean().square() + len(b) * along[len(a) :].mean().square()
    return float(between / along.square().sum().clamp(min=1e-300))
