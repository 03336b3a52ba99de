"""The fitted reference as an artifact: saved, loaded elsewhere, refused where it does not fit; and the options of gradients."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from hf_safefilter import SafetyRiskScorer, cli
from hf_safefilter.chat import ChatEncoder
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.refusal.generation import Answer
from hf_safefilter.refusal.larf_layer import find_larf_layer
from hf_safefilter.scores import GradientScore
from hf_safefilter.testing import tiny_model, tiny_tokenizer

SCORES = ("gradient", "representation", "margin_step", "larf", "compliance", "subspace", "refusal_direction")


def scored(scorer, rows) -> dict[str, list]:
    ds = Dataset.from_list(rows).map(scorer, batched=True)
    return {name: ds[name][:] for name in scorer.result_columns}


def numbers(columns) -> dict[str, np.ndarray]:
    return {n: np.array(v, float) for n, v in columns.items() if n not in ("risk_status", "gradient_parameters")}


@pytest.fixture
def saved(tmp_path, model_folder, anchors):
    scorer = SafetyRiskScorer(str(model_folder), anchors, SCORES, dtype="float32")
    return scorer, scorer.save_reference(tmp_path / "reference")


def test_a_saved_reference_gives_the_same_scores_without_fitting(saved, rows, model_folder, tmp_path, monkeypatch):
    scorer, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["reference.json", "reference.safetensors"]
    # Elsewhere: another folder for the model, another for the reference.
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    shutil.copytree(folder, tmp_path / "copied")
    expected = scored(scorer, rows)
    monkeypatch.setattr("hf_safefilter.session.fit", lambda *a: pytest.fail("fitted"))
    other = SafetyRiskScorer(str(tmp_path / "elsewhere"), scores=SCORES, dtype="float32", reference=tmp_path / "copied")
    assert other.anchors == scorer.anchors
    again = scored(other, rows)
    assert again["risk_status"] == expected["risk_status"]
    for name, values in numbers(expected).items():
        np.testing.assert_allclose(numbers(again)[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    one = SafetyRiskScorer(str(model_folder), scores="larf", dtype="float32", reference=folder)
    np.testing.assert_allclose(scored(one, rows)["risk_larf"], expected["risk_larf"], atol=1e-6)
    assert one.fingerprint != other.fingerprint != scorer.fingerprint


def test_it_travels_with_the_pickled_scorer(saved, rows, model_folder):
    _, folder = saved
    scorer = SafetyRiskScorer(str(model_folder), scores="gradient", dtype="float32", reference=folder)
    again = pickle.loads(pickle.dumps(scorer))
    assert again.fingerprint == scorer.fingerprint
    assert scored(again, rows) == scored(scorer, rows)
    payload = pickle.dumps(scorer)
    description = json.loads((folder / "reference.json").read_text())
    (folder / "reference.json").write_text(json.dumps(description | {"note": "changed"}))
    with pytest.raises(InputError, match="has changed since this scorer was made"):
        pickle.loads(payload)


def test_it_is_read_in_another_process(saved, rows, model_folder, tmp_path):
    scorer, folder = saved
    code = (
        "import json, sys; from hf_safefilter import SafetyRiskScorer;"
        "s = SafetyRiskScorer(sys.argv[1], scores='gradient', dtype='float32', reference=sys.argv[2]);"
        "print(float(s(json.loads(sys.argv[3]))['risk_gradient']))"
    )
    argv = [sys.executable, "-c", code, str(model_folder), str(folder), json.dumps(rows[0])]
    found = float(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert found == pytest.approx(scored(scorer, rows)["risk_gradient"][0], abs=1e-6)


def test_it_refuses_what_it_was_not_fitted_on(saved, rows, tmp_path, tokenizer, anchors, model_folder):
    _, folder = saved
    other_model, other_tokenizer = tmp_path / "other_model", tmp_path / "other_tokenizer"
    tiny_model(seed=1).save_pretrained(other_model)
    tokenizer.save_pretrained(other_model)
    shutil.copytree(model_folder, other_tokenizer)
    tiny_tokenizer(special_tokens=("<|im_start|>", "<|new|>")).save_pretrained(other_tokenizer)
    for model, reason in ((other_model, "fitted on another model"), (other_tokenizer, "fitted on another tokenizer")):
        with pytest.raises(InputError, match=reason):
            SafetyRiskScorer(str(model), scores="gradient", dtype="float32", reference=folder)(rows[0])
    make = lambda **options: SafetyRiskScorer(str(model_folder), reference=folder, **{"scores": "gradient", **options})  # noqa: E731
    for options, reason in (
        ({"scores": "baseline"}, "was not fitted for the score 'baseline'; it has compliance, gradient"),
        ({"scores": GradientScore(anchor_tokens=3)}, "was fitted with other options of 'gradient'"),
        ({"anchors": anchors}, "anchors comes with the reference"),
        ({"parameters": "head"}, "parameters comes with the reference"),
        ({"direction_energy": 0.5}, "direction_energy comes with the reference"),
    ):
        with pytest.raises(InputError, match=reason):
            make(**options)


def test_the_same_weights_in_16_bits_are_the_same_model(saved, rows, model_folder):
    _, folder = saved
    scorer = SafetyRiskScorer(str(model_folder), scores="gradient", dtype="bfloat16", reference=folder)
    assert scored(scorer, rows)["risk_status"] == ["ok"] * len(rows)


def test_damaged_references(saved, rows, tmp_path, model_folder):
    _, folder = saved
    make = lambda: SafetyRiskScorer(str(model_folder), scores="larf", dtype="float32", reference=folder)  # noqa: E731
    tensors = load_file(folder / "reference.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, folder / "reference.safetensors")
    with pytest.raises(InputError, match="is not the file that reference.json describes"):
        make()(rows[0])
    (folder / "reference.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(InputError, match="cannot read"):
        make()(rows[0])
    (folder / "reference.safetensors").unlink()
    with pytest.raises(InputError, match="cannot read"):
        make()(rows[0])
    for content, reason in (
        ("{", "not valid JSON"),
        ("[]", "has the format None"),
        ('{"format": "hf_safefilter.reference/9"}', "this version reads"),
        ('{"format": "hf_safefilter.reference/1"}', "is damaged: it lacks 'model'"),
    ):
        (folder / "reference.json").write_text(content)
        with pytest.raises(InputError, match=reason):
            make()
    with pytest.raises(InputError, match="no fitted reference in"):
        SafetyRiskScorer(str(model_folder), reference=tmp_path / "nowhere")


def test_factored_directions_are_small_on_disk_and_close(anchors, rows, model, tokenizer, tmp_path):
    wide = tiny_model("llama", hidden_size=96, intermediate_size=256)
    size, values = {}, {}
    for energy in (1.0, 0.5):
        scorer = SafetyRiskScorer(wide, anchors, "gradient", tokenizer=tokenizer, direction_energy=energy)
        folder = scorer.save_reference(tmp_path / str(energy))
        size[energy] = (folder / "reference.safetensors").stat().st_size
        values[energy] = np.array(scored(scorer, rows)["risk_gradient_balanced"])
        kept = json.loads((folder / "reference.json").read_text())["direction_energy"]
        assert all(0.5 < share <= 1 for share in kept.values())
        assert (min(kept.values()) == 1) == (energy == 1)
        again = SafetyRiskScorer(wide, scores="gradient", tokenizer=tokenizer, reference=folder)
        np.testing.assert_allclose(scored(again, rows)["risk_gradient_balanced"], values[energy], atol=1e-6)
    assert size[0.5] < 0.7 * size[1.0]
    assert np.abs(values[0.5] - values[1.0]).max() < values[1.0].std()


def test_the_default_is_exact_but_in_16_bits(model_folder, anchors):
    energy = {d: SafetyRiskScorer(str(model_folder), anchors, dtype=d).direction_energy for d in ("float32", "bfloat16")}
    assert energy == {"float32": 1.0, "bfloat16": 0.9}
    assert SafetyRiskScorer(str(model_folder), anchors, dtype="bfloat16", direction_energy=1).direction_energy == 1


def test_scoring_the_opening_only(model, tokenizer, anchors, rows):
    """`max_response_tokens=n` is scoring rows that end there."""
    scorer = SafetyRiskScorer(model, anchors, SCORES, tokenizer=tokenizer, max_response_tokens=3)
    cut = scored(scorer, rows)
    assert max(cut["target_tokens"]) == 3
    whole = SafetyRiskScorer(model, anchors, SCORES, tokenizer=tokenizer)
    session = whole._session(None)
    examples = [session.encoder.encode_row(r, _layout()).first_targets(3) for r in rows]
    signals = session.engine.collect(examples, session.needs, session.reference)
    for score in whole.scores:
        for name, values in score.reduce(signals, session.reference).items():
            np.testing.assert_allclose(cut[name], values.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


def _layout():
    from hf_safefilter.formats import find_layout

    return find_layout(["prompt", "completion"])


@pytest.mark.parametrize("parameters", ["linear", "head", "last-1"])
def test_the_parameter_subset_is_recorded(model, tokenizer, anchors, rows, parameters):
    scorer = SafetyRiskScorer(model, anchors, ("gradient", "larf"), tokenizer=tokenizer, parameters=parameters)
    assert set(scored(scorer, rows)["gradient_parameters"]) == {parameters}
    assert "gradient_parameters" not in SafetyRiskScorer(model, anchors, "larf", tokenizer=tokenizer).result_columns
    assert pickle.loads(pickle.dumps(scorer)).parameters == parameters


def test_gradient_checkpointing_through_the_scorer(model, tokenizer, anchors, rows):
    plain = SafetyRiskScorer(model, anchors, "gradient", tokenizer=tokenizer)
    again = SafetyRiskScorer(model, anchors, "gradient", tokenizer=tokenizer, gradient_checkpointing=True)
    for name, values in numbers(scored(plain, rows)).items():
        np.testing.assert_allclose(numbers(scored(again, rows))[name], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"direction_energy": 0}, "direction_energy must be over 0 and at most 1"),
        ({"direction_energy": 1.5}, "direction_energy must be over 0"),
        ({"direction_energy": "x"}, "direction_energy must be over 0"),
        ({"parameters": "some"}, "parameters must be 'all'"),
        ({"max_response_tokens": 0}, "max_response_tokens must be a whole number of at least 1"),
    ],
)
def test_bad_options(model, tokenizer, anchors, options, reason):
    with pytest.raises(InputError, match=reason):
        SafetyRiskScorer(model, anchors, tokenizer=tokenizer, **options)


def test_an_unsupported_layer_is_named(tokenizer, anchors, rows):
    model = tiny_model()
    model.model.layers[0].mlp.act_fn = torch.nn.PReLU()
    with pytest.raises(InputError, match="PReLU.*use parameters='linear'"):
        SafetyRiskScorer(model, anchors, "gradient", tokenizer=tokenizer)(rows[0])
    linear = SafetyRiskScorer(model, anchors, "gradient", tokenizer=tokenizer, parameters="linear")
    assert linear(rows[0])["risk_status"] == "ok"


def test_the_fit_command(tmp_path, model_folder, anchors, rows, capsys):
    anchors.save(tmp_path / "anchors.json")
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    common = ["--model", str(model_folder), "--scores", "gradient,larf", "--dtype", "float32"]
    out, reference = str(tmp_path / "out"), str(tmp_path / "ref")
    argv = ["fit", *common, "--anchors", str(tmp_path / "anchors.json"), "--larf-layer", "1", "--out", reference]
    assert cli.main([*argv, "--json"]) == 0
    account = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"name": "larf", "version": 1, "layer": 1.0} in account["scores"]
    assert account["direction_energy"] == {"harmful": 1.0, "safe_1": 1.0, "safe_2": 1.0}
    assert cli.main(argv) == 0
    assert f"--reference {reference}" in capsys.readouterr().out
    argv = ["score", str(tmp_path / "rows.jsonl"), *common, "--reference", reference, "--out", out]
    assert cli.main([*argv, "--json"]) == 1  # its larf reads another layer than the default
    assert "was fitted with other options of 'larf'" in capsys.readouterr().err
    argv[argv.index("gradient,larf")] = "gradient"
    assert cli.main([*argv, "--json"]) == 0
    account = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert account["scored"] == len(rows)
    assert len(account["reference"]) == 64
    for wrong, reason in (
        (["--larf-layer", "x"], "must be a layer or search"),
        (["--larf-layer", "9"], "layer 9 does not exist"),
    ):
        assert cli.main(["fit", *common, *wrong, "--out", reference]) == 1
        assert reason in capsys.readouterr().err
    assert cli.main(["fit", *common[:2], "--larf-layer", "1", "--out", reference]) == 1
    assert "is for the score larf" in capsys.readouterr().err


def test_searching_the_larf_layer(tmp_path, model, tokenizer, model_folder, capsys, monkeypatch):
    """Refusals are planted: only a larger second block makes the model say sorry, and only a smaller one stops it."""
    before = {n: p.clone() for n, p in model.named_parameters()}
    weight = model.model.layers[1].mlp.up_proj.weight
    start = float(weight.detach().norm())

    def answers(model, tokenizer, prompts, **options):
        factor = float(weight.detach().norm()) / start
        refused = 3 if factor > 1.01 else 0 if factor < 0.99 else 1
        texts = ["I'm sorry, but I can't."] * refused + ["Sure."] * (len(prompts) - refused)
        return [Answer(text, 5, False) for text in texts]

    with monkeypatch.context() as patch:
        patch.setattr("hf_safefilter.refusal.larf_layer.generate", answers)
        search = find_larf_layer(model, ChatEncoder(tokenizer), ["a", "b", "c", "d"])
    assert search.layer == 1
    assert search.sensitivity == [0, 3]
    assert search.refusals[1] == {0.7: 0, 0.8: 0, 0.9: 0, 1.1: 3, 1.2: 3, 1.3: 3}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    # The real thing: a random model never refuses, and the search says so.
    with pytest.raises(EvaluationError, match="no block stands out"):
        find_larf_layer(model, ChatEncoder(tokenizer), ["Say hello.", "Hi"], changes=[0.3], max_new_tokens=4)
    argv = ["fit", "--model", str(model_folder), "--scores", "larf", "--larf-layer", "search", "--larf-prompts", "2"]
    assert cli.main([*argv, "--out", str(tmp_path / "r")]) == 2
    assert "no block stands out" in capsys.readouterr().err
    for prompts, changes, reason in (([], [0.1], "needs prompts"), (["a"], [2], "between 0 and 1")):
        with pytest.raises(InputError, match=reason):
            find_larf_layer(model, ChatEncoder(tokenizer), prompts, changes=changes)
