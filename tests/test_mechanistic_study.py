"""The synthetic study end to end on a model that learns nothing much, resumed; and its findings on tables made up here."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.mechanistic import study
from hf_safefilter.mechanistic.findings import (
    CONTROLS,
    JAILBREAKS,
    MEDIUM,
    TUNED,
    claim,
    draw_findings,
    estimate,
    less,
    per_seed,
    summarize,
)
from hf_safefilter.mechanistic.study import Scale, run_synthetic
from hf_safefilter.mechanistic.synthetic import SMALL
from hf_safefilter.tuning import Recipe, Tuned

TINY = replace(SMALL, model={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2})
QUICK = Recipe(epochs=1, learning_rate=3e-3, batch_size=16, micro_batch_size=16, bf16=False)
SCALE = Scale(pretraining=QUICK, tuning=QUICK, pretraining_steps=4, rows=32, prompts=12, moved=4, alphas=(0, 1), radii=(1.0,))
NAMES = ("base", *CONTROLS, *TUNED)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, run_synthetic(folder, (3,), setting=TINY, scale=SCALE, progress=False)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_study_leaves_models_tables_findings_and_pictures(done):
    folder, summary = done
    assert {p.name for p in (folder / "models" / "seed3").iterdir()} == set(NAMES)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert [name for name in summary if name[0] == "A"] == [f"A{i}" for i in range(1, 9)]
    assert len(list(folder.glob("*.svg"))) == 10
    tables = {p.stem: pq.read_table(p).to_pylist() for p in folder.glob("*.parquet")}
    assert set(tables) == {"rates", "separation", "attack", "alignment", "gain", "groups", "shift"}
    for name, rows in tables.items():
        models = set(NAMES) if name in ("rates", "separation", "attack") else set(NAMES) - {"base"}
        assert {(row["seed"], row["model"]) for row in rows} == {(3, m) for m in models}
    assert {row["update"] for row in tables["alignment"] if row["model"] == "sft-medium"} == {"tuned", "random", *CONTROLS}
    assert {row["part"] for row in tables["shift"]} == {"none", "all", "mlp", "attention", "transplanted"}
    for row in tables["shift"]:
        if row["model"] == "dpo-small" and row["part"] == "none":
            base = [r for r in tables["rates"] if r["model"] == "base" and r["kind"] == "safe"]
            assert row["alpha"] == 0
            assert row["instruct_safe"] == pytest.approx(base[0]["instruct"], abs=0.2)


def test_what_is_there_is_not_made_again(done, monkeypatch):
    folder, summary = done
    before = files(folder)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(study, "pretrain", never)
    monkeypatch.setattr(study, "safety_tune", never)
    monkeypatch.setattr(study, "answer_rates", never)
    assert run_synthetic(folder, (3,), setting=TINY, scale=SCALE, progress=False) == summary
    assert files(folder) == before


def test_one_missing_model_alone_is_trained_and_comes_out_the_same(done, monkeypatch):
    folder, _ = done
    model = folder / "models" / "seed3" / "unlearn-small"
    before = files(folder)
    for path in model.iterdir():
        path.unlink()
    model.rmdir()
    real, calls = study.safety_tune, []
    monkeypatch.setattr(study, "safety_tune", lambda *a, **k: calls.append(a[3:5]) or real(*a, **k))
    run_synthetic(folder, (3,), setting=TINY, scale=SCALE, progress=False)
    assert calls == [("unlearn", "small")]
    assert files(folder) == before


def test_processes_that_share_the_work_leave_the_same(done, tmp_path):
    summary = run_synthetic(tmp_path, (3, 4), setting=TINY, scale=SCALE, workers=2, progress=False)
    assert summary["seeds"] == [3, 4]
    ours, theirs = files(tmp_path), files(done[0])
    of_seed = [path for path in theirs if "seed3" in str(path)]
    assert len(of_seed) > 2 * len(NAMES)
    assert {path: ours[path] for path in of_seed} == {path: theirs[path] for path in of_seed}


def test_a_training_that_diverges_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(
        study, "pretrain", lambda *a, **k: Tuned(None, [], "training diverged: the loss is not finite at step 3")
    )
    with pytest.raises(EvaluationError, match="seed 7, base: training diverged"):
        run_synthetic(tmp_path, (7,), setting=TINY, scale=SCALE, progress=False)
    assert list((tmp_path / "models" / "seed7").iterdir()) == []


def test_a_damaged_analysis_is_named(done):
    path = done[0] / "analyses" / "seed3-dpo-small.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"seed3-dpo-small.json is damaged"):
        run_synthetic(done[0], (3,), setting=TINY, scale=SCALE, progress=False)
    path.write_bytes(whole)


def test_a_folder_of_another_study_is_refused(done):
    with pytest.raises(InputError, match="holds a study with another scale"):
        run_synthetic(done[0], (3,), setting=TINY, scale=replace(SCALE, rows=64), progress=False)


@pytest.mark.parametrize(("text", "reason"), [("[]", "holds a study with another scale"), ("{", "study.json is damaged")])
def test_a_folder_whose_description_is_none_is_refused(text, reason, tmp_path):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=reason):
        run_synthetic(tmp_path, (3,), setting=TINY, scale=SCALE, progress=False)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_must_be_different(seeds, tmp_path):
    with pytest.raises(InputError, match="seeds"):
        run_synthetic(tmp_path, seeds, setting=TINY, scale=SCALE, progress=False)


def test_values_by_seed_are_means_of_the_rows_that_fit():
    rows = [{"seed": s, "layer": i, "model": "a", "x": 10 * s + i} for s in (0, 1) for i in (0, 1, 2)]
    rows += [{"seed": 0, "layer": 2, "model": "b", "x": 99}, {"seed": 1, "layer": 2, "model": "a", "x": None}]
    assert per_seed(rows, "x", model="a", layer=range(1, 3)) == {0: 1.5, 1: 11.5}
    assert per_seed(rows, "x", model="a", layer=0) == {0: 0, 1: 10}
    assert per_seed(rows, "x", model="c") == {}
    assert less({0: 3.0, 1: 4.0}, {0: 1.0, 2: 0.0}) == {0: 2.0}


def test_intervals_are_students():
    """Three values, by the formula and t(0.975, 2) = 4.3027 from a table."""
    found = estimate({0: 1.0, 1: 2.0, 2: 4.5})
    half = 4.3027 * 1.802776 / 3**0.5
    assert found["mean"] == 2.5
    assert found["interval"] == [pytest.approx(2.5 - half, abs=1e-3), pytest.approx(2.5 + half, abs=1e-3)]
    assert estimate({0: 1.0}) == {"mean": 1.0, "interval": None, "values": [1.0]}
    assert estimate({}) == {}


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ({"a": {0: 1.0, 1: 1.1, 2: 0.9}, "b": {0: 5.0, 1: 5.1, 2: 5.0}}, "holds"),
        ({"a": {0: 1.0, 1: 1.1, 2: 0.9}, "b": {0: 5.0, 1: 0.1, 2: 0.1}}, "in the right direction"),
        ({"a": {0: 1.0, 1: 1.1, 2: 0.9}, "b": {0: -5.0, 1: 0.1, 2: 0.1}}, "does not hold"),
        ({"a": {0: 1.0}}, "in the right direction"),
        ({"a": {0: 1.0, 1: 1.0}, "b": {}}, "not measured"),
    ],
)
def test_verdicts(differences, verdict):
    assert claim(differences)["verdict"] == verdict


def made_up(better: float) -> dict[str, list[dict]]:
    """Tables in which every claim of the paper holds by a clear margin, or fails where `better` is negative."""
    strength = {"base": 0.0, "benign": 0.0, "new": 0.0}
    strength |= {
        f"{m}-{s}": v * w for m, v in (("sft", 1), ("dpo", 2), ("unlearn", 3)) for s, w in (("medium", 1), ("small", 0.5))
    }
    tables: dict[str, list[dict]] = {n: [] for n in ("rates", "separation", "attack", "alignment", "gain", "groups", "shift")}
    for seed in (0, 1, 2):
        for model, power in strength.items():
            at = {"seed": seed, "model": model}
            x, jitter = better * power, 1e-3 * seed
            for kind in ("safe", "unsafe", *JAILBREAKS, "new"):
                refuses = kind != "safe" and x > 0
                tables["rates"].append(at | {"kind": kind, "instruct": 1.0 - refuses, "null": float(refuses)})
            for layer in range(3):
                # Only the last third counts: the others say the opposite.
                y = x if layer == 2 else -x
                tables["separation"].append(at | {"layer": layer, "gap_normalised": y + jitter, "gap": y, "auroc": 0.5})
                if model == "base":
                    continue
                for update in ("tuned", "random", *CONTROLS):
                    gain = 1 + (y if update == "tuned" else 0) + jitter
                    tables["gain"].append(at | {"layer": layer, "update": update, "gain": gain})
                for update, value in (("tuned", x), ("random", 0), ("benign", 0), ("new", 0)):
                    for basis in ("full", "energy90"):
                        tables["alignment"].append(
                            at | {"layer": layer, "update": update, "basis": basis, "excess": value + jitter}
                        )
                for group, place in zip(("safe", *JAILBREAKS, "unsafe"), (1, 0.5, 0.4, 0.3, -1), strict=True):
                    row = at | {"measure": "tau", "layer": layer, "group": group, "outcome": "all", "mean": y * place + jitter}
                    tables["groups"].append(row | ({"auroc": 0.5 + y / 10} if group in JAILBREAKS else {}))
            if model == "base":
                continue
            for kind in ("sensitivity_logit", "sensitivity_log_probability"):
                for group, sign in (("safe", 1), ("unsafe", -1)):
                    tables["groups"].append(
                        at | {"measure": kind, "layer": None, "group": group, "outcome": "all", "mean": sign * (x + jitter)}
                    )
            for alpha in (0, 0.5, 1, 1.25):
                names = ("null_unsafe", *(f"null_{j}" for j in JAILBREAKS))
                row = at | {"alpha": alpha, "part": "all" if alpha else "none", "instruct_safe": 1}
                tables["shift"].append(row | dict.fromkeys(names, x * alpha + jitter * alpha))
    return tables


def test_pictures_of_tables_with_several_seeds(tmp_path):
    tables = made_up(1.0) | {"attack": [{"seed": 0, "model": "sft-small", "radius": 1, "success": 0.5}]}
    paths = draw_findings(tmp_path, tables, 3)
    assert len(paths) == 10
    assert all(path.read_bytes().startswith(b"<?xml") for path in paths)
    again = [path.read_bytes() for path in paths]
    draw_findings(tmp_path, tables, 3)
    assert [path.read_bytes() for path in paths] == again


def test_findings_hold_where_they_hold_and_fail_where_they_fail():
    found = summarize(made_up(1.0), 3)
    assert {name: f["verdict"] for name, f in found.items()} == {f"A{i}": "holds" for i in range(1, 9)}
    found = summarize(made_up(-1.0), 3)
    assert {name: f["verdict"] for name, f in found.items() if name != "A1"} == {f"A{i}": "does not hold" for i in range(2, 9)}
    assert len(found["A2"]["values"]) == 2 * len(MEDIUM)
