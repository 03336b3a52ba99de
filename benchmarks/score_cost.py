"""What scoring costs beside training on the same rows: `make bench`.

All in one process, on the same rows (one by one where not said otherwise), in turns, so that a machine's drift hits all of
them; medians over rounds, as ratios to the training step (forward and backward with weight gradients, no optimizer). Times
alone mean nothing here.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from importlib import resources

import torch

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.cli.show import table
from hf_safefilter.engine.batching import collate
from hf_safefilter.formats import find_layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    # Fitting costs the same whatever the rows; a few anchors make the same directions to compare with.
    anchors = AnchorSet.load().subset(["fraud"])
    scorers = {name: SafetyRiskScorer(demo_model(), anchors, name, dtype=args.dtype) for name in ("representation", "gradient")}
    batched = SafetyRiskScorer(demo_model(), anchors, "representation", dtype=args.dtype, batch_tokens=1024)
    both = SafetyRiskScorer(demo_model(), anchors, "all", dtype=args.dtype)
    text = (resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()][: args.rows]
    session = both._session(None)
    layout = find_layout(rows[0])
    examples = [session.encoder.encode_row(row, layout) for row in rows]
    model, device = session.engine.model, session.engine.device

    def training_step() -> None:
        for p in model.parameters():
            p.requires_grad_(True)
        for example in examples:
            batch = collate([example], device)
            model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

    def forward() -> None:
        with torch.inference_mode():
            for example in examples:
                model(input_ids=collate([example], device).input_ids, use_cache=False)

    def collect(scorer: SafetyRiskScorer):
        own = scorer._session(None)
        return lambda: own.engine.collect(examples, scorer.needs, own.reference)

    passes = {
        "training step": training_step,
        "forward": forward,
        "representation": collect(scorers["representation"]),
        "representation, 1024 tokens a batch": collect(batched),
        "gradient": collect(scorers["gradient"]),
        "both scores": collect(both),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = {
        name: sorted(v / t for v, t in zip(values[1:], seconds["training step"][1:], strict=True))
        for name, values in seconds.items()
    }
    tokens = sum(len(e.input_ids) for e in examples)
    print(f"SmolLM2-135M-Instruct, {both.spec.dtype}, {len(rows)} rows one by one, {tokens} tokens, {args.rounds} rounds, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}\n")  # fmt: skip
    lines = [
        {
            "pass": name,
            "seconds (median)": median[name],
            "of a training step": statistics.median(ratios[name]),
            "lowest": ratios[name][0],
            "highest": ratios[name][-1],
        }
        for name in passes
    ]
    print(table(lines, list(lines[0])))
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
