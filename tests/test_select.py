"""Choosing rows."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict

from hf_safefilter import filter_risky, select_risky
from hf_safefilter.errors import InputError

RISK = [0.1, 0.9, 0.5, 0.9, -0.3, 0.5]


@pytest.fixture
def scored() -> Dataset:
    return Dataset.from_dict({"id": list(range(6)), "risk_a": RISK, "risk_b": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]})


@pytest.fixture
def gaps() -> Dataset:
    columns = {"id": [0, 1, 2, 3], "risk_a": [None, 0.2, float("nan"), 0.4], "risk_status": ["text is null", "ok", "?", "ok"]}
    return Dataset.from_dict(columns)


def ids(ds: Dataset) -> list[int]:
    return ds["id"][:]


def test_highest_risk_first_and_ties_in_dataset_order(scored):
    assert ids(select_risky(scored, k=4, by="risk_a")) == [1, 3, 2, 5]
    assert ids(select_risky(scored, k=0, by="risk_a")) == []


def test_filter_is_the_complement_in_dataset_order(scored):
    for budget in ({"k": 3}, {"fraction": 0.5}, {"threshold": 0.5}, {"k": 6}, {"k": 0}, {"fraction": 0.0}, {"fraction": 1.0}):
        risky = ids(select_risky(scored, by="risk_a", **budget))
        clean = ids(filter_risky(scored, by="risk_a", **budget))
        assert sorted([*risky, *clean]) == list(range(6))
        assert clean == sorted(clean)


def test_budgets(scored):
    assert len(select_risky(scored, fraction=0.5, by="risk_a")) == 3
    assert len(select_risky(scored, fraction=0.4, by="risk_a")) == 2  # 2.4 rows
    assert ids(select_risky(scored, threshold=0.5, by="risk_a")) == [1, 3, 2, 5]  # at least
    assert ids(select_risky(scored, threshold=0.51, by="risk_a")) == [1, 3]
    # Thirty rows, a tenth: no rounding error makes it four.
    thirty = Dataset.from_dict({"risk_a": [float(i) for i in range(30)]})
    assert len(select_risky(thirty, fraction=0.1)) == 3


def test_several_columns_are_compared_by_mean_rank(scored):
    # Ranks of risk_a: 2, 5.5, 3.5, 5.5, 1, 3.5; of risk_b: 6, 5, 4, 3, 2, 1.
    assert ids(select_risky(scored, k=6, by=["risk_a", "risk_b"])) == [1, 3, 0, 2, 5, 4]


def test_indices_mappings_are_honoured(scored):
    shuffled = scored.select([5, 3, 1, 0])
    assert ids(select_risky(shuffled, k=3, by="risk_a")) == [3, 1, 5]
    assert ids(filter_risky(shuffled, k=2, by="risk_a")) == [5, 0]
    assert ids(select_risky(scored.with_format("numpy"), k=1, by="risk_b").with_format(None)) == [0]
    assert ids(select_risky(scored.filter(lambda r: r["id"] > 1), k=1, by="risk_b")) == [2]


def test_the_default_column():
    columns = {"risk_representation": [1.0, 2.0], "risk_gradient": [2.0, 1.0], "id": [0, 1]}
    assert ids(select_risky(Dataset.from_dict(columns), k=1)) == [0]
    columns["risk_gradient_balanced"] = [1.0, 2.0]
    assert ids(select_risky(Dataset.from_dict(columns), k=1)) == [1]
    assert ids(select_risky(Dataset.from_dict({"risk_mine": [1.0, 2.0], "risk_status": ["ok", "ok"], "id": [0, 1]}), k=1)) == [
        1
    ]


def test_unscored_rows(gaps):
    with pytest.raises(InputError, match=r"2 of 4 rows have no score, row 0 first \(text is null\); pass unscored='drop'"):
        select_risky(gaps, k=1)
    assert ids(select_risky(gaps, k=1, unscored="drop")) == [3]
    assert ids(select_risky(gaps, k=1, unscored="keep")) == [3, 0, 2]
    assert ids(filter_risky(gaps, k=1, unscored="drop")) == [1]
    assert ids(filter_risky(gaps, k=1, unscored="keep")) == [0, 1, 2]
    assert len(select_risky(gaps, fraction=0.5, unscored="drop")) == 1  # half of the two scored rows
    both = gaps.add_column("risk_b", [1.0, 4.0, 3.0, None])
    assert ids(select_risky(both, k=1, by=["risk_a", "risk_b"], unscored="drop")) == [1]


@pytest.mark.parametrize("choose", [select_risky, filter_risky])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "exactly one of k, fraction and threshold; got none"),
        ({"k": 1, "fraction": 0.1}, "got k, fraction"),
        ({"k": -1}, "k must be a whole number of at least 0, got -1"),
        ({"k": 1.5}, "k must be a whole number"),
        ({"k": True}, "k must be a whole number"),
        ({"k": 7}, "k=7, but only 6 rows have a score"),
        ({"fraction": 1.1}, "fraction must be between 0 and 1"),
        ({"fraction": "half"}, "fraction must be between 0 and 1"),
        ({"threshold": float("nan")}, "threshold must be a number"),
        ({"k": 1, "by": "risk_c"}, "no column 'risk_c' in the dataset; its score columns: risk_a, risk_b"),
        ({"k": 1, "by": []}, "by names no column"),
        ({"k": 1, "by": "text"}, "does not hold numbers but Value"),
        ({"k": 1, "by": None}, "several score columns: choose with by="),
        ({"threshold": 0.1, "by": ["risk_a", "risk_b"]}, "a threshold needs a single column"),
        ({"k": 1, "unscored": "guess"}, "unscored must be one of error, keep, drop"),
    ],
)
def test_bad_arguments(scored, choose, arguments, reason):
    scored = scored.add_column("text", ["x"] * 6)
    with pytest.raises(InputError, match=reason):
        choose(scored, **{"by": "risk_a", **arguments})


def test_what_is_not_a_scored_dataset(scored):
    with pytest.raises(InputError, match="no risk_... column: score it first"):
        select_risky(scored.remove_columns(["risk_a", "risk_b"]), k=1)
    for other, hint in (
        (DatasetDict(train=scored), "choose a split"),
        (scored.to_iterable_dataset(), "save the scored rows"),
        ([1], "score and load it"),
    ):
        with pytest.raises(InputError, match=hint):
            filter_risky(other, k=1)
