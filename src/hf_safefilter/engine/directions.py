"""Directions in parameter space that rows' gradients are compared with, dense or in a factored form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .ghost import accumulator, widest


@dataclass
class Dense:
    """`values` [directions, ...shape of the parameter], float32 or float64."""

    values: torch.Tensor


@dataclass
class Factored:
    """Direction k is `left core[k] right'`: `left` [out, rank], `right` [in, rank], `core` [directions, rank, rank].

    `left` and `right` have orthonormal columns. Low rank makes it small, and inner products cheap.
    """

    left: torch.Tensor
    right: torch.Tensor
    core: torch.Tensor

    def dense(self) -> torch.Tensor:
        """[directions, out, in]."""
        return self.left @ self.core @ self.right.T


@dataclass
class Directions:
    """Named directions, a part for each parameter. `energy` is the share of each direction's squared norm that is kept."""

    names: tuple[str, ...]
    parts: dict[str, Dense | Factored]
    energy: dict[str, float]
    _squares: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def zeros(cls, names: Sequence[str], parameters: dict[str, torch.nn.Parameter]) -> Directions:
        """All-zero dense directions to add to."""
        parts: dict[str, Dense | Factored] = {
            name: Dense(torch.zeros(len(names), *p.shape, dtype=accumulator(p.dtype), device=p.device))
            for name, p in parameters.items()
        }
        return cls(tuple(names), parts, dict.fromkeys(names, 1.0))

    def squared_norms(self) -> dict[str, torch.Tensor]:
        """Squared norm of each parameter's part, [directions] float64; once, when they are complete."""
        squares = self._squares
        if squares:
            return squares
        for name, part in self.parts.items():
            # Factors have orthonormal columns, so that the core has the norm.
            values = part.values if isinstance(part, Dense) else part.core
            flat = values.flatten(1)
            pieces = [widest(torch.linalg.vector_norm(piece, dim=1)).square() for piece in flat.split(1 << 14, dim=1)]
            squares[name] = torch.stack(pieces).sum(dim=0).cpu()
        return squares

    def compress(self, energy: float) -> Directions:
        """The directions with each matrix in factored form where at most `1 - energy` of its squared norm is lost by it.

        A matrix for which such a form would not be cheaper stays dense.
        """
        if energy >= 1:
            return self
        parts = {name: _factored(part, energy) or part for name, part in self.parts.items()}
        small = Directions(self.names, parts, {})
        before = torch.stack(list(self.squared_norms().values())).sum(dim=0)
        after = torch.stack(list(small.squared_norms().values())).sum(dim=0)
        small.energy = dict(zip(self.names, (after / before.clamp(min=1e-300)).clamp(max=1).tolist(), strict=True))
        return small

    def beside(self, parameters: Mapping[str, torch.nn.Parameter]) -> Directions:
        """The directions, each part on the device of its parameter."""
        move = lambda part, device: type(part)(**{k: v.to(device) for k, v in vars(part).items()})  # noqa: E731
        parts = {name: move(part, parameters[name].device) for name, part in self.parts.items()}
        return Directions(self.names, parts, self.energy)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by `parameter/role`, for safetensors."""
        return {f"{name}/{role}": t for name, part in self.parts.items() for role, t in vars(part).items()}

    @classmethod
    def from_tensors(cls, names: Sequence[str], tensors: dict[str, torch.Tensor], energy: dict[str, float]) -> Directions:
        """The inverse of `tensors`."""
        roles: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, role = key.rpartition("/")
            roles.setdefault(name, {})[role] = tensor
        parts = {name: Dense(**r) if "values" in r else Factored(**r) for name, r in roles.items()}
        return cls(tuple(names), parts, energy)


def _factored(part: Dense | Factored, energy: float) -> Factored | None:
    """A Tucker-2 form of the directions with common column and row spaces, or `None` where it would not pay."""
    if isinstance(part, Factored) or part.values.dim() != 3:
        return None
    values = part.values
    directions, rows, columns = values.shape
    # Directions differ in length; each must keep its share.
    lengths = values.flatten(1).norm(dim=1).clamp(min=1e-30)
    unit = values / lengths[:, None, None]
    most = int(0.4 * rows * columns / (rows + columns))  # above, its inner products cost as much as the dense ones
    lost = (1 - energy) / 2  # by each of the two cuts
    right = _basis(unit.reshape(directions * rows, columns), lost * directions, most)
    if right is None:
        return None
    narrow = unit @ right  # [directions, out, rank]
    left = _basis(narrow.transpose(1, 2).reshape(-1, rows), lost * directions, most)
    if left is None:
        return None
    core = (left.T @ narrow) * lengths[:, None, None]
    return Factored(left.contiguous(), right.contiguous(), core.contiguous())


def _basis(stack: torch.Tensor, lost: float, most: int) -> torch.Tensor | None:
    """Orthonormal columns [features, rank] that span the rows of `stack` [n, features] but for `lost` of its squared norm.

    `None` if that takes more than `most` columns.
    """
    total = float(widest(stack.square().sum(dim=1)).sum())
    rank = min(64, *stack.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while True:
            _, s, v = torch.svd_lowrank(stack, q=rank, niter=2)
            left_out = total - widest(s).square().cumsum(0)  # [rank], after each column
            enough = (left_out <= lost).nonzero()
            if len(enough):
                # Processors multiply matrices of such widths fastest, and what it adds is exactness.
                wanted = min(-(-(int(enough[0]) + 1) // 16) * 16, v.shape[1])
                return v[:, :wanted] if wanted <= most else None
            if rank >= min(most, *stack.shape):
                return None
            rank = min(2 * rank, *stack.shape)
