"""Models whose weights are spread over processes (FSDP2) or devices (`device_map`) give the scores of the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import cpu_offload
from datasets import Dataset

from hf_safefilter import SafetyRiskScorer
from hf_safefilter.errors import InputError
from hf_safefilter.testing import tiny_model

SCRIPT = Path(__file__).parent / "score_in_two_processes.py"


@pytest.fixture
def rows(tmp_path) -> Dataset:
    rows = [{"prompt": f"Question {i}?", "completion": "word " * (1 + 7 * i % 23)} for i in range(20)]
    rows[3]["completion"] = ""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Dataset.from_list(rows)


def assert_same(scored: Dataset, plain: Dataset) -> None:
    assert scored.column_names == plain.column_names
    assert scored["risk_status"][:] == plain["risk_status"][:]
    for name in [n for n, kind in plain.features.items() if kind.dtype == "float32"]:
        ours, theirs = (np.array([np.nan if v is None else v for v in ds[name]]) for ds in (scored, plain))
        assert np.isfinite(theirs).sum() == len(plain) - 1
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_a_model_sharded_over_two_processes(kind, tmp_path, rows, tokenizer, anchors):
    anchors.save(tmp_path / "anchors.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path), kind], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    model = tiny_model(kind)
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(s["held"] for s in said) == sum(p.numel() for p in model.parameters())
    scorer = SafetyRiskScorer(model, anchors, scores="all", tokenizer=tokenizer)
    assert {s["fingerprint"] for s in said} == {said[0]["fingerprint"]}
    plain = rows.map(scorer, batched=True, batch_size=7)
    for rank in (0, 1):
        assert_same(Dataset.from_parquet(str(tmp_path / f"rank{rank}.parquet")), plain)


def test_a_model_spread_over_devices(model_folder, rows, anchors):
    """With a CPU alone all layers are on it, but through accelerate's hooks."""
    plain, spread = (
        rows.map(SafetyRiskScorer(str(model_folder), anchors, scores="all", dtype="float32", device=device), batched=True)
        for device in ("cpu", "auto")
    )
    assert_same(spread, plain)


def test_offloaded_weights_are_refused(model, tokenizer, rows, anchors):
    offloaded = cpu_offload(tiny_model())
    with pytest.raises(InputError, match="weights are offloaded .'lm_head.weight' among them.*FSDP2"):
        SafetyRiskScorer(offloaded, anchors, tokenizer=tokenizer)(rows[:2])
