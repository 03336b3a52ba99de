"""Ray Data with two actors against a plain map."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no network
import ray
from datasets import Dataset

from hf_safefilter import SafetyRiskScorer
from hf_safefilter.errors import InputError
from hf_safefilter.ray_data import score_with_ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    yield
    ray.shutdown()


def test_two_actors_give_what_a_map_gives(model_folder, anchors):
    rows = [{"prompt": f"Question {i}?", "completion": "word " * (i % 19)} for i in range(150)]
    scorer = SafetyRiskScorer(str(model_folder), anchors, dtype="float32")
    ds = Dataset.from_list(rows)
    plain = ds.map(scorer, batched=True)
    scored = score_with_ray(
        ray.data.from_huggingface(ds).repartition(6), scorer, concurrency=2, num_cpus=0.5, batch_size=16
    ).take_all()
    assert [r["prompt"] for r in scored] == [r["prompt"] for r in rows]
    assert set(scored[0]) == set(plain.column_names)
    assert [r["risk_status"] for r in scored] == plain["risk_status"][:]
    for name in ("risk_gradient", "risk_gradient_balanced", "risk_representation"):
        ours, theirs = (
            np.array([np.nan if v is None else v for v in vs]) for vs in ([r[name] for r in scored], plain[name][:])
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert sum(r["risk_gradient"] is None or np.isnan(r["risk_gradient"]) for r in scored) == 8


def test_actors_that_take_every_cpu_are_warned_of(model_folder, anchors, caplog):
    ds = ray.data.from_huggingface(Dataset.from_list([{"prompt": "a", "completion": "b"}]))
    score_with_ray(ds, SafetyRiskScorer(str(model_folder), anchors), concurrency=2)
    assert "2 actors of 1 CPUs take all 2 CPUs" in caplog.text


def test_what_cannot_be_scored_so(model, tokenizer, anchors, model_folder):
    ds = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match=r"takes a ray.data.Dataset, got Dataset; use ray.data.from_huggingface"):
        score_with_ray(ds, SafetyRiskScorer(str(model_folder), anchors))
    with pytest.raises(InputError, match="name the model"):
        score_with_ray(ray.data.from_huggingface(ds), SafetyRiskScorer(model, anchors, tokenizer=tokenizer))
