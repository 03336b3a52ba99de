"""The command line: exit codes, outputs, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hub_server import HubServer

from hf_safefilter import cli
from hf_safefilter.cli.files import read_rows
from hf_safefilter.cli.show import printable, table
from hf_safefilter.errors import InputError, UnscorableRow


def run(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, standard output, and the last line of standard error."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, (err.strip().splitlines() or [""])[-1]


@pytest.fixture
def anchors_file(anchors, tmp_path):
    return anchors.save(tmp_path / "anchors.json")


@pytest.fixture
def score(capsys, model_folder, anchors_file, tmp_path):
    def score(data, *options):
        return run(
            capsys, "score", data, "--model", model_folder, "--anchors", anchors_file, "--out", tmp_path / "out", *options
        )

    return score


@pytest.fixture
def rows_file(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_score_select_and_filter(score, capsys, rows_file, rows, tmp_path):
    code, out, _ = score(rows_file, "--dtype", "float32")
    assert code == 0
    assert "rank  risk_gradient_balanced" in out
    assert f"{len(rows)} of {len(rows)} rows scored" in out
    scored = Dataset.from_parquet(str(tmp_path / "out/scored.parquet"))
    assert scored["prompt"][:] == [r["prompt"] for r in rows]
    order = sorted(range(len(rows)), key=lambda i: -scored["risk_gradient_balanced"][i])
    for name, suffix, options in (("select", ".jsonl", ["-k", 3]), ("select", ".csv", ["--fraction", 0.43])):
        code, out, _ = run(capsys, name, tmp_path / "out", *options, "-o", tmp_path / f"risky{suffix}")
        assert code == 0
        assert f"3 of {len(rows)} rows written" in out
        assert read_rows(str(tmp_path / f"risky{suffix}"))["prompt"][:] == [rows[i]["prompt"] for i in order[:3]]
    code, out, _ = run(capsys, "filter", tmp_path / "out", "-k", 3, "-o", tmp_path / "new/clean.parquet", "--json")
    assert code == 0
    assert json.loads(out) == {"command": "filter", "rows": 7, "written": 4, "out": str(tmp_path / "new/clean.parquet")}
    clean = read_rows(str(tmp_path / "new/clean.parquet"))
    assert clean["prompt"][:] == [rows[i]["prompt"] for i in sorted(order[3:])]
    assert clean.features == scored.features
    code, out, _ = run(
        capsys,
        "select",
        tmp_path / "out",
        "-k",
        1,
        "--by",
        "risk_gradient",
        "--by",
        "risk_representation",
        "-o",
        tmp_path / "both.parquet",
    )
    assert code == 0


def test_the_account_of_a_run(score, rows_file, tmp_path, anchors):
    code, out, _ = score(rows_file, "--json", "--limit", 2, "--scores", "representation", "--top-n", 2, "--quiet")
    assert code == 0
    account = json.loads(out)
    assert account == json.loads((tmp_path / "out/run.json").read_text())
    assert account["rows"] == account["scored"] == 2
    assert account["unscored"] == {}
    assert account["score_columns"] == ["risk_representation", "risk_representation_balanced"]
    assert account["scores"] == [{"name": "representation", "version": 1, "top_n": 2}]
    assert account["anchors"]["sha256"] == anchors.content_hash
    assert account["model"]["model"]["kind"] == "folder"
    assert len(account["model"]["model"]["fingerprint"]) == 64
    assert {"python", "torch", "transformers", "datasets", "hf-safefilter"} <= set(account["versions"])
    assert account["seconds"] > 0
    assert account["options"] == {
        "device": None,
        "max_length": 1024,
        "max_response_tokens": None,
        "target": "assistant",
        "batch_tokens": None,
        "parameters": "all",
        "direction_energy": 0.9 if account["model"]["dtype"] == "bfloat16" else 1.0,
        "gradient_checkpointing": False,
        "attribution": False,
        "columns": None,
    }


def test_rows_that_cannot_be_scored(score, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "Q", "completion": ""}\n{"prompt": "Q", "completion": "A\\u001b[31m"}\n')
    code, out, _ = score(path, "--scores", "representation")
    assert code == 0
    assert "1 without a score: no target: the response is empty" in out
    assert "\x1b" not in out
    assert "\\x1b[31m" in out
    path.write_text('{"prompt": "Q", "completion": "A"}\n{"prompt": ["x"], "completion": 3}\n')
    code, out, _ = score(path, "--scores", "representation")
    assert code == 0
    assert "1 without a score: prompt[0] is str, not a message with role and content" in out
    path.write_text('{"prompt": "Q", "completion": ""}\n')
    code, _, err = score(path, "--scores", "representation")
    assert code == 2
    assert err == "hf-safefilter: error: none of the 1 rows could be scored; the first: no target: the response is empty"
    assert (tmp_path / "out/scored.parquet").is_file()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ("not json\n", "line 1 is no JSON object"),
        ('{"prompt": "caf\udce9", "completion": "A"}\n', "the column 'prompt' holds bytes that are not UTF-8"),
        ('{"a": 1}\n', "cannot tell prompt from response among the columns 'a'"),
    ],
)
def test_bad_files(score, tmp_path, content, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    code, _, err = score(path)
    assert code == 1
    assert err.startswith("hf-safefilter: error: ")
    assert reason in err


def test_cells_of_a_csv_file_are_text(score, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n6 x 7?,42\nWho?,None\nWhat?,\n")
    code, out, _ = score(tmp_path / "rows.csv", "--scores", "representation", "--json")
    assert code == 0
    assert json.loads(out)["unscored"] == {"no target: the response is empty": 1}
    assert read_rows(str(tmp_path / "out/scored.parquet"))["completion"][:] == ["42", "None", ""]


def test_no_rows(score, tmp_path):
    Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(str(tmp_path / "none.parquet"))
    code, _, err = score(tmp_path / "none.parquet")
    assert code == 1
    assert err.endswith("none.parquet has no rows")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--scores", "magic"], "unknown score 'magic'"),
        (["--scores", ","], "no score chosen"),
        (["--top-n", "0"], "top_n must be"),
        (["--columns", "prompt"], "--columns must look like prompt=q,completion=a"),
        (["--columns", "prompt=x,completion=y"], "columns['prompt'] is 'x', but the dataset has no such column"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--limit", "many"], "invalid int value: 'many'"),
        (["--split", "test"], ""),
        (["--dtype", "int3"], "dtype must be 'auto'"),
        (["--adapter", "/no/adapter"], "no adapter '/no/adapter'"),
    ],
)
def test_bad_options(score, rows_file, options, reason):
    code, _, err = score(rows_file, *options)
    assert code == (0 if options[0] == "--split" else 1)  # a single file has no splits
    assert reason in err


def test_usage_errors_end_with_one(capsys, tmp_path):
    for argv in ([], ["score"], ["score", "x", "--model", "m"], ["nonsense"], ["select", "x"]):
        assert run(capsys, *argv)[0] == 1
    assert run(capsys, "select", tmp_path, "-k", 1, "-o", "x.txt")[2] == (
        "hf-safefilter: error: cannot write 'x.txt': end its name in .csv, .jsonl, .parquet"
    )
    assert "no data at" in run(capsys, "select", "org/none", "-k", 1, "-o", "x.csv")[2]
    (tmp_path / "data.txt").write_text("x")
    assert "cannot read .txt" in run(capsys, "filter", tmp_path / "data.txt", "-k", 1, "-o", "x.csv")[2]
    assert run(capsys, "--help")[0] == 0


def test_an_unwritable_place_is_an_error_in_one_line(capsys, rows_file, tmp_path):
    (tmp_path / "file").write_text("x")
    Dataset.from_dict({"risk_a": [1.0]}).to_parquet(str(tmp_path / "s.parquet"))
    code, _, err = run(capsys, "select", tmp_path / "s.parquet", "-k", 1, "-o", tmp_path / "file/x.csv")
    assert code == 1
    assert str(tmp_path / "file") in err


def test_what_nobody_expected_is_still_one_line(capsys, monkeypatch, rows_file):
    monkeypatch.setattr("hf_safefilter.cli.choose.read_rows", lambda *a: 1 / 0)
    code, _, err = run(capsys, "select", rows_file, "-k", 1, "-o", "x.csv")
    assert code == 2
    assert err == "hf-safefilter: error: unexpected ZeroDivisionError: division by zero (--debug shows where)"
    with pytest.raises(ZeroDivisionError):
        run(capsys, "select", rows_file, "-k", 1, "-o", "x.csv", "--debug")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_safefilter.cli.choose.read_rows", interrupt)
    assert run(capsys, "select", rows_file, "-k", 1, "-o", "x.csv")[0] == 130


def test_reading_rows(tmp_path, rows):
    ds = Dataset.from_list(rows)
    ds.save_to_disk(tmp_path / "disk")
    DatasetDict(train=ds, test=ds.select(range(2))).save_to_disk(tmp_path / "dict")
    DatasetDict(a=ds, b=ds).save_to_disk(tmp_path / "ab")
    ds.to_json(tmp_path / "rows.json")
    ds.to_csv(tmp_path / "rows.csv")
    (tmp_path / "files").mkdir()
    ds.to_parquet(tmp_path / "files" / "train.parquet")
    for name in ("disk", "dict", "rows.json", "rows.csv", "files"):
        assert read_rows(str(tmp_path / name))["prompt"][:] == [r["prompt"] for r in rows]
    assert len(read_rows(str(tmp_path / "dict"), "test")) == 2
    with pytest.raises(InputError, match="several splits: choose one with --split, of a, b"):
        read_rows(str(tmp_path / "ab"))
    with pytest.raises(InputError, match="no split 'x'; it has test, train"):
        read_rows(str(tmp_path / "dict"), "x")
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError):
        read_rows(str(tmp_path / "void"))


def test_reading_rows_from_a_hub(tmp_path):
    """The real client of `datasets` against a Hub on the loopback."""
    folder = tmp_path / "hub/datasets/org/rows"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n' * 3)
    script = (
        "from hf_safefilter.cli.files import read_rows\n"
        "print(read_rows('org/rows')['prompt'][:])\n"
        "try: read_rows('org/none')\nexcept ValueError as error: print(error)\n"
    )
    with HubServer(tmp_path / "hub") as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        argv = [sys.executable, "-c", script]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=os.environ | env)
    rows, error = done.stdout.splitlines()
    assert rows == "['Q', 'Q', 'Q']"
    assert error.startswith("no data at 'org/none': not a file or folder here, and not on the Hub")


def test_the_example(model_folder, tmp_path):
    example = Path(__file__).parents[1] / "examples/score_and_filter.py"
    argv = [
        sys.executable,
        str(example),
        "--model",
        str(model_folder),
        "--limit",
        "10",
        "--out",
        str(tmp_path / "clean.parquet"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("9 of 10 rows saved to")
    assert len(Dataset.from_parquet(str(tmp_path / "clean.parquet"))) == 9


def test_hostile_text_on_a_terminal():
    assert printable("a\x1b[2J\r\n\tb\u202ec\ud800\x00", 60) == "a\\x1b[2J b\\u202ec\\ud800\\x00"
    assert printable("x" * 50, 10) == "x" * 9 + "…"


def test_errors_and_reasons_hold_no_control_characters(capsys):
    for kind in (InputError, UnscorableRow):
        assert str(kind("no \x1b[2J\x07role\u202e")) == "no \\x1b[2J\\x07role\\u202e"
    assert cli.main(["select", "no\x1b[31mfile.jsonl", "-k", "1", "-o", "x.jsonl"]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert table([{"n": 1.5, "t": "a|b"}, {"n": None, "t": ["x"]}], ["n", "t"]).splitlines()[2:] == [
        "1.500  a|b",
        '    -  ["x"]',
    ]
    assert table([], ["a"]).splitlines() == ["a", "-"]


def test_nothing_heavy_is_imported_for_help_or_the_package():
    script = (
        "import sys, hf_safefilter, hf_safefilter.cli\n"
        "try: hf_safefilter.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "dir(hf_safefilter)\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
        "assert hf_safefilter.select_risky.__module__ == 'hf_safefilter.select'\n"
        "from hf_safefilter import *\nassert AnchorSet and SafetyRiskScorer and filter_risky\n"
        "try: hf_safefilter.nothing\nexcept AttributeError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "has no attribute 'nothing'" in done.stdout


def test_the_installed_command():
    command = os.path.join(os.path.dirname(sys.executable), "hf-safefilter")
    for argv in ([command, "--version"], [sys.executable, "-m", "hf_safefilter.cli", "--version"]):
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert done.stdout == f"hf-safefilter {cli.__version__}\n"
