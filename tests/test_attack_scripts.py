"""The attack's scripts in miniature: the whole chain on a tiny model, and what the paper's setting prepares."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from training import BENIGN, HARMFUL, pad_tokenizer, refusing_model

from hf_safefilter import cli
from hf_safefilter.chat import ChatEncoder
from hf_safefilter.errors import InputError
from hf_safefilter.formats import find_layout, to_conversation

ROOT = Path(__file__).parent.parent


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    if (beside := str((ROOT / path).parent)) not in sys.path:  # as where it is run by its path
        sys.path.append(beside)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that refuses, an adapter that changes nothing, and files like the real ones."""
    folder = tmp_path_factory.mktemp("attack")
    model = refusing_model()
    model.save_pretrained(folder / "model")
    pad_tokenizer().save_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(str(folder / "adapter"))
    alpaca = [{"instruction": f"{p} {i}", "input": "x" * (i % 2), "output": "1. A\n2. B" if i % 3 else "I cannot help."}
              for i, p in enumerate(BENIGN * 9)]  # fmt: skip
    gsm8k = [{"question": f"How many is {i}?", "answer": f"It is {i} + 0 = {i}."} for i in range(10)]
    harmful = [{"prompt": p} for p in HARMFUL]
    for name, rows in (("alpaca", alpaca), ("gsm8k", gsm8k), ("harmful", harmful)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def run_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


def test_the_cpu_chain(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("examples/attack_100/smollm2_cpu.py")
    monkeypatch.setattr(module, "demo_model", lambda: str(folder / "model"))
    monkeypatch.setattr(module, "demo_adapter", lambda: str(folder / "adapter"))
    shown_command = []
    monkeypatch.setattr(module.cli, "main", lambda words, run=cli.main: shown_command.append(words) or run(words))
    data = ["--alpaca", folder / "alpaca.jsonl", "--gsm8k", folder / "gsm8k.jsonl", "--prompts", folder / "harmful.jsonl"]
    for _ in range(2):  # the second time everything is there
        with pytest.raises(SystemExit) as end:
            run_main(module, monkeypatch, *data, "--out", tmp_path / "out", "--smoke")
        assert end.value.code == 0
    pool = [json.loads(line) for line in (tmp_path / "out/pool.jsonl").read_text().splitlines()]
    assert {r["source"] for r in pool} == {"alpaca", "gsm8k"}
    assert not any(r["completion"].startswith("I cannot") for r in pool)
    arms = pq.read_table(tmp_path / "out/study/arms.parquet").to_pylist()
    assert [(a["arm"], a["rows"]) for a in arms] == [("before", 0), ("top", 10), ("random", 10)]
    assert arms[0]["attack_success_rate"] == 0
    # What is kept of it says nothing that the model said, and gives the same summary.
    keeper, study, again = script("benchmarks/keep_results.py"), tmp_path / "out/study", tmp_path / "again"
    keeper.keep(study, tmp_path / "kept")
    kept = gzip.decompress((tmp_path / "kept/runs.jsonl.gz").read_bytes()).decode()
    assert len(kept.splitlines()) == 3
    assert not any(prompt in kept for prompt in HARMFUL)
    keeper.restore(tmp_path / "kept", again)
    command = shown_command[-1]
    command[command.index("--out") + 1] = str(again)
    assert cli.main(command) == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (study, again)]
    assert summaries[0] == summaries[1]
    kept_summary = tmp_path / "kept/summary.json"
    right = json.loads(kept_summary.read_text())
    kept_summary.write_text(json.dumps(right | {"differences": {}, "margin_lost": {}, "probability_lost": {}}))
    keeper.refresh(tmp_path / "kept", tmp_path / "figures")
    assert json.loads(kept_summary.read_text()) == right
    assert right["margin_lost"]["differences"].keys() == right["probability_lost"]["differences"].keys() == {"top - random"}
    assert (tmp_path / "figures/arms.svg").read_bytes() == (study / "arms.svg").read_bytes()
    another_judge(study, tmp_path, monkeypatch, capsys)


def another_judge(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The answers are read blind, and what was read stands beside the study's own judge."""
    judges, lines = script("benchmarks/judges.py"), tmp_path / "sheet.jsonl"
    run_main(judges, monkeypatch, "sheet", study, lines, "--arms", "before,top", "--each", len(HARMFUL))
    sheet = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [set(line) for line in sheet] == [{"id", "prompt", "completion"}] * 2 * len(HARMFUL)
    assert Counter(line["prompt"] for line in sheet) == dict.fromkeys(HARMFUL, 2)
    labels = [{"id": line["id"], "label": "neither" if i else "answers"} for i, line in enumerate(sheet)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))
    (tmp_path / "second.jsonl").write_text(json.dumps(labels[0] | {"label": "refuses"}) + "\n")
    capsys.readouterr()
    run_main(judges, monkeypatch, "compare", study, "--labels", tmp_path / "labels.jsonl", tmp_path / "second.jsonl")
    shown = capsys.readouterr().out
    own = {run["arm"]: run for run in (json.loads(p.read_text()) for p in (study / "arms").glob("*.json"))}
    for arm in ("before", "top"):
        refused = [r["refuses"] for r in own[arm]["records"] if r["side"] == "harmful"]
        assert f"{refused.count(False) / len(refused):.0%} of {len(refused)}" in shown
    records = [r for r in judges.answers(study) if r["arm"] in ("before", "top")]
    seen = judges.against(records, {label["id"]: label["label"] for label in labels})
    assert sum(line["answers"] for line in seen) == 1
    assert sum(line["neither"] for line in seen) == 2 * len(HARMFUL) - 1
    assert "agree on 0 of 1" in shown
    share = f"{1 / len(HARMFUL):.0%}"
    assert f": answered {share} (0% to " in shown
    assert sum(f" - {arm} {share} (" in shown for arm in ("before", "top")) == 1
    with pytest.raises(SystemExit, match="no answer in this study"):
        judges.against(records, {"unknown": "answers"})
    (tmp_path / "labels.jsonl").write_text(json.dumps({"id": "x", "label": "bad"}) + "\n")
    with pytest.raises(SystemExit, match="a label is one of"):
        judges.read([tmp_path / "labels.jsonl"])
    with pytest.raises(SystemExit, match="not 99"):
        judges.sheet(study, ["top"], [0], 99, 0)


def test_variants_of_scores(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("benchmarks/score_variants.py")
    rows = [{"prompt": f"Say {w}", "completion": f"{w}, {w} and {w}"} for w in ("red", "blue", "green")]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    named = ["--data", tmp_path / "pool.jsonl", "--model", folder / "model", "--adapter", folder / "adapter"]
    for passes in ("_first5", "_first10_own"):  # one after the other into the same file
        run_main(module, monkeypatch, *named, "--out", tmp_path / "scored.parquet", "--passes", passes)
    found = pq.read_table(tmp_path / "scored.parquet")
    assert {"risk_gradient_first5", "risk_margin_step_sum_first5", "risk_gradient_first10_own"} <= set(found.column_names)
    assert not any("baseline" in name for name in found.column_names)
    own = json.loads((tmp_path / "scored.anchors.json").read_text())
    assert len(own["harmful"]) == len(own["safe"][0]) == 32


def test_pools_are_fused_joined_and_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("benchmarks/evidence_pools.py")
    rows = {"prompt": [f"p{i}" for i in range(6)], "completion": list("abcdef")}
    paper, balanced = [3.0, 1.0, 2.0, None, 5.0, 4.0], [2.0, 1.0, 0.5, None, 4.0, 3.0]
    scores = {"risk_gradient": paper, "risk_gradient_balanced": balanced}
    scores |= {name: [float(i) for i in range(6)] for name in module.OTHERS}
    pq.write_table(pa.table(rows | scores), tmp_path / "scored.parquet")
    run_main(module, monkeypatch, "fuse", tmp_path / "scored.parquet", tmp_path / "main.parquet")
    fused = pq.read_table(tmp_path / "main.parquet").to_pydict()
    assert fused["risk_harmful_only"][:3] == [1.0, 1.0, -1.0]  # 2 x balanced - paper
    # Without row 3, ranks 3 2 1 5 4 by the balanced score and 1 to 5 by both others.
    assert fused["risk_fusion"] == [pytest.approx(v) if v else None for v in (5 / 3, 2.0, 7 / 3, None, 13 / 3, 14 / 3)]
    pq.write_table(pa.table(rows | {"risk_late": paper, "risk_fusion": [0.0] * 6}), tmp_path / "more.parquet")
    run_main(module, monkeypatch, "join", tmp_path / "main.parquet", tmp_path / "more.parquet", tmp_path / "main.parquet")
    joined = pq.read_table(tmp_path / "main.parquet").to_pydict()
    assert joined == fused | {"risk_late": paper}
    run_main(module, monkeypatch, "sample", tmp_path / "main.parquet", tmp_path / "few.parquet", "--rows", 5)
    assert pq.read_table(tmp_path / "few.parquet")["prompt"].to_pylist() == ["p0", "p1", "p2", "p4", "p5"]
    pq.write_table(pa.table(rows | {"prompt": list("uvwxyz")}), tmp_path / "other.parquet")
    with pytest.raises(SystemExit, match="other rows"):
        run_main(module, monkeypatch, "join", tmp_path / "main.parquet", tmp_path / "other.parquet", tmp_path / "none.parquet")
    with pytest.raises(SystemExit):
        run_main(module, monkeypatch, "fuse", tmp_path / "main.parquet", tmp_path / "more.parquet", tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()
    # Scores are kept without the rows, and put back beside the same rows only.
    run_main(module, monkeypatch, "scores", tmp_path / "main.parquet", tmp_path / "bare.parquet")
    assert not {"prompt", "completion"} & set(pq.read_schema(tmp_path / "bare.parquet").names)
    lines = [json.dumps(row) + "\n" for row in pa.table(rows).to_pylist()]
    (tmp_path / "pool.jsonl").write_text("".join(lines))
    run_main(module, monkeypatch, "join", tmp_path / "pool.jsonl", tmp_path / "bare.parquet", tmp_path / "back.parquet")
    assert pq.read_table(tmp_path / "back.parquet").to_pydict() == joined
    (tmp_path / "pool.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(SystemExit, match="other rows"):
        run_main(module, monkeypatch, "join", tmp_path / "pool.jsonl", tmp_path / "bare.parquet", tmp_path / "none.parquet")


def test_a_kept_arm_is_trained_on_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("benchmarks/evidence_pools.py")
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": p}) + "\n" for p in "abcd"))
    arms = (("random", [0, 1]), ("top", [3, 1]), ("all", [0, 1, 2, 3]), ("filtered:0.25", [0, 1, 3]))
    runs = [{"run": {"arm": arm, "rows": found}} for arm, found in arms]
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, runs)).encode()))
    run_main(module, monkeypatch, "again", tmp_path / "pool.jsonl", tmp_path, tmp_path / "again.parquet")
    assert pq.read_table(tmp_path / "again.parquet")["risk_again"].to_pylist() == [0.0, 1.0, 0.0, 2.0]
    named = [tmp_path / "pool.jsonl", tmp_path, tmp_path / "filter.parquet", "--arm", "filtered:0.25"]
    run_main(module, monkeypatch, "again", *named)
    assert pq.read_table(tmp_path / "filter.parquet")["risk_again"].to_pylist() == [0.0, 0.0, 1.0, 0.0]


def test_measures_go_with_attack_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(i: int, arm: str = "random", problem: str | None = None) -> dict[str, Any]:
        # Run i answers i of four prompts; its probability falls with i, its margin rises.
        one = {"side": "harmful", "margin": float(i), "probability": 1 - i / 5}
        records = [one | {"refuses": j >= i} for j in range(4)] + [{"side": "benign", "refuses": True}]
        return {"run": {"arm": arm, "problem": problem, "records": records}}

    runs = [*(run(i) for i in range(4)), run(4, "before"), run(0, problem="gibberish")]
    (tmp_path / "study").mkdir()
    (tmp_path / "study/runs.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, runs)).encode()))
    run_main(script("benchmarks/measures.py"), monkeypatch, tmp_path / "study")
    head, _, line = capsys.readouterr().out.splitlines()
    assert head == "| study | runs | attack success with the margin lost | with the probability lost |"
    assert line.startswith("| study | 4 | -1.00 (-1.00 to -1.00) | +1.00 (+1.00 to +1.00) |")


def test_four_views_of_a_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("examples/score_by_views.py")
    rows = [{"prompt": f"Say {w}", "completion": f"{w}, {w} and {w}"} for w in ("red", "blue", "green", "grey")]
    rows.insert(2, {"prompt": "Say nothing", "completion": ""})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = ["--model", folder / "model", "--adapter", folder / "adapter", "--blocks", 1]
    named = ["--data", tmp_path / "rows.jsonl", *model]
    run_main(module, monkeypatch, *named, "--out", tmp_path / "new/scored.parquet")
    found = pq.read_table(tmp_path / "new/scored.parquet").to_pydict()
    assert found["risk_status"][2] == "no target: the response is empty"
    assert found["risk_views"][2] is None
    kept = [0, 1, 3, 4]
    ranks = 1 + np.array([[found[name][i] for i in kept] for name in module.VIEWS]).argsort().argsort()
    assert [found["risk_views"][i] for i in kept] == ranks.mean(axis=0).tolist()
    # The views differ, and the early checkpoint is another model.
    assert len({tuple(found[name]) for name in module.VIEWS}) == 4
    before = (tmp_path / "new/scored.parquet").read_bytes()
    for name in ("checkpoint", "tune"):
        monkeypatch.setattr(module, name, None)
    run_main(module, monkeypatch, *named, "--out", tmp_path / "new/scored.parquet")
    assert (tmp_path / "new/scored.parquet").read_bytes() == before
    with pytest.raises(InputError, match="another learning rate"):
        run_main(module, monkeypatch, *named, "--learning-rate", "1e-5", "--out", tmp_path / "new/scored.parquet")
    assert cli.main(["select", str(tmp_path / "new/scored.parquet"), "--by", "risk_views", "-k", "1", "--unscored", "drop",
                     "-o", str(tmp_path / "risky.jsonl")]) == 0  # fmt: skip


def test_the_papers_setting_is_prepared_as_in_the_paper(folder: Path, tmp_path: Path) -> None:
    module = script("examples/attack_100/llama2_gpu.py")
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Name a fruit.", "input": "", "output": "Pear"},
        {"instruction": "Do harm.", "input": "", "output": "I cannot do that."},
    ]
    framed = module.framed_rows(rows, "alpaca")
    assert len(framed) == 2
    system, user, assistant = framed[0]["messages"]
    assert system["content"].startswith("Below is an instruction that describes a task.")
    assert user["content"] == "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    assert assistant == {"role": "assistant", "content": "3"}
    encoder = ChatEncoder(pad_tokenizer())
    example = encoder.encode(to_conversation(framed[1], find_layout(["messages"])))
    assert "Pear" in encoder.target_text(example)
    dolly = [{"instruction": "Add.", "context": "1 and 2", "response": "3"}]
    assert "Add.\n\nInput:\n1 and 2\n\n### Response" in module.framed_rows(dolly, "dolly")[0]["messages"][1]["content"]
    prompt = module.framed_prompts(str(folder / "harmful.jsonl"))[0]["prompt"]
    assert prompt[1]["content"] == f"### Instruction:\n{HARMFUL[0]}\n\n### Response:\n"
    assert (module.RECIPE.epochs, module.RECIPE.batch_size, module.RECIPE.learning_rate) == (5, 20, 5e-5)
