"""Per-example gradients over all parameters, one example at a time with autograd.

Slow and exact. Norms and inner products accumulate in float32 and float64 whatever the weights' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Gradient = list[torch.Tensor | None]


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that gradients are taken over: all with floating-point values, tied ones once."""
    return [p for p in model.parameters() if p.is_floating_point()]


@contextmanager
def scoring_mode(model: Any, *, gradients: bool) -> Iterator[None]:
    """Evaluation mode, with gradients for all parameters or for none; what the user had set comes back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    required = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p in model.parameters():
            p.requires_grad_(gradients and p.is_floating_point())
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for p, was_required in required:
            p.requires_grad_(was_required)


def gradient(loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> Gradient:
    """The gradient of a scalar loss, a tensor or `None` (no influence) for each parameter."""
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def norm(g: Gradient) -> float:
    """Euclidean norm over all parameters."""
    squares = [torch.dot(c, c) for _, _, c in _chunks(g)]
    return math.sqrt(sum(torch.stack(squares).tolist())) if squares else 0.0


@dataclass
class Directions:
    """Named directions in parameter space: `parts[i]` is [directions, entries of parameter i], float32 or float64.

    A direction is the mean of anchors' unit gradients, not normalised again (He et al. 2024, as their code does), so that
    a unit gradient's inner product with it is the mean of its cosines to the anchors.
    """

    names: tuple[str, ...]
    parts: list[torch.Tensor]

    @classmethod
    def zeros(cls, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> Directions:
        """All-zero directions to add to."""
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        parts = [torch.zeros(len(names), p.numel(), dtype=d, device=p.device) for p, d in zip(parameters, dtypes, strict=True)]
        return cls(tuple(names), parts)

    def add(self, name: str, g: Gradient, scale: float) -> None:
        """Add `scale * g` to one direction."""
        row = self.names.index(name)
        for part, grad in zip(self.parts, g, strict=True):
            if grad is not None:
                part[row].add_(_flat(grad), alpha=scale)

    def measure(self, g: Gradient) -> tuple[float, dict[str, float]]:
        """The norm of `g`, and its inner product with each direction."""
        # On the device, so that it is waited for once; but Apple's has no float64.
        device = self.parts[0].device
        total = torch.zeros(1 + len(self.names), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        for i, start, chunk in _chunks(g):
            total[0] += torch.dot(chunk, chunk).to(total)
            # total[1 + k] += sum_n part[k, n] g[n]
            total[1:] += (self.parts[i][:, start : start + len(chunk)] @ chunk).to(total)
        squares, *dots = total.tolist()
        return math.sqrt(squares), dict(zip(self.names, dots, strict=True))


# Entries summed in float32 before the sum goes on in float64: a float32 sum over an embedding's 28 million squares is wrong
# by 4e-4 (one dot product) to 3e-3 (torch.linalg.vector_norm) on the CPUs measured; over this many, by under 1e-6.
_CHUNK = 1 << 16


def _chunks(g: Gradient) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Parameter index, first entry, and entries of each piece of the gradient, in float32 or float64."""
    for i, part in enumerate(g):
        if part is not None:
            flat = _flat(part)
            for start in range(0, len(flat), _CHUNK):
                yield i, start, flat[start : start + _CHUNK]


def _flat(part: torch.Tensor) -> torch.Tensor:
    return part.flatten().to(torch.promote_types(part.dtype, torch.float32))
