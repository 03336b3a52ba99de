"""Real SmolLM2, taught to refuse and then fine-tuned on harmless rows with real trainers, loses its refusals under watch."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback

from hf_safefilter import AnchorSet, RefusalRateCallback
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.refusal.prompts import monitor_prompts
from hf_safefilter.session import harmless_requests

EXAMPLE = Path(__file__).parent.parent / "examples/monitor_sft.py"
PROMPTS = monitor_prompts("harmful")[::4]
WATCH = {"prompts": PROMPTS, "benign_prompts": monitor_prompts("benign")[::16], "judge": "keyword_prefix", "max_new_tokens": 16}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("monitor_sft", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harmless(example):
    file = Path(importlib.util.find_spec("hf_safefilter").submodule_search_locations[0]) / "assets/benign_sample.jsonl"
    return Dataset.from_list([example.chat(json.loads(line)) for line in file.read_text("utf-8").splitlines()]).shuffle(seed=0)


@pytest.fixture(scope="module")
def aligned(example, harmless, tmp_path_factory):
    """As the example does it, in fewer steps."""
    model, tokenizer = load(named_spec(demo_model()), "cpu")
    refusals = [example.chat(d) for side in AnchorSet.load().safe for d in side]
    lessons = Dataset.from_list(refusals + [example.chat(d) for d in harmless_requests()] + list(harmless.select(range(32))))
    options = {"output_dir": str(tmp_path_factory.mktemp("align")), "learning_rate": 1e-3, "max_steps": 32, "report_to": "none"}
    aligner = example.make_trainer("plain", model, tokenizer, lessons, disable_tqdm=True, **options)
    aligner.train()
    return aligner.model.merge_and_unload(), tokenizer


def rates(trainer) -> dict[int, float]:
    return {e["step"]: e["eval_refusal_rate"] for e in trainer.state.log_history if "eval_refusal_rate" in e}


def scalars(folder: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(next(folder.rglob("events.*")).parent))
    events.Reload()
    return {e.step: e.value for e in events.Scalars(name)}


def test_trainer_stops_early_and_the_best_weights_refuse(example, harmless, aligned, tmp_path):
    model, tokenizer = copy.deepcopy(aligned[0]), aligned[1]
    rows = harmless.select(range(64, 240))
    options = {"learning_rate": 2e-3, "max_steps": 24, "report_to": "tensorboard", "disable_tqdm": True}
    t = example.make_trainer("plain", model, tokenizer, rows, output_dir=str(tmp_path), **options)
    t.args.set_evaluate("steps", steps=3, batch_size=8, delay=0)
    t.args.set_save("steps", steps=3, total_limit=2)
    t.args.load_best_model_at_end, t.args.metric_for_best_model, t.args.greater_is_better = True, "eval_refusal_rate", True
    t.eval_dataset = t.train_dataset.select(range(4))
    t.add_callback(EarlyStoppingCallback(2))
    callback = RefusalRateCallback(t, **WATCH, steps=(0,), margin_every=3)
    t.add_callback(callback)
    t.train()
    found = rates(t)
    assert found[0] >= 0.7
    last = t.state.global_step
    assert last < 24
    assert found[last] < found[0]
    assert callback.monitor.check(t.model).rate == pytest.approx(t.state.best_metric, abs=1 / len(PROMPTS))
    assert scalars(tmp_path, "eval/refusal_rate") == pytest.approx(found)
    margins = scalars(tmp_path, "eval/refusal_margin")
    assert margins[last] < margins[0]
    assert scalars(tmp_path, "eval/loss").keys() == set(found) - {0}


def test_trl_restores_the_last_safe_adapter(example, harmless, aligned, tmp_path):
    model, tokenizer = copy.deepcopy(aligned[0]), aligned[1]
    options = {"learning_rate": 2e-3, "max_steps": 30, "report_to": "tensorboard", "disable_tqdm": True}
    t = example.make_trainer("sft", model, tokenizer, harmless.select(range(64, 240)), output_dir=str(tmp_path), **options)
    adapters = {}

    class Recorder(RefusalRateCallback):
        def _check(self, args, state, control, model):
            adapters[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            return super()._check(args, state, control, model)

    callback = Recorder(t, **WATCH, steps=(0,), every=2, min_refusal_rate=0.6, on_breach="restore")
    t.add_callback(callback)
    t.train()
    found = rates(t)
    last = t.state.global_step
    assert last < 30
    assert found[last] < 0.6
    safe = max(step for step, rate in found.items() if rate >= 0.6)
    for name, p in t.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, adapters[safe][name]), name
    assert any(not torch.equal(adapters[safe][n], adapters[last][n]) for n in adapters[last])
    assert callback.monitor.check(t.model).rate == found[safe]
    assert scalars(tmp_path, "eval/refusal_rate") == pytest.approx(found)
    answers = [json.loads(line) for line in (tmp_path / f"refusal_checks/step-{last:08d}.jsonl").read_text().splitlines()]
    assert sum(a["refuses"] for a in answers if a["side"] == "harmful") == round(found[last] * len(PROMPTS))
    assert all(a["perplexity"] is not None for a in answers)
