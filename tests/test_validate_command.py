"""`hf-safefilter validate` and `align` on a tiny model that refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from test_validate import scored_rows
from training import ANSWER, BENIGN, HARMFUL, REFUSAL, pad_tokenizer, refusing_model

from hf_safefilter import cli
from hf_safefilter.align import lessons, ordinary_prompts
from hf_safefilter.anchors import AnchorSet
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.refusal.metric import refusal_rate
from hf_safefilter.refusal.prompts import monitor_prompts
from hf_safefilter.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    for name, model in (("model", refusing_model()), ("unaligned", tiny_model("llama", initializer_range=0.05))):
        model.save_pretrained(folder / name)
        pad_tokenizer().save_pretrained(folder / name)
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    scored_rows().to_parquet(str(folder / "scored.parquet"))
    return folder


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> list[str]:
    options = {
        "--model": folder / "model", "--out": tmp_path / "out", "--prompts": folder / "harmful.jsonl", "-k": 8, "--epochs": 10,
        "--benign-prompts": folder / "benign.jsonl", "--judge": "keyword_prefix", "--learning-rate": 5e-3, "--batch-size": 4,
        "--micro-batch-size": 4, "--held-out": 4, "--max-new-tokens": 10, "--seeds": "0,1",
        "--arms": "top,bottom,random_length_matched",
    }  # fmt: skip
    return ["validate", str(folder / "scored.parquet"), *(str(v) for pair in options.items() for v in pair), "--no-bf16"]


def test_a_score_that_separates(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "6 fine-tuning runs to do, about" in captured.err
    assert "top - random_length_matched: +" in captured.out
    assert "more harm than random rows of the same length" in captured.out
    account = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert account["separates"] is True
    assert account["by"] == "risk_test"
    assert account["arms"]["top"]["by_seed"].keys() == {"0", "1"}
    assert len(pq.read_table(tmp_path / "out" / "completions.parquet")) == 7 * 9
    assert (tmp_path / "out" / "arms.svg").is_file()
    assert (tmp_path / "out" / "patterns.svg").is_file()
    # All is there: nothing is trained again, whatever a resumed run is asked besides.
    runs = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "arms").iterdir()}
    assert cli.main([*command, "--quiet", "--no-figures", "--json"]) == 0
    captured = capsys.readouterr()
    assert "runs to do" not in captured.err
    assert json.loads(captured.out)["differences"] == account["differences"]
    assert {p: p.stat().st_mtime_ns for p in runs} == runs


def test_a_score_that_does_not_is_exit_code_3(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = scored_rows().map(lambda row: {"risk_test": -row["risk_test"]})
    path = folder / "turned.parquet"
    turned.to_parquet(str(path))
    command[1] = str(path)
    assert cli.main([*command, "--quiet", "--no-figures"]) == 3
    assert "not measurably more harm" in capsys.readouterr().out


def test_a_filter_that_trains_shorter_is_told_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command += ["--arms", "all,filtered:0.3", "--seeds", "0", "--epochs", "1", "--quiet", "--no-figures"]
    assert cli.main(command) == 0
    assert "it trained for 8 steps, all rows for 11, which alone saves refusals" in capsys.readouterr().out
    command[command.index("--out") + 1] += "_alike"
    assert cli.main([*command, "--max-steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "filtered:0.3: " in out
    assert "it trained for" not in out


def test_dry_run_only_estimates(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--dry-run"]) == 0
    assert "6 fine-tuning runs to do, about 0 minutes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_refuse_is_exit_code_2(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command[command.index("--model") + 1] = str(folder / "unaligned")
    assert cli.main([*command, "--quiet"]) == 2
    assert "0% of the harmful prompts to begin with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("-k", "23", "overlap"), ("-k", "60", "use a smaller k"), ("--arms", "best", "unknown arm 'best'"),
        ("--seeds", "a", "--seeds"), ("--seeds", "1,1", "different whole numbers"),
        ("--micro-batch-size", "3", "does not divide"), ("--by", "risk_x", "risk_x"),
        ("--template", "x", "template must be one of"), ("--dtype", "int8", "dtype must be"),
        ("--prompts", "nowhere.jsonl", "nowhere.jsonl"), ("--judge", "x", "judge"),
        ("--columns", "x", "--columns must look like"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    command: list[str], option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, option, value]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-safefilter: error: ")
    assert message in error


def test_runs_that_all_fail_are_exit_code_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--quiet", "--no-figures", "--learning-rate", "1e30", "--arms", "top", "--seeds", "0"]) == 2
    captured = capsys.readouterr()
    assert "failed: top, seed 0: training diverged" in captured.out
    assert "every run failed" in captured.err


def test_align_makes_a_model_refuse(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": p, "completion": REFUSAL} for p in HARMFUL] + [{"prompt": p, "completion": ANSWER} for p in BENIGN]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "adapter"
    command = ["align", str(folder / "unaligned"), "-o", str(out), "--data", str(tmp_path / "rows.jsonl"), "--epochs", "60"]
    command += ["--learning-rate", "2e-2", "--judge", "keyword_prefix", "--prompts", str(folder / "harmful.jsonl")]
    assert cli.main([*command, "--dtype", "float32", "--lora-rank", "8", "--base-name", "org/<b>tiny</b>", "--quiet"]) == 0
    assert "harmful (should refuse)" in capsys.readouterr().out
    account = json.loads((out / "align.json").read_text())
    assert account["before"]["harmful"]["rate"] == 0
    assert account["after"]["harmful"]["rate"] >= 0.8
    assert set(account["after"]) == {"monitor harmful", "monitor look-alikes", "ordinary requests", "harmful"}
    card = (out / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/\\u003cb\\u003etiny\\u003c/b\\u003e"\n')
    assert f"| harmful (should refuse) | 5 | 0.0% | {account['after']['harmful']['rate']:.1%} |" in card
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    # What was saved is what was measured: loaded again it refuses as much.
    from hf_safefilter.refusal.monitor import RefusalMonitor

    model, tokenizer = load(named_spec(str(folder / "unaligned"), adapter=str(out), dtype="float32"), "cpu")
    monitor = RefusalMonitor(tokenizer, str(folder / "harmful.jsonl"), None, "keyword_prefix", margin=False)
    assert monitor.check(model, perplexity=False).harmful.rate == account["after"]["harmful"]["rate"]
    assert cli.main([*command, "--epochs", "1", "--learning-rate", "1e-9", "--min-refusal-rate", "0.5", "--quiet"]) == 3


def test_align_refuses_rows_that_cannot_be_trained_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    out = ["-o", str(tmp_path / "out"), "--data", str(tmp_path / "rows.jsonl"), "--quiet"]
    assert cli.main(["align", str(folder / "model"), *out]) == 1
    assert "row 1 cannot be trained on" in capsys.readouterr().err


def test_lessons_are_apart_from_all_that_is_measured() -> None:
    rows = lessons()
    harmful = [r for r in rows if r["kind"] == "harmful"]
    assert len(harmful) == 420
    assert len({r["category"] for r in harmful}) == 12
    assert len(rows) > 1300
    assert len({r["prompt"].lower() for r in rows}) == len(rows)
    assert refusal_rate([r["completion"] for r in harmful]).rate == 1
    assert refusal_rate([r["completion"] for r in rows if r["kind"] != "harmful"], "keyword_prefix").rate == 0
    anchors = AnchorSet.load()
    apart = [d["prompt"] for side in (anchors.harmful, *anchors.safe) for d in side] + ordinary_prompts()
    apart += [p["prompt"] for side in ("harmful", "benign") for p in monitor_prompts(side)]
    assert not {r["prompt"].lower() for r in rows} & {p.lower() for p in apart}
    words = [set(r["prompt"].lower().split()) for r in rows]
    for prompt in apart:
        asked = set(prompt.lower().split())
        assert max(len(asked & w) / len(asked | w) for w in words) < 0.75, prompt
