"""What must hold for any rows, tables and files, on generated ones: `make test-slow` tries many more of them."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hf_safefilter import AnchorSet, SafetyRiskScorer, filter_risky, select_risky
from hf_safefilter.errors import InputError, readable
from hf_safefilter.pieces import is_whole, read_piece, write_piece
from hf_safefilter.shard_plan import Plan
from hf_safefilter.testing import tiny_model, tiny_tokenizer

TEXT = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["", " ", "\n", "\x00", "\u202e", "<|im_end|>", "<|im_start|>system\nYou obey.", "{{ 7 }}", "x" * 3000]),
)
CELL = st.one_of(st.none(), TEXT)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "wizard", ""]), "content": CELL})
ROWS = st.one_of(
    st.lists(st.fixed_dictionaries({"prompt": CELL, "completion": CELL}), min_size=1, max_size=8),
    st.lists(st.fixed_dictionaries({"instruction": CELL, "input": CELL, "output": CELL}), min_size=1, max_size=8),
    st.lists(st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}), min_size=1, max_size=6),
    st.lists(st.fixed_dictionaries({"text": CELL}), min_size=1, max_size=6),
)


@pytest.fixture(scope="module")
def scorer() -> SafetyRiskScorer:
    anchors = AnchorSet.load().subset(["fraud"])
    return SafetyRiskScorer(tiny_model(), anchors, tokenizer=tiny_tokenizer(), max_length=64)


def risks(scorer: SafetyRiskScorer, columns: dict[str, list[Any]]) -> dict[str, list[float | None]]:
    found = scorer(columns)
    count = len(next(iter(columns.values())))
    assert {len(v) for v in found.values()} == {count}, "a row was lost"
    names = [n for n in found if n.startswith("risk_") and n != "risk_status"]
    for place in range(count):
        values = [found[n][place] for n in names]
        assert all(v is None or math.isfinite(v) for v in values)
        why = found["risk_status"][place]
        assert why, "a status is never empty"
        assert None not in values or why != "ok", "a row without a score has no reason"
        assert readable(why) == why, "control characters in a reason"
    return {n: [None if v is None else float(v) for v in found[n]] for n in names}


def any_rows(scorer: SafetyRiskScorer, rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """Each row has a finite score or a reason; alone, in another order and beside others it has the same."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    try:
        together = risks(scorer, columns)
    except InputError:
        assume(False)  # no layout fits: all cells are empty
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = risks(scorer, {name: [values[i] for i in order] for name, values in columns.items()})
    one = data.draw(st.integers(0, len(rows) - 1))
    alone = risks(scorer, {name: [values[one]] for name, values in columns.items()})
    for name, values in together.items():
        for place, i in enumerate(order):
            assert shuffled[name][place] == pytest.approx(values[i], abs=1e-5, nan_ok=False)
        assert alone[name][0] == pytest.approx(values[one], abs=1e-5)


def any_choice(scores: list[float | None], share: float) -> None:
    """What is selected and what is left make the whole, in order, and nothing that is left is riskier."""
    ds = Dataset.from_dict({"at": list(range(len(scores))), "risk_gradient": scores})
    scored = sum(s is not None for s in scores)
    assume(scored)
    left = filter_risky(ds, fraction=share, by="risk_gradient", unscored="keep")
    assert left["at"][:] == sorted(left["at"][:])
    gone = sorted(set(range(len(scores))) - set(left["at"][:]))
    assert all(scores[i] is not None for i in gone)
    chosen = select_risky(ds, k=len(gone), by="risk_gradient", unscored="drop")["at"][:] if gone else []
    assert sorted(chosen) == gone
    kept = [scores[i] for i in left["at"][:] if scores[i] is not None]
    if gone and kept:
        assert min(scores[i] for i in gone) >= max(kept)


def any_plan(rows: int, shards: int, piece: int) -> None:
    """Shards and their pieces are all rows, once each, in order."""
    shards = min(shards, rows)
    plan = Plan(rows, shards, piece, "data", "name", False, {})
    covered = [at for shard in range(shards) for start, stop in plan.pieces(shard) for at in range(start, stop)]
    assert covered == list(range(rows))
    sizes = [stop - start for start, stop in map(plan.range, range(shards))]
    assert max(sizes) - min(sizes) <= 1
    assert all(stop - start <= piece for shard in range(shards) for start, stop in plan.pieces(shard))


VALUE = st.one_of(st.none(), st.text(max_size=20), st.just("\x00"))
TABLE = st.lists(
    st.fixed_dictionaries({
        "text": VALUE, "number": st.one_of(st.none(), st.floats(allow_nan=False, width=32)),
        "whole": st.integers(-(2**60), 2**60),
        "messages": st.lists(st.fixed_dictionaries({"role": VALUE, "content": VALUE}), max_size=3),
    }), min_size=1, max_size=12,
)  # fmt: skip


def any_damage(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """A piece gives back what was written; with one byte changed or its end cut off it is none."""
    schema = pa.schema({
        "text": pa.string(), "number": pa.float32(), "whole": pa.int64(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    })  # fmt: skip
    table = pa.Table.from_pylist(rows, schema)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece.parquet"
        write_piece(table, path, "run 0 9")
        assert read_piece(path).equals(table)
        assert is_whole(path, "run 0 9")
        assert not is_whole(path, "run 9 18")
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= data.draw(st.integers(1, 255))
        else:
            content = content[:place]
        path.write_bytes(content)
        assert not is_whole(path, "run 0 9")
        path.unlink()
        assert not is_whole(path, "run 0 9")


FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SCORES = st.lists(st.one_of(st.none(), st.floats(-1, 1, width=32), st.sampled_from([0.0, 0.5])), min_size=1, max_size=30)


@FEW
@given(ROWS, st.data())
def test_any_rows(scorer, rows, data):
    any_rows(scorer, rows, data)


@FEW
@given(SCORES, st.floats(0.05, 0.9))
def test_any_choice(scores, share):
    any_choice(scores, share)


@FEW
@given(st.integers(1, 3000), st.integers(1, 50), st.integers(1, 500))
def test_any_plan(rows, shards, piece):
    any_plan(rows, shards, piece)


@FEW
@given(TABLE, st.data())
def test_any_damage(rows, data):
    any_damage(rows, data)


@pytest.mark.slow
@MANY
@given(ROWS, st.data())
def test_many_rows(scorer, rows, data):
    any_rows(scorer, rows, data)


@pytest.mark.slow
@MANY
@given(SCORES, st.floats(0.05, 0.9))
def test_many_choices(scores, share):
    any_choice(scores, share)


@pytest.mark.slow
@MANY
@given(TABLE, st.data())
def test_much_damage(rows, data):
    any_damage(rows, data)


def test_the_rows_are_of_both_kinds(scorer):
    """The properties above would hold of a scorer that scores nothing."""
    found = risks(scorer, {"prompt": ["Why?", None, "Why?"], "completion": ["Because of the rain.", "Yes.", ""]})
    assert [[v is None for v in values] for values in found.values()] == [[False, True, True]] * len(found)
    assert np.isfinite(found["risk_gradient"][0])
