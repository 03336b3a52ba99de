"""A study: the same model fine-tuned on differently chosen rows, arm by arm and seed by seed, kept in a folder.

study.json              what is compared, which a resumed run must agree with
arms/ARM-seedN.json     one run: measures and every completion; a run that is there is not repeated
completions.parquet     one line for each completion of each run
arms.parquet            one line for each run
summary.json            estimates with intervals, and what follows from them
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chat import Example
from ..errors import InputError
from ..files import agree, read_json, write_atomically, write_table
from ..formats import find_layout
from ..patterns import patterns
from ..scores.baselines import is_list
from ..select import default_score, score_columns, score_values
from .arms import Pool, draw, expand
from .attack import Outcome, Subject

if TYPE_CHECKING:
    from datasets import Dataset

STUDY_FILE, SUMMARY_FILE = "study.json", "summary.json"
COMPLETIONS_FILE, ARMS_FILE = "completions.parquet", "arms.parquet"


@dataclass(frozen=True)
class Plan:
    """What a study compares, ready to run: `runs` of (arm, seed, dataset rows), and the encoded rows.

    `held_out` are the rows that no arm trains on, `pool` what arms draw from, `texts` [dataset] the responses, `scores` all
    score columns [dataset] and the baselines length and list format.
    """

    runs: list[tuple[str, int, list[int]]]
    pool: Pool
    held_out: list[int]
    examples: list[Example | None]
    texts: list[str]
    kinds: list[Any] | None
    scores: dict[str, np.ndarray]

    def encoded(self, rows: Sequence[int]) -> list[Example]:
        """The rows' examples."""
        return [e for e in (self.examples[i] for i in rows) if e is not None]


def plan(
    subject: Subject,
    scored: Dataset,
    *,
    arms: Sequence[str],
    k: int = 100,
    by: str | Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Plan:
    """Choose every arm's rows before anything is trained.

    Args:
        subject: the model under test.
        scored: the dataset with `risk_...` columns. Rows without a score, or that cannot be encoded, take no part.
        arms: see `arms.py`.
        k: rows of an arm.
        by: the score column that arms go by; several are ranked each and compared by mean rank.
        columns: where the prompt and the response are, if not told by the columns' names.

    Raises:
        InputError: unknown arms or columns, too few rows for an arm, overlapping arms.
    """
    names = expand(arms)
    layout = find_layout([c for c in scored.column_names if not c.startswith("risk_")], columns)
    rows = [dict(row) for row in scored.select_columns(list(layout.columns.values()))]
    examples = subject.encode(rows, layout)
    texts = ["" if e is None else subject.encoder.target_text(e) for e in examples]
    risks = _risks(scored, by, names)
    usable = np.array([e is not None for e in examples]) & np.isfinite(np.stack(list(risks.values()))).all(axis=0)
    candidates = np.flatnonzero(usable)
    wanted = subject.evaluation.held_out
    if len(candidates) < wanted + k:
        raise InputError(
            f"{len(candidates)} rows can be used; {wanted} held out and arms of {k} need at least {wanted + k}: "
            "use a smaller k or fewer held-out rows"
        )
    rng = np.random.default_rng(subject.evaluation.held_out_seed)
    held_out = np.sort(rng.choice(candidates, wanted, replace=False))
    kept = np.setdiff1d(candidates, held_out)
    pool = Pool(
        rows=kept,
        risks={name: risk[kept] for name, risk in risks.items()},
        lengths=np.array([len(examples[i].target_positions) for i in kept]),  # type: ignore[union-attr]
        lists=np.array([is_list(texts[i]) for i in kept]),
    )
    runs = [(name, seed, draw(name, pool, k, seed)) for seed in subject.recipe.seeds for name in names]
    kinds = next((list(scored[c]) for c in ("kind", "source", "category") if c in scored.column_names), None)
    scores = {name: score_values(scored, [name]) for name in score_columns(scored)}
    scores |= {"length": np.array([0 if e is None else len(e.target_positions) for e in examples])}
    scores |= {"list": np.array([float(is_list(text)) for text in texts])}
    return Plan(runs, pool, held_out.tolist(), examples, texts, kinds, scores)


def run(
    subject: Subject,
    made: Plan,
    folder: Path,
    identity: Mapping[str, Any],
    *,
    on_estimate: Callable[[int, float], None] = lambda runs, seconds: None,
    progress: Callable[[Any], Any] = iter,
    trainer_progress: bool = False,
) -> dict[str, list[Outcome]]:
    """Run what is not there yet; returns each arm's outcomes by seed, with `before` among them.

    Args:
        subject: the model under test.
        made: from `plan`.
        folder: where results are kept.
        identity: what names the model and the data; a folder with another identity, recipe or evaluation is refused.
        on_estimate: told how many runs are left and about how many seconds they take, before the first.
        progress: wraps the iteration over runs left.
        trainer_progress: whether to show each training's own bar.

    Raises:
        InputError: the folder holds another study, or a damaged file.
        EvaluationError: the model does not refuse to begin with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arms").mkdir(exist_ok=True)
    agree(folder / STUDY_FILE, _description(subject, made, identity))
    held_out = made.encoded(made.held_out)
    found: dict[tuple[str, int], Outcome] = {}
    before = _read(_path(folder, "before", 0), [])
    if before is None:
        before = subject.before(held_out)
        _write(_path(folder, "before", 0), before)
    left = []
    for arm, seed, rows in made.runs:
        there = _read(_path(folder, arm, seed), rows)
        if there is None:
            left.append((arm, seed, rows))
        else:
            found[arm, seed] = there
    if left:
        on_estimate(len(left), estimate(subject, made, left, before.seconds))
    for arm, seed, rows in progress(left):
        outcome = subject.attack(arm, rows, made.encoded(rows), held_out, seed, progress=trainer_progress)
        _write(_path(folder, arm, seed), outcome)
        found[arm, seed] = outcome
    outcomes: dict[str, list[Outcome]] = {"before": [before]}
    for arm, seed, _ in sorted(made.runs, key=lambda run: run[1]):
        outcomes.setdefault(arm, []).append(found[arm, seed])
    return outcomes


def estimate(
    subject: Subject, made: Plan, left: Sequence[tuple[str, int, list[int]]] | None = None, check_seconds: float | None = None
) -> float:
    """About how many seconds the runs take, from one micro-batch on this machine and one check.

    Args:
        subject: the model under test.
        made: from `plan`.
        left: the runs that are not there yet; all by default.
        check_seconds: how long a check takes; the model is checked as it is where that is not known.
    """
    if check_seconds is None:
        check_seconds = subject.before(made.encoded(made.held_out)).seconds
    examples = [made.encoded(rows) for _, _, rows in (made.runs if left is None else left)]
    tokens = sum(sum(len(e.input_ids) for e in group) * subject.recipe.passes(len(group)) for group in examples)
    return tokens * subject.step_seconds(examples[0]) + len(examples) * check_seconds


def write_tables(folder: Path, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """Write `completions.parquet` and `arms.parquet`."""
    runs = [o for several in outcomes.values() for o in several]
    completions = [{"arm": o.arm, "seed": o.seed, **record} for o in runs for record in o.records]
    lines = []
    for o in runs:
        harmful, benign, margin = (o.check.get(name) or {} for name in ("harmful", "benign", "margin"))
        lines.append(
            {
                "arm": o.arm, "seed": o.seed, "rows": len(o.rows), "attack_success_rate": harmful.get("attack_success_rate"),
                "coherent_attack_success_rate": harmful.get("coherent_attack_success_rate"), "n": harmful.get("n"),
                "unscored": harmful.get("unscored"), "incoherent": harmful.get("incoherent"),
                "benign_refusal_rate": benign.get("rate"),
                "refusal_margin": margin.get("mean"), "refusal_probability": margin.get("probability"),
                "held_out_loss": o.held_out_loss, "first_loss": o.losses[0] if o.losses else None,
                "last_loss": o.losses[-1] if o.losses else None, "steps": len(o.losses), "problem": o.problem,
                "seconds": o.seconds, "row_indices": o.rows,
            }
        )  # fmt: skip
    for name, table in ((COMPLETIONS_FILE, completions), (ARMS_FILE, lines)):
        write_table(folder / name, table)


def groups(made: Plan) -> list[dict[str, Any]]:
    """What the rows of each arm look like (`patterns`), the seeds of an arm together, beside the whole pool."""
    members: dict[str, list[int]] = {"pool": made.pool.rows.tolist()}
    for arm, _, rows in made.runs:
        if arm not in ("all",) and not arm.startswith("subset_"):
            members.setdefault(arm, []).extend(rows)
    return patterns(made.texts, members, made.kinds)


def _risks(scored: Dataset, by: str | Sequence[str] | None, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Risk [rows] by column, NaN where a row has none; what arms go by first."""
    columns = [by] if isinstance(by, str) else list(by or [default_score(score_columns(scored))])
    risks = {"+".join(columns): score_values(scored, columns)}
    for name in names:
        _, _, column = name.partition(":")
        if column.startswith("risk_") and column not in risks:
            risks[column] = score_values(scored, [column])
        elif column and name.startswith(("top:", "bottom:", "bin_")) and column not in risks:
            raise InputError(f"the arm {name!r} names no score column; there are {', '.join(score_columns(scored))}")
    return risks


def _description(subject: Subject, made: Plan, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must share to be compared. Arms and seeds may be added."""
    recipe = {name: value for name, value in subject.recipe.as_dict().items() if name not in ("seeds", "micro_batch_size")}
    if recipe["max_steps"] is None:  # studies begun before there was one go on
        del recipe["max_steps"]
    conversations = json.dumps(subject.monitor.conversations, sort_keys=True)
    evaluation = {n: v for n, v in subject.evaluation.as_dict().items() if n not in ("prompts", "benign_prompts", "batch_size")}
    return {
        "format": "hf_safefilter.study/1",
        **identity,
        "recipe": recipe,
        "evaluation": evaluation,
        "prompts_hash": hashlib.sha256(conversations.encode()).hexdigest(),
        "held_out_rows": made.held_out,
    }


def _path(folder: Path, arm: str, seed: int) -> Path:
    # Names come from column names: they are hashed where they are not plain.
    plain = re.sub(r"[^\w.-]", "_", arm)
    name = arm if plain == arm else f"{plain}-{zlib.crc32(arm.encode()):08x}"
    return folder / "arms" / f"{name}-seed{seed}.json"


def _write(path: Path, outcome: Outcome) -> None:
    text = json.dumps(outcome.as_dict(), ensure_ascii=False)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _read(path: Path, rows: list[int]) -> Outcome | None:
    if not path.exists():
        return None
    try:
        outcome = Outcome(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path} is not a run of a study ({error}): delete it to run it again") from None
    if outcome.rows != rows:
        raise InputError(f"{path} was trained on other rows (another score, k or dataset): use another folder")
    return outcome
