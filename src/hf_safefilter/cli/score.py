"""`hf-safefilter score`: score a dataset with a model and leave the scored rows and an account of the run."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accounts import RUN_FILE
from ..errors import EvaluationError, InputError
from .files import SCORED, data_fingerprint, is_on_hub, read_rows, stream_rows, write_rows
from .shards import add_shard_arguments, score_in_shards
from .show import row_text, table

if TYPE_CHECKING:
    from datasets import Dataset

    from ..engine.loading import ModelSpec
    from ..scorer import SafetyRiskScorer


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `score`."""
    p = commands.add_parser(
        "score",
        parents=[common],
        help="score the rows of a dataset",
        description=f"Score rows; higher is riskier. Writes OUT/{SCORED} and OUT/{RUN_FILE}.",
    )
    p.add_argument("data", help="a Hub id, a folder, or a json, jsonl, csv or parquet file")
    p.add_argument("--out", required=True, type=Path, help="folder for the results")
    add_row_arguments(p)
    add_shard_arguments(p)
    p.add_argument("--streaming", action="store_true", help="read rows as they come, from the Hub without a download of all")
    p.set_defaults(run=run)


def add_row_arguments(p: argparse.ArgumentParser) -> None:
    """Add the arguments that `score` and `estimate` share: which rows, and how they are scored."""
    add_scorer_arguments(p)
    p.add_argument("--reference", help="a folder written by fit: do not fit the anchors again")
    p.add_argument("--columns", help="where the prompt and the response are, such as prompt=q,completion=a")
    p.add_argument("--split", help="split of the dataset (default: train)")
    p.add_argument("--limit", type=int, help="score only the first LIMIT rows")
    p.add_argument("--target", default="assistant", help="assistant, last_assistant, completion or all (default: assistant)")
    p.add_argument("--max-length", type=int, default=1024, help="tokens kept of each row (default: 1024)")
    p.add_argument("--max-response-tokens", type=int, help="score rows as if responses ended after this many tokens")
    p.add_argument("--attribution", action="store_true", help="add what each token adds to risk_gradient_balanced")


def add_scorer_arguments(p: argparse.ArgumentParser) -> None:
    """Add the arguments that `score` and `fit` share: which model, anchors and scores, and how to run."""
    p.add_argument("--model", required=True, help="a Hub id, a folder or a .gguf file")
    add_model_arguments(p)
    p.add_argument("--anchors", default="default", help="an anchor file, folder or Hub id (default: the built-in set)")
    p.add_argument(
        "--scores", default="gradient,representation", help="names with commas between, or all (default: %(default)s)"
    )
    p.add_argument("--top-n", type=int, default=1, help="nearest anchors averaged by representation (default: 1)")
    p.add_argument("--parameters", help="gradients over all (default), linear, lora, head, or last-K such as last-4")
    p.add_argument(
        "--direction-energy",
        type=float,
        help="under 1, anchor directions are factored: small, fast, inexact (default: 1, in 16 bits 0.9)",
    )
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    p.add_argument("--batch-tokens", type=int, help="padded tokens in a micro-batch")


def add_model_arguments(p: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a named model is loaded."""
    p.add_argument("--revision", help="branch, tag or commit of the model")
    p.add_argument("--gguf-file", help="the GGUF file in the model's folder or repository")
    p.add_argument("--adapter", help="a PEFT adapter, merged into the model")
    p.add_argument("--tokenizer", help="a tokenizer's folder or Hub id (default: the model's own)")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ..., or auto: layers over all GPUs (default: a GPU if there is one)")


def model_spec(args: argparse.Namespace, device: str, dtype: str | None = None) -> ModelSpec:
    """What the shared arguments say to load; `dtype` instead of the argument where given."""
    from ..engine.loading import named_spec

    return named_spec(
        args.model,
        args.tokenizer,
        revision=args.revision,
        adapter=args.adapter,
        gguf_file=args.gguf_file,
        dtype=dtype or args.dtype,
        device=device,
    )


def build_scorer(args: argparse.Namespace, scores: Sequence[Any], **options: Any) -> SafetyRiskScorer:
    """The scorer that the shared arguments ask for."""
    from ..scorer import SafetyRiskScorer

    return SafetyRiskScorer(
        args.model,
        anchors=args.anchors,
        scores=scores,
        tokenizer=args.tokenizer,
        revision=args.revision,
        adapter=args.adapter,
        gguf_file=args.gguf_file,
        dtype=args.dtype,
        device=args.device,
        batch_tokens=args.batch_tokens,
        parameters=args.parameters,
        direction_energy=args.direction_energy,
        gradient_checkpointing=args.gradient_checkpointing,
        **options,
    )


def run(args: argparse.Namespace) -> int:
    """Score and save."""
    if args.num_shards is not None or args.shard_index is not None:
        if args.streaming:
            raise InputError("a stream has no shards: use --streaming or --num-shards")
        return score_in_shards(args)
    if args.streaming:
        return score_as_stream(args)
    rows, scorer = rows_and_scorer(args)
    scored, account = score_and_save(rows, scorer, args.out, data=args.data)
    if args.json:
        print(json.dumps(account))
    else:
        print(riskiest(scored, scorer, 10))
        print()
        tell(account, args.out)
    return 0


def score_as_stream(args: argparse.Namespace) -> int:
    """Score rows as they come."""
    scorer, rows = scorer_of(args), stream_rows(args.data, args.split, csv_as_text=True)
    rows = rows if args.limit is None else rows.take(args.limit)
    from datasets.utils import tqdm

    from ..stream import score_stream

    fingerprint = data_fingerprint(args.data, args.split, args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    # Without a total, the bar counts.
    with tqdm(desc="Scoring, length unknown", unit="row", total=args.limit, disable=True if args.quiet else None) as bar:
        account = score_stream(
            rows, scorer, args.out / SCORED, data=fingerprint, name=args.data, on_hub=is_on_hub(args.data),
            piece_rows=args.piece_rows, progress=bar.update,
        )  # fmt: skip
    account = {"command": "score"} | account | settings_of(scorer)
    write_json(args.out / RUN_FILE, account)
    if not account["scored"]:
        raise EvaluationError(
            f"none of the {account['rows']} rows has a score; reasons are in {args.out / SCORED}, risk_status"
        )
    if args.json:
        print(json.dumps(account))
    else:
        tell(account, args.out)
    return 0


def tell(account: Mapping[str, Any], out: Path) -> None:
    """How many rows have scores, and why others have none."""
    print(f"{account['scored']} of {account['rows']} rows scored in {account['seconds']:.0f} s; wrote {out / SCORED}")
    for reason, count in account["unscored"].items():
        print(f"  {count} without a score: {reason}")


def rows_and_scorer(args: argparse.Namespace) -> tuple[Dataset, SafetyRiskScorer]:
    """What the arguments of `add_row_arguments` ask for."""
    scorer, rows = scorer_of(args), read_rows(args.data, args.split, csv_as_text=True)
    return rows if args.limit is None else rows.select(range(min(args.limit, len(rows)))), scorer


def scorer_of(args: argparse.Namespace) -> SafetyRiskScorer:
    """The scorer that these arguments ask for; checked before data are read, which takes seconds."""
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be at least 1, got {args.limit}")
    columns = columns_argument(args.columns)
    scores = chosen_scores(args.scores, args.top_n)  # cheap checks first: reading data and loading libraries take seconds
    return build_scorer(
        args,
        scores,
        max_length=args.max_length,
        max_response_tokens=args.max_response_tokens,
        target=args.target,
        columns=columns,
        reference=args.reference,
        attribution=args.attribution,
    )


def score_and_save(rows: Dataset, scorer: SafetyRiskScorer, out: Path, *, data: str) -> tuple[Dataset, dict[str, Any]]:
    """Score rows and write them with an account of the run; returns both.

    Raises:
        InputError: no rows, or columns in no known layout.
        EvaluationError: no row could be scored.
    """
    if not len(rows):
        raise InputError(f"{data} has no rows")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # Gradient passes are slow: small calls, so that the bar moves.
    batch_size = 64 if scorer.needs.gradient else 256
    scored = rows.map(scorer, batched=True, batch_size=batch_size, desc="Scoring")
    seconds = time.perf_counter() - started
    risk = [c for c in scorer.result_columns if c.startswith("risk_") and c != "risk_status"]
    unscored = [why for score, why in zip(scored[risk[0]][:], scored["risk_status"][:], strict=True) if score is None]
    write_rows(scored, out / SCORED)
    account = {
        "command": "score",
        "data": data,
        "data_on_hub": is_on_hub(data),
        "rows": len(rows),
        "scored": len(rows) - len(unscored),
        "unscored": dict(Counter(unscored).most_common()),
        "tokens": sum(n or 0 for n in scored["total_tokens"][:]),
        "seconds": round(seconds, 2),
        "score_columns": risk,
    } | settings_of(scorer)
    write_json(out / RUN_FILE, account)
    if len(unscored) == len(rows):
        raise EvaluationError(f"none of the {len(rows)} rows could be scored; the first: {unscored[0]}")
    return scored, account


def settings_of(scorer: SafetyRiskScorer) -> dict[str, Any]:
    """What a run's account tells of its scorer."""
    from ..scorer import OPTIONS

    return {
        "model": asdict(scorer.spec),
        "anchors": {"name": scorer.anchors.name, "sha256": scorer.anchors.content_hash},
        "reference": None if scorer.reference is None else scorer.reference.fingerprint,
        "scores": [score.key() for score in scorer.scores],
        "options": {name: getattr(scorer, name) for name in OPTIONS},
        "fingerprint": scorer.fingerprint,
        "versions": versions(),
    }


def riskiest(scored: Dataset, scorer: SafetyRiskScorer, count: int) -> str:
    """The riskiest rows by the default score, as a table."""
    from ..formats import find_layout
    from ..select import default_score, score_columns, select_risky

    by = default_score(score_columns(scored))
    top = select_risky(scored, k=min(count, sum(v is not None for v in scored[by][:])), by=by, unscored="drop")
    parts = find_layout(scored.column_names, scorer.columns).columns
    lines = [{"rank": i + 1, by: row[by], "row": row_text(row, parts)} for i, row in enumerate(top)]
    return table(lines, ["rank", by, "row"], {"row": 90})


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one step."""
    from ..files import write_atomically

    write_atomically(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def versions() -> dict[str, str]:
    """The versions that a score depends on."""
    from importlib.metadata import version
    from platform import python_version

    names = ("hf-safefilter", "torch", "transformers", "datasets", "tokenizers", "peft")
    return {"python": python_version(), **{name: version(name) for name in names}}


def columns_argument(text: str | None) -> dict[str, str] | None:
    """`--columns` as the scorer takes it."""
    if text is None:
        return None
    pairs = [item.partition("=") for item in text.split(",")]
    if not all(part.strip() and equals and column.strip() for part, equals, column in pairs):
        raise InputError(f"--columns must look like prompt=q,completion=a, got {text!r}")
    return {part.strip(): column.strip() for part, _, column in pairs}


def chosen_scores(text: str, top_n: int) -> list[Any]:
    """Scores from names with commas between, or all."""
    from ..scores import RepresentationScore, resolve_scores

    names = text if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    return [RepresentationScore(top_n) if s.name == RepresentationScore.name else s for s in resolve_scores(names)]
