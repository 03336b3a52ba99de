"""Scoring with Ray Data: actors on a cluster that each load the model once (extra `ray`).

Ray schedules, retries and moves the rows; the scores are those of the same scorer, made by the same calls.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .errors import InputError

if TYPE_CHECKING:
    from .scorer import SafetyRiskScorer


logger = logging.getLogger(__name__)


class _Actor:
    """One worker: its model and fitted anchors live as long as it does."""

    def __init__(self, scorer: SafetyRiskScorer, threads: int | None) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.scorer = scorer.prepare()

    def __call__(self, rows: pa.Table) -> pa.Table:
        table: pa.Table = self.scorer(rows)
        return table


def score_with_ray(
    ray_dataset: Any,
    scorer: SafetyRiskScorer,
    *,
    concurrency: int = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    batch_size: int = 64,
) -> Any:
    """Score a Ray dataset; lazily, as Ray does.

    Args:
        ray_dataset: rows in any layout that the scorer reads.
        scorer: of a named model (Hub id, or a folder that every node sees). A `reference=` spares each actor the fitting.
        concurrency: actors, each with a model.
        num_gpus: GPUs of an actor; 0 for CPUs.
        num_cpus: CPUs, and threads, of an actor. Reading and moving rows needs CPUs, too: actors that take all of them wait for
            rows for ever, so there is a warning then.
        batch_size: rows in a call.

    Returns:
        A Ray dataset with the scorer's columns added. Its rows are in their order where
        `ray.data.DataContext.get_current().execution_options.preserve_order` is set; else take a column of your own along.

    Raises:
        InputError: no Ray dataset, Ray is not installed, or a model that was given loaded, which actors cannot get at.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy, Dataset
    except ImportError:
        raise InputError("scoring with Ray needs it: pip install 'hf_safefilter[ray]'") from None
    if not isinstance(ray_dataset, Dataset):
        raise InputError(
            f"score_with_ray takes a ray.data.Dataset, got {type(ray_dataset).__name__}; use ray.data.from_huggingface"
        )
    if "loaded" in (scorer.spec.model.kind, scorer.spec.tokenizer.kind):
        raise InputError("actors load the model themselves: name the model and the tokenizer (Hub id or folder)")
    available = ray.cluster_resources().get("CPU", 0) if ray.is_initialized() else None
    if available is not None and concurrency * num_cpus >= available:
        logger.warning(
            "%d actors of %g CPUs take all %g CPUs; leave some to Ray for reading and moving rows, or it may wait for ever",
            concurrency, num_cpus, available,
        )  # fmt: skip
    return ray_dataset.map_batches(
        _Actor,
        fn_constructor_args=(scorer, None if num_gpus else max(1, int(num_cpus))),
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=concurrency),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
    )
