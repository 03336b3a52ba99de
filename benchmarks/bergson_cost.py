"""What bergson's exact per-example gradient cosines cost beside a training step on the same rows: `score_cost.py --bergson`.

It runs in bergson's own environment and knows nothing of this project; rows come as token ids, in their micro-batches. A pass
is timed beside the training step (forward and backward with weight gradients, no optimizer) of the same round, in one process.

bergson is called as its `score` command calls it: `setup_model_and_peft` loads the model and freezes all but the input
embedding, hooks on every linear layer of the base model (so not the head) form each row's whole gradient, `g.mT @ a`, and the
`Scorer` streams them into dot products and norms (`projection_dim=0`, `unit_normalize=True`). Rows and scores stay in memory
(`InMemoryCollector`, `InMemorySequenceScoreWriter`) where the command would write them to disk; each pass writes one count of
tokens into a temporary folder, since `CollectorComputer` always does. Normalising takes no pass of its own. The query, the
first row's gradient, and loading are not timed. The training step has an attention mask where rows are padded, as in
`score_cost.py`; bergson goes without, and its loss stays in the model's dtype. Where the head shares the embedding's weight,
bergson's backward pass takes that weight's gradient too and throws it away; `--freeze-embedding` spares it that, which the
command cannot.

Its environment needs no torchvision, torchaudio, torchopt or bitsandbytes for this:

    pip install -c constraints.txt torch transformers datasets accelerate peft safetensors jinja2 scipy pyyaml \\
        simple-parsing jaxtyping ml_dtypes natsort petname
    pip install --no-deps bergson==2.5.1

Prints one JSON object as its last line. The first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import bergson
import torch
import torch.nn.functional as F
from bergson.score.score_writer import InMemorySequenceScoreWriter
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset


def computer(model: Any, rows: list[dict], batches: list[list[int]], cfg: Any, scorer: Any = None) -> Any:
    """bergson's loop over these micro-batches; without a scorer it keeps the gradients."""
    data = Dataset.from_list(rows)
    collector = bergson.InMemoryCollector(
        model=model.base_model, data=data, cfg=cfg, processor=create_processor(model, cfg), scorer=scorer
    )
    return bergson.CollectorComputer(model, data, collector=collector, batches=batches, cfg=cfg)


def unit(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of length 1, by a float64 norm; bergson's helper takes it in float32, on the CPU 0.25% off in a try with 14M entries."""
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    return {name: g.float() / norm for name, g in gradients.items()}


def row_losses(model: Any, batch: list[dict]) -> torch.Tensor:
    """Each row's mean cross-entropy over its labels."""
    width = max(len(row["input_ids"]) for row in batch)
    pad = lambda values, fill: values + [fill] * (width - len(values))  # noqa: E731
    ids = torch.tensor([pad(row["input_ids"], 0) for row in batch], device=model.device)
    labels = torch.tensor([pad(row["labels"], -100) for row in batch], device=model.device)[:, 1:]
    mask = torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch], device=model.device)
    logits = model(input_ids=ids, attention_mask=None if bool(mask.all()) else mask, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
    return losses.sum(1) / (labels != -100).sum(1)


def training_step(model: Any, batches: list[list[dict]]) -> None:
    model.requires_grad_(True)
    for batch in batches:
        row_losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)


def score(model: Any, run: Any, freeze_embedding: bool) -> None:
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    embedding.requires_grad_(not freeze_embedding)
    with contextlib.ExitStack() as stack:
        if freeze_embedding:  # hooks need a graph all the same
            stack.callback(embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True)).remove)
        run.run_with_collector_hooks(desc="scores")


def by_autograd(model: Any, rows: list[dict], layers: list[str]) -> list[float]:
    """The same cosines, from one row's gradient after another."""
    model.requires_grad_(True)
    weights = [model.base_model.get_submodule(name).weight for name in layers]
    gradient = lambda row: [g.double() for g in torch.autograd.grad(row_losses(model, [row]).sum(), weights)]  # noqa: E731
    dot = lambda xs, ys: sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))  # noqa: E731
    query = gradient(rows[0])
    gradients = map(gradient, rows)
    return [dot(g, query) / (dot(g, g) * dot(query, query)) ** 0.5 for g in gradients]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches", help='JSON: {"batches": [[{"input_ids": [...], "labels": [...]}, ...], ...]}')
    parser.add_argument("model", help="the folder of a causal language model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--freeze-embedding", action="store_true", help="leaner than bergson's own command; see above")
    parser.add_argument("--check", action="store_true", help="also the largest error against plain autograd (slow)")
    args = parser.parse_args()

    batches = json.loads(Path(args.batches).read_text("utf-8"))["batches"]
    rows = [row for batch in batches for row in batch]
    places = iter(range(len(rows)))
    groups = [[next(places) for _ in batch] for batch in batches]
    with tempfile.TemporaryDirectory() as folder:
        precision = {"float32": "fp32", "bfloat16": "bf16"}[args.dtype]
        cfg = bergson.IndexConfig(
            run_path=f"{folder}/run", model=args.model, precision=precision, projection_dim=0, loss_reduction="mean"
        )
        cfg.partial_run_path.mkdir()
        model, _ = setup_model_and_peft(cfg)

        query = computer(model, rows[:1], [[0]], cfg)
        query.run_with_collector_hooks(desc="query")
        layers = list(query.collector.target_info)
        direction = unit(query.collector.gradients)
        writer = InMemorySequenceScoreWriter(len(rows), 1)
        scorer = bergson.Scorer(direction, layers, writer, model.device, model.dtype, unit_normalize=True)
        del query, direction
        run = computer(model, rows, groups, cfg, scorer)

        seconds: dict[str, list[float]] = {"training_step": [], "score": []}
        for _ in range(args.rounds + 1):
            for name, values in seconds.items():
                start = time.perf_counter()
                if name == "score":
                    score(model, run, args.freeze_embedding)
                else:
                    training_step(model, batches)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                values.append(time.perf_counter() - start)
    seconds = {name: values[1:] for name, values in seconds.items()}
    cosines = writer.scores[:, 0].tolist()
    # Wide layers' norms are summed in the model's dtype, some percent off: a check that the right thing was computed, no more.
    assert abs(cosines[0] - 1) < 0.1, f"the query's own cosine is {cosines[0]}"
    found: dict[str, Any] = {"bergson": bergson.__version__, **seconds}
    found["ratios"] = [s / t for s, t in zip(seconds["score"], seconds["training_step"], strict=True)]
    found |= {"cosines": cosines, "layers": layers}
    if args.check:
        found["largest_error"] = max(abs(x - y) for x, y in zip(cosines, by_autograd(model, rows, layers), strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
