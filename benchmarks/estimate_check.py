"""What `hf-safefilter estimate` says beside what `score` then takes: the same rows and settings, one after the other.

python benchmarks/estimate_check.py [--rows 96] [--data FILE --model MODEL]

By default the built-in rows with SmolLM2-135M-Instruct (its GGUF package must be installed). Loading the model is in neither.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

# Scores, dtype.
SETTINGS = (
    ("gradient,representation", "bfloat16"),
    ("representation", "bfloat16"),
    ("all", "bfloat16"),
    ("gradient", "float32"),
)

# Scores rows in a process of its own; prints what an estimate also says.
_CHILD = """
import sys, time
from pathlib import Path
from hf_safefilter.cli import build_parser
from hf_safefilter.cli.score import rows_and_scorer, score_and_save
from hf_safefilter.engine.loading import default_device
from hf_safefilter.probe import _memory
import json
args = build_parser().parse_args(sys.argv[1:])
rows, scorer = rows_and_scorer(args)
from hf_safefilter.session import _MODELS
from hf_safefilter.engine.loading import load
device = default_device()
_MODELS[(scorer.spec, None, device)] = load(scorer.spec, device)  # not timed
start = time.perf_counter()
scorer.prepare()
fit = time.perf_counter() - start
scored, account = score_and_save(rows, scorer, args.out, data=args.data)
tokens, seconds = account["tokens"], account["seconds"]
print(json.dumps({"tokens": tokens, "fit_seconds": fit, "score_seconds": seconds, "memory": _memory("VmHWM")}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl"))
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=96)
    args = parser.parse_args()
    if args.model is None:
        from hf_safefilter.cli.demo import demo_model

        args.model = str(demo_model())
    print(f"{'scores':24} {'dtype':9} {'':9} {'tokens':>9} {'anchors s':>10} {'rows s':>8} {'peak GiB':>9}")
    for scores, dtype in SETTINGS:
        shared = [args.data, "--model", args.model, "--scores", scores, "--dtype", dtype, "--limit", str(args.rows), "--quiet"]
        said = _json([sys.executable, "-m", "hf_safefilter.cli", "estimate", *shared, "--json"])
        with tempfile.TemporaryDirectory() as folder:
            took = _json([sys.executable, "-c", _CHILD, "score", *shared, "--out", str(Path(folder) / "out")])
        for name, found in (("estimated", said), ("took", took)):
            numbers = f"{found['tokens']:9} {found['fit_seconds']:10.1f} {found['score_seconds']:8.1f}"
            print(f"{scores:24} {dtype:9} {name:9} {numbers} {found['memory'] / 2**30:9.2f}", flush=True)


def _json(command: list[str]) -> dict[str, Any]:
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
