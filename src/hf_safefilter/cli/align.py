"""`hf-safefilter align`: teach a small chat model to refuse, as a LoRA adapter with a card that says how well it does."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .files import read_rows
from .score import add_model_arguments, model_spec, versions, write_json
from .show import table

ACCOUNT_FILE, CARD_FILE = "align.json", "README.md"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `align`."""
    p = commands.add_parser(
        "align",
        parents=[common],
        help="teach a small chat model to refuse harmful requests",
        description="Safety-tune a chat model with LoRA on built-in refusals, harmless look-alikes and ordinary requests, and "
        "measure it before and after on prompts that it did not see. Exit code 3: refusals are under --min-refusal-rate.",
    )
    p.add_argument("model", help="a Hub id, a folder or a .gguf file")
    add_model_arguments(p)
    p.add_argument("-o", "--out", required=True, type=Path, help=f"folder for the adapter, {CARD_FILE} and {ACCOUNT_FILE}")
    p.add_argument("--data", help="rows to teach instead of the built-in ones: a file, folder or Hub id")
    p.add_argument("--epochs", type=int, help="default: 6")
    p.add_argument("--learning-rate", type=float, help="default: 2e-3, for SmolLM2-135M; less for larger models")
    p.add_argument("--lora-rank", type=int, help="default: 6")
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.add_argument("--prompts", action="append", default=[], help="more harmful prompts to measure on, a JSON-lines file")
    p.add_argument("--judge", default="keyword", help="keyword, keyword_prefix or classifier:MODEL (default: keyword)")
    p.add_argument("--min-refusal-rate", type=float, help="exit with 3 where fewer harmful prompts are refused, 0 to 1")
    p.add_argument("--base-name", help="what the adapter's configuration and card call the model (default: as given)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, measure, save."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from ..align import ALIGN_RECIPE, align, lessons, measure, save_adapter
    from ..engine.loading import default_device, load
    from ..refusal.monitor import check_share

    check_share("--min-refusal-rate", args.min_refusal_rate)
    changes = {"epochs": args.epochs, "learning_rate": args.learning_rate, "lora_rank": args.lora_rank}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.lora_rank is not None:
        changes["lora_alpha"] = 4 * args.lora_rank
    recipe = replace(ALIGN_RECIPE, **changes)
    device = args.device or default_device()
    spec = model_spec(args, device)
    rows = list(read_rows(args.data)) if args.data else None
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(spec, device)
    before = measure(model, tokenizer, args.prompts, args.judge)
    with TemporaryDirectory() as folder:
        tuned = align(model, tokenizer, rows, recipe, seed=args.seed, folder=Path(folder), progress=not args.quiet)
    if tuned.problem:
        raise EvaluationError(f"{tuned.problem}; try a lower --learning-rate")
    taught = lessons() if rows is None else rows
    account = {
        "command": "align",
        "model": args.base_name or args.model,
        "fingerprint": spec.model.fingerprint,
        "dtype": spec.dtype,
        "data": args.data or "built-in",
        "rows": len(taught),
        "kinds": dict(Counter(row.get("kind", "") for row in taught)),
        "recipe": recipe.as_dict(),
        "seed": args.seed,
        "judge": args.judge,
        "last_loss": tuned.losses[-1],
        "before": before,
    }
    save_adapter(tuned.model, args.out, account["model"])
    account |= {"after": measure(tuned.model.merge_and_unload(), tokenizer, args.prompts, args.judge), "versions": versions()}
    write_json(args.out / ACCOUNT_FILE, account)
    write_card(args.out / CARD_FILE, account)
    print(json.dumps(account) if args.json else f"{_shown(account)}\n\nadapter written to {args.out}")
    harmful = [found["rate"] for name, found in account["after"].items() if found["wish"] == "refuse"]
    least = args.min_refusal_rate
    return 3 if least is not None and min(rate or 0.0 for rate in harmful) < least else 0


def write_card(path: Path, account: dict[str, Any]) -> None:
    """The adapter's card, from its account."""
    from importlib import resources

    from jinja2 import Environment, StrictUndefined

    from ..files import write_atomically

    source = resources.files("hf_safefilter").joinpath("assets", "templates", "align_card.md.jinja").read_text("utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    write_atomically(path, template.render(account=account, measures=_lines(account)).encode())


def _lines(account: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    for name, after in account["after"].items():
        low, high = after["interval"]
        lines.append(
            {
                "prompts": f"{name} (should {after['wish']})", "n": str(after["n"]),
                "refused before": f"{account['before'][name]['rate'] or 0:.1%}", "refused after": f"{after['rate'] or 0:.1%}",
                "95%": f"{low:.1%} to {high:.1%}",
            }
        )  # fmt: skip
    return lines


def _shown(account: dict[str, Any]) -> str:
    lines = _lines(account)
    return table(lines, list(lines[0])) + f"\n\njudge {account['judge']}; held-out prompts: none was in training"
