"""Subspace energy: how much of the row's state lies in the span of harmful anchors' states, minus that of safe ones'.

DataShield (arXiv 2607.15081): the states h at the last token after several layers, concatenated; an uncentred SVD of the
anchors' gives the leading `rank` directions U of each side, and

    risk_subspace = |U_harmful' h|^2 / |h|^2 - |U_safe' h|^2 / |h|^2

With `spans`, also `risk_subspace_span`: with q_t the same at response token t, the largest increase `(q_t - q_(t-1)) / 2`
within the response, which points at the span where the row turns. They average over three source models; this is one. Their
layers for Llama-3-8B are 13, 16 and 19 of 32; the default is the same shares of the depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.hidden import Hidden, Probe, energies
from ..engine.passes import Needs, Reference, Signals
from ..errors import InputError
from .base import Fitted, Score, States, check_count, check_layer, safe_sides


@dataclass(frozen=True)
class SubspaceScore(Score):
    """`risk_subspace` and, with `spans`, `risk_subspace_span`.

    Args:
        layers: indices of `hidden_states`, or shares of the depth.
        rank: directions kept of each side; at most as many as it has anchors.
        spans: whether to score each response token too.

    Raises:
        InputError: not layers, or a rank under 1.
    """

    name: ClassVar[str] = "subspace"
    version: ClassVar[int] = 1

    layers: tuple[float, ...] = (13 / 32, 16 / 32, 19 / 32)
    rank: int = 16
    spans: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence) or not self.layers:
            raise InputError(f"layers must be a sequence of layers, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            check_layer(layer)
        check_count("rank", self.rank)

    @property
    def needs(self) -> Needs:
        """The layers' states at the last target token."""
        return Needs(hidden=frozenset(Hidden(layer) for layer in self.layers))

    def columns(self, sides: Sequence[str]) -> list[str]:
        """The score, and that of the spans."""
        return ["risk_subspace", "risk_subspace_span"] if self.spans else ["risk_subspace"]

    def _joined(self, states: Fitted | dict[Hidden, torch.Tensor] | object) -> torch.Tensor:
        return torch.cat([states[Hidden(layer)] for layer in self.layers], dim=1)  # type: ignore[index]

    def fit(self, states: States, depth: int) -> dict[str, torch.Tensor]:
        """Leading right singular vectors of each side's states, [sum of hidden sizes, rank]."""
        sides = {
            "harmful": self._joined(states["harmful"]),
            "safe": torch.cat([self._joined(states[side]) for side in safe_sides(list(states))]),
        }
        rank = min(self.rank, *(len(x) for x in sides.values()))  # the same on both sides, or the larger would win
        return {side: torch.linalg.svd(x.double(), full_matrices=False).Vh[:rank].T.float() for side, x in sides.items()}

    def row_needs(self, fitted: Fitted) -> Needs:
        """The states, and with `spans` every response token's energies."""
        if not self.spans:
            return self.needs
        return self.needs | Needs(probes=frozenset({self._probe(fitted)}))

    def _probe(self, fitted: Fitted) -> Probe:
        return Probe(self.layers, (fitted["harmful"], fitted["safe"]))

    def reduce(self, signals: Signals, reference: Reference) -> dict[str, torch.Tensor]:
        """Differences of energies."""
        fitted = reference.fitted[self.name]
        inside = energies(self._joined(signals.hidden), (fitted["harmful"], fitted["safe"]))  # [rows, 2]
        columns = {"risk_subspace": inside[:, 0] - inside[:, 1]}
        if self.spans:
            (found,) = (e for probe, e in signals.energies.items() if probe.bases[0] is fitted["harmful"])
            columns["risk_subspace_span"] = torch.stack([_largest_rise(e[:, 0] - e[:, 1]) for e in found])
        return columns


def _largest_rise(q: torch.Tensor) -> torch.Tensor:
    """Half the largest increase from one token to the next; 0 for a single token."""
    return q.diff().amax() / 2 if len(q) > 1 else q.new_zeros(())
