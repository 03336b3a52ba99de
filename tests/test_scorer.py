"""The scorer as a `datasets.map` callable: every form of rows, and the same scores from all of them."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.errors import InputError
from hf_safefilter.scores import GradientScore, RepresentationScore
from hf_safefilter.testing import tiny_model, tiny_tokenizer

RISK = ["risk_gradient", "risk_gradient_balanced", "risk_representation", "risk_representation_balanced"]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


@pytest.fixture
def scorer(model, tokenizer, anchors) -> SafetyRiskScorer:
    return SafetyRiskScorer(model, anchors, tokenizer=tokenizer)


@pytest.fixture
def expected(scorer, rows) -> dict[str, list]:
    """Scores of the rows, each scored alone."""
    alone = [scorer(row) for row in rows]
    return {name: [r[name] for r in alone] for name in scorer.result_columns}


def check(scored, expected, tolerance=1e-5):
    for name in RISK:
        np.testing.assert_allclose(np.array(scored[name][:], float), expected[name], atol=tolerance, err_msg=name)
    assert list(scored["risk_status"][:]) == expected["risk_status"]


def test_columns_and_types(scorer, rows):
    scored = Dataset.from_list(rows).map(scorer, batched=True)
    names = ["risk_gradient", "risk_gradient_balanced", *(f"gradient_cosine_{s}" for s in ("harmful", "safe_1", "safe_2"))]
    names += ["gradient_norm", "gradient_loss", "risk_representation", "risk_representation_balanced"]
    names += [f"representation_cosine_{s}" for s in ("harmful", "safe_1", "safe_2")]
    assert scorer.result_columns == [*names, "gradient_parameters", "target_tokens", "total_tokens", "risk_status"]
    assert set(scored["gradient_parameters"]) == {"all"}
    assert scored.column_names == ["prompt", "completion", *scorer.result_columns]
    assert all(scored.features[n] == Value("float32") for n in names)
    assert scored.features["target_tokens"] == Value("int32")
    assert scored.features["risk_status"] == Value("string")


def test_batched_and_row_by_row(scorer, rows, expected):
    ds = Dataset.from_list(rows)
    check(ds.map(scorer, batched=True), expected)
    check(ds.map(scorer, batched=True, batch_size=2), expected)
    check(ds.map(scorer), expected)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("batched", [False, True])
def test_no_rows_and_one_row(scorer, rows, expected, count, batched):
    scored = Dataset.from_list(rows).select(range(count)).map(scorer, batched=batched)
    assert len(scored) == count
    if count:
        check(scored, {name: values[:1] for name, values in expected.items()})


def test_an_empty_batch_has_all_columns(scorer):
    assert scorer({"prompt": [], "completion": []}) == {name: [] for name in scorer.result_columns}


@pytest.mark.parametrize("num_proc", [2])
def test_processes(scorer, rows, expected, num_proc):
    """With the session made before the fork, and a loaded model that only this process and its forks hold."""
    check(Dataset.from_list(rows).map(scorer, batched=True, batch_size=2, num_proc=num_proc), expected)


def test_processes_with_a_folder(model_folder, anchors, rows, expected):
    scorer = SafetyRiskScorer(str(model_folder), anchors, dtype="float32")
    check(Dataset.from_list(rows).map(scorer, batched=True, num_proc=2, with_rank=True), expected)


@pytest.mark.parametrize("batched", [False, True])
def test_iterable_datasets(scorer, rows, expected, batched):
    stream = (
        Dataset.from_list(rows)
        .to_iterable_dataset(num_shards=3)
        .map(scorer, batched=batched, **({"batch_size": 3} if batched else {}))
    )
    scored = list(stream)
    check({name: [row[name] for row in scored] for name in scored[0]}, expected)
    assert all(isinstance(row["risk_gradient"], np.float32) for row in scored)


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow", "polars"])
@pytest.mark.parametrize("batched", [False, True])
def test_formatted_datasets(scorer, rows, expected, form, batched):
    scored = Dataset.from_list(rows).with_format(form).map(scorer, batched=batched).with_format(None)
    check(scored, expected)
    assert scored.column_names[:2] == ["prompt", "completion"]
    assert scored.features["risk_gradient"] == Value("float32")
    # A second run replaces its columns.
    assert scored.with_format(form).map(scorer, batched=batched).column_names == scored.column_names


@pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow", "pandas"])
@pytest.mark.parametrize("batched", [False, True])
def test_messages_in_each_format(scorer, form, batched):
    expected = scorer({"messages": MESSAGES})
    ds = Dataset.from_list([{"messages": MESSAGES, "meta": {"source": "x"}}] * 2).with_format(form)
    scored = ds.map(scorer, batched=batched).with_format(None)
    assert scored["risk_status"][:] == ["ok", "ok"]
    np.testing.assert_allclose(scored["risk_gradient"][:], [expected["risk_gradient"]] * 2, atol=1e-6)


def test_order_batch_budget_and_padding_side(model, anchors, rows, expected):
    for side, batch_tokens, order in (("left", 1, 1), ("right", 64, -1), ("left", 100_000, -1)):
        tokenizer = tiny_tokenizer(padding_side=side)
        scorer = SafetyRiskScorer(model, anchors, tokenizer=tokenizer, batch_tokens=batch_tokens)
        scored = Dataset.from_list(rows[::order]).map(scorer, batched=True)
        check(scored, {name: values[::order] for name, values in expected.items()})


@pytest.mark.parametrize("scores", ["all", "representation"])
def test_bfloat16_scores_do_not_depend_on_neighbours_either(tokenizer, anchors, rows, scores):
    """By default, on a CPU: batches, order and processes change nothing."""
    scorer = SafetyRiskScorer(tiny_model(dtype=torch.bfloat16), anchors, scores, tokenizer=tokenizer)
    alone = [scorer(row)["risk_representation"] for row in rows]
    ds = Dataset.from_list(rows)
    for options in ({}, {"batch_size": 3}, {"num_proc": 2, "batch_size": 1}):
        np.testing.assert_allclose(ds.map(scorer, batched=True, **options)["risk_representation"][:], alone, atol=1e-6)
    backwards = Dataset.from_list(rows[::-1]).map(scorer, batched=True)["risk_representation"][::-1]
    np.testing.assert_allclose(backwards, alone, atol=1e-6)


def test_representation_alone_equals_its_share(model, tokenizer, anchors, rows, expected):
    scorer = SafetyRiskScorer(model, anchors, "representation", tokenizer=tokenizer)
    scored = Dataset.from_list(rows).map(scorer, batched=True)
    np.testing.assert_allclose(scored["risk_representation"][:], expected["risk_representation"], atol=1e-5)
    assert "risk_gradient" not in scored.column_names


def test_bad_rows_keep_their_place(scorer, rows, expected):
    bad = [
        {"prompt": "Q", "completion": None},
        {"prompt": None, "completion": "A"},
        {"prompt": "Q", "completion": ""},
        {"prompt": "Q", "completion": "A<|im_end|>B"},
    ]
    mixed = [bad[0], rows[0], bad[1], bad[2], rows[1], bad[3], rows[0]]
    scored = Dataset.from_list(mixed).map(scorer, batched=True)
    assert scored["risk_status"][:] == [
        "completion is null",
        "ok",
        "prompt is null",
        "no target: the response is empty",
        "ok",
        "content holds control tokens: <|im_end|>",
        "ok",
    ]
    for name in RISK:
        values = scored[name][:]
        assert [v is None for v in values] == [True, False, True, True, False, False, False]
        # Duplicates get the same score, and good rows the score that they get alone.
        assert values[1] == pytest.approx(values[6], abs=1e-6)
        assert values[1] == pytest.approx(expected[name][0], abs=1e-5)
    assert scored["target_tokens"][0] is None


def test_a_first_batch_without_any_score_keeps_the_column_types(scorer, rows):
    ds = Dataset.from_list([{"prompt": "Q", "completion": ""}] * 4 + rows[:1])
    for options in ({"batched": True, "batch_size": 2}, {}):
        scored = ds.map(scorer, writer_batch_size=1, **options)
        assert scored.features["risk_gradient"] == Value("float32")
        assert [v is None for v in scored["risk_gradient"][:]] == [True] * 4 + [False]


def test_content_that_is_not_text(scorer):
    ds = Dataset.from_dict({"question": ["a", "b"], "answer": [1, 2]})
    assert ds.map(scorer, batched=True)["risk_status"][:] == ["answer is int, not text"] * 2
    assert scorer({"prompt": ["Q\ud800"], "completion": ["A"]})["risk_status"][0].startswith("prompt is not valid Unicode")


@pytest.mark.parametrize("form", [None, "arrow"])
def test_bytes_that_are_not_utf8_are_named_only_where_they_matter(scorer, tmp_path, form):
    def read(text: str) -> Dataset:
        (tmp_path / "rows.jsonl").write_text(text, errors="surrogateescape")
        return Dataset.from_json(str(tmp_path / "rows.jsonl")).with_format(form)

    with pytest.raises(InputError, match="the column 'prompt' holds bytes that are not UTF-8"):
        read('{"prompt": "caf\udce9", "completion": "A"}\n').map(scorer, batched=True)
    # A column that is not read does no harm.
    scored = read('{"prompt": "Q", "completion": "A", "note": "caf\udce9"}\n').map(scorer, batched=True)
    assert scored.with_format(None).select_columns(["risk_status"])["risk_status"][:] == ["ok"]


def test_truncation_is_reported_with_a_score(model, tokenizer, anchors, rows):
    scorer = SafetyRiskScorer(model, anchors, tokenizer=tokenizer, max_length=64)
    result = scorer(rows[3])
    assert result["risk_status"].startswith("truncated: kept ")
    assert result["total_tokens"] == 64
    assert math.isfinite(result["risk_gradient"])
    # The model's own context is a limit too.
    scorer = SafetyRiskScorer(model, anchors, tokenizer=tokenizer, max_length=100_000)
    long = scorer({"prompt": "Q", "completion": "word " * 100_000})
    assert long["total_tokens"] == model.config.max_position_embeddings
    assert "max_length=512" in long["risk_status"]


def test_overflow_is_no_score_and_neighbours_keep_theirs(tokenizer, anchors, rows):
    model = tiny_model()
    scorer = SafetyRiskScorer(model, anchors, tokenizer=tokenizer)
    expected = scorer(rows[0])
    # One token, in no anchor and not in the first row, overflows.
    token = tokenizer("Q", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("inf")
    scored = Dataset.from_list([{"prompt": "Q", "completion": "x"}, rows[0]]).map(scorer, batched=True)
    assert "risk_representation_balanced are not finite" in scored["risk_status"][0]
    assert scored["risk_gradient"][0] is None
    assert scored["risk_representation"][0] is None
    assert scored["risk_status"][1] == "ok"
    assert scored["risk_gradient"][1] == pytest.approx(expected["risk_gradient"], abs=1e-5)


def test_zero_gradient_is_no_score_but_its_representation_is(anchors):
    model, tokenizer = tiny_model("llama", num_hidden_layers=0), tiny_tokenizer(eos_token=None)
    token = tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():  # after Z the model is certain of another Z: no loss, no gradient
        for weight, value in ((model.model.embed_tokens.weight, 1), (model.lm_head.weight, 1e6)):
            weight[token] = 0
            weight[token, 0] = value
    scorer = SafetyRiskScorer(model, anchors, tokenizer=tokenizer)
    certain = scorer({"text": ["Z" * 9, "hello"]})
    assert "risk_gradient, risk_gradient_balanced are not finite (zero gradient" in certain["risk_status"][0]
    assert certain["risk_gradient"][0] is None
    assert certain["gradient_norm"][0] == 0
    assert math.isfinite(certain["risk_representation"][0])
    assert certain["risk_status"][1] == "ok"


def test_told_columns(model, tokenizer, anchors, rows, expected):
    scorer = SafetyRiskScorer(model, anchors, tokenizer=tokenizer, columns={"prompt": "q", "completion": "a"})
    ds = Dataset.from_list(rows).rename_columns({"prompt": "q", "completion": "a"})
    check(ds.map(scorer, batched=True), expected)
    with pytest.raises(InputError, match=r"columns\['prompt'\] is 'q', but the dataset has no such column"):
        Dataset.from_list(rows).map(scorer, batched=True)


def test_unknown_columns(scorer):
    with pytest.raises(InputError, match="cannot tell prompt from response among the columns 'x'"):
        Dataset.from_dict({"x": ["y"]}).map(scorer, batched=True)
    with pytest.raises(InputError, match="takes a row or a batch as datasets.map passes it, not list"):
        scorer([1])


def test_the_target_changes_the_score(model, tokenizer, anchors):
    talk = {"messages": [*MESSAGES, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Nothing else."}]}
    scores = {
        t: SafetyRiskScorer(model, anchors, tokenizer=tokenizer, target=t)(talk)["risk_gradient"]
        for t in ("assistant", "last_assistant", "all")
    }
    assert len({round(float(s), 4) for s in scores.values()}) == 3


def test_pickling(scorer, model_folder, rows, expected):
    for original in (scorer, SafetyRiskScorer(str(model_folder), scorer.anchors, dtype="float32")):
        payload = pickle.dumps(original)
        copy = pickle.loads(payload)
        assert pickle.dumps(copy) == payload
        assert copy.fingerprint == original.fingerprint
        assert copy(rows[0])["risk_gradient"] == pytest.approx(expected["risk_gradient"][0], abs=1e-5)
        assert pickle.dumps(original) == payload  # scoring changed nothing
    assert len(pickle.dumps(SafetyRiskScorer(str(model_folder)))) < 10_000  # with the whole built-in anchor set


def test_the_fingerprint_names_everything_that_matters(model_folder, anchors, monkeypatch):
    def fingerprint(**options):
        return SafetyRiskScorer(str(model_folder), **{"anchors": anchors, "dtype": "float32", **options}).fingerprint

    base = fingerprint()
    assert fingerprint() == base
    changed = [
        fingerprint(anchors=AnchorSet.load().subset(["hate"])),
        fingerprint(scores="gradient"),
        fingerprint(scores=[GradientScore(anchor_tokens=5), RepresentationScore()]),
        fingerprint(dtype="bfloat16"),
        fingerprint(max_length=99),
        fingerprint(target="all"),
        fingerprint(columns={"text": "t"}),
    ]
    monkeypatch.setattr("hf_safefilter.scorer.SCORE_VERSION", 99)
    changed.append(fingerprint())
    monkeypatch.undo()
    tiny_model(seed=1).save_pretrained(model_folder)
    changed.append(fingerprint())
    assert len({base, *changed}) == len(changed) + 1


def test_a_loaded_model_that_is_trained_on_gets_new_scores(tokenizer, anchors, rows):
    model = tiny_model()
    scorer = SafetyRiskScorer(model, anchors, tokenizer=tokenizer)
    before, payload = scorer(rows[0])["risk_gradient"], pickle.dumps(scorer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    after = scorer(rows[0])["risk_gradient"]
    assert abs(after - before) > 1e-4
    assert pickle.dumps(scorer) != payload
    payload = pickle.dumps(scorer)
    model.lm_head.weight.data.mul_(1.5)  # behind autograd's back
    assert pickle.dumps(scorer) != payload
    after = scorer(rows[0])["risk_gradient"]
    fresh = SafetyRiskScorer(model, anchors, tokenizer=tokenizer)
    assert fresh.fingerprint == scorer.fingerprint
    assert fresh(rows[0])["risk_gradient"] == pytest.approx(after, abs=1e-6)


def test_equal_models_are_told_apart_when_one_is_trained(tokenizer, anchors, rows):
    base, tuned = tiny_model(seed=3), tiny_model(seed=3)
    scorers = [SafetyRiskScorer(m, anchors, tokenizer=tokenizer) for m in (tuned, base)]
    before = [s(rows[0])["risk_gradient"] for s in scorers]
    copy = pickle.loads(pickle.dumps(scorers[0]))
    with torch.no_grad():
        tuned.lm_head.weight.add_(torch.randn(tuned.lm_head.weight.shape))
    after = [s(rows[0])["risk_gradient"] for s in scorers]
    assert before[0] == before[1] == after[1]
    assert abs(after[0] - before[0]) > 1e-4
    assert copy(rows[0])["risk_gradient"] == before[1]  # the base model holds what the copy names
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    with pytest.raises(InputError, match="has changed since this copy of its scorer was made"):
        copy(rows[0])


def test_a_loaded_model_is_not_in_another_process(tokenizer, anchors, rows):
    scorer = SafetyRiskScorer(tiny_model(seed=7), anchors, tokenizer=tokenizer)
    payload = pickle.dumps(scorer)
    del scorer  # as in a process that never had it
    with pytest.raises(InputError, match="built from a loaded model .* pass a Hub id or a folder"):
        pickle.loads(payload)(rows[0])


def test_arguments_of_the_map_cache(scorer, rows, tmp_path):
    """The features of the result survive a round trip, so that a cached or saved dataset is the same dataset."""
    scored = Dataset.from_list(rows).map(scorer, batched=True)
    scored.save_to_disk(tmp_path / "scored")
    assert Dataset.load_from_disk(tmp_path / "scored").features == scored.features
    assert isinstance(scored.features, Features)


def test_prepare_makes_the_session_once(scorer, rows, monkeypatch):
    assert scorer.prepare() is scorer
    monkeypatch.setattr("hf_safefilter.session.fit", lambda *a: pytest.fail("fitted again"))
    scorer(rows[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scores": "magic"}, "unknown score 'magic'"),
        ({"dtype": "int8"}, "dtype must be 'auto'"),
        ({"dtype": "bfloat16"}, "the loaded model is float32; convert it yourself"),
        ({"device": "quantum"}, "device must be 'cpu'"),
        ({"max_length": 0}, "max_length must be"),
        ({"target": "user"}, "target must be one of"),
        ({"batch_tokens": 0}, "batch_tokens must be"),
        ({"columns": {"a": "b"}}, "unknown part 'a'"),
        ({"anchors": "nowhere/nothing"}, "no anchor set at 'nowhere/nothing'"),
        ({"tokenizer": None}, "a loaded model needs its tokenizer"),
        ({"revision": "main"}, "revision goes with a model named by id or folder"),
        ({"adapter": "a"}, "adapter goes with a model named by id or folder"),
    ],
)
def test_bad_arguments(model, tokenizer, anchors, options, reason):
    with pytest.raises(InputError, match=reason):
        SafetyRiskScorer(model, **{"tokenizer": tokenizer, "anchors": anchors, **options})


def test_repr_says_what_it_is(scorer):
    assert repr(scorer).startswith("SafetyRiskScorer('LlamaForCausalLM', scores=(gradient, representation), anchors=AnchorSet(")
