"""`hf-safefilter mechanism`: what tuning changed inside a model, or the whole synthetic study of it."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .score import add_model_arguments, model_spec, versions, write_json
from .show import table

ACCOUNT_FILE = "mechanism.json"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `mechanism`."""
    p = commands.add_parser(
        "mechanism",
        parents=[common],
        help="see what tuning changed inside: clusters of harmful prompts, the update, sensitivity",
        description="The analyses of Jain et al. 2024 on a base model and models tuned from it, or, with --synthetic, their "
        "whole study on synthetic data. Leaves tables (JSON lines), pictures and an account of the run.",
    )
    p.add_argument("-o", "--out", required=True, type=Path, help="folder for the results")
    p.add_argument("--base", dest="model", metavar="BASE", help="the model before: a Hub id, a folder or a .gguf file")
    named = "[NAME=]"
    p.add_argument("--tuned", action="append", default=[], metavar=f"{named}MODEL", help="a model after; may be given again")
    p.add_argument(
        "--tuned-adapter", action="append", default=[], metavar=f"{named}ADAPTER", help="likewise, a PEFT adapter of the base"
    )
    p.add_argument(
        "--control", action="append", default=[], metavar=f"{named}MODEL", help="the base tuned on harmless data, to compare"
    )
    p.add_argument("--control-adapter", action="append", default=[], metavar=f"{named}ADAPTER", help="likewise, an adapter")
    add_model_arguments(p)
    p.add_argument("--prompts", default="default", help="harmful prompts, a JSON-lines file (default: 64 built-in ones)")
    p.add_argument("--benign-prompts", default="default", help="harmless look-alikes, likewise")
    p.add_argument(
        "--group", action="append", default=[], metavar="NAME=FILE",
        help="further prompts, such as jailbreaks, a JSON-lines file; a field success (true, false) splits them",
    )  # fmt: skip
    p.add_argument("--layers", help="blocks, or shares of the depth, with commas between (default: all)")
    p.add_argument("-k", type=int, default=8, help="singular vectors of the update (default: 8)")
    p.add_argument("--no-sensitivity", action="store_true", help="take no gradients")
    p.add_argument("--no-shift", action="store_true", help="take no refusal margins along the update")
    p.add_argument("--no-figures", action="store_true", help="draw nothing")
    p.add_argument("--synthetic", action="store_true", help="the study on synthetic data, from pre-training on; needs no model")
    p.add_argument("--seeds", default="0,1,2", help="of --synthetic (default: %(default)s)")
    p.add_argument(
        "--workers", type=int, help="of --synthetic: processes that share the work (default: one for each core, at most 8)"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The study, or the comparison."""
    given = [*args.tuned, *args.tuned_adapter, *args.control, *args.control_adapter]
    if args.synthetic:
        if args.model or given:
            raise InputError("--synthetic trains models of its own: leave --base, --tuned and --control out")
        return _synthetic(args)
    if not args.model or not (args.tuned or args.tuned_adapter):
        raise InputError("give --base and --tuned (or --tuned-adapter), or --synthetic")
    return _compare(args)


def _synthetic(args: argparse.Namespace) -> int:
    try:
        seeds = tuple(int(part) for part in args.seeds.split(","))
    except ValueError:
        raise InputError(f"--seeds must be whole numbers with commas between, got {args.seeds!r}") from None
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be at least 1, got {args.workers}")
    from ..engine.loading import default_device
    from ..mechanistic.study import run_synthetic

    workers = args.workers or (min(os.cpu_count() or 1, 8) if default_device() == "cpu" else 1)
    args.out.mkdir(parents=True, exist_ok=True)
    summary = run_synthetic(args.out, seeds, workers=workers, progress=not args.quiet)
    if args.json:
        print(json.dumps({"command": "mechanism", "synthetic": True, **summary, "versions": versions()}))
    else:
        lines = [{"finding": name, "verdict": of["verdict"]} for name, of in summary.items() if isinstance(of, dict)]
        print(table(lines, ["finding", "verdict"]))
        print(f"\ntables and pictures written to {args.out}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    layers = _layers(args.layers)
    groups = dict(_named(text, "--group") for text in args.group)
    from ..chat import ChatEncoder
    from ..engine.identity import resolve
    from ..engine.loading import attach_adapter, context_length, default_device, load, named_spec
    from ..engine.mlp import layer_indices
    from ..mechanistic.compare import compare, draw, summarize, upper
    from ..refusal.monitor import write_records
    from ..refusal.prompts import load_prompts, prompt_ids

    # Cheap checks first: loading models takes long.
    sides = {"unsafe": load_prompts(args.prompts, "harmful"), "safe": load_prompts(args.benign_prompts, "benign")}
    success = {}
    for name, file in groups.items():
        if name in sides:
            raise InputError(f"--group {name}: that name is taken by the harmful and the harmless prompts")
        sides[name], success[name] = load_prompts(file, "harmful"), _success(Path(file))
    device = args.device or default_device()
    # In 16 bits an update is mostly rounding.
    dtype = "float32" if args.dtype == "auto" else args.dtype
    spec = model_spec(args, device, dtype)
    after = [
        (kind, form, *_named(text, f"--{kind}{form}"))
        for kind in ("tuned", "control")
        for form in ("", "-adapter")
        for text in getattr(args, f"{kind}{form}".replace("-", "_"))
    ]
    names = [name for _, _, name, _ in after]
    if len(set(names)) < len(names) or {"base", "tuned", "random"} & set(names):
        raise InputError("models need names that differ, and not base, tuned or random: give NAME=MODEL")
    sources: dict[str, Any] = {
        name: resolve(path, what="adapter", probe="adapter_config.json")
        if form
        else named_spec(path, dtype=dtype, device=device)
        for _, form, name, path in after
    }
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    base, tokenizer = load(spec, device)
    encoder, room = ChatEncoder(tokenizer), context_length(base)
    ids = {side: [prompt_ids(encoder, c, f"{side} prompt {i}", room) for i, c in enumerate(cs)] for side, cs in sides.items()}
    models: dict[str, dict[str, Any]] = {"tuned": {}, "control": {}}
    for kind, form, name, _ in after:
        source = sources[name]
        models[kind][name] = attach_adapter(copy.deepcopy(base), source) if form else load(source, device)[0]
    chosen = layer_indices(layers, base.config.get_text_config().num_hidden_layers)
    tables = compare(
        base, models["tuned"], ids.pop("unsafe"), ids.pop("safe"), controls=models["control"], groups=ids,
        success={name: of for name, of in success.items() if any(o is not None for o in of)}, layers=layers, k=args.k,
        sensitivity=not args.no_sensitivity, measure=None if args.no_shift else _margins(encoder, sides),
        progress=_bar(args.quiet),
    )  # fmt: skip
    for name, rows in tables.items():
        write_records(args.out / f"{name}.jsonl", rows)
    at = upper(base, chosen)
    account = {
        "command": "mechanism", "synthetic": False, "base": spec.model.name, "fingerprint": spec.model.fingerprint,
        "tuned": list(models["tuned"]), "controls": list(models["control"]), "dtype": spec.dtype,
        "prompts": {side: len(of) for side, of in sides.items()}, "blocks": at, "summary": summarize(tables, at),
        "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
    }  # fmt: skip
    if not args.no_figures:
        draw(args.out, tables)
    write_json(args.out / ACCOUNT_FILE, account)
    print(json.dumps(account) if args.json else _shown(account, tables, args.out))
    return 0


def _margins(encoder: Any, sides: dict[str, Any]) -> Any:
    """Refusal margins of a model, on at most 32 prompts of each side."""
    from ..refusal.margin import MarginProbe

    probes = {of: MarginProbe(encoder, sides[side][:: max(1, len(sides[side]) // 32)]) for of, side in _SIDES.items()}
    return lambda model: {f"margin_{of}": probe(model).mean for of, probe in probes.items()}


_SIDES = {"harmful": "unsafe", "benign": "safe"}


def _shown(account: dict[str, Any], tables: dict[str, Any], out: Path) -> str:
    lines = [{name: value for name, value in row.items() if value is not None} for row in account["summary"]]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    blocks = account["blocks"]
    text = f"Means over blocks {blocks[0]} to {blocks[-1]}; sensitivity: log2 against the base.\n\n{table(lines, columns)}"
    if shift := tables.get("shift"):
        text += "\n\nRefusal margins along the update, nats per token:\n\n" + table(shift, list(shift[0]))
    return f"{text}\n\ntables and pictures written to {out} in {account['seconds']:.0f} s"


def _named(text: str, argument: str) -> tuple[str, str]:
    """NAME=VALUE, or a value that is named by its last part."""
    name, equals, value = text.partition("=")
    if not equals:
        name, value = Path(text).stem if argument == "--group" else Path(text).name, text
    if not name or not value:
        raise InputError(f"{argument} must look like NAME=PATH, got {text!r}")
    return name, value


def _layers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--layers must be numbers with commas between, got {text!r}") from None


def _success(file: Path) -> list[bool | None]:
    """Whether each prompt of a group is said to have succeeded; the prompts themselves have been read before."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    found = [row.get("success") if isinstance(row, dict) else None for row in rows]
    if bad := [value for value in found if value not in (True, False, None)]:
        raise InputError(f"{file}: success must be true, false or left out, got {bad[0]!r}")
    return found


def _bar(quiet: bool) -> Any:
    from datasets.utils import tqdm

    def steps(work: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        started = time.perf_counter()
        bar: Iterable[Any] = tqdm(work, desc="Analyses", unit="table", disable=True if quiet else None)
        for i, step in enumerate(bar):
            if i == 1 and not quiet:
                _say_estimate(work, time.perf_counter() - started)
            yield step

    return steps


# What a table of one model costs, in forwards over all prompts, measured on SmolLM2-135M.
_COST = {"separation": 1.0, "groups": 8.0, "shift": 5.0, "alignment": 2.0, "gain": 0.3, "singular": 0.3, "drift": 0.0}


def _say_estimate(work: Sequence[tuple[str, str]], first: float) -> None:
    rest = first * sum(_COST[table] for _, table in work[1:])
    print(f"about {max(rest / 60, 0.1):.1f} minutes to go on this machine", file=sys.stderr, flush=True)
