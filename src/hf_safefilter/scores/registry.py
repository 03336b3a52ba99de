"""Scores by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError
from .base import Score
from .baselines import BaselineScore
from .compliance import ComplianceScore
from .gradient import GradientScore
from .gradient_modulewise import GradientModulewiseScore
from .larf import LarfScore
from .margin_step import MarginStepScore
from .refusal_direction import RefusalDirectionScore
from .representation import RepresentationScore
from .self_influence import SelfInfluenceScore
from .subspace import SubspaceScore

SCORES: dict[str, type[Score]] = {
    cls.name: cls
    for cls in (
        BaselineScore,
        ComplianceScore,
        GradientScore,
        GradientModulewiseScore,
        LarfScore,
        MarginStepScore,
        RefusalDirectionScore,
        RepresentationScore,
        SelfInfluenceScore,
        SubspaceScore,
    )
}


def resolve_scores(scores: str | Score | Iterable[str | Score]) -> tuple[Score, ...]:
    """Scores from names, from `"all"`, or from configured instances such as `RepresentationScore(top_n=5)`.

    Raises:
        InputError: an unknown name, a score given twice, or none.
    """
    if isinstance(scores, str | Score):
        scores = list(SCORES) if scores == "all" else [scores]
    chosen: dict[str, Score] = {}
    for item in scores:
        if isinstance(item, str) and item not in SCORES:
            raise InputError(f"unknown score {item!r}; the scores are {', '.join(sorted(SCORES))}, or 'all'")
        score = SCORES[item]() if isinstance(item, str) else item
        if not isinstance(score, Score):
            raise InputError(f"scores must be names or Score objects, got {score!r}")
        if score.name in chosen:
            raise InputError(f"the score {score.name!r} is given twice")
        chosen[score.name] = score
    if not chosen:
        raise InputError(f"no score chosen; the scores are {', '.join(sorted(SCORES))}, or 'all'")
    return tuple(chosen[name] for name in sorted(chosen))


def score_of(key: Mapping[str, Any]) -> Score:
    """The score that `Score.key` describes.

    Raises:
        InputError: this version of the package has no such score, or another version of it.
    """
    kind = SCORES.get(key["name"])
    if kind is None or kind.version != key["version"]:
        raise InputError(f"version {key['version']} of the score {key['name']!r} is not in this version of hf_safefilter")
    return kind(**{name: value for name, value in key.items() if name not in ("name", "version")})
