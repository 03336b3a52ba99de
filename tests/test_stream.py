"""Rows that come as a stream, of unknown length: the same scores, resumed after kills, with flat memory."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from datasets import Dataset, IterableDataset

from hf_safefilter import SafetyRiskScorer
from hf_safefilter.cli import main
from hf_safefilter.errors import InputError
from hf_safefilter.stream import score_stream

ROWS = 61


@pytest.fixture
def world(tmp_path, model_folder, anchors) -> list[str]:
    """The command that scores rows.jsonl, two of which cannot be scored."""
    anchors.save(tmp_path / "anchors.json")
    rows = [{"prompt": f"Question {i}?", "completion": "word " * (1 + 7 * i % 23), "kind": "ab"[i % 2]} for i in range(ROWS)]
    rows[4]["completion"] = rows[50]["completion"] = ""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["score", str(tmp_path / "rows.jsonl"), "--model", str(model_folder), "--dtype", "float32", "--streaming"]
    return [*command, "--anchors", str(tmp_path / "anchors.json"), "--piece-rows", "10", "--out", str(tmp_path / "out")]


def streamed(rows, tmp_path, scorer, **options) -> Dataset:
    (tmp_path / "out").mkdir(exist_ok=True)
    score_stream(rows, scorer, tmp_path / "out/scored.parquet", data="these rows", **options)
    return Dataset.from_parquet(str(tmp_path / "out/scored.parquet"))


def test_a_stream_gives_what_a_map_gives(world, tmp_path, model_folder, anchors, capsys):
    assert main(world) == 0
    said = capsys.readouterr()
    assert f"{ROWS - 2} of {ROWS} rows scored" in said.out
    assert "2 without a score: no target: the response is empty" in said.out
    scored = Dataset.from_parquet(str(tmp_path / "out/scored.parquet"))
    plain = Dataset.from_json(str(tmp_path / "rows.jsonl")).map(
        SafetyRiskScorer(str(model_folder), anchors, dtype="float32"), batched=True
    )
    assert scored["row_index"][:] == list(range(ROWS))
    assert scored.remove_columns("row_index").features == plain.features
    for name in plain.column_names:
        if plain.features[name].dtype == "float32":
            ours, theirs = (np.array([np.nan if v is None else v for v in ds[name]]) for ds in (scored, plain))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            assert scored[name][:] == plain[name][:]
    account = json.loads((tmp_path / "out/run.json").read_text())
    assert account["rows"] == ROWS
    assert account["tokens"] == sum(n or 0 for n in plain["total_tokens"])
    assert account["model"]["dtype"] == "float32"
    assert not (tmp_path / "out/stream").exists()
    assert main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "r.html")]) == 0


def test_a_bar_without_a_total(world, tmp_path):
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_safefilter.cli", *world], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=end, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(end)
    shown = b""
    with suppress(OSError):  # what a terminal says when nobody writes to it any more
        while more := os.read(terminal, 4096):
            shown += more
    os.close(terminal)
    assert process.wait(60) == 0
    assert re.search(rb"length unknown: \d+row \[", shown)


@pytest.mark.parametrize("form", ["csv", "parquet", "saved", "folder", "splits"])
def test_every_form_of_data_can_be_streamed(form, world, tmp_path):
    rows = Dataset.from_json(world[1])
    at = str(tmp_path / "data")
    if form == "csv":
        rows.to_csv(at := at + ".csv")
    elif form == "parquet":
        rows.to_parquet(at := at + ".parquet")
    elif form == "saved":
        rows.save_to_disk(at)
    elif form == "splits":
        rows.train_test_split(0.1, shuffle=False)["train"].to_parquet(f"{at}/train.parquet")
        rows.to_parquet(f"{at}/test.parquet")
    else:
        rows.to_json(f"{at}/rows.jsonl")
    split = ["--split", "test"] if form == "splits" else []
    assert main([world[0], at, *world[2:], *split, "--limit", "12", "--quiet"]) == 0
    scored = Dataset.from_parquet(str(tmp_path / "out/scored.parquet"))
    assert scored["prompt"][:] == rows["prompt"][:12]


def test_a_killed_stream_goes_on(world, tmp_path, capsys):
    assert main([*world, "--quiet"]) == 0
    whole = (tmp_path / "out/scored.parquet").read_bytes()
    other = [*world[:-1], str(tmp_path / "again"), "--quiet"]
    for pieces in (1, 3, 4):
        command = [sys.executable, "-m", "hf_safefilter.cli", *other]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        end = time.time() + 120
        while len(list((tmp_path / "again/stream").glob("0*.parquet"))) < pieces:
            assert time.time() < end
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "again/scored.parquet").exists():
            break  # it was faster
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "again/stream").glob("0*.parquet")}
    # Damaged: as good as none, and so is what comes after it.
    broken = tmp_path / "again/stream/000000000000.parquet"
    if broken.exists():
        broken.write_bytes(broken.read_bytes()[:-9])
    assert main(other) == 0
    assert kept, "killed before its first piece"
    assert (tmp_path / "again/scored.parquet").read_bytes() == whole
    assert not list((tmp_path / "again").glob(".*.tmp"))


def test_pieces_are_not_scored_again(tmp_path, model, tokenizer, anchors):
    """A stream that breaks at row 35 leaves three pieces; the next run begins after them."""
    asked: list[int] = []

    def rows(breaks: bool):
        def generate():
            for i in range(50):
                if breaks and i == 35:
                    raise ValueError("the line is cut")
                asked.append(i)
                yield {"prompt": f"Question {i}?", "completion": "word " * (1 + i % 7)}

        return IterableDataset.from_generator(generate)

    scorer = SafetyRiskScorer(model, anchors, scores=["representation"], tokenizer=tokenizer)
    with pytest.raises(InputError, match="the rows after row 3. cannot be read: ValueError: the line is cut"):
        streamed(rows(True), tmp_path, scorer, piece_rows=8)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/stream").glob("0*.parquet")}
    assert len(kept) == 4
    seen: list[int] = []
    scored = streamed(rows(False), tmp_path, scorer, piece_rows=8, progress=seen.append)
    assert seen == [8, 8, 8, 8, 8, 8, 2]
    assert scored["prompt"][:] == [f"Question {i}?" for i in range(50)]


def test_pieces_of_another_run_are_refused(world, tmp_path, model, tokenizer, anchors, capsys):
    (tmp_path / "out/stream").mkdir(parents=True)
    scorer = SafetyRiskScorer(model, anchors, scores=["representation"], tokenizer=tokenizer)
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "a", "completion": "b"}, 7]))
    with pytest.raises(InputError, match="cannot be read"):
        streamed(rows, tmp_path, scorer, piece_rows=10)
    assert main([*world, "--quiet"]) == 1
    assert "other rows, or rows that have changed: use another folder" in capsys.readouterr().err


def test_types_that_change_along_the_stream(tmp_path, model, tokenizer, anchors):
    scorer = SafetyRiskScorer(model, anchors, scores=["representation"], tokenizer=tokenizer)

    def rows(late, early=1):
        def generate():
            for i in range(300):
                yield {"prompt": "Why?", "completion": "Because.", "note": early if i < 256 else late}

        return IterableDataset.from_generator(generate)

    # Whole numbers become numbers; text and numbers are nothing in common.
    assert streamed(rows(0.5), tmp_path, scorer)["note"][254:258] == [1.0, 1.0, 0.5, 0.5]
    objects = [{"a": None, "b": 1}], [{"a": "x", "b": 2}]
    assert streamed(rows(objects[1], objects[0]), tmp_path, scorer)["note"][255:257] == list(objects)
    with pytest.raises(InputError, match="the rows from 256 on have columns of other types than those before .*note"):
        streamed(rows("one"), tmp_path, scorer)


def test_what_a_stream_cannot_take(tmp_path, model, tokenizer, anchors):
    scorer = SafetyRiskScorer(model, anchors, scores=["representation"], tokenizer=tokenizer)
    row = {"prompt": "Why?", "completion": "Because."}
    with pytest.raises(InputError, match="has a column 'row_index' already: rename it"):
        streamed(IterableDataset.from_list([row | {"row_index": 3}]), tmp_path, scorer)
    with pytest.raises(InputError, match="piece_rows must be at least 1, got 0"):
        streamed(IterableDataset.from_list([row]), tmp_path, scorer, piece_rows=0)


def test_an_empty_stream(world, tmp_path, capsys):
    Dataset.from_json(world[1]).select([]).to_parquet(str(tmp_path / "none.parquet"))
    assert main([world[0], str(tmp_path / "none.parquet"), *world[2:], "--quiet"]) == 1
    assert "none.parquet has no rows" in capsys.readouterr().err
    assert main([*world, "--num-shards", "2"]) == 1
    assert "a stream has no shards" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_rows(tmp_path, model, tokenizer, anchors):
    """12,000 rows with 30 kB that is not scored: 360 MB go through, of which little stays."""
    scorer = SafetyRiskScorer(model, anchors, scores=["representation"], tokenizer=tokenizer)
    memory: list[int] = []

    def generate():
        for i in range(12_000):
            if i % 500 == 0:
                memory.append(psutil.Process().memory_info().rss)
            yield {"prompt": "Why?", "completion": "Because.", "ballast": f"{i:05d}" * 6000}

    assert len(streamed(IterableDataset.from_generator(generate), tmp_path, scorer)) == 12_000
    assert max(memory) - memory[4] < 100e6
