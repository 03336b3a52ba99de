"""Two clusters, of safe and of unsafe prompts: how far apart, where a prompt lies between them, how they moved.

Held-out: means are taken over prompts 0, 2, 4, ... and prompts 1, 3, 5, ... are scored, so near copies must not be neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError

Row = dict[str, float | int | str | None]
Activations = Mapping[int, torch.Tensor]

LEAST_PROMPTS = 4
_DRAWS = 2000


@dataclass(frozen=True)
class Clusters:
    """The mean activation of safe and of unsafe prompts at one layer, each [hidden]."""

    safe: torch.Tensor
    unsafe: torch.Tensor

    @classmethod
    def of(cls, safe: torch.Tensor, unsafe: torch.Tensor) -> Clusters:
        """From activations [prompts, hidden]: of every other prompt."""
        return cls(fitted(safe).mean(dim=0), fitted(unsafe).mean(dim=0))

    @property
    def direction(self) -> torch.Tensor:
        """From safe to unsafe [hidden], the refusal direction."""
        return self.unsafe - self.safe

    def tau(self, x: torch.Tensor) -> torch.Tensor:
        """|x - unsafe| - |x - safe| of each row of x [prompts, hidden]: above 0 where it is nearer to safe prompts."""
        return (x - self.unsafe).norm(dim=1) - (x - self.safe).norm(dim=1)


def fitted(x: torch.Tensor) -> torch.Tensor:
    """The prompts that means are taken over."""
    return x[::2]


def held_out(x: torch.Tensor) -> torch.Tensor:
    """The prompts that are scored."""
    return x[1::2]


def check_enough(groups: Mapping[str, int]) -> None:
    """Raise `InputError` where a group has too few prompts for a held-out split."""
    for name, count in groups.items():
        if count < LEAST_PROMPTS:
            raise InputError(
                f"{name}: {count} prompts; a held-out split needs at least {LEAST_PROMPTS} (half to fit, half to score)"
            )


def auroc(higher: torch.Tensor, lower: torch.Tensor) -> float:
    """How often a value of `higher` [n] is above one of `lower` [m]; equal ones count half. 0.5 is chance."""
    return float(wins(higher, lower).mean())


def cluster_separation(safe: Activations, unsafe: Activations) -> list[Row]:
    """Whether safe and unsafe prompts lie apart at each layer (Fig. 3), on prompts that the means have not seen.

    The released code scores what it fitted, on a quarter of the MLP's hidden units averaged over answer positions that are
    given the true answer. Here: what the MLP reads at the last prompt token, half the prompts to fit, half to score.

    Args:
        safe, unsafe: activations of at least 4 prompts each.

    Returns:
        A row a layer: mean `tau_safe` and `tau_unsafe`, their difference `gap`, which grows with the activations' length, and
        `gap_normalised`, by the distance of the means, so that models can be compared, with an interval; `auroc` of tau with an
        interval; the `silhouette` of the two groups; `top_singular_share` of the centred unsafe prompts, 1 where they lie on a
        line. `None` where both means are the same point.

    Raises:
        InputError: too few prompts.
    """
    rows: list[Row] = []
    for layer in sorted(safe):
        s, u = safe[layer].double(), unsafe[layer].double()
        check_enough({"safe": len(s), "unsafe": len(u)})
        clusters = Clusters.of(s, u)
        distance = float(clusters.direction.norm())
        ts, tu = clusters.tau(held_out(s)), clusters.tau(held_out(u))
        ws, wu = draw_weights(len(ts)), draw_weights(len(tu), stream=1)
        gaps = ws @ ts.numpy() - wu @ tu.numpy()
        areas = ((ws @ wins(ts, tu).numpy()) * wu).sum(axis=1)
        gap = float(ts.mean() - tu.mean())
        rows.append(
            {
                "layer": layer, "n_safe": len(ts), "n_unsafe": len(tu),
                "tau_safe": float(ts.mean()), "tau_unsafe": float(tu.mean()), "gap": gap,
                "gap_normalised": gap / distance if distance else None,
                **interval("gap_normalised", gaps / distance if distance else None),
                "auroc": auroc(ts, tu), **interval("auroc", areas),
                "silhouette": silhouette(held_out(s), held_out(u)), "top_singular_share": top_singular_share(u),
            }
        )  # fmt: skip
    return rows


def silhouette(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean silhouette of two groups of points, each [n, features] (Rousseeuw 1987): 1 far apart, 0 mixed."""
    found = []
    for mine, other in ((a, b), (b, a)):
        within = torch.cdist(mine, mine).sum(dim=1) / max(len(mine) - 1, 1)
        across = torch.cdist(mine, other).mean(dim=1)
        largest = torch.maximum(within, across)
        found.append(torch.where(largest > 0, (across - within) / largest.clamp(min=1e-300), 0))
    return float(torch.cat(found).mean())


def top_singular_share(x: torch.Tensor) -> float | None:
    """s_1^2 / sum s^2 of x [n, features], centred; `None` where all rows are the same."""
    squares = torch.linalg.svdvals(x.double() - x.double().mean(dim=0)).square()
    return float(squares[0] / squares.sum()) if squares.sum() > 0 else None


def direction_drift(before: tuple[Activations, Activations], after: tuple[Activations, Activations]) -> list[Row]:
    """How the refusal direction r (mean of unsafe minus mean of safe prompts) and the prompts along it moved. Ours.

    Args:
        before, after: activations of (safe, unsafe) prompts, the same prompts in both.

    Returns:
        A row a layer: `cosine` of r with what it was, `norm_ratio`, and `projection_safe`, `projection_unsafe`: the mean move
        of the prompts along the old r, in lengths of it. Unsafe at -1: they are where safe ones were; safe above 0:
        over-refusal.
    """
    rows: list[Row] = []
    for layer in sorted(before[0]):
        s0, u0, s, u = (x[layer].double().mean(dim=0) for x in (*before, *after))
        r0, r = u0 - s0, u - s
        length, now = float(r0.norm()), float(r.norm())
        along = lambda moved: float(moved @ r0) / length**2 if length else None  # noqa: B023, E731
        rows.append(
            {
                "layer": layer, "cosine": float(r @ r0) / (length * now) if length and now else None,
                "norm_ratio": now / length if length else None,
                "projection_safe": along(s - s0), "projection_unsafe": along(u - u0),
            }
        )  # fmt: skip
    return rows


def wins(higher: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """[n, m]: 1 where a value of `higher` [n] is above one of `lower` [m], half where equal."""
    return (higher[:, None] > lower).double() + (higher[:, None] == lower).double() / 2


def draw_weights(n: int, stream: int = 0) -> np.ndarray:
    """How much each of n prompts counts in each draw of the bootstrap, [draws, n], rows summing to 1."""
    return np.random.default_rng([5, stream]).multinomial(n, np.full(n, 1 / n), size=_DRAWS) / n


def interval(name: str, draws: np.ndarray | None) -> Row:
    """`{name}_low` and `{name}_high`, 95%, of a bootstrap's draws."""
    low, high = (None, None) if draws is None else np.quantile(draws, [0.025, 0.975]).tolist()
    return {f"{name}_low": low, f"{name}_high": high}
