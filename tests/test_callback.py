"""`RefusalRateCallback` in real trainers, on a tiny model that refuses at first and really loses it."""

from __future__ import annotations

import copy
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import ANSWER, BENIGN, HARMFUL, MONITOR, REFUSAL, pad_tokenizer, rows, trainer
from transformers import EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer

from hf_safefilter import RefusalRateCallback
from hf_safefilter.errors import InputError
from hf_safefilter.testing import tiny_model, tiny_tokenizer

RATE = "eval_refusal_rate"


def by_step(trainer, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def watched(t, **options) -> RefusalRateCallback:
    callback = RefusalRateCallback(t, **{**MONITOR, **options})
    t.add_callback(callback)
    return callback


def test_refusals_are_seen_going(refusing, tmp_path):
    t = trainer(
        refusing, tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=6, eval_dataset=rows([("a", ANSWER)])
    )
    callback = watched(t, steps=(0, 1, 2), every=4, margin_every=1)
    t.train()
    rates, margins = by_step(t, RATE), by_step(t, "eval_refusal_margin")
    assert list(rates) == [0, 1, 2, 4, 6, 8, 12]
    assert rates[0] == 1
    assert rates[12] == 0
    assert list(margins) == list(range(13))
    assert margins[12] < margins[0]
    assert set(by_step(t, "eval_refusal_rate_benign").values()) == {0.0}
    assert by_step(t, "eval_refusal_n")[0] == 5
    assert by_step(t, "eval_attack_success_rate")[12] == 1
    # The trainer's own logs are as they would be, also at steps that were checked.
    assert list(by_step(t, "loss")) == [3, 6, 9, 12]
    # Files: one of answers for each check, and a history with every margin.
    files = sorted(p.name for p in (tmp_path / "refusal_checks").iterdir())
    assert files == ["history.jsonl", *(f"step-{step:08d}.jsonl" for step in rates)]
    first = [json.loads(line) for line in (tmp_path / "refusal_checks/step-00000000.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in first] == HARMFUL + BENIGN
    assert {(r["side"], r["completion"], r["refuses"]) for r in first} == {
        ("harmful", REFUSAL, True),
        ("benign", ANSWER, False),
    }
    history = [json.loads(line) for line in (tmp_path / "refusal_checks/history.jsonl").read_text().splitlines()]
    assert history == callback.history
    assert {e["step"]: e[RATE] for e in history if RATE in e} == rates
    # TensorBoard's event files, read back.
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("eval/refusal_rate")} == rates
    assert {e.step: e.value for e in events.Scalars("eval/refusal_margin")} == pytest.approx(margins)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_weights_are_the_same_bit_by_bit(taught, tmp_path, accumulation):
    """With dropout, so that a random number taken out of turn would show."""
    ends = []
    for monitored in (False, True):
        model = copy.deepcopy(taught)
        options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "bf16": accumulation == 3}
        t = trainer(model, tmp_path / str(monitored), **options)
        if monitored:
            watched(t, every=2, margin_every=1)
        t.train()
        ends.append((weights(model), [e["loss"] for e in t.state.log_history if "loss" in e]))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert not same(ends[0][0], weights(taught))


def sft(model, folder: Path, **options) -> SFTTrainer:
    config = {
        "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-2, "per_device_train_batch_size": 4,
        "max_steps": 8, "logging_steps": 2, "save_strategy": "no", "disable_tqdm": True, "max_length": 128, **options,
    }  # fmt: skip
    chat = lambda p: {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": ANSWER}]}  # noqa: E731
    data = Dataset.from_list([chat(p) for p in BENIGN * 6])
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
    evaluation = data.select(range(4)) if "eval_strategy" in options else None
    args = SFTConfig(str(folder), **config)
    return SFTTrainer(
        model, args, train_dataset=data, eval_dataset=evaluation, processing_class=pad_tokenizer(), peft_config=lora
    )


@pytest.mark.parametrize(
    "options", [{}, {"packing": True}, {"gradient_checkpointing": False, "gradient_accumulation_steps": 2}]
)
def test_trl_with_lora(taught, tmp_path, options):
    """SFTTrainer's metrics are its own, adapters the same bit by bit, and answers come without dropout."""
    ends = []
    for monitored in (False, True):
        t = sft(copy.deepcopy(taught), tmp_path / str(monitored), **options)
        if monitored:
            watched(t, every=3, margin_every=1)
        t.train()
        ends.append(
            (weights(t.model), [{k: e[k] for k in ("loss", "mean_token_accuracy")} for e in t.state.log_history if "loss" in e])
        )
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    rates = by_step(t, RATE)
    assert rates[0] == 1
    assert list(rates) == [0, 1, 2, 3, 5, 6]
    # The base model is there under the adapter: perplexities are known.
    record = json.loads((tmp_path / "True/refusal_checks/step-00000006.jsonl").read_text().splitlines()[0])
    assert record["perplexity"] > 1


def test_the_best_model_and_early_stopping(refusing, tmp_path):
    """Early stopping was there first; ours goes before it, and the weights that refuse come back."""
    best = {"metric_for_best_model": RATE, "greater_is_better": True, "load_best_model_at_end": True}
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 30}
    evaluation = rows([("a", ANSWER)])
    t = trainer(refusing, tmp_path, [EarlyStoppingCallback(2)], eval_dataset=evaluation, **best, **often)
    callback = watched(t)
    t.train()
    kinds = [type(c) for c in t.callback_handler.callbacks]
    assert kinds.index(RefusalRateCallback) < kinds.index(EarlyStoppingCallback)
    assert kinds.count(RefusalRateCallback) == 1
    rates = by_step(t, RATE)
    assert t.state.global_step < 30
    assert t.state.best_metric == max(r for step, r in rates.items() if step)
    assert callback.monitor.check(refusing).rate == t.state.best_metric


def test_stop_saves_a_checkpoint_first(refusing, tmp_path):
    t = trainer(refusing, tmp_path, max_steps=40)
    watched(t, steps=(0,), every=1, min_refusal_rate=1.0, on_breach="stop")
    t.train()
    rates = by_step(t, RATE)
    step = t.state.global_step
    assert step < 40
    assert all(rate == 1 for s, rate in rates.items() if s < step)  # at the threshold is not under it
    assert rates[step] < 1
    assert (tmp_path / f"checkpoint-{step}/model.safetensors").is_file()


def test_stop_saves_a_checkpoint_that_is_not_the_best(refusing, tmp_path):
    """save_strategy="best" overrules what callbacks ask for within the step."""
    t = trainer(
        refusing, tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="best", eval_dataset=rows([("a", ANSWER)]),
        metric_for_best_model=RATE, greater_is_better=True, max_steps=40, learning_rate=5e-4,
    )  # fmt: skip
    watched(t, steps=(0,), min_refusal_rate=0.9, on_breach="stop")
    t.train()
    assert by_step(t, RATE)[1] == t.state.best_metric == 1  # the first evaluation is the best
    assert by_step(t, RATE)[t.state.global_step] < 0.9
    assert (tmp_path / f"checkpoint-{t.state.global_step}").is_dir()


@pytest.mark.parametrize("lora", [False, True])
def test_restore_puts_the_last_safe_weights_back(refusing, tmp_path, lora, caplog):
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(refusing, LoraConfig(r=8, target_modules="all-linear"))
    else:
        model = refusing
    t = trainer(model, tmp_path, max_steps=60, learning_rate=3e-3 if lora else 5e-4)
    seen = {}

    class Recorder(RefusalRateCallback):
        def _act(self, check, control, model, step):
            seen[step] = (check.rate, weights(model))
            super()._act(check, control, model, step)

    callback = Recorder(t, **MONITOR, steps=(0,), every=1, min_refusal_rate=0.9, on_breach="restore")
    t.add_callback(callback)
    with caplog.at_level(logging.WARNING):
        t.train()
    last = t.state.global_step
    assert last < 60
    safe = max(step for step, (rate, _) in seen.items() if rate >= 0.9)
    assert seen[last][0] < 0.9
    assert same(weights(model), seen[safe][1])
    assert not same(weights(model), seen[last][1])
    assert f"putting back the weights of step {safe}" in caplog.text
    assert callback.monitor.check(model).rate >= 0.9


def test_warn_only_warns(refusing, tmp_path, caplog):
    t = trainer(refusing, tmp_path)
    watched(t, every=4, min_refusal_rate=0.9)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert t.state.global_step == 12
    assert "step 12: the model refuses 0.0% of harmful prompts, under 90.0%" in caplog.text


def test_warn_warns_before_training_too(refusing, tmp_path, caplog):
    t = trainer(refusing, tmp_path, max_steps=1)
    watched(t, prompts=BENIGN, steps=(0,), min_refusal_rate=0.5)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert t.state.global_step == 1
    assert caplog.text.count("step 0: the model refuses 0.0% of harmful prompts, under 50.0%") == 1


def test_several_evaluation_datasets_are_one_check(refusing, tmp_path):
    sets = {"a": rows([("a", ANSWER)]), "b": rows([("b", ANSWER)])}
    t = trainer(refusing, tmp_path, eval_strategy="steps", eval_steps=6, eval_dataset=sets)
    callback = watched(t, steps=(0, 6))
    checks = []
    check = callback.monitor.check
    callback.monitor.check = lambda *a, **k: (checks.append(1), check(*a, **k))[1]
    t.train()
    assert len(checks) == 3
    assert [e["step"] for e in t.state.log_history if RATE in e] == [0, 6, 12]
    metrics = t.evaluate()
    assert metrics[RATE] == 0
    assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()


def test_resume_goes_on_with_the_history(taught, tmp_path):
    def run(folder, **options):
        t = trainer(copy.deepcopy(taught), folder, save_strategy="steps", save_steps=6, **options)
        watched(t, steps=(0, 2, 6, 7, 8), margin_every=3)
        return t

    whole = run(tmp_path / "whole")
    whole.train()
    first = run(tmp_path / "cut")
    first.add_callback(type("Stop", (EarlyStoppingCallback,), {
        "on_train_begin": lambda *a, **k: None, "on_evaluate": lambda *a, **k: None,
        "on_step_end": lambda self, args, state, control, **k: setattr(control, "should_training_stop", state.global_step == 7),
    })())  # fmt: skip
    first.train()
    second = run(tmp_path / "cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-6"))
    assert same(weights(whole.model), weights(second.model))
    plain = lambda folder: [  # noqa: E731
        {k: v for k, v in json.loads(line).items() if k != "eval_refusal_runtime"}
        for line in (folder / "refusal_checks/history.jsonl").read_text().splitlines()
    ]
    assert plain(tmp_path / "cut") == plain(tmp_path / "whole")
    assert [e["step"] for e in plain(tmp_path / "whole") if RATE in e] == [0, 2, 6, 7, 8]


def test_without_a_trainer(refusing, tmp_path, caplog):
    """In callbacks=[...]: to log_history and evaluations, and says what does not get it."""
    callback = RefusalRateCallback(**MONITOR, steps=(0, 1))
    t = trainer(
        refusing,
        tmp_path,
        [callback],
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=12,
        eval_dataset=rows([("a", ANSWER)]),
    )
    with caplog.at_level(logging.WARNING):
        t.train()
    rates = by_step(t, RATE)
    assert list(rates) == [0, 1, 12]
    assert (rates[0], rates[12]) == (1, 0)
    alone = trainer(t.model, tmp_path, [RefusalRateCallback(**MONITOR)], eval_dataset=rows([("a", ANSWER)]))
    assert alone.evaluate()[RATE] == 0  # without a run
    assert caplog.text.count("refusals will not reach tensorboard") == 1


def broken_judge(prompt: str, completion: str) -> bool:
    raise RuntimeError("no quota left")


def mostly_silent(prompt: str, completion: str) -> bool | None:
    return False if prompt in HARMFUL[:2] else None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"judge": broken_judge}, "5 of 5 answers are unscored, most because the judge raised RuntimeError: no quota left"),
        ({"judge": mostly_silent}, "3 of 5 answers are unscored, most because the judge gave no verdict"),
        ({"judge": SimpleNamespace(name="odd", judge=lambda p, c: [])}, "the judge odd failed: EvaluationError"),
    ],
)
def test_a_check_that_fails_never_acts(refusing, tmp_path, caplog, options, why):
    calls = []

    class Later(RefusalRateCallback):
        def _check(self, *args):
            calls.append(1)
            return super()._check(*args)

    t = trainer(
        refusing, tmp_path, eval_strategy="steps", eval_steps=6, eval_dataset=rows([("a", ANSWER)]), metric_for_best_model=RATE,
        greater_is_better=True, save_strategy="best",
    )  # fmt: skip
    t.add_callback(Later(t, **MONITOR, **options, steps=(0, 3), min_refusal_rate=0.9, on_breach="stop"))
    with caplog.at_level(logging.WARNING):
        t.train()
    assert t.state.global_step == 12
    assert len(calls) == 4
    assert f"step 3: refusals not evaluated: {why}" in caplog.text
    assert by_step(t, RATE) == {}
    assert set(by_step(t, "eval_refusal_evaluated").values()) == {0.0}
    assert by_step(t, "eval_refusal_margin").keys() == {0, 3, 6, 12, 10}
    assert not list(tmp_path.glob("checkpoint-*"))
    assert math.isnan(t.evaluate()[RATE])


def test_generation_that_fails_never_acts(refusing, tmp_path, caplog, monkeypatch):
    def out_of_memory(*args, **options):
        raise RuntimeError("out of memory")

    t = trainer(refusing, tmp_path)
    callback = watched(t, steps=(0, 3), min_refusal_rate=0.9, on_breach="restore", margin_every=None)
    monkeypatch.setattr("hf_safefilter.refusal.monitor.generate", out_of_memory)
    monkeypatch.setattr(callback.monitor, "_probe", lambda model: 1 / 0)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert t.state.global_step == 12
    assert "step 3: refusals not evaluated: generation failed in process 0: RuntimeError: out of memory" in caplog.text
    assert caplog.text.count("no refusal margin from here on: division by zero") == 1


def test_a_model_that_only_ends(tmp_path, tokenizer):
    model = tiny_model()
    head = model.get_output_embeddings()
    head.weight.data.zero_()
    head.register_forward_hook(lambda m, a, out: out + 50 * torch.eye(512)[tokenizer.eos_token_id])
    t = trainer(model, tmp_path, max_steps=1)
    watched(t, steps=(0,), min_refusal_rate=0.5, on_breach="stop")
    t.train()
    first = t.state.log_history[0]
    assert (first["eval_refusal_evaluated"], first["eval_refusal_empty"], first["eval_refusal_unscored"]) == (0.0, 5, 5)
    assert first["eval_refusal_truncated"] == 0
    assert t.state.global_step == 1


def test_files_that_cannot_be_written(refusing, tmp_path, caplog, monkeypatch):
    t = trainer(refusing, tmp_path)
    watched(t, steps=(0, 2))

    def full(path, records):
        if "step-" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_safefilter.callbacks.monitoring.write_records", full)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert t.state.global_step == 12
    assert "step 2: answers not saved: [Errno 28] No space left on device" in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="answers cannot be written to .*; choose output_dir"):
        RefusalRateCallback(t, **MONITOR, output_dir=tmp_path / "file/x")


def test_a_model_that_refuses_nothing_from_the_start(refusing, tmp_path):
    t = trainer(refusing, tmp_path)
    watched(t, prompts=BENIGN, min_refusal_rate=0.5, on_breach="stop")
    with pytest.raises(InputError, match="refuses 0.0% of the harmful prompts before training.*align the model first"):
        t.train()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"on_breach": "explode"}, "on_breach must be one of warn, stop, restore"),
        ({"on_breach": "stop"}, "needs min_refusal_rate"),
        ({"min_refusal_rate": 1.5}, "between 0 and 1"),
        ({"min_refusal_rate": float("nan")}, "between 0 and 1"),
        ({"every": 0}, "every must be"),
        ({"margin_every": 1.5}, "margin_every must be"),
        ({"steps": (0, -1)}, "steps must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"prompts": []}, "no harmful prompts"),
        ({"benign_prompts": [""]}, "benign prompt 0"),
        ({"judge": "gpt"}, "judge must be"),
        ({"judge": "classifier:nobody/nothing-here"}, "no judge 'nobody/nothing-here'"),
    ],
)
def test_bad_options_without_a_trainer(options, reason):
    with pytest.raises(InputError, match=reason):
        RefusalRateCallback(**options)


def test_bad_options_with_a_trainer(refusing, tmp_path, caplog):
    t = trainer(refusing, tmp_path)
    with pytest.raises(
        InputError, match="harmful prompt 1 has .* tokens, and with its answer the model's context has room for 502"
    ):
        RefusalRateCallback(t, prompts=["a", "long " * 600], max_new_tokens=10)
    t.processing_class = None
    with pytest.raises(InputError, match="no tokenizer"):
        RefusalRateCallback(t, **MONITOR)
    with caplog.at_level(logging.WARNING):  # no chat template: a fallback is used, and named
        RefusalRateCallback(t, **MONITOR, tokenizer=tiny_tokenizer(None))
    assert "no chat template" in caplog.text
    t = trainer(
        refusing,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        eval_dataset=rows([("a", "b")]),
    )
    with pytest.raises(InputError, match="load_best_model_at_end would undo"):
        RefusalRateCallback(t, **MONITOR, min_refusal_rate=0.5, on_breach="restore")
    t = trainer(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(InputError, match="Linear cannot generate text"):
        RefusalRateCallback(t, **MONITOR)


def test_sharded_models(refusing, tmp_path):
    """What is refused under ZeRO-3 and FSDP; the engines themselves are not on this machine, so plugins stand in."""
    t = trainer(refusing, tmp_path)
    state = t.accelerator.state
    zero3 = SimpleNamespace(zero_stage=3)
    real = t.accelerator
    t.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=zero3, fsdp_plugin=None))
    RefusalRateCallback(t, **MONITOR)
    with pytest.raises(InputError, match="ZeRO-3 gathers all of them for every token; raise max_sharded_parameters"):
        RefusalRateCallback(t, **MONITOR, max_sharded_parameters=1000)
    t.args.deepspeed_plugin = zero3
    with pytest.raises(InputError, match="does not go with sharded weights"):
        RefusalRateCallback(t, **MONITOR, min_refusal_rate=0.5, on_breach="restore")
    t.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(InputError, match="fsdp_version: 2"):
        RefusalRateCallback(t, **MONITOR)
    t.accelerator = real
    assert t.accelerator.state is state
    lonely = RefusalRateCallback(**MONITOR)
    with pytest.raises(InputError, match="several processes"):
        lonely._check_arguments(SimpleNamespace(world_size=2, report_to=[], fsdp="", load_best_model_at_end=False))


def test_two_processes_decide_alike(tmp_path):
    """Under torchrun and accelerate, nine prompts for two processes: the same rates, the same stop, no hang."""
    script = Path(__file__).parent / "train_in_two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["processes"] == 2
    for key in ("step", "rates", "margins", "geometry", "weights"):
        assert ranks[0][key] == ranks[1][key], key
    assert ranks[0]["rates"]["0"] == 1
    assert {"0", str(ranks[0]["step"])} <= ranks[0]["geometry"].keys()  # the step that stopped the run is measured
    assert ranks[0]["rates"][str(ranks[0]["step"])] < 0.9
    assert (tmp_path / f"checkpoint-{ranks[0]['step']}").is_dir()
    answers = (tmp_path / "refusal_checks/step-00000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in answers] == HARMFUL + BENIGN
    assert (
        ranks[0]["failed"] == ranks[1]["failed"] == "generation failed in process 1: RuntimeError: this process has no memory"
    )
