"""Peak memory against the number of rows: all scores of a small random model over 1,000 and 10,000 rows, each in its process.

What grows with the rows would show here; what grows with the model is in `score_cost.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from importlib import resources

from datasets import Dataset

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.testing import tiny_model, tiny_tokenizer


def score(count: int, folder: str) -> None:
    """Score `count` rows from disk to disk, and print the process's peak memory in MiB."""
    text = (resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    path = f"{folder}/rows-{count}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            row = rows[i % len(rows)]
            file.write(json.dumps({"prompt": f"{row['prompt']} ({i})", "completion": row["completion"][:120]}) + "\n")
    model = tiny_model("llama_tied", hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    scorer = SafetyRiskScorer(model, AnchorSet.load().subset(["fraud"]), "all", tokenizer=tiny_tokenizer())
    ds = Dataset.from_json(path, cache_dir=folder)
    assert len(ds.map(scorer, batched=True)) == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--child", nargs=2, metavar=("ROWS", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        score(int(args.child[0]), args.child[1])
        return
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            argv = [sys.executable, __file__, "--child", str(rows), folder]
            peak = float(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            first = first or peak
            print(f"{rows:6} rows: peak {peak:.0f} MiB, {peak / first - 1:+.1%} to the first")


if __name__ == "__main__":
    main()
