"""What a score is: it declares the signals that it needs, and reduces them to columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from ..engine.hidden import Hidden
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
