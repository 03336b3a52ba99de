"""What a report shows, as plain values, gathered from a scored dataset and what is known of how it was made."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..accounts import model_text, read_account, without_folders
from ..errors import InputError, UnscorableRow
from ..formats import Layout, find_layout, to_conversation
from ..patterns import patterns
from ..select import DEFAULT_ORDER, default_score, score_columns, score_values, spearman

if TYPE_CHECKING:
    from datasets import Dataset

# What a page may weigh: scores first, exact, then texts with what is left, those of the riskiest rows whole.
SCORE_BYTES, TEXT_BYTES, HEAT_BYTES = 400_000, 450_000, 70_000
# Rows that a page holds; of a larger set the riskiest.
MAX_ROWS = 10_000
MAX_PROMPT, MAX_RESPONSE, MAX_EXCERPT = 1_000, 2_000, 80
# Tokens' shares in a row's score are shown in so many shades to each side.
SHADES = 4
# The riskiest share that is set against the rest.
RISKIEST = 0.1
HISTORY_FILE, SUMMARY_FILE = "history.jsonl", "summary.json"


@dataclass(frozen=True)
class Content:
    """All that the page shows.

    Attributes:
        title: of the page.
        rows, scored: how many rows there are, and how many have a score by `by`.
        by: the score that rows are ordered by at first.
        columns: the scores in the page, `by` first; `left_out` those that it has no room for.
        correlations: Spearman's [columns][columns], `None` where a score is constant.
        shown: dataset indices of the rows in the page, riskiest first by `by`, rows without a score last.
        values: a float32 [shown] for each of `columns`, little-endian in base64.
        prompts, responses: [shown], cut; `full` of them, from the first on, as long as a page ever shows.
        heat: for the first of `shown`, tokens and the shade of each, from -SHADES to SHADES, or `None`: its share in
            `risk_gradient_balanced` beside the row's largest.
        unscored: how many rows have no score, by reason.
        common: `patterns` of the riskiest tenth and of the rest.
        model: that was scored with, in a line.
        run: the account that `score` wrote, without folders of that machine, or `None`.
        history: of a monitor run: refusal rates by step, or `None`.
        study: the summary that `validate` wrote, or `None`.
    """

    title: str
    rows: int
    scored: int
    by: str
    columns: list[str]
    left_out: list[str]
    correlations: list[list[float | None]]
    shown: list[int]
    values: dict[str, str]
    prompts: list[str]
    responses: list[str]
    full: int
    heat: list[tuple[list[str], list[int]] | None]
    unscored: dict[str, int]
    common: list[dict[str, Any]]
    model: str = ""
    run: dict[str, Any] | None = None
    history: list[dict[str, Any]] | None = None
    study: dict[str, Any] | None = None


def gather(
    ds: Dataset,
    *,
    title: str | None = None,
    by: str | None = None,
    columns: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | str | Path | None = None,
    monitor: str | Path | None = None,
    validate: str | Path | None = None,
) -> Content:
    """Collect what the page shows.

    Args:
        ds: a scored dataset.
        title: of the page.
        by: the score column that rows are ordered by; by default as `select_risky` chooses.
        columns: where the prompt and the response are, if not told by the columns' names.
        run: the account that `hf-safefilter score` wrote (`run.json`), or its path.
        monitor: folder or `history.jsonl` of a `RefusalRateCallback`.
        validate: folder or `summary.json` of `hf-safefilter validate`.

    Raises:
        InputError: not a scored dataset, no rows, no row with a score, an unknown column, or a file that cannot be read.
    """
    from datasets import Dataset

    if not isinstance(ds, Dataset):
        raise InputError(f"a report needs a datasets.Dataset with scores, got {type(ds).__name__}")
    if not len(ds):
        raise InputError("the dataset has no rows")
    names = score_columns(ds)
    by = by or default_score(names)
    scores = {name: score_values(ds, [name]).astype(np.float32) for name in [by, *(n for n in ordered(names) if n != by)]}
    risk = scores[by]
    missing = np.isnan(risk)
    status = ds["risk_status"][:] if "risk_status" in ds.column_names else [None] * len(ds)
    if missing.all():
        raise InputError(f"no row has a score in {by!r}; the first row: {status[0] or 'no reason given'}")
    riskiest_first = np.argsort(np.where(missing, np.inf, -risk), kind="stable")  # rows without a score last
    order = riskiest_first[:MAX_ROWS]
    room = max(1, SCORE_BYTES // (len(order) * 16 // 3 + 1))
    kept = list(scores)[:room]
    account = without_folders(read_account(run))
    layout = find_layout([c for c in ds.column_names if not c.startswith("risk_")], columns)
    both = texts(ds, layout)
    prompts, responses, full = _cut([both[i] for i in order.tolist()])
    return Content(
        title=title or "Scored rows",
        rows=len(ds),
        scored=int((~missing).sum()),
        by=by,
        columns=kept,
        left_out=list(scores)[room:],
        correlations=_correlations([scores[name] for name in kept]),
        shown=order.tolist(),
        values={name: base64.b64encode(scores[name][order].astype("<f4").tobytes()).decode() for name in kept},
        prompts=prompts,
        responses=responses,
        full=full,
        heat=_heat(ds, order[:full].tolist()),
        unscored=dict(Counter(str(why) for why, no in zip(status, missing, strict=True) if no).most_common(20)),
        common=_common(ds, [response for _, response in both], riskiest_first[: int((~missing).sum())].tolist()),
        run=account,
        model=model_text(account),
        history=None if monitor is None else _history(Path(monitor)),
        study=None if validate is None else _json(_inside(Path(validate), SUMMARY_FILE), "a study's summary", "arms"),
    )


def ordered(names: Sequence[str]) -> list[str]:
    """The scores that people ask for first, then the others, baselines last."""
    first = [n for n in DEFAULT_ORDER if n in names]
    return first + sorted((n for n in names if n not in first), key=lambda n: (n.startswith("risk_baseline"), n))


def _correlations(scores: Sequence[np.ndarray]) -> list[list[float | None]]:
    """Spearman's rank correlation of each pair, over rows that have both."""

    def one(a: np.ndarray, b: np.ndarray) -> float | None:
        both = ~(np.isnan(a) | np.isnan(b))
        rho = spearman(a[both], b[both]) if both.any() else float("nan")
        return None if np.isnan(rho) else round(rho, 3)

    return [[one(a, b) for b in scores] for a in scores]


def texts(ds: Dataset, layout: Layout) -> list[tuple[str, str]]:
    """Each row's prompt and response; of a row that cannot be read, its cells as they are."""
    found = []
    for row in ds.select_columns(list(layout.columns.values())):
        try:
            conversation = to_conversation(row, layout)
        except UnscorableRow:
            found.append((" ".join(str(v) for v in row.values() if v is not None), ""))
            continue
        if conversation.text is not None:
            found.append(("", conversation.text))
            continue
        messages = [str(m.get("content") or "") for m in conversation.messages]
        system = [i for i, m in enumerate(conversation.messages) if m["role"] in ("system", "developer")]
        found.append(("\n\n".join(m for i, m in enumerate(messages[:-1]) if i not in system), messages[-1]))
    return found


def _cut(rows: Sequence[tuple[str, str]]) -> tuple[list[str], list[str], int]:
    """Prompts and responses within the page's budget, and how many from the first on are as long as a page ever shows."""
    excerpt = min(MAX_EXCERPT, TEXT_BYTES // (4 * len(rows)))
    left = TEXT_BYTES - len(rows) * (2 * excerpt + 6)
    prompts, responses, full = [], [], 0
    for prompt, response in rows:
        long = shorten(prompt, MAX_PROMPT), shorten(response, MAX_RESPONSE)
        left -= _weight(long[0]) + _weight(long[1])
        if left >= 0:
            full += 1
        pair = long if left >= 0 else (shorten(prompt, excerpt), shorten(response, excerpt))
        prompts.append(pair[0])
        responses.append(pair[1])
    return prompts, responses, full


def shorten(text: str, length: int) -> str:
    """At most so many characters, the last an ellipsis where some are missing."""
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…"


def _heat(ds: Dataset, rows: Sequence[int]) -> list[tuple[list[str], list[int]] | None]:
    """Tokens and shades of the first rows, as many as there is room for."""
    if not {"attribution", "attribution_tokens"} <= set(ds.column_names):
        return []
    found: list[tuple[list[str], list[int]] | None] = []
    left = HEAT_BYTES
    for row in ds.select_columns(["attribution", "attribution_tokens"]).select(rows):
        tokens, terms = row["attribution_tokens"], np.asarray(row["attribution"], dtype=np.float64)
        largest = np.abs(terms).max(initial=0.0)
        if not largest or not np.isfinite(largest):
            found.append(None)
            continue
        shades = np.rint(SHADES * terms / largest).astype(int).tolist()
        left -= sum(map(_weight, tokens)) + 3 * len(tokens)
        if left < 0:
            break
        found.append((tokens, shades))
    return found


def _weight(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _common(ds: Dataset, responses: list[str], order: list[int]) -> list[dict[str, Any]]:
    """What the riskiest tenth of the scored rows, riskiest first in `order`, looks like beside the rest."""
    count = max(1, round(RISKIEST * len(order)))
    kinds = next((ds[c][:] for c in ("kind", "source", "category") if c in ds.column_names), None)
    groups = {f"riskiest {count}": order[:count]} | ({"the rest": order[count:]} if order[count:] else {})
    return patterns(responses, groups, kinds)


def _history(path: Path) -> list[dict[str, Any]]:
    path = _inside(path, HISTORY_FILE)
    try:
        entries = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the monitor's history {path}: {error}") from None
    if not entries or not all(isinstance(e, dict) and "step" in e for e in entries):
        raise InputError(f"{path} is not a monitor's history: it has no checks with a step")
    return entries


def _json(path: Path, what: str, key: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {what} from {path}: {error}") from None
    if not isinstance(data, dict) or key not in data:
        raise InputError(f"{path} is not {what}: it has no {key!r}")
    return data


def _inside(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path
