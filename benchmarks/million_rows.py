"""A million short rows through the sharded command with a tiny model: does memory grow, does it slow down?

python benchmarks/million_rows.py [--rows 1000000 --shards 20 --workers 1]

Memory is the resident set of the whole process tree, looked at twice a second, the median of each tenth of the rows; time that
of each tenth, from when its pieces were written. The growth asked for: from the second tenth (warm) to the last. The merge's
memory is looked at, too. Prints one line of JSON for each part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from hf_safefilter import AnchorSet
from hf_safefilter.testing import tiny_model, tiny_tokenizer

COMMAND = [sys.executable, "-m", "hf_safefilter.cli"]


def make_rows(path: Path, rows: int) -> None:
    """Short rows of differing lengths, some of which cannot be scored."""
    writer = None
    for start in range(0, rows, 50_000):
        places = range(start, min(start + 50_000, rows))
        answers = ["" if i % 1000 == 7 else "word " * (1 + 7 * i % 5) for i in places]
        table = pa.table({"prompt": [f"Question {i}?" for i in places], "completion": answers})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def watched(command: list[str], out: Path, workers: int) -> tuple[list[tuple[float, int, float]], float]:
    """Run; (seconds, rows that are done, MiB of all processes) twice a second, and the seconds that it took."""
    started = time.time()
    each = [
        subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) for _ in range(workers)
    ]
    seen = []
    while any(p.poll() is None for p in each):
        memory = 0
        for p in each:
            with suppress(psutil.NoSuchProcess):
                tree = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
                memory += sum(q.memory_info().rss for q in tree)
        done = sum(json.loads(r.read_text())["rows"] for r in (out / "records").glob("*.json"))
        done += 256 * sum(1 for _ in (out / "work").glob("*/*.parquet"))
        seen.append((time.time() - started, done, memory / 2**20))
        time.sleep(0.5)
    if any(p.returncode for p in each):
        raise SystemExit("a worker failed")
    return seen, time.time() - started


def main() -> None:
    """Score, merge, and check the merged rows' order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scores", default="representation")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        AnchorSet.load().subset(["fraud"]).save(folder / "anchors.json")
        make_rows(folder / "rows.parquet", args.rows)
        out = folder / "run"
        command = [*COMMAND, "score", str(folder / "rows.parquet"), "--model", str(folder / "model"), "--dtype", "float32"]
        command += ["--anchors", str(folder / "anchors.json"), "--scores", args.scores, "--quiet"]
        command += ["--out", str(out), "--num-shards", str(args.shards)]
        seen, seconds = watched(command, out, args.workers)
        tenths = []
        for tenth in range(10):
            low, high = tenth * args.rows / 10, (tenth + 1) * args.rows / 10
            inside = [s for s in seen if low < s[1] <= high]
            if len(inside) > 1:
                rate = (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
                tenths.append({"rows_per_second": round(rate), "mib": round(statistics.median(s[2] for s in inside), 1)})
        print(json.dumps({"rows": args.rows, "workers": args.workers, "seconds": round(seconds), "tenths": tenths}))
        warm, last = tenths[1], tenths[-1]
        print(json.dumps({"memory_growth": round(last["mib"] / warm["mib"] - 1, 4),
                          "speed_last_to_second": round(last["rows_per_second"] / warm["rows_per_second"], 3)}))  # fmt: skip
        merge = [*COMMAND, "merge", str(out), "-o", str(folder / "merged.parquet")]
        seen, seconds = watched(merge, out, 1)
        print(json.dumps({"merge_seconds": round(seconds), "merge_peak_mib": round(max(s[2] for s in seen))}))
        at = 0
        with pq.ParquetFile(folder / "merged.parquet") as file:
            for batch in file.iter_batches(columns=["row_index", "prompt"]):
                assert batch["row_index"].to_pylist() == list(range(at, at := at + len(batch)))
                assert batch["prompt"][0].as_py() == f"Question {at - len(batch)}?"
        assert at == args.rows


if __name__ == "__main__":
    main()
