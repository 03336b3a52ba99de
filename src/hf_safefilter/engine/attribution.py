"""Which tokens carry a row's gradient score: the inner product with a direction, position by position.

A row's gradient is a sum over positions, at each layer of what the position's input and its output's gradient make of it, so
its inner product with a direction is a sum over positions, too:

    <G, M> = sum over layers and positions t of  d_t . M a_t

Position t holds the token at t: its embedding, its way through the blocks, and the head's prediction of the token that
follows it. Prompt tokens have terms as well, through attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import ghost
from .backward import Targets
from .batching import Batch
from .directions import Dense, Directions
from .measure import Visitor


class Attribution(Visitor):
    """Terms of rows' inner products with a weighted sum of directions: `terms` [batch, tokens] float64.

    Args:
        batch, targets: the micro-batch.
        directions: what gradients are compared with.
        weights: each direction's weight by its name.
    """

    def __init__(self, batch: Batch, targets: Targets, directions: Directions, weights: Mapping[str, float]) -> None:
        super().__init__(batch, targets)
        self.directions = directions
        self.weights = torch.tensor([weights.get(name, 0.0) for name in directions.names], device=batch.input_ids.device)
        self.terms = ghost.widest(torch.zeros(batch.input_ids.shape, device=batch.input_ids.device))

    def _add(self, rows: slice, product: torch.Tensor) -> None:
        """`product` [rows, positions, ...], summed over all that follows positions."""
        terms = ghost.widest(product.flatten(2).sum(dim=2)).to(self.terms.device)
        if self.positions is None:
            self.terms[rows] += terms
        else:  # the head's, at the positions that predict
            self.terms[rows].index_add_(1, self.positions.to(terms.device), terms)

    def _direction(self, unit: str) -> torch.Tensor:
        """The weighted sum [...shape of the parameter] of dense directions."""
        part = self.directions.parts[unit]
        assert isinstance(part, Dense)
        return torch.tensordot(self.weights.to(part.values), part.values, dims=1)

    def matrix(self, unit: str, rows: slice, a: torch.Tensor, d: torch.Tensor) -> None:
        """See `Visitor`."""
        part = self.directions.parts[unit]
        if isinstance(part, Dense):
            self._add(rows, d.to(ghost.accumulator(d.dtype)) * (a @ self._direction(unit).to(a.dtype).T))
        else:
            x, y = d @ part.left.to(d.dtype), a @ part.right.to(a.dtype)
            core = torch.tensordot(self.weights.to(part.core), part.core, dims=1)
            self._add(rows, (x.to(core.dtype) @ core) * y)

    def norm(self, unit: str, rows: slice, normalised: torch.Tensor, d: torch.Tensor) -> None:
        """See `Visitor`."""
        self._add(rows, (normalised * d).to(ghost.accumulator(d.dtype)) * self._direction(unit))

    def bias(self, unit: str, rows: slice, d: torch.Tensor) -> None:
        """See `Visitor`."""
        self._add(rows, d.to(ghost.accumulator(d.dtype)) * self._direction(unit))

    def vector(self, unit: str, rows: slice, g: torch.Tensor) -> None:
        """Never called: sums over positions are what is taken apart here."""
        raise NotImplementedError

    def lookup(self, unit: str, ids: torch.Tensor, d: torch.Tensor, *, tied: bool) -> None:
        """See `Visitor`."""
        part = self.directions.parts[unit]
        if isinstance(part, Dense):
            # Looked up before they are weighted: an embedding is large, a row short.
            looked_up = torch.tensordot(self.weights.to(part.values), part.values[:, ids], dims=1)
        else:
            core = torch.tensordot(self.weights.to(part.core), part.core, dims=1)
            looked_up = part.left[ids] @ core @ part.right.T
        self._add(self.every_row, d.to(looked_up.dtype) * looked_up)
