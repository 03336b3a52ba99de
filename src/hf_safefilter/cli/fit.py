"""`hf-safefilter fit`: fit the anchors on a model once and keep what rows are compared with."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..errors import InputError
from .score import add_scorer_arguments, build_scorer, chosen_scores
from .show import table


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `fit`."""
    p = commands.add_parser(
        "fit",
        parents=[common],
        help="fit the anchors on a model and save the reference",
        description="Fit the anchors on a model and save what rows are compared with, for score --reference OUT.",
    )
    p.add_argument("--out", required=True, type=Path, help="folder for the reference")
    add_scorer_arguments(p)
    p.add_argument("--larf-layer", help="the layer of the score larf, or search: by scaling each block's weights (slow)")
    p.add_argument("--larf-prompts", type=int, default=64, help="prompts of that search, at most 64 (default: 64)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fit and save."""
    scores = chosen_scores(args.scores, args.top_n)
    started = time.perf_counter()
    found = None
    if args.larf_layer is not None:
        if not any(score.name == "larf" for score in scores):
            raise InputError("--larf-layer is for the score larf, which --scores does not name")
        scores, found = _with_larf_layer(args, scores)
    scorer = build_scorer(args, scores)
    scorer.save_reference(args.out)
    description = json.loads((args.out / "reference.json").read_text("utf-8"))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    account = {
        "command": "fit",
        "out": str(args.out),
        "megabytes": round(size / 1e6, 2),
        "scores": description["scores"],
        "parameters": description["parameters"],
        "direction_energy": description["direction_energy"],
        "larf_layer": found,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if args.json:
        print(json.dumps(account))
        return 0
    for direction, energy in account["direction_energy"].items():
        print(f"direction {direction:12} {energy:.4f} of its squared norm kept")
    print(f"wrote {args.out}   {account['megabytes']} MB, {account['seconds']:.0f} s")
    print(f"next  hf-safefilter score DATA --model {args.model} --scores {args.scores} --reference {args.out} --out scored")
    return 0


def _with_larf_layer(args: argparse.Namespace, scores: list[Any]) -> tuple[list[Any], dict[str, Any] | None]:
    from ..scores import LarfScore, RepresentationScore

    replaced = lambda layer: [LarfScore(layer) if score.name == "larf" else score for score in scores]  # noqa: E731
    if args.larf_layer != "search":
        try:
            return replaced(float(args.larf_layer)), None
        except ValueError:
            raise InputError(f"--larf-layer must be a layer or search, got {args.larf_layer!r}") from None
    if not 1 <= args.larf_prompts <= 64:
        raise InputError(f"--larf-prompts must be between 1 and 64, got {args.larf_prompts}")
    from ..refusal.larf_layer import find_larf_layer
    from ..refusal.prompts import monitor_prompts
    from ..session import progress

    prompts = [prompt["prompt"] for prompt in monitor_prompts("benign")][: args.larf_prompts]
    loaded = build_scorer(args, [RepresentationScore()])._session(None)
    search = find_larf_layer(loaded.engine.model, loaded.encoder, prompts, progress=progress("Scaling blocks"))
    if not args.json:
        lines = [
            {"block": i, "sensitivity": s, "refusals by factor": " ".join(f"{f:g}:{n}" for f, n in counts.items())}
            for i, (s, counts) in enumerate(zip(search.sensitivity, search.refusals, strict=True))
        ]
        print(table(lines, ["block", "sensitivity", "refusals by factor"]))
        print(f"\nlarf reads layer {search.layer}\n")
    return replaced(search.layer), {"layer": search.layer, "sensitivity": search.sensitivity, "prompts": search.prompts}
