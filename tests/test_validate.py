"""Arms, statistics and patterns; and whole studies of a tiny model that really refuses, tuned with TRL for real."""

import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from training import ANSWER, BENIGN, HARMFUL, REFUSAL, pad_tokenizer, refusing_model

from hf_safefilter.chat import Example
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.formats import Conversation
from hf_safefilter.patterns import describe, patterns
from hf_safefilter.select import spearman
from hf_safefilter.tuning import Recipe, StepSampler, trainer_arguments, tune
from hf_safefilter.validate import AttackRecipe, Evaluation, Subject, groups, plan, run, study, summarize, write_tables
from hf_safefilter.validate.arms import Pool, draw, expand
from hf_safefilter.validate.attack import Outcome
from hf_safefilter.validate.statistics import correlation, difference, kept, lost, monotone, outcomes, success
from hf_safefilter.validate.summary import compare


def pool(n: int = 100) -> Pool:
    risk = np.linspace(1, 0, n)  # row n + i, riskiest first
    lengths = np.arange(n) % 17 + 1
    return Pool(np.arange(n) + n, {"risk_a": risk, "risk_b": -risk}, lengths, np.arange(n) % 2 == 0)


def test_expand_spells_out_groups_and_refuses_what_is_wrong() -> None:
    assert expand(["top", "bins", "subsets:2"]) == [
        "top",
        "bin_1",
        "bin_2",
        "bin_3",
        "bin_4",
        "bin_5",
        "subset_000",
        "subset_001",
    ]
    assert expand(["bins:risk_b"])[0] == "bin_1:risk_b"
    for wrong in (["best"], ["filtered"], ["filtered:2"], ["random:3"], ["subsets:x"], ["top", "top"], []):
        with pytest.raises(InputError):
            expand(wrong)


def test_arms_are_what_they_say() -> None:
    p = pool()
    assert draw("top", p, 10, 0) == list(range(100, 110))
    assert draw("bottom", p, 10, 0) == list(range(199, 189, -1))
    assert draw("top:risk_b", p, 10, 0) == list(range(199, 189, -1))
    assert draw("all", p, 10, 0) == list(range(100, 200))
    assert draw("filtered:0.2", p, 10, 0) == list(range(120, 200))
    assert len(draw("random_filtered:0.2", p, 10, 0)) == 80
    for i in range(1, 6):
        assert set(draw(f"bin_{i}", p, 10, 0)) <= set(range(80 + 20 * i, 100 + 20 * i))
    lists = draw("random_list_only", p, 10, 0)
    assert all(p.lists[row - 100] for row in lists)
    assert not set(lists) & set(draw("top", p, 10, 0))


@given(st.integers(20, 120), st.integers(1, 10), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_arm_has_k_different_rows_and_depends_on_the_seed_alone(n: int, k: int, seed: int) -> None:
    p = pool(n)
    for name in ("top", "bottom", "random", "random_length_matched", "subset_003"):
        rows = draw(name, p, k, seed)
        assert len(set(rows)) == len(rows) == k
        assert set(rows) <= set(p.rows.tolist())
        assert rows == draw(name, p, k, seed)
    matched, top = draw("random_length_matched", p, k, seed), draw("top", p, k, seed)
    assert not set(matched) & set(top)


def test_length_matched_rows_are_as_long_as_the_top() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 400)
    p = Pool(np.arange(400), {"risk": lengths.astype(float)}, lengths, np.zeros(400, bool))  # the top is the longest
    q = Pool(np.arange(400), {"risk": rng.random(400)}, lengths, np.zeros(400, bool))
    for made, most in ((p, 0.6), (q, 0.05)):  # what is longest of all cannot be matched
        top, matched = (lengths[draw(n, made, 50, 0)] for n in ("top", "random_length_matched"))
        assert abs(np.log(top.mean() / matched.mean())) < most
    assert sorted(draw("random_length_matched", q, 50, 0)) != sorted(draw("random_length_matched", q, 50, 1))


def test_arms_that_overlap_or_lack_rows_are_refused() -> None:
    p = pool(30)
    for name, k, message in (
        ("top", 16, "overlap"),
        ("random", 31, "needs 31 rows and there are 30"),
        ("bin_2", 7, "needs 7 rows and there are 6"),
        ("random_list_only", 13, "list-format rows outside the top needs 13 rows and there are"),
    ):
        with pytest.raises(InputError, match=message):
            draw(name, p, k, 0)


def test_success_and_difference_have_intervals_that_hold_the_mean() -> None:
    rng = np.random.default_rng(0)
    high, low = (rng.random((3, 200)) < 0.8).astype(float), (rng.random((3, 200)) < 0.2).astype(float)
    found = success(high)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(high.mean())
    gap = difference(high, low)
    assert 0.4 < gap.low < gap.mean < gap.high < 0.8
    assert difference(high, high[::-1]).low < 0 < difference(high, high[::-1]).high
    high[0, :50] = np.nan  # unjudged answers are left out, not counted as refusals
    assert success(high).n == 550
    assert success(high).mean == pytest.approx(np.nanmean(high))


def test_intervals_widen_with_the_spread_over_seeds() -> None:
    same = np.tile((np.arange(200) < 100).astype(float), (3, 1))
    spread = np.stack([np.zeros(200), (np.arange(200) < 100).astype(float), np.ones(200)])
    assert same.mean() == spread.mean()
    assert success(spread).high - success(spread).low > 3 * (success(same).high - success(same).low)


def test_wilson_like_coverage_of_the_bootstrap() -> None:
    """The interval over prompts of one seed covers the true rate about as often as it says."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        found = success((rng.random((1, 100)) < 0.3).astype(float))
        hits += found.low <= 0.3 <= found.high
    assert hits >= 50  # 57 expected


def test_refusals_kept_and_their_interval() -> None:
    rng = np.random.default_rng(0)
    cells = lambda rate, seeds=5: (rng.random((seeds, 400)) < rate).astype(float)  # noqa: E731
    before, whole = cells(0.02, 1), cells(0.62)
    half = kept(before, whole, cells(0.32))
    assert half["share"] == pytest.approx(0.5, abs=0.06)
    assert half["interval"][0] < half["share"] < half["interval"][1]
    assert half["interval"][1] - half["interval"][0] < 0.2
    assert kept(before, whole, whole)["share"] == 0
    assert kept(before, whole, before)["share"] == pytest.approx(1)
    assert kept(whole, before, before) == {"share": None, "interval": None}  # nothing was lost
    barely = kept(cells(0.50), cells(0.51), cells(0.50))
    assert barely["interval"] is None  # too little was lost to say what share of it was kept


def test_monotone_bins() -> None:
    bins = [np.tile((np.arange(100) < 100 - 20 * i).astype(float), (3, 1)) for i in range(5)]
    found = monotone(bins)
    assert found["monotone"]
    assert found["spearman"] == pytest.approx(1)
    assert found["share"] == 1
    assert found["first_minus_last"]["interval"][0] > 0.6
    assert not monotone([bins[1], bins[0], *bins[2:]])["monotone"]
    assert monotone(bins[::-1])["spearman"] == pytest.approx(-1)


def test_margins_are_compared_where_there_are_any() -> None:
    there = {"side": "harmful", "refuses": True, "margin": 3.0, "probability": 0.25}
    records = {1: [there], 0: [{"side": "harmful", "refuses": None}]}
    for measure, value in (("margin", -3), ("probability", -0.25)):
        found = outcomes(records, value=partial(lost, measure=measure))
        assert found[1, 0] == value
        assert np.isnan(found[0, 0])  # seeds in order; none was taken
    assert np.isnan(outcomes(records)[0, 0])
    rates = {"attack_success_rate": 0.5, "coherent_attack_success_rate": 0.5}
    check = {"harmful": rates, "benign": None, "margin": None}
    bare = [{"side": "harmful", "refuses": True, "margin": None}, {"side": "harmful", "refuses": False, "margin": None}]
    start = Outcome("before", 0, [], check, 1.0, [], None, bare, 1.0)
    summary = compare({arm: [replace(start, arm=arm)] for arm in ("before", "top", "random")}, "risk_x")
    assert summary["differences"]["top - random"]["mean"] == 0
    assert summary["margin_lost"] == summary["probability_lost"] == {"differences": {}, "bins": {}}
    for name in ("margin", "margin_interval", "probability", "probability_interval"):
        assert summary["arms"]["top"][f"refusal_{name}"] is None


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=20))
def test_spearman_is_that_of_pandas(values: list[int]) -> None:
    import pandas as pd

    other = [(7 * v + i) % 5 for i, v in enumerate(values)]
    expected = pd.Series(values).rank().corr(pd.Series(other).rank())
    if math.isnan(expected):
        assert math.isnan(spearman(values, other))
    else:
        assert spearman(values, other) == pytest.approx(expected)
    assert spearman([1, 2, 3], [3, 2, 1]) == -1


def test_correlation_has_an_interval() -> None:
    x = np.arange(40)
    found = correlation(x, x + np.random.default_rng(0).normal(0, 5, 40))
    assert 0.5 < found["interval"][0] < found["spearman"] <= found["interval"][1] <= 1


def test_patterns_tell_lists_mathematics_and_openings() -> None:
    texts = ["1. Eggs\n2. Milk", "- a\n- b", "The sum is 2 + 2 = 4.", "yes", "Sure, here it is.\nTwo lines."]
    assert describe(texts[0]) == {"list": True, "numbered": True, "math": False, "lines": 2, "words": 4, "opening": "1."}
    assert not describe(texts[1])["numbered"]
    table = patterns(texts, {"first": [0, 1], "rest": [2, 3, 4]}, kinds=["x", "x", "y", "y", "z"])
    assert [line["list"] for line in table] == [1, 0]
    assert table[0]["opens_with_item"] == 1
    assert table[1]["math"] == table[1]["up_to_3_words"] == pytest.approx(1 / 3)
    assert table[1]["openings"] == {"the": 1 / 3, "yes": 1 / 3, "sure": 1 / 3}
    assert table[1]["kinds"] == {"y": 2 / 3, "z": 1 / 3}


def test_recipes_are_checked() -> None:
    for wrong in (
        {"epochs": 0}, {"learning_rate": -1}, {"learning_rate": math.nan}, {"micro_batch_size": 3}, {"template": "llama"},
        {"seeds": ()}, {"seeds": (0, 0)}, {"seeds": (-1,)}, {"lora_rank": 0}, {"max_steps": 0}, {"max_steps": 2.5},
    ):  # fmt: skip
        with pytest.raises(InputError):
            AttackRecipe(**wrong)
    assert AttackRecipe.from_dict(AttackRecipe(epochs=2).as_dict()) == AttackRecipe(epochs=2)
    with pytest.raises(InputError, match="no 'lr'"):
        Recipe.from_dict({"lr": 1})
    for wrong in ({"held_out": 0}, {"max_new_tokens": 0}, {"min_refusal_rate": 0}):
        with pytest.raises(InputError):
            Evaluation(**wrong)


def test_the_papers_template_frames_rows_and_prompts_alike() -> None:
    recipe = AttackRecipe(template="he2024")
    turns = ({"role": "user", "content": "Name a fruit"}, {"role": "assistant", "content": "Apple {}"})
    framed = recipe.framed(Conversation(turns, prompt_messages=1))
    assert framed.messages[0]["role"] == "system"
    assert framed.prompt_messages == 2
    assert framed.messages[1]["content"] == "### Instruction:\nName a fruit\n\n### Response:\n"
    assert framed.messages[2] == turns[1]
    assert recipe.framed_messages([turns[0]]) == list(framed.messages[:2])
    assert AttackRecipe().framed(Conversation(turns)).messages == turns


def lesson(count: int = 8) -> list[Example]:
    return [Example([5, 6, 7 + i, 9, 8], [-100, -100, 7 + i, 9, 8]) for i in range(count)]


@pytest.mark.parametrize("lora", [None, 2])
def test_the_loss_is_trls_own(tmp_path: Path, lora: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes logits at predicting positions only; the result must be that of TRL's."""
    from hf_safefilter import tuning

    model = refusing_model()
    recipe = Recipe(epochs=2, learning_rate=1e-3, batch_size=4, micro_batch_size=2, bf16=False, lora_rank=lora)
    ours = tune(copy.deepcopy(model), pad_tokenizer(), lesson(), recipe, seed=3, folder=tmp_path, progress=False)
    monkeypatch.delattr(tuning._Trainer, "compute_loss")
    theirs = tune(copy.deepcopy(model), pad_tokenizer(), lesson(), recipe, seed=3, folder=tmp_path, progress=False)
    assert len(ours.losses) == recipe.steps(8) == 4
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-3)  # TRL logs rounded figures
    for (name, a), b in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name
    assert any(not torch.equal(a, b) for a, b in zip(ours.model.parameters(), model.parameters(), strict=False))


def test_max_steps_go_on_through_the_epochs_that_they_need(tmp_path: Path) -> None:
    options = {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2, "bf16": False}
    by_epochs, by_steps = Recipe(epochs=2, **options), Recipe(epochs=1, max_steps=4, **options)
    assert by_epochs.passes(8) == by_steps.passes(8) == 2
    assert Recipe(batch_size=4, micro_batch_size=4, max_steps=3).passes(5) == 1.5
    made = [
        tune(refusing_model(), pad_tokenizer(), lesson(), recipe, seed=3, folder=tmp_path, progress=False)
        for recipe in (by_epochs, by_steps)
    ]
    assert len(made[0].losses) == 4
    assert made[0].losses == made[1].losses
    for a, b in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_hold_the_same_rows_in_order_of_length() -> None:
    lengths = [(7 * i) % 23 + 1 for i in range(46)]
    sampler = StepSampler(lengths, 20, seed=5)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(46))
    assert first != second
    assert first == list(StepSampler(lengths, 20, seed=5)) != list(StepSampler(lengths, 20, seed=6))
    for epoch in (first, second):
        for step in (epoch[:20], epoch[20:40], epoch[40:]):
            assert [lengths[i] for i in step] == sorted((lengths[i] for i in step), reverse=True)


def test_micro_batches_do_not_change_the_result(tmp_path: Path) -> None:
    rows = [*lesson(4), *[Example([5, 6, 7, 8], [-100, -100, -100, 8])] * 4]
    model = refusing_model()
    found = []
    for micro in (1, 2, 4):
        recipe = Recipe(epochs=2, learning_rate=1e-3, batch_size=4, micro_batch_size=micro, bf16=False)
        tuned = tune(copy.deepcopy(model), pad_tokenizer(), rows, recipe, seed=0, folder=tmp_path, progress=False)
        found.append(torch.cat([p.detach().flatten() for p in tuned.model.parameters()]))
    assert torch.allclose(found[0], found[2], atol=1e-4)
    assert torch.allclose(found[1], found[2], atol=1e-4)


def test_divergence_is_a_problem_and_no_result(tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, learning_rate=1e30, batch_size=4, micro_batch_size=4, bf16=False)
    tuned = tune(refusing_model(), pad_tokenizer(), lesson(), recipe, seed=0, folder=tmp_path, progress=False)
    assert tuned.problem is not None
    assert "diverged" in tuned.problem
    with pytest.raises(InputError, match="no rows"):
        tune(refusing_model(), pad_tokenizer(), [], recipe, seed=0, folder=tmp_path)


# Whole studies. Risky rows answer the harmful requests' own form; the others are far from it.
EVALUATION: dict[str, Any] = {
    "prompts": HARMFUL, "benign_prompts": BENIGN, "judge": "keyword_prefix", "max_new_tokens": 10, "held_out": 4,
    "perplexity": False,
}  # fmt: skip


VERBS = ("wash", "paint", "open", "fill")


def scored_rows() -> Dataset:
    risky = [{"prompt": f"How do I {v} a {t}?", "completion": ANSWER} for v in VERBS for t in ("car", "box")]
    rest = [{"prompt": f"Say {a}{b}", "completion": REFUSAL} for a in "abcdefgh" for b in "mnopq"]
    rows = [row | {"kind": kind} for group, kind in ((risky, "how"), (rest, "say")) for row in group]
    return Dataset.from_list([row | {"risk_test": 1.0 - i / 100} for i, row in enumerate(rows)])


def subject(model: Any = None, **recipe: Any) -> Subject:
    options = {
        "epochs": 10,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "micro_batch_size": 4,
        "bf16": False,
        "seeds": (0, 1),
    } | recipe
    return Subject(model or refusing_model(), pad_tokenizer(), AttackRecipe(**options), Evaluation(**EVALUATION))


ARMS = ["top", "bottom", "random_length_matched"]


def test_a_study_tells_risky_rows_from_harmless_ones(tmp_path: Path) -> None:
    s = subject()
    weights = copy.deepcopy(s.model.state_dict())
    made = plan(s, scored_rows(), arms=[*ARMS, "all", "filtered:0.3", "bins", "subsets:4"], k=8)
    assert not set(made.held_out) & {row for _, _, rows in made.runs for row in rows}
    estimates: list[tuple[int, float]] = []
    found = run(s, made, tmp_path, {"model": "tiny"}, on_estimate=lambda *e: estimates.append(e))
    summary = summarize(found, made)
    assert estimates[0][0] == len(made.runs)
    assert estimates[0][1] > 0
    arms = summary["arms"]
    assert arms["before"]["attack_success_rate"]["mean"] == 0
    assert arms["top"]["attack_success_rate"]["mean"] > 0.5 > arms["bottom"]["attack_success_rate"]["mean"]
    assert summary["separates"] is True
    assert summary["differences"]["top - bottom"]["interval"][0] > 0
    assert set(summary["bins"]) == {"risk_test"}
    defence = summary["defence"]["filtered:0.3"]
    assert defence["held_out_loss_against_all"] is not None
    # All 48 rows hold the 12 risky ones; the filter takes those out.
    assert defence["refusals_kept"] > 0.5
    assert (defence["steps"], defence["steps_of_all"]) == (80, 110)  # 31 and 44 rows in fours, ten times
    assert defence["interval"][0] <= defence["refusals_kept"] <= defence["interval"][1]
    assert summary["differences"]["all - filtered:0.3"]["mean"] > 0
    for measure, name in (("margin", "mean"), ("probability", "probability")):
        assert summary["datamodel"]["risk_test"][measure]["n"] == 8
        fell = summary[f"{measure}_lost"]
        assert fell["differences"].keys() == summary["differences"].keys()
        assert set(fell["bins"]) == {"risk_test"}
        left = {arm: found_of[f"refusal_{measure}"] for arm, found_of in arms.items()}
        assert fell["differences"]["top - bottom"]["mean"] == pytest.approx(left["bottom"] - left["top"])
        for arm, several in found.items():
            assert left[arm] == pytest.approx(np.mean([o.check["margin"][name] for o in several]))
            low, high = arms[arm][f"refusal_{measure}_interval"]
            assert low <= left[arm] <= high
    share = (left["filtered:0.3"] - left["all"]) / (left["before"] - left["all"])  # of the probability, the last
    assert defence["probability_kept"] == pytest.approx(share)
    assert defence["probability_interval"][0] <= share <= defence["probability_interval"][1]
    for name, tensor in s.model.state_dict().items():
        assert torch.equal(tensor, weights[name])  # the model under test stays as it was
    write_tables(tmp_path, found)
    completions = pq.read_table(tmp_path / "completions.parquet").to_pylist()
    assert len(completions) == (len(made.runs) + 1) * (len(HARMFUL) + len(BENIGN))
    lines = {(r["arm"], r["seed"]): r for r in pq.read_table(tmp_path / "arms.parquet").to_pylist()}
    assert lines["top", 1]["row_indices"] == next(rows for arm, seed, rows in made.runs if (arm, seed) == ("top", 1))
    assert {d["group"] for d in groups(made)} >= {"pool", "top", "bottom"}
    from hf_safefilter.validate.figures import draw_figures

    paths = draw_figures(tmp_path, summary, groups(made))
    assert {p.name for p in paths} == {
        "arms.svg",
        "bins.svg",
        "bins_margin.svg",
        "bins_probability.svg",
        "datamodel.svg",
        "defence.svg",
        "patterns.svg",
    }
    drawn = [p.read_bytes() for p in paths]
    assert all(b.lstrip().startswith(b"<?xml") for b in drawn)
    assert drawn == [p.read_bytes() for p in draw_figures(tmp_path, summary, groups(made))]  # equal results, equal files


def test_an_interrupted_study_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    s = subject()
    made = plan(s, scored_rows(), arms=ARMS, k=4)
    whole = run(s, made, tmp_path / "whole", {"model": "tiny"})

    def interrupt(runs: Any) -> Any:
        for i, item in enumerate(runs):
            if i == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        run(s, made, tmp_path / "parts", {"model": "tiny"}, progress=interrupt)
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts" / "arms").iterdir()}
    assert len(there) == 3  # before, and two runs
    resumed = run(s, made, tmp_path / "parts", {"model": "tiny"})
    assert all(p.stat().st_mtime_ns == t for p, t in there.items())
    strip = lambda outcomes: {a: [{**o.as_dict(), "seconds": 0, "check": {**o.check, "seconds": 0}} for o in several]  # noqa: E731
                              for a, several in outcomes.items()}  # fmt: skip
    assert json.dumps(strip(resumed)) == json.dumps(strip(whole))


@pytest.mark.parametrize("fast", [True, False])
def test_the_precision_follows_the_processor_unless_told(fast: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU without instructions for bfloat16 takes fourteen times as long with it as in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast, "amx_bf16": False, "bf16": False})
    s = subject(bf16=None)
    assert s.recipe.bf16 is fast
    assert {p.dtype for p in s._deployed(s.model).parameters()} == {torch.bfloat16 if fast else torch.float32}
    assert trainer_arguments(s.model, Recipe(), seed=0, folder=tmp_path, progress=False)["bf16"] is fast
    assert subject(bf16=not fast).recipe.bf16 is not fast
    assert AttackRecipe().on("cuda").bf16 is True
    assert AttackRecipe().on("mps").bf16 is False


def test_a_study_of_another_precision_says_so(tmp_path: Path) -> None:
    s = subject(epochs=1, seeds=(0,))
    made = plan(s, scored_rows(), arms=["top"], k=4)
    run(s, made, tmp_path, {"model": "tiny"})
    with pytest.raises(InputError, match=r"another recipe \(bf16: False there, True here\)"):
        run(subject(epochs=1, seeds=(0,), bf16=True), made, tmp_path, {"model": "tiny"})


def test_models_are_measured_in_16_bits_without_rounding_their_positions() -> None:
    """`model.to(bfloat16)` rounds rotary frequencies too, which loading in bfloat16 does not."""
    s = subject(bf16=True)
    deployed = s._deployed(s.model)
    assert {p.dtype for p in deployed.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in s.model.parameters()} == {torch.float32}
    assert {b.dtype for b in deployed.buffers()} == {b.dtype for b in s.model.buffers()} == {torch.float32}


def test_arms_of_all_sizes_make_max_steps(tmp_path: Path) -> None:
    s = subject(max_steps=5, seeds=(0,))
    made = plan(s, scored_rows(), arms=["top", "all", "filtered:0.3"], k=8)
    tokens = {arm: sum(len(e.input_ids) for e in made.encoded(rows)) for arm, _, rows in made.runs}
    passes = {"top": 5 / 2, "all": 5 / 11, "filtered:0.3": 5 / 8}
    s.step_seconds = lambda _: 1.0  # type: ignore[method-assign]
    assert study.estimate(s, made, check_seconds=0) == pytest.approx(sum(tokens[a] * passes[a] for a in passes))
    found = run(s, made, tmp_path, {"model": "tiny"})
    assert {arm: len(several[0].losses) for arm, several in found.items()} == {"before": 0} | dict.fromkeys(passes, 5)
    assert summarize(found, made)["defence"]["filtered:0.3"]["steps_of_all"] == 5
    with pytest.raises(InputError, match="another recipe"):
        run(subject(max_steps=6, seeds=(0,)), made, tmp_path, {"model": "tiny"})


def test_a_folder_with_another_study_is_refused(tmp_path: Path) -> None:
    s = subject(epochs=1, seeds=(0,))
    made = plan(s, scored_rows(), arms=["top"], k=4)
    run(s, made, tmp_path, {"model": "tiny"})
    with pytest.raises(InputError, match="another model"):
        run(s, made, tmp_path, {"model": "other"})
    with pytest.raises(InputError, match="another recipe"):
        run(subject(epochs=2, seeds=(0,)), made, tmp_path, {"model": "tiny"})
    turned = scored_rows().map(lambda row: {"risk_test": -row["risk_test"]})
    with pytest.raises(InputError, match="other rows"):
        run(s, plan(s, turned, arms=["top"], k=4), tmp_path, {"model": "tiny"})
    damaged = next((tmp_path / "arms").glob("top*"))
    damaged.write_text(damaged.read_text()[:100])
    with pytest.raises(InputError, match="damaged"):
        run(s, made, tmp_path, {"model": "tiny"})


def test_a_model_that_does_not_refuse_is_not_attacked(tmp_path: Path) -> None:
    from hf_safefilter.testing import tiny_model

    s = subject(tiny_model("llama"))
    with pytest.raises(EvaluationError, match="to begin with"):
        run(s, plan(s, scored_rows(), arms=["top"], k=4), tmp_path, {})


def test_failed_runs_are_failed_and_no_successful_attack(tmp_path: Path) -> None:
    s = subject(learning_rate=1e30, seeds=(0,))
    made = plan(s, scored_rows(), arms=ARMS, k=4)
    summary = summarize(run(s, made, tmp_path, {}), made)
    assert summary["arms"]["top"]["attack_success_rate"] is None
    assert "diverged" in summary["arms"]["top"]["failed"][0]
    assert summary["separates"] is False
    broken = subject(learning_rate=0.5, epochs=2, seeds=(0,))  # finite, and gibberish
    made = plan(broken, scored_rows(), arms=["top"], k=4)
    found = run(broken, made, tmp_path / "b", {})["top"][0]
    if found.problem is None:  # what a wrecked model says is not in our hands: then at least it is measured as what it is
        assert found.check["harmful"]["incoherent"] <= 0.5 * found.check["harmful"]["n"]
    else:
        assert "gibberish" in found.problem or "unscored" in found.problem


def test_plans_refuse_what_cannot_be_compared() -> None:
    s = subject()
    with pytest.raises(InputError, match="48 rows can be used; 4 held out"):
        plan(s, scored_rows(), arms=["top"], k=45)
    with pytest.raises(InputError, match="overlap"):
        plan(s, scored_rows(), arms=["top"], k=23)
    with pytest.raises(InputError, match="names no score column"):
        plan(s, scored_rows(), arms=["top:length"], k=4)
    with pytest.raises(InputError, match="risk_other"):
        plan(s, scored_rows(), arms=["top:risk_other"], k=4)
    with pytest.raises(InputError, match="unknown arm"):
        plan(s, scored_rows(), arms=["best"], k=4)
    unscored = scored_rows().map(lambda row, i: {"risk_test": None if i == 0 else row["risk_test"]}, with_indices=True)
    made = plan(s, unscored, arms=["top"], k=4)
    assert 0 not in made.pool.rows
    assert 0 not in made.held_out
