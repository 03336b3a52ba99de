"""What an estimate says against what scoring then does; and that it reads no weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from hub_server import HubServer
from transformers import AutoConfig

from hf_safefilter import SafetyRiskScorer, estimate_scoring
from hf_safefilter.cli import main
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.estimate import _line
from hf_safefilter.probe import measure, shallow
from hf_safefilter.testing import tiny_model

ROWS = [{"prompt": f"Question {i}?", "completion": "word " * (1 + i % 17)} for i in range(40)]
ROWS[3]["completion"] = ""
ROWS[20]["completion"] = ""


@pytest.fixture
def deep_folder(tmp_path, tokenizer):
    """A model of fourteen blocks; returns its folder and the loaded model."""
    model = tiny_model("llama_tied", num_hidden_layers=14)
    model.save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep", model


def test_counts_are_those_of_scoring_and_no_weights_are_read(deep_folder, anchors):
    folder, model = deep_folder
    ds = Dataset.from_list(ROWS)
    scored = ds.map(SafetyRiskScorer(str(folder), anchors, "representation", max_length=60, dtype="float32"), batched=True)
    (folder / "model.safetensors").unlink()
    scorer = SafetyRiskScorer(str(folder), anchors, "representation", max_length=60, dtype="float32")
    found = estimate_scoring(ds, scorer, trial=False)
    assert (found.rows, found.sampled, found.layers) == (40, 40, 14)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == 4 * found.parameters
    assert found.tokens == sum(n or 0 for n in scored["total_tokens"])
    assert found.tokens_interval == (found.tokens,) * 2
    assert found.response_tokens == sum(n or 0 for n in scored["target_tokens"])
    reasons = [why for value, why in zip(scored["risk_representation"], scored["risk_status"], strict=True) if value is None]
    assert found.reasons == {reasons[0]: 2}
    assert found.unscorable == pytest.approx(0.05)
    assert found.disk / 2 >= scored.with_format("arrow")[:].nbytes * 0.9
    assert (found.download, found.memory, found.fit_seconds, found.remarks) == (0, None, None, ())


def test_a_sample_tells_the_tokens_within_its_interval(deep_folder, anchors):
    scorer = SafetyRiskScorer(str(deep_folder[0]), anchors, "representation")
    lengths = np.random.default_rng(0).integers(1, 30, 2000)
    ds = Dataset.from_list([{"prompt": "Count.", "completion": "word " * int(n)} for n in lengths])
    whole = estimate_scoring(ds, scorer, sample=len(ds), trial=False)
    part = estimate_scoring(ds, scorer, sample=300, trial=False)
    assert part.sampled == 300
    assert part.tokens_interval[0] <= whole.tokens <= part.tokens_interval[1]
    assert part.tokens_interval[1] - part.tokens_interval[0] < 0.2 * whole.tokens
    more = estimate_scoring(ds, scorer, sample=300, rows=20_000, trial=False)
    assert more.rows == 20_000
    assert more.tokens == pytest.approx(10 * part.tokens, rel=1e-3)


def test_a_trial_runs_without_weights(deep_folder, anchors):
    folder, _ = deep_folder
    (folder / "model.safetensors").unlink()
    scorer = SafetyRiskScorer(str(folder), anchors, "all", dtype="float32", device="cpu")
    said: list[str] = []
    found = estimate_scoring(Dataset.from_list(ROWS), scorer, say=said.append)
    assert found.remarks == ()
    assert "32 rows on 4 and 12 of 14 blocks" in found.measured
    assert said[1:] == ["timing 4 of 14 blocks with random weights", "timing 12 of 14 blocks with random weights"]
    assert 0 < found.score_seconds < 60
    assert 0 < found.fit_seconds < 60
    assert 10**8 < found.memory < 10**10
    assert found.device_memory is None


def test_the_line_through_two_depths():
    assert _line((2, 6), (10.0, 18.0), 30) == 66.0
    assert _line((2, 6), (10.0, 9.0), 30) == 9.0  # noise must not make deep models free
    assert _line((4,), (7.0,), 4) == 7.0


def test_shallow_configurations_keep_their_lists_in_step():
    config = AutoConfig.for_model("qwen3", num_hidden_layers=6, hidden_size=32, num_attention_heads=4, head_dim=8)
    config.layer_types = ["full_attention", "sliding_attention"] * 3
    cut = shallow(config, 2)
    assert cut.num_hidden_layers == 2
    assert cut.layer_types == ["full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 6
    assert len(config.layer_types) == 6


def test_what_cannot_be_measured_is_said(deep_folder, anchors, monkeypatch):
    scorer = SafetyRiskScorer(str(deep_folder[0]), anchors, "representation", device="cpu")
    monkeypatch.setattr("hf_safefilter.estimate._free", lambda device: 1000)
    found = estimate_scoring(Dataset.from_list(ROWS), scorer)
    assert found.memory is None
    assert found.tokens > 0
    assert found.remarks[0].startswith("time and memory are not known: a trial needs about")
    # The trial's own failure, in its process: a model that is gone.
    gone = SafetyRiskScorer(str(deep_folder[0]), anchors, "representation")
    (deep_folder[0] / "config.json").unlink()
    with pytest.raises(EvaluationError, match="the trial with 2 of the model's blocks failed: cannot"):
        measure(gone, "cpu", 2, {1: ROWS[:1]})
    assert replace(found, memory=5).as_dict()["memory"] == 5


def test_bad_input(deep_folder, anchors, model, tokenizer):
    folder, _ = deep_folder
    scorer = SafetyRiskScorer(str(folder), anchors, "representation")
    with pytest.raises(InputError, match="no rows"):
        estimate_scoring(Dataset.from_dict({"prompt": [], "completion": []}), scorer)
    with pytest.raises(InputError, match="none of 1 sampled rows"):
        estimate_scoring(Dataset.from_list(ROWS[3:4]), scorer)
    with pytest.raises(InputError, match="by name"):
        estimate_scoring(Dataset.from_list(ROWS), SafetyRiskScorer(model, anchors, "representation", tokenizer=tokenizer))


def test_the_download_is_what_is_not_in_the_cache(tmp_path, model, tokenizer):
    folder, data = tmp_path / "hub" / "models" / "org" / "tiny", tmp_path / "rows.jsonl"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text("\n".join(map(json.dumps, ROWS)))
    command = ["estimate", str(data), "--model", "org/tiny", "--scores", "representation", "--no-trial", "--json", "--quiet"]

    def run(endpoint: str, offline: str) -> dict:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-m", "hf_safefilter.cli", *command], env=os.environ | environment | {"HF_HUB_DISABLE_XET": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    with HubServer(tmp_path / "hub") as hub:
        found = run(hub.endpoint, "0")
        assert found["download"] == (folder / "model.safetensors").stat().st_size
        assert not found["remarks"]
        assert any("config.json" in request for request in hub.requests)
        assert not any("model.safetensors" in request for request in hub.requests)
        endpoint = hub.endpoint
    offline = run(endpoint, "1")
    assert offline["download"] is None
    assert "size of org/tiny on the Hub is not known" in offline["remarks"][0]
    assert offline["tokens"] == found["tokens"]


def test_the_command(deep_folder, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    command = ["estimate", str(data), "--model", str(deep_folder[0]), "--no-trial", "--quiet"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "40 (all read; 5.0% of these cannot be scored)" in out
    assert "no score    2: no target" in out
    assert "14 blocks" in out
    assert main([*command, "--json", "--rows", "1000", "--limit", "10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["sampled"]) == (1000, 10)
    assert main([*command, "--sample", "0"]) == 1
    assert "--sample must be at least 1" in capsys.readouterr().err


def test_the_command_with_a_trial(deep_folder, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    assert main(["estimate", str(data), "--model", str(deep_folder[0]), "--scores", "representation", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "at the peak" in out
    assert "32 rows on 4 and 12 of 14 blocks" in out
