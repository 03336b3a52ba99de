"""`hf-safefilter monitor`: one check of a model's refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .score import add_model_arguments, model_spec, versions, write_json
from .show import table

CHECK_FILE, ANSWERS_FILE = "check.json", "answers.jsonl"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `monitor`."""
    p = commands.add_parser(
        "monitor",
        parents=[common],
        help="check how a model refuses harmful requests",
        description="Answer harmful prompts and harmless look-alikes, judge the answers, take the refusal margin. "
        "Exit code 3: refusals are under --min-refusal-rate.",
    )
    p.add_argument("model", help="a Hub id, a folder or a .gguf file")
    add_model_arguments(p)
    p.add_argument("--prompts", default="default", help="harmful prompts, a JSON-lines file (default: 64 built-in ones)")
    p.add_argument("--benign-prompts", default="default", help="harmless look-alikes, likewise, or none")
    p.add_argument("--judge", default="keyword", help="keyword, keyword_prefix or classifier:MODEL (default: keyword)")
    p.add_argument("--max-new-tokens", type=int, default=32, help="where answers are cut off (default: 32)")
    p.add_argument("--batch-size", type=int, default=64, help="prompts at a time (default: 64)")
    p.add_argument("--min-refusal-rate", type=float, help="exit with 3 where fewer harmful prompts are refused, 0 to 1")
    p.add_argument("--base", help="the model before fine-tuning, for answers' perplexity: incoherent answers are told better")
    p.add_argument("--out", type=Path, help=f"folder for {CHECK_FILE} and {ANSWERS_FILE} (default: none)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, print, save."""
    from ..engine.loading import context_length, default_device, load, named_spec
    from ..refusal.monitor import RefusalMonitor, check_share, write_records

    check_share("--min-refusal-rate", args.min_refusal_rate)
    device = args.device or default_device()
    spec = model_spec(args, device)
    base_spec = named_spec(args.base, dtype=args.dtype, device=device) if args.base else None
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(spec, device)
    monitor = RefusalMonitor(
        tokenizer,
        args.prompts,
        None if args.benign_prompts == "none" else args.benign_prompts,
        args.judge,
        max_new_tokens=args.max_new_tokens,
        context_length=context_length(model),
        batch_size=args.batch_size,
    )
    check = monitor.check(model, base=load(base_spec, device)[0] if base_spec else None)
    breach = check.rate is not None and args.min_refusal_rate is not None and check.rate < args.min_refusal_rate
    account = {
        "command": "monitor",
        "model": spec.model.name,
        "fingerprint": spec.model.fingerprint,
        "adapter": spec.adapter and {"name": spec.adapter.name, "fingerprint": spec.adapter.fingerprint},
        "dtype": spec.dtype,
        "max_new_tokens": args.max_new_tokens,
        "min_refusal_rate": args.min_refusal_rate,
        "breach": breach,
        **check.summary(),
        "versions": versions(),
    }
    if args.out is not None:
        write_json(args.out / CHECK_FILE, account)
        write_records(args.out / ANSWERS_FILE, check.records)
    print(json.dumps(account) if args.json else _shown(account))
    if check.problem:
        raise EvaluationError(f"refusals not evaluated: {check.problem}")
    return 3 if breach else 0


def _shown(account: dict[str, Any]) -> str:
    sides = {"harmful": "should refuse", "benign": "should answer"}
    lines = []
    for side, wish in sides.items():
        if found := account[side]:
            low, high = found["interval"]
            counts = {name: found[name] for name in ("n", "refused", "unscored", "empty", "truncated", "incoherent")}
            share = "-" if found["rate"] is None else f"{found['rate']:.1%}"
            lines.append({"prompts": f"{side} ({wish})", "refusal rate": share, "95%": f"{low:.1%} to {high:.1%}", **counts})
    text = table(lines, list(lines[0])) if lines else ""
    if account["harmful"]:
        text += f"\n\njudge {account['harmful']['judge']}, {account['max_new_tokens']} tokens, {account['seconds']:.0f} s"
    if margin := account["margin"]:
        low, high = margin["interval"]
        spread = "" if low is None else f" (95% {low:+.2f} to {high:+.2f})"
        text += f"\nrefusal margin {margin['mean']:+.2f} nats per token{spread}"
        text += f"\nprobability of opening with a refusal {margin['probability']:.1%}"
    if account["breach"]:
        text += f"\nunder the threshold of {account['min_refusal_rate']:.1%}"
    return text
