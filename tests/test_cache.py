"""The cache of `datasets.map`: a second run in a new process does no forward pass; whatever changes the scores does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hf_safefilter import AnchorSet
from hf_safefilter.testing import tiny_model

SCRIPT = Path(__file__).parent / "map_in_a_process.py"


def run(folder: Path, **options) -> dict:
    """Map in a new process; how many forward passes it did, and the scores."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path, model_folder, anchors, rows) -> Path:
    anchors.save(tmp_path / "anchors.json")
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    return tmp_path


def test_a_new_process_finds_the_scores_and_any_change_makes_new_ones(folder):
    first = run(folder)
    assert first["forwards"] > 0
    assert first["cache_files"] > 0
    again = run(folder)
    assert again["forwards"] == 0
    assert again["risk_gradient"] == first["risk_gradient"]
    # Progress and processes are no part of the key; options, versions, anchors and weights are.
    assert run(folder, num_proc=2)["forwards"] == 0
    assert run(folder, max_length=400)["forwards"] > 0
    assert run(folder, score_version=99)["forwards"] > 0
    AnchorSet.load().subset(["hate"]).save(folder / "anchors.json")
    assert run(folder)["forwards"] > 0
    assert run(folder)["forwards"] == 0
    tiny_model(seed=5).save_pretrained(folder / "model")  # another revision of the same folder
    changed = run(folder)
    assert changed["forwards"] > 0
    assert changed["risk_gradient"] != first["risk_gradient"]
