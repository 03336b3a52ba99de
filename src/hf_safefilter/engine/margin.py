"""The refusal margin's gradient: how a step on a row would change the log-probability of refusing minus that of complying.

    margin = mean over anchors of log p(refusal opening) - log p(affirmative opening), per token, on the harmful requests

A step of plain SGD with learning rate lr on a row with gradient g changes it by `-lr <g, margin'>` to first order, and one with
a diagonal preconditioner P by `-lr <P g, margin'> = -lr <g, P margin'>`: both are inner products with a fixed direction.
"""

from __future__ import annotations

import torch

from .directions import Dense, Directions
from .ghost import widest

MARGIN = "margin"
MARGIN_ADAM = "margin_adam"

# Added to each row's and column's share of the second moment, relative to their mean: entries whose gradient is nearly zero
# on the anchors must not rule the product.
_DAMPING = 0.01


def margin_directions(directions: Directions) -> None:
    """Make the margin's two directions in place.

    On entry `margin` is the mean gradient of the affirmative openings' loss and `margin_adam` that of the refusals'.
    On return `margin` is the margin's gradient (a loss is a negative log-probability), and `margin_adam` the same times
    `sqrt(mean v) / sqrt(v)`, with v the mean of the two sides' squared gradients, of matrices factored into rows and columns
    (Adafactor; Shazeer and Stern 2018, arXiv 1804.04235, section 3) and damped.
    """
    first, second = directions.names.index(MARGIN), directions.names.index(MARGIN_ADAM)
    total, count = 0.0, 0
    for part in directions.parts.values():
        assert isinstance(part, Dense)
        affirmative, refusal = part.values[first], part.values[second]
        v = (affirmative.square() + refusal.square()) / 2
        total += float(widest(v.sum(dim=0)).sum())
        count += v.numel()
        margin = affirmative - refusal  # = -(mean gradient of log p(affirmative)) + that of log p(refusal)
        part.values[first] = margin
        part.values[second] = margin / _root(v)
    scale = (total / max(count, 1)) ** 0.5
    for part in directions.parts.values():
        assert isinstance(part, Dense)
        part.values[second] *= scale


def _root(v: torch.Tensor) -> torch.Tensor:
    """`sqrt(v)`, damped; of a matrix in its rank-one form from the means of rows and columns."""
    tiny = torch.finfo(v.dtype).tiny
    if v.dim() == 1:
        return (v + _DAMPING * v.mean()).clamp(min=tiny).sqrt()
    rows, columns = v.mean(dim=1), v.mean(dim=0)
    mean = rows.mean().clamp(min=tiny)
    left = (rows + _DAMPING * mean).sqrt()
    right = ((columns + _DAMPING * mean) / mean).sqrt()
    return left[:, None] * right
