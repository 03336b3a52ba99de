"""Sharded scoring against a plain map, and what becomes of it when workers are killed, hang, or files are damaged."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset

from hf_safefilter import SafetyRiskScorer, filter_risky
from hf_safefilter.cli import main
from hf_safefilter.cli.shards import my_shards
from hf_safefilter.shard_plan import read_plan

ROWS = 97
SHARDS = 5


def make_world(folder: Path, model, tokenizer, anchors) -> list[str]:
    """A folder with a model, anchors and rows, two of which cannot be scored; returns the command that scores them."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    anchors.save(folder / "anchors.json")
    rows = [{"prompt": f"Question {i}?", "completion": "word " * (1 + 7 * i % 23), "kind": "ab"[i % 2]} for i in range(ROWS)]
    rows[4]["completion"] = rows[50]["completion"] = ""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["score", str(folder / "rows.jsonl"), "--model", str(folder / "model"), "--dtype", "float32", "--quiet"]
    return [*command, "--anchors", str(folder / "anchors.json"), "--num-shards", str(SHARDS), "--piece-rows", "6"]


@pytest.fixture
def world(tmp_path, model, tokenizer, anchors) -> list[str]:
    return make_world(tmp_path, model, tokenizer, anchors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, tokenizer, anchors) -> bytes:
    """The merged file of a run that nothing interrupted; it does not depend on the folder."""
    folder = tmp_path_factory.mktemp("whole")
    return finish(make_world(folder, model, tokenizer, anchors), folder / "run")


def start(command: list[str], out: Path) -> subprocess.Popen:
    """The command in a process of its own, with one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "hf_safefilter.cli", *command, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(command: list[str], out: Path) -> bytes:
    """Score what is left and merge; returns the merged file."""
    last = start(command, out)
    said, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert f"{SHARDS} of {SHARDS} shards are complete" in said
    assert not list(out.rglob("*.tmp")), "left by a killed worker"
    assert main(["merge", str(out), "-o", str(out.parent / f"{out.name}.merged.parquet")]) == 0
    return (out.parent / f"{out.name}.merged.parquet").read_bytes()


def wait_for(path: Path, pattern: str, count: int = 1, seconds: float = 60) -> None:
    end = time.time() + seconds
    while len(list(path.rglob(pattern))) < count:
        assert time.time() < end, f"no {pattern} in {path}"
        time.sleep(0.01)


def test_shards_give_what_a_map_gives(world, tmp_path, anchors, capsys):
    assert main([*world, "--out", str(tmp_path / "run")]) == 0
    assert "next  hf-safefilter merge" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 1
    assert "holds shards of score --num-shards: join them first, hf-safefilter merge" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "run"), "-o", str(tmp_path / "scored")]) == 0
    assert f"{ROWS - 2} of {ROWS} rows scored" in capsys.readouterr().out
    merged = Dataset.from_parquet(str(tmp_path / "scored/scored.parquet"))
    rows = Dataset.from_json(str(tmp_path / "rows.jsonl"))
    plain = rows.map(SafetyRiskScorer(str(tmp_path / "model"), anchors, dtype="float32"), batched=True)
    assert merged["row_index"][:] == list(range(ROWS))
    assert merged.remove_columns("row_index").features == plain.features
    for name, kind in plain.features.items():
        if kind.dtype == "float32":
            ours, theirs = (np.array([np.nan if v is None else v for v in ds[name]]) for ds in (merged, plain))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            assert merged[name][:] == plain[name][:]
    account = json.loads((tmp_path / "scored/run.json").read_text())
    assert account["unscored"] == {"no target: the response is empty": 2}
    assert account["data_on_hub"] is False
    assert account["tokens"] == sum(n or 0 for n in plain["total_tokens"])
    assert main(["report", str(tmp_path / "scored"), "-o", str(tmp_path / "r.html")]) == 0
    assert len(filter_risky(merged, fraction=0.1, unscored="keep")) == ROWS - 10
    # Complete: not done again, and nothing of the work is left.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/shards").iterdir()}
    assert main([*world, "--out", str(tmp_path / "run")]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run/shards").iterdir()} == before
    assert list((tmp_path / "run/work").iterdir()) == []


def killed(world: list[str], out: Path, kills: int, seed: int, *, launchers: bool = False) -> int:
    """Kill one or two workers at random moments, mostly while they score, again and again; returns how often.

    With `launchers` sometimes `torchrun` instead, whose ranks go on beside the next round's workers, or are killed with it.
    """
    rng, done = random.Random(seed), 0
    orphans: list[psutil.Process] = []
    progress = lambda: {p for part in ("work", "records") for p in (out / part).rglob("*.*")}  # noqa: E731
    while done < kills and len(list((out / "records").glob("*.json"))) < SHARDS:
        before = progress()
        if parent := launchers and rng.random() < 0.4:
            workers = [launched("torchrun", world, out)]
        else:
            workers = [start(world, out) for _ in range(rng.choice([1, 2]))]
        end = time.time() + (60 if done == 0 or rng.random() < 0.7 else rng.uniform(0, 4))
        while progress() == before and time.time() < end and any(w.poll() is None for w in workers):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3 if done else 0.05))  # the first kill hits its worker
        for worker in workers:
            if worker.poll() is None:
                ranks = psutil.Process(worker.pid).children(recursive=True) if parent else []
                worker.send_signal(signal.SIGKILL)
                done += 1
                orphans += ranks
                if rng.random() < 0.5:
                    done += ended(ranks)
            worker.wait()  # not for the end of its output, which its ranks hold open
    return done + ended(orphans)


def ended(processes: list[psutil.Process]) -> int:
    """Kill what is still running, wait for it, and return how many that were."""
    count = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            count += 1
    psutil.wait_procs(processes, timeout=60)
    return count


def test_killed_workers_leave_the_same_bytes(world, tmp_path, whole):
    assert killed(world, tmp_path / "run", kills=3, seed=0) >= 1
    assert finish(world, tmp_path / "run") == whole


def test_a_piece_that_was_finished_is_not_scored_again(world, tmp_path):
    out = tmp_path / "run"
    worker = start(world, out)
    wait_for(out / "work", "*.seal", 2)
    worker.kill()
    worker.communicate()
    sealed = [p for p in (out / "work").rglob("*.seal") if not p.name.startswith(".")]
    assert sealed or list((out / "records").iterdir())
    finish(world, out)
    record = json.loads((out / "records/00000.json").read_text())
    rows = {start: stop - start for start, stop in read_plan(out).pieces(0)}
    kept = [rows[int(p.stem)] for p in sealed if p.parent.name == "00000"]
    if kept:  # else the first shard was complete when the worker died
        assert record["rows_scored_last"] == record["rows"] - sum(kept)


@pytest.mark.parametrize("count", [2, 4])
def test_workers_share_and_do_nothing_twice(count, world, tmp_path, whole):
    out = tmp_path / "run"
    workers = [start(world, out) for _ in range(count)]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    records = [json.loads(p.read_text()) for p in sorted((out / "records").iterdir())]
    assert sum(r["rows_scored_last"] for r in records) == ROWS
    assert finish(world, out) == whole


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # Without GPUs, too, this starts two processes; --cpu starts one.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}


def launched(launcher: str, world: list[str], out: Path) -> subprocess.Popen:
    """The command on two ranks."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "hf_safefilter.cli", *world, "--out", str(out)]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_spreads_shards_over_ranks(launcher, world, tmp_path, whole):
    process = launched(launcher, world, tmp_path / "run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert finish(world, tmp_path / "run") == whole


def test_a_killed_parent_and_a_killed_rank(world, tmp_path, whole):
    out = tmp_path / "run"
    parent = launched("torchrun", world, out)
    wait_for(out, "0000*.parquet")
    ranks = psutil.Process(parent.pid).children(recursive=True)
    assert len(ranks) >= 2
    parent.kill()  # its ranks go on without it, until one of them is killed, too
    ranks[0].kill()
    parent.communicate()
    psutil.wait_procs(ranks, timeout=120)
    assert not [r for r in ranks if r.is_running() and r.status() != psutil.STATUS_ZOMBIE], "a rank hangs"
    assert finish(world, out) == whole


def test_a_merge_that_is_killed(world, tmp_path, whole):
    """At whatever moment: the file is not there, or it is whole; what was left is tidied up by the next."""
    assert main([*world, "--out", str(tmp_path / "run")]) == 0
    merged, killed_at = tmp_path / "run.merged.parquet", []
    command = [sys.executable, "-m", "hf_safefilter.cli", "merge", str(tmp_path / "run"), "-o", str(merged)]
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".run.merged*.tmp")):
            pass
        process.kill()
        process.wait()
        killed_at.append(process.returncode == -signal.SIGKILL)
        assert not merged.exists() or merged.read_bytes() == whole
        merged.unlink(missing_ok=True)
    assert any(killed_at), "every merge was done before it could be killed"
    assert finish(world, tmp_path / "run") == whole
    assert not list(tmp_path.glob(".*.tmp"))


def test_rows_of_which_none_can_be_scored(world, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": ""}) for i in range(6)))
    assert main([*world, "--out", str(tmp_path / "run")]) == 0
    assert main(["merge", str(tmp_path / "run"), "-o", str(tmp_path / "scored")]) == 2
    assert "none of the 6 rows has a score" in capsys.readouterr().err
    assert json.loads((tmp_path / "scored/run.json").read_text())["unscored"] == {"no target: the response is empty": 6}


def test_whose_shards():
    assert my_shards(6, None, {}) == [0, 1, 2, 3, 4, 5]
    assert my_shards(6, 4, {"RANK": "1", "WORLD_SIZE": "2"}) == [4]
    assert my_shards(6, None, {"RANK": "1", "WORLD_SIZE": "2"}) == [1, 3, 5, 0, 2, 4]
    slurm = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert my_shards(6, None, slurm) == [2, 5, 0, 1, 3, 4]
    assert my_shards(12, None, slurm | {"RANK": "1", "WORLD_SIZE": "2"})[:2] == [5, 11]
    assert my_shards(4, None, {"SLURM_ARRAY_TASK_ID": "3"}) == [3, 0, 1, 2]
    assert sorted(my_shards(7, None, {"RANK": "9", "WORLD_SIZE": "12"})) == list(range(7))


def test_damage_is_named_and_repaired(world, tmp_path, capsys):
    out, merged = tmp_path / "run", tmp_path / "m.parquet"
    whole = finish(world, out)
    merge = ["merge", str(out), "-o", str(merged)]
    shard, record = out / "shards/00002-of-00005.parquet", out / "records/00002.json"
    good, good_record = shard.read_bytes(), record.read_text()
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 1
    for damaged in (bytes(flipped), good[:-100], b""):
        shard.write_bytes(damaged)
        assert main(merge) == 2
        said = capsys.readouterr().err
        assert "shard 2 is damaged" in said
        assert f"delete {record} and run the same score command again" in said
        assert not merged.exists()
    for damaged in (
        "{",
        "[]",
        json.dumps(json.loads(good_record) | {"start": 0}),
        json.dumps(json.loads(good_record) | {"plan": "x"}),
    ):
        record.write_text(damaged)
        assert main(merge) == 2
        assert "shard 2 is damaged" in capsys.readouterr().err
    record.unlink()
    assert main(merge) == 2
    assert "1 of 5 shards are missing (2): run the same score command again" in capsys.readouterr().err
    assert finish(world, out) == whole


def test_damaged_pieces_are_scored_again(world, tmp_path, whole):
    out = tmp_path / "run"
    worker = start(world, out)
    wait_for(out / "work", "*.parquet", 2)
    worker.send_signal(signal.SIGSTOP)
    pieces = [p for p in (out / "work").rglob("*.parquet") if not p.name.startswith(".")]
    kept = pieces[0].parent
    shutil.copytree(kept, tmp_path / "kept")
    worker.kill()
    worker.communicate()
    for piece in kept.glob("*.parquet"):
        piece.write_bytes(piece.read_bytes()[:-50])
    assert finish(world, out) == whole


def test_another_run_in_the_folder_is_refused(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*world, "--out", str(out), "--shard-index", "1"]) == 0
    assert "1 of 5 shards are complete" in capsys.readouterr().out
    plan = (out / "plan.json").read_text()
    for change, message in (
        (["--num-shards", "4"], "shards of another number of shards (5, not 4): use another folder"),
        (["--piece-rows", "7"], "another --piece-rows"),
        (["--max-length", "20"], "scored with another scorer (other options)"),
        (["--scores", "representation"], "(other scores)"),
        (["--limit", "50"], "other rows, or rows that have changed"),
    ):
        assert main([*world, *change, "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"prompt": "More?", "completion": "Yes.", "kind": "a"}))
    assert main([*world, "--out", str(out)]) == 1
    assert "other rows, or rows that have changed" in capsys.readouterr().err
    (out / "plan.json").write_text(plan.replace('"num_shards": 5', '"num_shards": 6'))
    assert main(["merge", str(out), "-o", str(tmp_path / "m.parquet")]) == 1
    assert "was changed by hand" in capsys.readouterr().err


def test_a_worker_that_hangs_is_named_and_holds_up_only_its_shard(world, tmp_path, whole):
    out = tmp_path / "run"
    hanging = start(world, out)
    wait_for(out / "work", "*.parquet", 1)
    hanging.send_signal(signal.SIGSTOP)
    try:
        other = start([*world, "--stale-minutes", "0"], out)
        said, errors = other.communicate(timeout=300)
        assert other.returncode == 2
        assert f"{SHARDS - 1} of {SHARDS} shards are complete" in said
        assert f"makes no progress: process {hanging.pid} on " in errors
        assert "end that process and run the same command again" in errors
    finally:
        hanging.kill()
        hanging.communicate()
    assert finish(world, out) == whole


def test_files_that_cannot_be_written_whole(world, tmp_path, whole):
    """The system refuses to let files grow, as on a full disk: one line, nothing half-written, and nothing lost."""
    out = tmp_path / "run"
    first = start([*world, "--shard-index", "0"], out)  # the anchors are fitted, and the rows cached
    first.communicate(timeout=300)
    assert first.returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "hf_safefilter.cli", *world, "--out", str(out)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("hf-safefilter: error:")]
    assert "Traceback" not in done.stderr
    assert len(list((out / "records").iterdir())) == 1
    assert [p for p in (out / "work").rglob("*") if p.is_file()] == []
    assert finish(world, out) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num-shards", "0"], "num_shards must be at least 1"),
        (["--num-shards", "98"], "98 shards for 97 rows"),
        (["--shard-index", "5"], "--shard-index must be from 0 to 4, got 5"),
        (["--piece-rows", "0"], "piece_rows must be at least 1"),
    ],
)
def test_bad_arguments(world, tmp_path, capsys, change, message):
    assert main([*world, *change, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


def test_bad_folders(tmp_path, world, capsys):
    (tmp_path / "file").write_text("")
    assert main([*world, "--out", str(tmp_path / "file")]) == 1
    assert main(["merge", str(tmp_path), "-o", str(tmp_path / "m.parquet")]) == 1
    assert "it has no plan.json" in capsys.readouterr().err
    for content in ("{", "[1]", '{"format": "hf_safefilter.shards/9"}', '{"format": "hf_safefilter.shards/1"}'):
        (tmp_path / "plan.json").write_text(content)
        assert main(["merge", str(tmp_path), "-o", str(tmp_path / "m.parquet")]) == 1
    assert main(["merge", str(tmp_path), "-o", str(tmp_path / "m.csv")]) == 1
    assert "merge writes .parquet" in capsys.readouterr().err
    assert main([*world[:2], "--model", "x", "--shard-index", "0", "--out", str(tmp_path / "o")]) == 1
    assert "--shard-index goes with --num-shards" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_thirty_kills(world, tmp_path, seed, whole):
    """Ten of them each: of workers, and in two series of launchers, too, with and without their ranks."""
    total, turn = 0, 0
    while total < 10:
        out = tmp_path / f"run{turn}"
        total += killed(world, out, kills=10 - total, seed=100 * seed + turn, launchers=seed > 0)
        assert finish(world, out) == whole
        assert read_plan(out).rows == ROWS
        turn += 1
