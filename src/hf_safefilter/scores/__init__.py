"""One published score a file; `base` has the contract and `registry` the names."""

from .base import Score
from .baselines import BaselineScore
from .compliance import ComplianceScore
from .gradient import GradientScore
from .gradient_modulewise import GradientModulewiseScore
from .larf import LarfScore
from .margin_step import MarginStepScore
from .refusal_direction import RefusalDirectionScore
from .registry import SCORES, resolve_scores
from .representation import RepresentationScore
from .self_influence import SelfInfluenceScore
from .subspace import SubspaceScore

__all__ = [
    "SCORES",
    "BaselineScore",
    "ComplianceScore",
    "GradientModulewiseScore",
    "GradientScore",
    "LarfScore",
    "MarginStepScore",
    "RefusalDirectionScore",
    "RepresentationScore",
    "Score",
    "SelfInfluenceScore",
    "SubspaceScore",
    "resolve_scores",
]
