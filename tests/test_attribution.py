"""Per-token terms of the gradient score: they sum to it; each is what a step seen by that position alone does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from hf_safefilter import SafetyRiskScorer
from hf_safefilter.chat import ChatEncoder, Example
from hf_safefilter.engine.layers import find_layers
from hf_safefilter.engine.passes import Engine, Needs, Reference
from hf_safefilter.errors import InputError
from hf_safefilter.testing import KINDS, tiny_model, tiny_tokenizer


def example(length: int, targets: int, seed: int) -> Example:
    ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [-100] * (length - targets) + ids[length - targets :])


ROWS = [example(12, 5, 0), example(30, 11, 1), example(7, 6, 2), example(21, 1, 3)]
SIDES = {"harmful": [example(9, 4, 10), example(14, 3, 11)], "safe_1": [example(8, 5, 12)], "safe_2": [example(10, 2, 13)]}
WEIGHTS = (("harmful", 1.0), ("safe_1", -0.5), ("safe_2", -0.5))
NEEDS = Needs(gradient=True, directions=True, attribution=WEIGHTS)


def collected(model, rows=ROWS, **options):
    engine = Engine(model, **options)
    reference = Reference({}, engine.directions(SIDES, Needs(gradient=True, directions=True)))
    return engine.collect(rows, NEEDS, reference), reference


def summed(signals) -> np.ndarray:
    return sum(weight * signals.dots[side].sum(dim=1) for side, weight in WEIGHTS).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_terms_sum_to_the_inner_product(kind: str, batch_tokens: int) -> None:
    signals, _ = collected(tiny_model(kind, dtype=torch.float64), batch_tokens=batch_tokens)
    assert [len(t) for t in signals.attribution] == [len(r.input_ids) for r in ROWS]
    np.testing.assert_allclose([float(t.sum()) for t in signals.attribution], summed(signals), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("parameters", "energy"), [("all", 0.7), ("linear", 1.0), ("last-1", 1.0), ("head", 1.0)])
def test_subsets_and_factored_directions(parameters: str, energy: float) -> None:
    signals, _ = collected(tiny_model("llama", dtype=torch.float64, hidden_size=64), parameters=parameters, energy=energy)
    np.testing.assert_allclose([float(t.sum()) for t in signals.attribution], summed(signals), rtol=1e-7, atol=1e-12)


def perturbed(model, reference, row: Example) -> np.ndarray:
    """Each position's term by autograd: the loss's derivative by a step along the direction that only this position sees."""
    steps = torch.zeros(len(row.input_ids), dtype=torch.float64, requires_grad=True)
    direction = {
        name: sum(w * part.values[reference.directions.names.index(side)] for side, w in WEIGHTS)
        for name, part in reference.directions.parts.items()
    }
    handles = []
    for layer in find_layers(model):

        def add(module, args, output, layer=layer):
            x = args[0]
            if layer.kind == "embedding":
                more = direction[layer.weight][x]
            elif layer.kind == "norm":
                more = layer.normalised(x) * direction[layer.weight]
            else:
                weight = direction[layer.weight]
                more = x @ (weight if layer.kind == "conv1d" else weight.T)
            if layer.bias is not None:
                more = more + direction[layer.bias]
            return output + steps.view(1, -1, *[1] * (more.dim() - 2)) * more

        handles.append(layer.module.register_forward_hook(add))
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    loss = cross_entropy(logits[:-1], torch.tensor(row.labels[1:]), ignore_index=-100)
    loss.backward()
    for handle in handles:
        handle.remove()
    return steps.grad.numpy()


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "qwen3", "phi"])
def test_each_term_is_what_its_position_alone_does(kind: str) -> None:
    model = tiny_model(kind, dtype=torch.float64)
    signals, reference = collected(model)
    for row, terms in zip(ROWS, signals.attribution, strict=True):
        expected = perturbed(model, reference, row)
        assert np.abs(expected).max() > 1e-6
        np.testing.assert_allclose(terms.numpy(), expected, rtol=1e-7, atol=1e-12)


def test_columns(model, tokenizer, anchors, rows) -> None:
    rows[2]["completion"] = "Grüße, 你好 🙂!"
    rows.append({"prompt": "Nothing follows.", "completion": ""})
    scorer = SafetyRiskScorer(model, tokenizer=tokenizer, anchors=anchors, scores="gradient", attribution=True)
    scored = Dataset.from_list(rows).map(scorer, batched=True)
    encoder = ChatEncoder(tokenizer)
    for row in scored.select(range(len(rows) - 1)):
        assert sum(row["attribution"]) == pytest.approx(row["risk_gradient_balanced"], abs=1e-5)
        assert len(row["attribution"]) == len(row["attribution_tokens"]) == row["total_tokens"]
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        assert "".join(row["attribution_tokens"]) == encoder.render(messages)
    assert scored[-1]["attribution"] == scored[-1]["attribution_tokens"] == []
    unscored = Dataset.from_list(rows[-1:] * 3 + rows[:1]).map(scorer, batched=True, batch_size=3)
    assert unscored.features["attribution"] == scored.features["attribution"]  # though its first batch has no terms
    one = scorer(rows[0])
    assert one["attribution"] == pytest.approx(scored[0]["attribution"], abs=1e-5)
    plain = SafetyRiskScorer(model, tokenizer=tokenizer, anchors=anchors, scores="gradient")
    assert plain.fingerprint != scorer.fingerprint
    without = Dataset.from_list(rows).map(plain, batched=True)
    assert without["risk_gradient_balanced"][:] == scored["risk_gradient_balanced"][:]
    assert "attribution" not in without.column_names


def test_attribution_needs_the_gradient_score(model, tokenizer, anchors) -> None:
    with pytest.raises(InputError, match="add 'gradient' to scores"):
        SafetyRiskScorer(model, tokenizer=tokenizer, anchors=anchors, scores="representation", attribution=True)


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_token_texts_join_to_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = ChatEncoder(tokenizer).token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
