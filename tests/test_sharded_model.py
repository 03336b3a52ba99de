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

EXAMPLE = Path(__file__).parents[1] / "examples/score_sharded.py"


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
    """The example; with a sitecustomize that notes what each process holds at its end."""
    anchors.save(tmp_path / "anchors.json")
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "sitecustomize.py").write_text(NOTES_WHAT_IS_HELD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(EXAMPLE)]
    options = ["--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--anchors", tmp_path / "anchors.json"]
    done = subprocess.run(
        [*launch, *map(str, options), "--scores", "all", "--dtype", "float32", "--out", str(tmp_path / "scored.parquet")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "NOTES": str(tmp_path)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    held = [int((tmp_path / f"held{rank}").read_text()) for rank in (0, 1)]
    assert sum(held) == sum(p.numel() for p in model.parameters())
    assert min(held) > 0.4 * sum(held)
    scorer = SafetyRiskScorer(model, anchors, scores="all", tokenizer=tokenizer)
    assert_same(Dataset.from_parquet(str(tmp_path / "scored.parquet")), rows.map(scorer, batched=True, batch_size=7))


NOTES_WHAT_IS_HELD = """
import os
if "RANK" in os.environ:
    import hf_safefilter.engine.passes as passes
    init = passes.Engine.__init__
    def noted(self, model, *args, **options):
        held = sum(p.to_local().numel() for p in model.parameters())
        with open(os.path.join(os.environ["NOTES"], "held" + os.environ["RANK"]), "w") as file:
            file.write(str(held))
        init(self, model, *args, **options)
    passes.Engine.__init__ = noted
"""


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
