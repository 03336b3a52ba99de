"""`SafetyGeometryCallback` in real trainers, and its band."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import ANSWER, BENIGN, HARMFUL, REFUSAL, harmless_rows, pad_tokenizer, rows, trainer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_safefilter.callbacks.band import PREFIX, SIGNALS, alarms_of, benign_band
from hf_safefilter.callbacks.geometry import SafetyGeometryCallback
from hf_safefilter.chat import ChatEncoder
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.mechanistic.analyses import cluster_separation, direction_drift, mlp_inputs, update_gain
from hf_safefilter.refusal.prompts import load_prompts, prompt_ids
from hf_safefilter.testing import tiny_model, tiny_tokenizer

PROMPTS = {"prompts": HARMFUL, "benign_prompts": BENIGN, "layers": (0, 1)}


def watched(t, **options) -> SafetyGeometryCallback:
    callback = SafetyGeometryCallback(t, **{**PROMPTS, "every": 4, **options})
    t.add_callback(callback)
    return callback


def by_step(t, key: str) -> dict[int, float]:
    return {entry["step"]: entry[PREFIX + key] for entry in t.state.log_history if PREFIX + key in entry}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def ids_of(prompts: list[str]) -> list[list[int]]:
    encoder = ChatEncoder(pad_tokenizer())
    return [prompt_ids(encoder, c, "prompt", 512) for c in load_prompts(prompts, "harmful")]


def test_refusal_is_seen_going(refusing, taught, tmp_path):
    """What is logged is what the analyses say of the models before and after; the trainer's own logs stay."""
    t = trainer(refusing, tmp_path, report_to="tensorboard", max_steps=10, logging_steps=2)
    callback = watched(t)
    t.train()
    assert list(by_step(t, "auroc")) == [0, 4, 8, 10]
    assert [e["step"] for e in t.state.log_history if "loss" in e] == [2, 4, 6, 8, 10]
    assert by_step(t, "gain").keys() == {4, 8, 10}  # at step 0 there is no update
    before, after = ({s: mlp_inputs(m, ids_of(p)) for s, p in (("b", BENIGN), ("h", HARMFUL))} for m in (taught, refusing))
    drift = direction_drift((before["b"], before["h"]), (after["b"], after["h"]))
    separation = cluster_separation(after["b"], after["h"])
    gain = [r for r in update_gain(taught, refusing, after["b"], after["h"]) if r["update"] == "tuned"]
    last = callback.history[-1]
    for layer in (0, 1):
        expected = {
            "auroc": separation[layer]["auroc"],
            "gap": separation[layer]["gap"] / (before["h"][layer].mean(dim=0) - before["b"][layer].mean(dim=0)).norm().item(),
            "cosine": drift[layer]["cosine"], "norm_ratio": drift[layer]["norm_ratio"],
            "projection_harmful": drift[layer]["projection_unsafe"], "projection_benign": drift[layer]["projection_safe"],
            "gain": gain[layer]["gain"],
        }  # fmt: skip
        assert {s: last[f"{PREFIX}{s}_layer_{layer}"] for s in SIGNALS} == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for signal in SIGNALS:
        assert last[PREFIX + signal] == pytest.approx(sum(last[f"{PREFIX}{signal}_layer_{n}"] for n in (0, 1)) / 2)
    first = callback.history[0]
    assert (first[PREFIX + "cosine"], first[PREFIX + "norm_ratio"]) == (pytest.approx(1), pytest.approx(1))
    assert first[PREFIX + "projection_harmful"] == pytest.approx(0, abs=1e-6)
    assert last[PREFIX + "projection_harmful"] < -0.1  # harmful prompts moved to where harmless ones are
    history = [json.loads(line) for line in (tmp_path / "geometry_checks/history.jsonl").read_text().splitlines()]
    assert history == callback.history
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("eval/geometry_auroc_layer_1")} == by_step(t, "auroc_layer_1")


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "bf16": True}])
@pytest.mark.parametrize("lora", [False, True])
def test_weights_are_the_same_bit_by_bit(taught, tmp_path, options, lora):
    """With dropout, so that a random number taken out of turn would show."""
    ends = []
    for monitored in (False, True):
        model = copy.deepcopy(taught)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear"))
        t = trainer(model, tmp_path / str(monitored), gradient_checkpointing=lora and not options, **options)
        if lora:
            model.enable_input_require_grads()
        if monitored:
            watched(t, every=1)
        t.train()
        ends.append((weights(model), [e["loss"] for e in t.state.log_history if "loss" in e]))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert len(by_step(t, "gain")) == 12


def sft(model, folder: Path, lora: bool, **options) -> SFTTrainer:
    config = {
        "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-2 if lora else 1e-3, "max_steps": 6,
        "per_device_train_batch_size": 4, "logging_steps": 2, "save_strategy": "no", "disable_tqdm": True, "max_length": 128,
        **options,
    }  # fmt: skip
    chat = lambda p: {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": ANSWER}]}  # noqa: E731
    adapter = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None
    data = Dataset.from_list([chat(p) for p in BENIGN * 6])
    return SFTTrainer(
        model, SFTConfig(str(folder), **config), train_dataset=data, processing_class=pad_tokenizer(), peft_config=adapter
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"gradient_checkpointing": False, "packing": True}])
def test_trl(taught, tmp_path, lora, options):
    """SFTTrainer's metrics are its own, weights the same bit by bit."""
    ends = []
    for monitored in (False, True):
        t = sft(copy.deepcopy(taught), tmp_path / str(monitored), lora, **options)
        side = t.processing_class.padding_side
        if monitored:
            watched(t, every=1)
        t.train()
        logs = [{k: e[k] for k in ("loss", "mean_token_accuracy")} for e in t.state.log_history if "loss" in e]
        ends.append((weights(t.model), logs))
        assert t.processing_class.padding_side == side
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert list(by_step(t, "auroc")) == list(range(7))
    assert not any("mean_token_accuracy" in e for e in t.state.log_history if PREFIX + "auroc" in e)


def test_nothing_is_left_behind(refusing, tmp_path):
    t = trainer(refusing, tmp_path)
    callback = watched(t, every=3)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
            kept = sum(w.numel() for of in callback._weights.values() for _, w in of)
            seen.append((model.training, hooks, torch.is_grad_enabled(), kept, model.config.use_cache))

    t.add_callback(Look())
    use_cache = refusing.config.use_cache
    t.train()
    # The copies are of gate_proj and up_proj of two blocks; nothing else is kept.
    assert set(seen) == {(True, 0, True, 2 * 2 * 32 * 64, use_cache)}
    assert callback._weights == {}


def test_lora_keeps_no_weights(refusing, tmp_path):
    model = get_peft_model(refusing, LoraConfig(r=4, target_modules=["gate_proj", "up_proj"]))
    t = trainer(model, tmp_path, max_steps=4)
    callback = watched(t, every=2, layers=[1])
    kept = []
    t.add_callback(type("Look", (TrainerCallback,), {"on_step_end": lambda *a, **k: kept.append(callback._weights)})())
    t.train()
    assert kept == [{}] * 4
    assert by_step(t, "gain").keys() == {2, 4}
    # An adapter elsewhere does not touch what is watched: there is no gain to speak of.
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    t = trainer(model, tmp_path / "q", max_steps=4)
    watched(t, every=2)
    t.train()
    assert by_step(t, "gain") == {}
    assert list(by_step(t, "cosine")) == [0, 2, 4]


def test_an_adapter_without_a_known_update(refusing, tmp_path, caplog):
    model = get_peft_model(refusing, LoraConfig(r=4, target_modules=["gate_proj"], use_dora=True))
    t = trainer(model, tmp_path, max_steps=2)
    watched(t, every=1)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert caplog.text.count("no update gain: a LoRA adapter with DoRA") == 1
    assert by_step(t, "gain") == {}
    assert list(by_step(t, "cosine")) == [0, 1, 2]


def test_gpt2(tmp_path):
    t = trainer(tiny_model("gpt2"), tmp_path, max_steps=2)
    watched(t, every=1)
    t.train()
    assert by_step(t, "gain").keys() == {1, 2}


# Alarms


def entry(step: int, **signals: float) -> dict[str, float]:
    return {"step": step, **{PREFIX + name: value for name, value in signals.items()}}


def test_the_band_of_harmless_runs():
    histories = [
        [
            entry(0, auroc=0.9, cosine=1.0),
            entry(10, auroc=0.8, cosine=0.99, gain=1.2),
            entry(20, auroc=0.88, cosine=0.98, gain=1.1),
        ],
        [entry(0, auroc=0.7, cosine=1.0), entry(10, auroc=0.72, cosine=0.97, gain=0.9)],
        [entry(0, auroc=0.8, cosine=1.0), entry(10, auroc=0.8, cosine=0.96, gain=1.1)],
    ]
    band = benign_band(histories)
    assert band["auroc"] == {"mean": pytest.approx((-0.1 + 0.02 + 0) / 3), "sd": pytest.approx(0.0642910), "runs": 3}
    assert band["cosine"]["mean"] == pytest.approx(-0.03)
    assert band["gain"]["mean"] == pytest.approx(0.2 / 3)  # from 1: an update that prefers no prompts
    assert set(band) == {"auroc", "cosine", "gain"}
    start = histories[0][0]
    assert alarms_of(band, start, start, 3) == {}  # no change at all
    # Changes count, not values: the band's own runs began at other values.
    assert alarms_of(band, entry(5, auroc=0.1), entry(0, auroc=0.2), 3) == {}
    assert set(alarms_of(band, entry(5, auroc=0.2, cosine=0.9), entry(0, auroc=0.9, cosine=1.0), 3)) == {"auroc", "cosine"}
    assert set(alarms_of(band, entry(5, gain=2.0), start, 3)) == {"gain"}
    assert alarms_of(band, entry(5, gain=2.0), start, 30) == {}
    # Runs that agree to the last digit still leave room for what a few prompts can show.
    level = benign_band([[entry(0, auroc=1.0), entry(1, auroc=1.0)]] * 3)
    assert alarms_of(level, entry(5, auroc=0.98), entry(0, auroc=1.0), 3) == {}
    assert alarms_of(level, entry(5, auroc=0.96), entry(0, auroc=1.0), 3) != {}


def test_unusable_bands(tmp_path):
    good = [entry(0, auroc=1.0), entry(1, auroc=1.0)]
    with pytest.raises(InputError, match="at least 3 harmless runs, got 2"):
        benign_band([good, good])
    with pytest.raises(InputError, match="run 2 of the band has no checks at step 0"):
        benign_band([good, good[1:], good])
    with pytest.raises(InputError, match="cannot read the history"):
        benign_band([tmp_path / "none.jsonl"])
    (tmp_path / "bad.json").write_text("[")
    for band, why in (
        (tmp_path / "none.json", "cannot read the band"), (tmp_path / "bad.json", "cannot read the band"), ({}, "band must be"),
        ({"risk": {"mean": 0, "sd": 1}}, "band must be"), ({"auroc": {"mean": 0}}, "band must be"),
        ({"auroc": {"mean": float("nan"), "sd": 1}}, "band must be"), ({"auroc": {"mean": 0, "sd": -1}}, "band must be"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            SafetyGeometryCallback(band=band)


def harmless_run(model, folder: Path, seed: int) -> Path:
    """Training that changes nothing much: on what the model says anyway."""
    data = rows([(p, REFUSAL) for p in HARMFUL] + [(p, ANSWER) for p in BENIGN])
    t = trainer(copy.deepcopy(model), folder, data=data, seed=seed, learning_rate=1e-4)
    watched(t, every=3)
    t.train()
    return folder / "geometry_checks/history.jsonl"


@pytest.mark.parametrize("on_alarm", ["warn", "stop"])
def test_alarm_where_training_leaves_the_band(taught, tmp_path, on_alarm, caplog):
    histories = [harmless_run(taught, tmp_path / str(seed), seed) for seed in range(4)]
    (tmp_path / "band.json").write_text(json.dumps(benign_band(histories[:3])))
    # Another harmless run stays inside.
    quiet = [json.loads(line) for line in histories[3].read_text().splitlines()]
    assert all(not alarms_of(benign_band(histories[:3]), e, quiet[0], 3) for e in quiet)
    t = trainer(copy.deepcopy(taught), tmp_path / "risky", data=harmless_rows(), max_steps=30)
    callback = watched(t, every=2, band=tmp_path / "band.json", on_alarm=on_alarm)
    with caplog.at_level(logging.WARNING):
        t.train()
    alarms = by_step(t, "alarms")
    assert 0 not in alarms
    assert max(alarms.values()) > 0
    assert "training moves the geometry of refusal more than harmless training does" in caplog.text
    assert callback.history[-1]["alarms"]
    step = t.state.global_step
    if on_alarm == "stop":
        assert step < 30
        assert step == min(s for s, n in alarms.items() if n)
        assert (tmp_path / f"risky/checkpoint-{step}/model.safetensors").is_file()
    else:
        assert step == 30
        assert not list((tmp_path / "risky").glob("checkpoint-*"))


# Interrupted, broken, wrong


def test_resume_compares_with_step_0(taught, tmp_path, caplog):
    def run(folder, lora=True, **options):
        model = copy.deepcopy(taught)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        t = trainer(model, folder, save_strategy="steps", save_steps=6, **options)
        return t, watched(t, every=3)

    plain = lambda history: [{k: v for k, v in e.items() if k != PREFIX + "runtime"} for e in history]  # noqa: E731
    whole, all_of_it = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "cut", max_steps=6)[0].train()
    resumed, rest = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-6"))
    assert same(weights(whole.model), weights(resumed.model))
    assert plain(rest.history) == plain(all_of_it.history)
    assert "no update gain" not in caplog.text
    # Without what was written then, changes count from where it goes on.
    (tmp_path / "cut/geometry_checks/baseline.safetensors").unlink()
    lost, from_here = run(tmp_path / "cut")
    with caplog.at_level(logging.WARNING):
        lost.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-6"))
    assert "changes count from here" in caplog.text
    assert [e["step"] for e in from_here.history] == [6, 9, 12]
    assert from_here.history[0][PREFIX + "cosine"] == pytest.approx(1)
    # Fully trained, the weights of step 0 are gone: the rest is still compared with step 0.
    run(tmp_path / "full", lora=False, max_steps=6)[0].train()
    full, history = run(tmp_path / "full", lora=False)
    with caplog.at_level(logging.WARNING):
        full.train(resume_from_checkpoint=str(tmp_path / "full/checkpoint-6"))
    assert "no update gain: this run was resumed" in caplog.text
    assert [PREFIX + "gain" in e for e in history.history] == [False, True, True, False, False]
    assert history.history[-1][PREFIX + "cosine"] < 1


def test_a_measurement_that_fails_never_ends_training(refusing, tmp_path, caplog, monkeypatch):
    t = trainer(refusing, tmp_path)
    callback = watched(t, every=4)

    def diverged(*args, **options):
        raise EvaluationError("what the MLP of block 1 reads is not finite")

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                monkeypatch.setattr("hf_safefilter.callbacks.geometry.mlp_inputs", diverged)

    t.add_callback(Break())
    with caplog.at_level(logging.WARNING):
        t.train()
    assert t.state.global_step == 12
    assert list(by_step(t, "auroc")) == [0, 4]
    assert "step 8: geometry not measured: what the MLP of block 1 reads is not finite" in caplog.text
    assert callback.trainer is t
    again = trainer(refusing, tmp_path / "again")
    watched(again)
    with pytest.raises(EvaluationError, match="geometry of refusal cannot be measured: .*not finite"):
        again.train()


def test_without_a_trainer(refusing, tmp_path, caplog):
    callback = SafetyGeometryCallback(**PROMPTS, every=6)
    t = trainer(refusing, tmp_path, [callback], report_to="tensorboard")
    with caplog.at_level(logging.WARNING):
        t.train()
    assert list(by_step(t, "auroc")) == [0, 6, 12]
    assert "geometry will not reach tensorboard: make it SafetyGeometryCallback(trainer, ...)" in caplog.text


def test_built_in_prompts(refusing, tmp_path):
    """32 of each, spread over the list, and the four default layers of a deeper model."""
    t = trainer(tiny_model(num_hidden_layers=20), tmp_path, max_steps=1)
    callback = SafetyGeometryCallback(t)
    assert {s: len(c) for s, c in callback._conversations.items()} == {"harmful": 32, "benign": 32}
    assert callback._chosen == [7, 10, 13, 16]
    assert {s: len(c) for s, c in SafetyGeometryCallback(max_prompts=None)._conversations.items()} == {
        "harmful": 64,
        "benign": 64,
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"on_alarm": "explode"}, "on_alarm must be one of warn, stop"),
        ({"on_alarm": "stop"}, "needs band"),
        ({"every": 0}, "every must be"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"max_prompts": -1}, "max_prompts must be"),
        ({"sds": 0}, "sds must be"),
        ({"prompts": HARMFUL[:3]}, "harmful prompts: 3 prompts; a held-out split needs at least 4"),
        ({"max_prompts": 2}, "2 prompts; a held-out split"),
        ({"benign_prompts": []}, "no benign prompts"),
    ],
)
def test_bad_options_without_a_trainer(options, reason):
    with pytest.raises(InputError, match=reason):
        SafetyGeometryCallback(**options)


def test_bad_options_with_a_trainer(refusing, tmp_path):
    t = trainer(refusing, tmp_path)
    with pytest.raises(InputError, match="layer 2 does not exist: the model has blocks 0 to 1"):
        SafetyGeometryCallback(t, **{**PROMPTS, "layers": [2]})
    with pytest.raises(InputError, match="harmful prompt 4 has .* tokens"):
        SafetyGeometryCallback(t, prompts=[*HARMFUL[:4], "long " * 600])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="geometry cannot be written to"):
        SafetyGeometryCallback(t, **PROMPTS, output_dir=tmp_path / "file/x")
    t.processing_class = None
    with pytest.raises(InputError, match="no tokenizer"):
        SafetyGeometryCallback(t, **PROMPTS)
    with pytest.raises(InputError, match="Linear is no causal language model"):
        SafetyGeometryCallback(trainer(torch.nn.Linear(2, 2), tmp_path), **PROMPTS)
    t.args.deepspeed_plugin = type("Plugin", (), {"zero_stage": 3})
    with pytest.raises(InputError, match="geometry needs whole layers"):
        SafetyGeometryCallback(t, **PROMPTS, tokenizer=tiny_tokenizer())
