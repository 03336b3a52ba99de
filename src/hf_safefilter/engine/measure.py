"""What is made of each layer's input and output gradient: norms and inner products of rows, or directions of anchors.

The form is chosen by cost for each layer and micro-batch. Forming `G = D'A` costs `2 T out in` operations for T tokens and one
pass over `out in` entries for its norm and each inner product; the ghost norm `2 T^2 (out + in)`; a dense direction without
forming `2 T out in`; a factored one of rank r `2 T r (out + in)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import ghost
from .backward import Targets, Visit
from .batching import Batch
from .directions import Dense, Directions, Factored
from .layers import Layer

# One pass over memory costs about as much an entry as this many multiplications and additions in a matrix product.
_PASS = 12
# Entries of formed gradients at a time: what a processor's cache holds.
_PIECE = 1 << 21


class Visitor(ABC):
    """Takes a layer apart into the matrices and vectors that its gradient consists of."""

    def __init__(self, batch: Batch, targets: Targets) -> None:
        self.batch = batch
        self.targets = targets
        self.every_row = slice(0, len(batch.input_ids))
        # Where in the row what is shown stands: `None` for every position, or those that the head predicts from.
        self.positions: torch.Tensor | None = None

    def __call__(self, layer: Layer, a: torch.Tensor, d: torch.Tensor) -> None:
        """Take a layer's input (or ids) and its output's gradient; see `backward.Visit`."""
        if layer.kind == "embedding":
            padding: Any = layer.module.padding_idx
            # As autograd does: the padding entry gets no gradient, wherever it stands.
            d = d * layer.scale if padding is None else (d * layer.scale).masked_fill((a == padding)[:, :, None], 0)
            assert layer.weight is not None
            self.positions = None
            self.lookup(layer.weight, a, d, tied=layer.tied)
            return
        parts = [(slice(i, i + 1), s) for i, s in enumerate(self.targets.slices())] if layer.head else []
        for rows, tokens in parts or [(self.every_row, slice(None))]:
            self.positions = self.targets.position[tokens].to(d.device) if layer.head else None
            part_a, part_d = a[:, tokens], d[:, tokens]
            if layer.weight is not None and layer.kind == "norm":
                self.norm(layer.weight, rows, layer.normalised(part_a), part_d)
            elif layer.weight is not None and layer.kind == "conv1d":
                self.matrix(layer.weight, rows, part_d, part_a)
            elif layer.weight is not None:
                self.matrix(layer.weight, rows, part_a, part_d)
            if layer.bias is not None:
                self.bias(layer.bias, rows, part_d.flatten(2))
            if layer.tied:
                self.head_at_ids(rows, part_a, part_d)

    @abstractmethod
    def matrix(self, unit: str, rows: slice, a: torch.Tensor, d: torch.Tensor) -> None:
        """The matrix `d' a` of each of `rows`, `a` [rows, tokens, columns] and `d` [rows, tokens, rows of the matrix]."""

    def norm(self, unit: str, rows: slice, normalised: torch.Tensor, d: torch.Tensor) -> None:
        """A norm's weight: its input normalised, and its output's gradient, both [rows, tokens, ..., features]."""
        self.vector(unit, rows, ghost.scale_gradient(normalised, d))

    def bias(self, unit: str, rows: slice, d: torch.Tensor) -> None:
        """A bias: the output's gradient [rows, tokens, features]."""
        self.vector(unit, rows, ghost.bias_gradient(d))

    @abstractmethod
    def vector(self, unit: str, rows: slice, g: torch.Tensor) -> None:
        """A vector's gradient [rows, features]."""

    @abstractmethod
    def lookup(self, unit: str, ids: torch.Tensor, d: torch.Tensor, *, tied: bool) -> None:
        """An embedding's entries `ids` [batch, tokens] and gradients `d` [batch, tokens, features]."""

    def head_at_ids(self, rows: slice, a: torch.Tensor, d: torch.Tensor) -> None:  # noqa: B027  # not all need it
        """A head that shares its weight with the embedding."""


def together(visitors: Sequence[Visitor]) -> Visit:
    """Show each layer to all of them, in one pass."""

    def visit(layer: Layer, a: torch.Tensor, d: torch.Tensor) -> None:
        for visitor in visitors:
            visitor(layer, a, d)

    return visit


def _pieces(a: torch.Tensor, d: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """`d' a` [rows, :, columns] in pieces of the matrix' rows."""
    step = max(128, _PIECE // (len(a) * a.shape[2]))  # thinner products waste more than cache misses do
    for start in range(0, d.shape[2], step):
        piece = slice(start, min(start + step, d.shape[2]))
        yield piece, ghost.linear_gradient(a, d[:, :, piece])


class Measurement(Visitor):
    """Squared norms and inner products of rows: `squares[unit]` [batch], `dots[unit]` [batch, directions], float64."""

    def __init__(self, batch: Batch, targets: Targets, directions: Directions | None) -> None:
        super().__init__(batch, targets)
        self.directions = directions
        self.squares: dict[str, torch.Tensor] = {}
        self.dots: dict[str, torch.Tensor] = {}
        self._gram_of: tuple[torch.Tensor, torch.Tensor] | None = None
        self._head_at_ids: torch.Tensor | None = None

    def _add(self, unit: str, rows: slice, squares: torch.Tensor, dots: torch.Tensor | None) -> None:
        count = len(self.batch.input_ids)
        where = self.squares.setdefault(unit, squares.new_zeros(count))
        where[rows] += squares
        if dots is not None:
            self.dots.setdefault(unit, dots.new_zeros(count, dots.shape[1]))[rows] += dots

    def matrix(self, unit: str, rows: slice, a: torch.Tensor, d: torch.Tensor) -> None:
        """See `Visitor`."""
        part = None if self.directions is None else self.directions.parts[unit]
        tokens, out, columns = d.shape[1], d.shape[2], a.shape[2]
        dense = len(part.values) if isinstance(part, Dense) else 0
        formed = 2 * tokens * out * columns + _PASS * (1 + dense) * out * columns
        # q, k and v read one input. Views of it differ as objects; the one held keeps its memory from being reused.
        held = None if self._gram_of is None else self._gram_of[0]
        shared = held is not None and (held.data_ptr(), held.shape, held.stride()) == (a.data_ptr(), a.shape, a.stride())
        without = 2 * tokens**2 * (out + (0 if shared else columns)) + dense * 2 * tokens * out * columns
        dots = None
        if formed <= without:
            squares = ghost.widest(torch.zeros(len(a), device=a.device))
            for piece, g in _pieces(a, d):
                squares += ghost.squared_norm(g)
                if isinstance(part, Dense):
                    more = ghost.formed_dots(g, part.values[:, piece])
                    dots = more if dots is None else dots + more
        else:
            if self._gram_of is None or not shared:
                self._gram_of = (a, ghost.gram(a))
            squares = ghost.linear_squared_norm(self._gram_of[1], d)
            if isinstance(part, Dense):
                dots = ghost.linear_dots(a, d, part.values)
        if isinstance(part, Factored):
            dots = ghost.factored_dots(d @ part.left.to(d.dtype), a @ part.right.to(a.dtype), part.core)
        self._add(unit, rows, squares, dots)

    def vector(self, unit: str, rows: slice, g: torch.Tensor) -> None:
        """See `Visitor`."""
        part = None if self.directions is None else self.directions.parts[unit]
        dots = ghost.formed_dots(g, part.values) if isinstance(part, Dense) else None
        self._add(unit, rows, ghost.squared_norm(g), dots)

    def head_at_ids(self, rows: slice, a: torch.Tensor, d: torch.Tensor) -> None:
        """See `Visitor`."""
        ids = self.batch.input_ids.to(a.device)
        if self._head_at_ids is None:
            self._head_at_ids = a.new_zeros(*ids.shape, a.shape[2])
        self._head_at_ids[rows] = ghost.tied_rows(ids[rows], a, d)

    def lookup(self, unit: str, ids: torch.Tensor, d: torch.Tensor, *, tied: bool) -> None:
        """See `Visitor`."""
        squares = ghost.embedding_squared_norm(ids, d)
        if tied:
            assert self._head_at_ids is not None
            squares = squares + 2 * ghost.token_dots(self._head_at_ids, d)
        dots = None
        if self.directions is not None:
            part = self.directions.parts[unit]
            if isinstance(part, Factored):
                dots = ghost.factored_dots(part.left[ids].to(d.dtype), d @ part.right.to(d.dtype), part.core)
            else:
                dots = ghost.embedding_dots(ids, d, part.values)
        self._add(unit, self.every_row, squares, dots)


class Accumulation(Visitor):
    """Adds `weights[k, b]` times the gradient of row b to direction k; `weights` is [directions, batch]."""

    def __init__(self, batch: Batch, targets: Targets, directions: Directions, weights: torch.Tensor) -> None:
        super().__init__(batch, targets)
        self.directions = directions
        self.weights = weights

    def _values(self, unit: str) -> torch.Tensor:
        part = self.directions.parts[unit]
        assert isinstance(part, Dense)
        return part.values

    def matrix(self, unit: str, rows: slice, a: torch.Tensor, d: torch.Tensor) -> None:
        """See `Visitor`."""
        values = self._values(unit)
        weights = self.weights[:, rows]
        weights = weights.to(d.device)
        involved = weights.any(dim=1).nonzero().flatten().tolist()  # an anchor is on one side, and the others' are large
        for piece, g in _pieces(a, d):
            for k in involved:
                values[k, piece].view(-1).addmv_(g.flatten(1).T, weights[k].to(g.dtype))

    def vector(self, unit: str, rows: slice, g: torch.Tensor) -> None:
        """See `Visitor`."""
        self._values(unit).addmm_(self.weights[:, rows].to(g), g)

    def lookup(self, unit: str, ids: torch.Tensor, d: torch.Tensor, *, tied: bool) -> None:
        """See `Visitor`."""
        for values, weight in zip(self._values(unit), self.weights.to(d.device, ghost.accumulator(d.dtype)), strict=True):
            values.index_add_(0, ids.flatten(), (weight[:, None, None] * d).flatten(0, 1))
