"""`hf-safefilter monitor`."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from training import BENIGN, HARMFUL, pad_tokenizer, refusing_model

from hf_safefilter import cli
from hf_safefilter.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusing")
    refusing_model().save_pretrained(folder / "model")
    pad_tokenizer().save_pretrained(folder / "model")
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return folder


@pytest.fixture
def command(folder):
    prompts = ["--prompts", str(folder / "harmful.jsonl"), "--benign-prompts", str(folder / "benign.jsonl")]
    return ["monitor", str(folder / "model"), *prompts, "--max-new-tokens", "10", "--dtype", "float32"]


def test_a_model_that_refuses(command, folder, tmp_path, capsys):
    assert cli.main([*command, "--min-refusal-rate", "0.9", "--out", str(tmp_path / "out"), "--base", command[1]]) == 0
    shown = capsys.readouterr().out
    assert "harmful (should refuse)" in shown
    assert "100.0%" in shown
    assert "56.6% to 100.0%" in shown
    assert "refusal margin" in shown
    check = json.loads((tmp_path / "out/check.json").read_text())
    assert (check["harmful"]["rate"], check["benign"]["rate"], check["evaluated"], check["breach"]) == (1, 0, True, False)
    assert check["harmful"]["n"] == 5
    answers = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == HARMFUL + BENIGN
    assert all(1 <= a["perplexity"] < 2 for a in answers)
    assert [a["margin"] is None for a in answers] == [False] * 5 + [True] * 4


def test_under_the_threshold_is_exit_code_3(command, folder, capsys):
    swapped = [
        BENIGN_FILE if a.endswith("harmful.jsonl") else a for a in command for BENIGN_FILE in [str(folder / "benign.jsonl")]
    ]
    assert cli.main([*swapped, "--min-refusal-rate", "0.9", "--json"]) == 3
    account = json.loads(capsys.readouterr().out)
    assert account["breach"] is True
    assert account["harmful"]["rate"] == 0
    assert cli.main([*swapped, "--benign-prompts", "none"]) == 0
    assert "benign" not in capsys.readouterr().out


def test_an_adapter(command, tmp_path, capsys):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert cli.main([*command, "--adapter", str(tmp_path / "adapter"), "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["adapter"]["name"] == str(tmp_path / "adapter")
    assert account["harmful"]["rate"] == 1  # a new adapter changes nothing


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--min-refusal-rate", "7"], 1, "between 0 and 1"),
        (["--judge", "gpt"], 1, "judge must be"),
        (["--judge", "classifier:/no/such/judge"], 1, "no judge"),
        (["--prompts", "/no/such/file"], 1, "cannot read prompts"),
        (["--max-new-tokens", "0"], 1, "max_new_tokens"),
        (["--max-new-tokens", "505"], 1, "has room for 7"),
        (["--adapter", "/no/such/adapter"], 1, "no adapter"),
        (["--tokenizer", "/no/such/tokenizer"], 1, "no tokenizer"),
        (["--base", "/no/such/base"], 1, "no model"),
    ],
)
def test_bad_arguments(command, arguments, code, reason, capsys):
    assert cli.main([*command, *arguments]) == code
    assert reason in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_exit_code_2(command, capsys, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_safefilter.refusal.monitor.generate", fails)
    assert cli.main([*command, "--min-refusal-rate", "0.9"]) == 2
    assert "refusals not evaluated: generation failed in process 0: RuntimeError: out of memory" in capsys.readouterr().err
