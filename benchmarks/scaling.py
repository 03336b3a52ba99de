"""What a second worker brings: the same rows scored in shards by 1, 2, ... processes, each on its own core with one thread.

python benchmarks/scaling.py --data ../shared/data/alpaca_999.jsonl [--rows 160 --workers 1,2 --repeats 2]

With the demo's model and anchors fitted beforehand. Efficiency is (time of 1) / (n x time of n): of the whole command, from
start to exit, and of the scoring alone (rows a second over shards, all workers together, but for the first of each, in which it
loads the model). Runs take turns, so that a slow minute of the machine falls on all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hf_safefilter.cli.demo import demo_adapter, demo_model

COMMAND = [sys.executable, "-m", "hf_safefilter.cli"]


def score(command: list[str], out: Path, workers: int, shards: int) -> dict[str, Any]:
    """One run: seconds of the whole, and rows a second while rows were scored."""
    cores = sorted(os.sched_getaffinity(0))

    def on_core(place: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["taskset", "--cpu-list", str(cores[place % len(cores)]), *command, "--out", str(out), "--num-shards", str(shards)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(place), "WORLD_SIZE": str(workers)},
            stdout=subprocess.DEVNULL,
        )

    started = time.perf_counter()
    processes = [on_core(place) for place in range(workers)]
    if any(p.wait() for p in processes):
        raise SystemExit("a worker failed")
    seconds = time.perf_counter() - started
    paths = sorted((out / "records").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    records = [json.loads(path.read_text()) for path in paths]
    by_worker: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_worker.setdefault(record["worker"], []).append(record)
    # Without each worker's first shard, in which it loads the model.
    rate = sum(sum(r["rows"] for r in mine[1:]) / sum(r["seconds"] for r in mine[1:]) for mine in by_worker.values())
    return {"workers": workers, "seconds": seconds, "rows_per_second": rate, "who_worked": len(by_worker)}


def main() -> None:
    """Run in turns and print one line of JSON for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--scores", default="gradient,representation")
    args = parser.parse_args()
    model = ["--model", str(demo_model()), "--adapter", str(demo_adapter()), "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "reference")
        fit = [*COMMAND, "fit", *model, "--scores", args.scores, "--out", reference]
        subprocess.run(fit, check=True, stdout=subprocess.DEVNULL)
        command = [*COMMAND, "score", args.data, *model, "--scores", args.scores, "--limit", str(args.rows)]
        command += ["--reference", reference, "--piece-rows", "10"]
        runs: dict[int, list[dict[str, Any]]] = {}
        for _ in range(args.repeats):
            for workers in map(int, args.workers.split(",")):
                out = Path(folder) / "run"
                runs.setdefault(workers, []).append(score(command, out, workers, args.shards))
                print(json.dumps(runs[workers][-1]), file=sys.stderr, flush=True)
                shutil.rmtree(out)
    whole = {n: statistics.median(run["seconds"] for run in each) for n, each in runs.items()}
    rate = {n: statistics.median(run["rows_per_second"] for run in each) for n, each in runs.items()}
    for n, each in runs.items():
        line = {"workers": n, "seconds": [round(run["seconds"], 1) for run in each]}
        line["rows_per_second"] = [round(run["rows_per_second"], 2) for run in each]
        ideal = min(n, os.cpu_count() or 1)
        if 1 in runs:
            line["efficiency_whole"] = round(whole[1] / whole[n] / ideal, 3)
            line["efficiency_scoring"] = round(rate[n] / rate[1] / ideal, 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
