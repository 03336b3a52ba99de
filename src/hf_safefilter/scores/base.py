"""What a score is: it declares the signals that it needs, and reduces them to columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from ..engine.passes import Needs, Reference, Signals


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
        """What the pass must collect."""

    @abstractmethod
    def columns(self, sides: Sequence[str]) -> list[str]:
        """The columns that `reduce` gives, for anchor sides `harmful`, `safe_1`, ...; `risk_...` first."""

    @abstractmethod
    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Reduce what the pass collected to columns, each [rows]; NaN where the score is not defined."""

    def key(self) -> dict[str, Any]:
        """Name, version and options."""
        return {"name": self.name, "version": self.version, **asdict(self)}


def safe_sides(sides: Sequence[str]) -> list[str]:
    """The sides that are not the harmful one."""
    return [side for side in sides if side != "harmful"]
