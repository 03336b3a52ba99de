"""What scoring costs beside training on the same rows: `make bench`.

All in one process, on the same rows in the same micro-batches, in turns, so that a machine's drift hits all of them; medians
over rounds, as ratios to the training step (forward and backward with weight gradients, no optimizer) of the same round. Times
alone mean nothing here. Peak memory is what a pass adds to the process (Linux), the reference counted apart.

Models: SmolLM2-135M-Instruct, and with `--model wide` a random Llama of two layers, 4096 wide (as in a 7B model).
Rows: the first of `--data` (JSON lines with prompt and completion, or Alpaca's columns), or the built-in sample's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.chat import Example
from hf_safefilter.cli.demo import demo_model
from hf_safefilter.cli.show import table
from hf_safefilter.engine.batching import collate, micro_batches
from hf_safefilter.formats import find_layout
from hf_safefilter.testing import tiny_tokenizer

SETS = {
    "forward only": None,
    "representation": "representation",
    "larf": "larf",
    "representation scores": ("representation", "larf", "compliance", "subspace", "refusal_direction"),
    "self_influence": "self_influence",
    "gradient": "gradient",
    "all": "all",
}


class Bench:
    """A model, rows in micro-batches, and passes over them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load(args)
        # A few anchors make directions as large as all would, and a pass over rows cannot tell.
        self.anchors = AnchorSet.load().subset(["fraud"]) if args.few_anchors else AnchorSet.load()
        self.examples = encode(self.scorer("baseline"), args)
        self.groups = micro_batches([len(e.input_ids) for e in self.examples], args.batch_tokens)
        self.batches = [[self.examples[i] for i in group] for group in self.groups]

    def scorer(self, scores: Any, **options: Any) -> SafetyRiskScorer:
        options = {"direction_energy": 1.0, "batch_tokens": self.args.batch_tokens, **options}
        return SafetyRiskScorer(self.model, self.anchors, scores, tokenizer=self.tokenizer, **options)

    def collect(self, scores: Any, tokens: int | None = None, **options: Any):
        """Our pass for these scores, with its anchors fitted."""
        session = self.scorer(scores, **options)._session(None)
        rows = self.examples if tokens is None else [e.first_targets(tokens) for e in self.examples]

        def run() -> None:
            session.engine.collect(rows, session.needs, session.reference)

        return run, session

    def training_step(self, batches: list[list[Example]] | None = None) -> None:
        """Forward and backward with weight gradients, as a trainer does, without the optimizer's step."""
        for p in self.model.parameters():
            p.requires_grad_(True)
        for batch in batches or self.batches:
            padded = collate(batch, "cpu")
            mask = torch.tensor([[1] * len(e.input_ids) + [0] * (padded.labels.shape[1] - len(e.input_ids)) for e in batch])
            mask = None if bool(mask.all()) else mask
            self.model(input_ids=padded.input_ids, attention_mask=mask, labels=padded.labels, use_cache=False).loss.backward()
            self.model.zero_grad(set_to_none=True)

    def forward(self) -> None:
        """The forward pass of training."""
        with torch.inference_mode():
            for batch in self.batches:
                self.model(input_ids=collate(batch, "cpu").input_ids, use_cache=False)

    def one_at_a_time(self) -> None:
        """As He et al.'s code works: row by row, the flattened gradient, once for each of three anchor files."""
        size = sum(p.numel() for p in self.model.parameters())
        anchor = torch.ones(size, dtype=next(self.model.parameters()).dtype)
        for p in self.model.parameters():
            p.requires_grad_(True)
        for _ in range(3):
            for example in self.examples:
                batch = collate([example], "cpu")
                self.model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
                g = torch.cat([p.grad.flatten() for p in self.model.parameters()])
                torch.dot(g / g.norm(), anchor)
                self.model.zero_grad(set_to_none=True)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model in its dtype, and its tokenizer."""
    if args.model == "wide":
        # A small vocabulary: in a whole 7B model the head is 2% of the work, and with a large one here it would be half.
        config = LlamaConfig(
            vocab_size=512, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=2048, initializer_range=0.02,
        )  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval(), tiny_tokenizer()
    session = SafetyRiskScorer(demo_model(), AnchorSet.load().subset(["fraud"]), "larf", dtype=args.dtype)._session(None)
    return session.engine.model, session.encoder.tokenizer


def encode(scorer: SafetyRiskScorer, args: argparse.Namespace) -> list[Example]:
    """The rows, encoded; a random choice of those that are there, the same every time."""
    if args.data:
        text = Path(args.data).read_text("utf-8")
    else:
        text = (resources.files("hf_safefilter") / "assets" / "benign_sample.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows = random.Random(0).sample(rows, min(args.rows, len(rows)))
    encoder = scorer._session(None).encoder
    layout = find_layout(list(rows[0]))
    examples = [encoder.encode_row(row, layout) for row in rows]
    if args.length:
        examples = [Example(e.input_ids[: args.length], e.labels[: args.length]) for e in examples]
        examples = [e for e in examples if len(e.input_ids) == args.length and e.target_positions]
    return examples


def peak_memory(run: Any) -> float | None:
    """GiB that a pass adds to the process at its peak; `None` where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    read = lambda key: int(status.read_text().split(f"{key}:")[1].split()[0]) / 2**20  # noqa: E731
    reset.write_text("5")  # the peak starts again from here
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def bergson(bench: Bench, python: str) -> dict[str, Any]:
    """The same rows in bergson's own environment; see `bergson_cost.py`."""
    with tempfile.TemporaryDirectory() as folder:
        model = bench.model
        model.save_pretrained(folder)
        batches = [[{"input_ids": e.input_ids, "labels": e.labels} for e in batch] for batch in bench.batches]
        Path(folder, "batches.json").write_text(json.dumps({"batches": batches}))
        script = Path(__file__).with_name("bergson_cost.py")
        argv = [
            python,
            str(script),
            f"{folder}/batches.json",
            folder,
            "--dtype",
            bench.args.dtype,
            "--rounds",
            str(bench.args.rounds),
        ]
        return json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "wide"], default="smollm2")
    parser.add_argument("--data", help="a JSON lines file (default: the built-in sample)")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, help="only rows of at least this many tokens, cut there")
    parser.add_argument("--passes", help="names with commas between (default: all but one-at-a-time and partial)")
    parser.add_argument("--energy", type=float, default=0.9, help="of the factored directions (default: 0.9)")
    parser.add_argument("--partial", action="store_true", help="also partial passes")
    parser.add_argument("--one-at-a-time", action="store_true", help="also the method of the paper's code")
    parser.add_argument("--few-anchors", action="store_true", help="an eighth of the anchors: fitting takes less time")
    parser.add_argument("--bergson", metavar="PYTHON", help="also bergson, with the interpreter of its environment")
    args = parser.parse_args()

    bench = Bench(args)
    rival = bergson(bench, args.bergson) if args.bergson else None  # first: nothing but the model is in memory yet
    passes: dict[str, Any] = {"training step": bench.training_step}
    reference: dict[str, float] = {}
    wanted = args.passes.split(",") if args.passes else [*SETS, "all-factored"]

    def add(name: str, scores: Any, **options: Any) -> None:
        passes[name], session = bench.collect(scores, **options)
        if (directions := session.reference.directions) is not None:
            reference[name] = sum(t.numel() * t.element_size() for t in directions.tensors().values()) / 2**30
            kept = {direction: round(energy, 4) for direction, energy in directions.energy.items()}
            print(f"{name}: share of the directions' squared norm kept: {kept}", flush=True)

    for name in wanted:
        if name == "forward only":
            passes[name] = bench.forward
        elif name == "all-factored":
            add(f"all, factored at {args.energy:g}", "all", direction_energy=args.energy)
        else:
            add(name, SETS[name])
    if args.partial:
        depth = bench.model.config.num_hidden_layers
        add("gradient, 10 response tokens", "gradient", tokens=10)
        add(f"gradient, last {max(depth // 4, 1)} of {depth} blocks", "gradient", parameters=f"last-{max(depth // 4, 1)}")
        add("gradient, head", "gradient", parameters="head")
    if args.one_at_a_time:
        passes["one at a time, three times"] = bench.one_at_a_time

    seconds: dict[str, list[float]] = {name: [] for name in passes}
    memory: dict[str, float | None] = {}
    for round_ in range(args.rounds + 1):  # the first round warms up, and is where memory is looked at
        for name, run in passes.items():
            start = time.perf_counter()
            if round_ == 0:
                memory[name] = peak_memory(run)
            else:
                run()
            seconds[name].append(time.perf_counter() - start)
    rows, groups = len(bench.examples), len(bench.batches)
    tokens, targets = (sum(map(len, x)) for x in zip(*((e.input_ids, e.target_positions) for e in bench.examples), strict=True))
    print(
        f"\n{args.model}, {args.dtype}, {rows} rows in {groups} micro-batches of {args.batch_tokens} tokens, {tokens} tokens,"
    )
    print(f"{targets} of them targets, {args.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    lines = []
    for name in passes:
        ratios = [v / t for v, t in zip(seconds[name][1:], seconds["training step"][1:], strict=True)]
        lines.append(
            line(name, ratios, seconds[name][1:])
            | {
                "peak GiB": "" if memory[name] is None else f"{memory[name]:.2f}",
                "reference GiB": f"{reference[name]:.2f}" if name in reference else "",
            }
        )
    if rival:
        name = f"bergson {rival['bergson']}: one direction, linear layers without the head, its own process"
        lines.append(line(name, rival["ratios"], rival["score"]) | {"peak GiB": "", "reference GiB": ""})
    print(table(lines, list(lines[0])))


def line(name: str, ratios: list[float], seconds: list[float]) -> dict[str, str]:
    """A pass in the table."""
    return {
        "pass": name,
        "of a training step": f"{statistics.median(ratios):.3f}",
        "lowest": f"{min(ratios):.3f}",
        "highest": f"{max(ratios):.3f}",
        "seconds": f"{statistics.median(seconds):.2f}",
    }


if __name__ == "__main__":
    main()
