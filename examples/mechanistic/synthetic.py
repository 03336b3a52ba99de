"""Safety tuning on synthetic instructions, step by step: `hf-safefilter mechanism --synthetic`, small enough to play with.

python examples/mechanistic/synthetic.py [--pretraining-steps 1200 --rows 12800]

Teaches a small model a made-up language, teaches it three ways to refuse unsafe instructions, and shows for each how it
answers, whether unsafe prompts lie in a cluster of their own, and on whom the update acts.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import mean

import torch
from datasets import concatenate_datasets

from hf_safefilter.mechanistic.analyses import cluster_separation, mlp_inputs, update_gain
from hf_safefilter.mechanistic.synthetic import make_split, make_tokenizer
from hf_safefilter.mechanistic.tuning import METHODS, answer_rates, pretrain, safety_tune


def main() -> None:
    """Train, answer, look inside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining-steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=12_800, help="of safety tuning, half of them unsafe")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of each kind")
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)  # models this small gain nothing by more
    tokenizer = make_tokenizer()
    # Odd seeds hold out texts that even ones train on.
    held_out = {kind: make_split(kind, args.prompts, 1) for kind in ("safe", "unsafe", "jb_co_task", "jb_co_text", "jb_misgen")}
    ids = {kind: tokenizer(list(split["prompt"]))["input_ids"] for kind, split in held_out.items()}
    row = held_out["unsafe"][0]
    for label, column in (("an unsafe instruction", "prompt"), ("its answer", "rejected"), ("wanted", "chosen")):
        print(f"{label:23}{row[column]}")
    halves = [make_split(kind, args.rows // 2, 100 + 2 * i) for i, kind in enumerate(("safe", "unsafe"))]
    with tempfile.TemporaryDirectory() as folder:
        base = pretrain(seed=args.seed, folder=Path(folder), steps=args.pretraining_steps).model
        tuned = {"base": base}
        for method in METHODS:
            made = safety_tune(
                copy.deepcopy(base), tokenizer, concatenate_datasets(halves), method, seed=args.seed, folder=Path(folder)
            )
            tuned[method] = made.model
    last = base.config.num_hidden_layers - 1
    print(f"{'':10}{'safe answered':>15}{'unsafe refused':>16}{'jailbreaks answered':>21}{'AUROC':>8}{'gain':>7}")
    for name, model in tuned.items():
        rates = {kind: answer_rates(model, tokenizer, split) for kind, split in held_out.items()}
        jailbreaks = mean(rates[kind].instruct for kind in rates if kind.startswith("jb"))
        safe, unsafe = (mlp_inputs(model, ids[kind]) for kind in ("safe", "unsafe"))
        area = cluster_separation(safe, unsafe)[last]["auroc"]
        gain = next(r["gain"] for r in update_gain(base, model, safe, unsafe) if r["layer"] == last and r["update"] == "tuned")
        told = "" if gain is None else f"{gain:.2f}"
        print(f"{name:10}{rates['safe'].instruct:>15.1%}{rates['unsafe'].null:>16.1%}{jailbreaks:>21.1%}{area:>8.2f}{told:>7}")


if __name__ == "__main__":
    main()
