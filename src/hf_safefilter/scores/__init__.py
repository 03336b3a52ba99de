"""One published score a file; `base` has the contract and `registry` the names."""

from .base import Score
from .gradient import GradientScore
from .registry import SCORES, resolve_scores
from .representation import RepresentationScore

__all__ = ["SCORES", "GradientScore", "RepresentationScore", "Score", "resolve_scores"]
