"""`hf-safefilter mechanism` and the comparison behind it, on tiny models."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training import BENIGN, HARMFUL, pad_tokenizer, refusing_model

from hf_safefilter import cli
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.errors import InputError
from hf_safefilter.mechanistic.compare import compare, draw, summarize, upper
from hf_safefilter.testing import tiny_model

TABLES = ("separation", "drift", "alignment", "gain", "singular", "groups", "shift")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, one tuned to refuse, an adapter of the base, prompts and jailbreaks."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_model("llama", initializer_range=0.05)
    for name, model in (("base", base), ("aligned", refusing_model()), ("gpt2", tiny_model("gpt2"))):
        model.save_pretrained(folder / name)
        pad_tokenizer().save_pretrained(folder / name)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    adapted.save_pretrained(folder / "adapter")
    for name, rows in (
        ("harmful", [{"prompt": p} for p in HARMFUL]), ("benign", [{"prompt": p} for p in BENIGN]),
        ("jailbreak", [{"prompt": f"Please, {p}", "success": i < 3} for i, p in enumerate(HARMFUL)]),
        ("odd", [{"prompt": "a", "success": "yes"}]),
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def command(folder):
    prompts = ["--prompts", str(folder / "harmful.jsonl"), "--benign-prompts", str(folder / "benign.jsonl")]
    return ["mechanism", "--base", str(folder / "base"), *prompts, "--quiet"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_base_and_tuned(command, folder, tmp_path, capsys):
    arguments = [
        "--tuned", str(folder / "aligned"), "--tuned-adapter", f"attacked={folder}/adapter", "--group",
        str(folder / "jailbreak.jsonl"), "-o", str(tmp_path),
    ]  # fmt: skip
    assert cli.main([*command, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Means over blocks 0 to 1" not in shown  # block 1 is the last third
    assert "Means over blocks 1 to 1" in shown
    assert "Refusal margins along the update" in shown
    tables = {name: read(tmp_path / f"{name}.jsonl") for name in TABLES}
    assert [(r["model"], r["layer"]) for r in tables["separation"]] == [
        (m, n) for m in ("base", "aligned", "attacked") for n in (0, 1)
    ]
    auroc = {(r["model"], r["layer"]): r["auroc"] for r in tables["separation"]}
    assert auroc["aligned", 1] == 1
    account = json.loads((tmp_path / "mechanism.json").read_text())
    assert [r["model"] for r in account["summary"]] == ["base", "aligned", "attacked"]
    assert account["summary"][1]["auroc"] == auroc["aligned", 1]
    assert account["summary"][0]["cosine"] is None  # the base against itself is not a finding
    # Along the update the aligned model comes to refuse.
    margin = {(r["alpha"], r["part"]): r["margin_harmful"] for r in tables["shift"] if r["model"] == "aligned"}
    assert margin[1, "all"] > margin[0, "none"]
    found = {(r["group"], r["outcome"]) for r in tables["groups"]}
    assert ("jailbreak", "success") in found
    assert not any(isinstance(v, float) and not math.isfinite(v) for rows in tables.values() for r in rows for v in r.values())
    pictures = {p.name for p in tmp_path.glob("*.svg")}
    assert pictures == {
        "separation.svg", "gap.svg", "drift.svg", "alignment.svg", "gain.svg", "tau.svg", "sensitivity.svg",
        "shift_margin_harmful.svg", "shift_margin_benign.svg",
    }  # fmt: skip


def test_less_of_it_as_json(command, folder, tmp_path, capsys):
    options = [
        "--tuned",
        f"a={folder}/aligned",
        "--control-adapter",
        f"benign={folder}/adapter",
        "--no-sensitivity",
        "--no-shift",
    ]
    arguments = [*options, "--no-figures", "--layers", "0.5", "--json", "-o", str(tmp_path / "new/folder")]
    assert cli.main([*command, *arguments]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["blocks"] == [1]
    assert account["controls"] == ["benign"]
    assert {"gain", "gain_random", "gain_benign", "excess", "excess_random", "excess_benign"} <= account["summary"][1].keys()
    written = {p.name for p in (tmp_path / "new/folder").iterdir()}
    assert written == {*(f"{t}.jsonl" for t in TABLES if t != "shift"), "mechanism.json"}
    assert {r["measure"] for r in read(tmp_path / "new/folder/groups.jsonl")} == {"tau", "change"}


def test_the_same_model_twice(command, folder, tmp_path, capsys):
    assert cli.main([*command, "--tuned", f"again={folder}/base", "--no-shift", "-o", str(tmp_path)]) == 0
    assert all("no update" in r["reason"] for r in read(tmp_path / "gain.jsonl"))
    assert all(abs(r["cosine"] - 1) < 1e-6 for r in read(tmp_path / "drift.jsonl"))
    assert "gain" not in capsys.readouterr().out.split("\n\n")[1].split("\n")[0]


def test_the_synthetic_study(monkeypatch, tmp_path, capsys):
    calls = []

    def study(out, seeds, *, workers, progress):
        calls.append((out, seeds, progress, workers))
        return {"seeds": [4], "A1": {"verdict": "holds"}}

    monkeypatch.setattr("hf_safefilter.mechanistic.study.run_synthetic", study)
    assert cli.main(["mechanism", "--synthetic", "--seeds", "4", "--quiet", "-o", str(tmp_path / "out")]) == 0
    assert calls == [(tmp_path / "out", (4,), False, min(8, os.cpu_count()))]
    assert "holds" in capsys.readouterr().out
    assert cli.main(["mechanism", "--synthetic", "--json", "-o", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["A1"] == {"verdict": "holds"}
    assert calls[1][1:] == ((0, 1, 2), True, min(8, os.cpu_count()))
    assert cli.main(["mechanism", "--synthetic", "--workers", "0", "-o", str(tmp_path / "out")]) == 1
    assert "--workers must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give --base and --tuned"),
        (["--synthetic", "--tuned", "x"], "--synthetic trains models of its own"),
        (["--tuned", "/no/such/model"], "no model"),
        (["--tuned-adapter", "/no/such/adapter"], "no adapter"),
        (["--tuned", "x=BASE", "--tuned-adapter", "x=ADAPTER"], "names that differ"),
        (["--tuned", "random=BASE"], "not base, tuned or random"),
        (["--tuned", "=BASE"], "must look like NAME=PATH"),
        (["--tuned", "x=GPT2"], "different parameters"),
        (["--tuned", "x=BASE", "--layers", "all"], "--layers must be numbers"),
        (["--tuned", "x=BASE", "--layers", "7"], "layer 7 does not exist"),
        (["--tuned", "x=BASE", "-k", "99"], "k must be"),
        (["--tuned", "x=BASE", "--group", "unsafe=HARMFUL"], "that name is taken"),
        (["--tuned", "x=BASE", "--group", "ODD"], "success must be true, false or left out"),
        (["--tuned", "x=BASE", "--group", "x=/no/such/file"], "cannot read prompts"),
    ],
)
def test_bad_arguments(command, folder, tmp_path, arguments, reason, capsys):
    places = {"BASE": "base", "ADAPTER": "adapter", "GPT2": "gpt2", "HARMFUL": "harmful.jsonl", "ODD": "odd.jsonl"}
    for word, name in places.items():
        arguments = [a.replace(word, str(folder / name)) for a in arguments]
    assert (
        cli.main([*(command if arguments[:1] != ["--synthetic"] else ["mechanism"]), *arguments, "-o", str(tmp_path / "o")])
        == 1
    )
    assert reason in capsys.readouterr().err


def test_bad_seeds(capsys, tmp_path):
    assert cli.main(["mechanism", "--synthetic", "--seeds", "a", "-o", str(tmp_path)]) == 1
    assert "--seeds must be whole numbers" in capsys.readouterr().err


def test_compare_as_a_function(folder):
    base, tokenizer = load(named_spec(str(folder / "base"), dtype="float32"), "cpu")
    aligned, _ = load(named_spec(str(folder / "aligned"), dtype="float32"), "cpu")
    ids = [tokenizer(p)["input_ids"] for p in (HARMFUL, BENIGN)]
    with pytest.raises(InputError, match="at least one tuned model"):
        compare(base, {}, *ids)
    with pytest.raises(InputError, match="needs at least 4"):
        compare(base, {"aligned": aligned}, ids[0][:3], ids[1])
    tables = compare(base, {"aligned": aligned}, *ids, sensitivity=False)
    again = compare(base, {"aligned": aligned}, *ids, sensitivity=False)
    assert tables == again  # the same input gives the same output
    assert set(tables) == {t for t in TABLES if t != "shift"}
    assert upper(base, [0, 1]) == [1]
    assert upper(base, [0]) == [0]
    row = summarize(tables, [1])[1]
    gain = next(r for r in tables["gain"] if r["layer"] == 1 and r["update"] == "tuned")
    assert row["gain"] == gain["gain"]
    excess = [r["excess"] for r in tables["alignment"] if r["layer"] == 1 and (r["update"], r["basis"]) == ("tuned", "full")]
    assert row["excess"] == pytest.approx(sum(excess) / 2)


def test_equal_tables_give_equal_pictures(folder, tmp_path):
    base, tokenizer = load(named_spec(str(folder / "base"), dtype="float32"), "cpu")
    ids = [tokenizer(p)["input_ids"] for p in (HARMFUL, BENIGN)]
    tables = compare(base, {"itself": base}, *ids, sensitivity=False)
    first = {p.name: p.read_bytes() for p in draw(tmp_path, tables)}
    assert {"separation.svg", "gap.svg", "drift.svg", "tau.svg"} <= first.keys()
    assert "gain.svg" not in first  # nothing to show
    assert len(first) == len(draw(tmp_path, tables))


EXAMPLES = Path(__file__).parents[1] / "examples/mechanistic"


def test_the_synthetic_example(monkeypatch, capsys):
    small = ["--pretraining-steps", "4", "--rows", "64", "--prompts", "12"]
    monkeypatch.setattr(sys, "argv", ["synthetic.py", *small])
    runpy.run_path(str(EXAMPLES / "synthetic.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["base", "sft", "dpo", "unlearn"]
    assert len(lines[-1].split()) == 6


def test_the_real_models_example(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_models.py", "--model", f"{folder}/base", "--adapter", f"{folder}/adapter"])
    runpy.run_path(str(EXAMPLES / "real_models.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["0", "1"]
