"""Find the harmless-looking fine-tuning rows that would make an aligned chat model stop refusing.

Nothing heavy is imported here: each public name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .anchors import AnchorSet
    from .callbacks.geometry import SafetyGeometryCallback
    from .callbacks.refusal_rate import RefusalRateCallback
    from .estimate import estimate_scoring
    from .hub import push_scored_to_hub
    from .ray_data import score_with_ray
    from .refusal.metric import refusal_rate
    from .report.page import scored_report
    from .scorer import SafetyRiskScorer
    from .select import filter_risky, select_risky

__all__ = [
    "AnchorSet",
    "RefusalRateCallback",
    "SafetyGeometryCallback",
    "SafetyRiskScorer",
    "__version__",
    "estimate_scoring",
    "filter_risky",
    "push_scored_to_hub",
    "refusal_rate",
    "score_with_ray",
    "scored_report",
    "select_risky",
]

_MODULE_OF = {
    "AnchorSet": "anchors",
    "RefusalRateCallback": "callbacks.refusal_rate",
    "SafetyGeometryCallback": "callbacks.geometry",
    "SafetyRiskScorer": "scorer",
    "estimate_scoring": "estimate",
    "filter_risky": "select",
    "push_scored_to_hub": "hub",
    "refusal_rate": "refusal.metric",
    "score_with_ray": "ray_data",
    "scored_report": "report.page",
    "select_risky": "select",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext hf_safefilter`: scored datasets are shown as tables in a notebook."""
    import_module(".notebook", __name__).load_ipython_extension(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """`%unload_ext hf_safefilter`."""
    import_module(".notebook", __name__).unload_ipython_extension(ipython)
