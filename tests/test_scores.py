"""The scores against a plain oracle, and on planted models and rows where the answer is known by hand."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

from hf_safefilter import AnchorSet
from hf_safefilter.chat import ChatEncoder, Example
from hf_safefilter.engine.batching import micro_batches
from hf_safefilter.engine.hidden import Hidden
from hf_safefilter.engine.passes import Engine, Needs
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.formats import Conversation
from hf_safefilter.scores import GradientScore, RepresentationScore, Score, resolve_scores
from hf_safefilter.testing import KINDS, tiny_model, tiny_tokenizer

GRADIENT, REPRESENTATION = GradientScore(), RepresentationScore()


def talk(prompt: str, completion: str) -> Conversation:
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": completion}), 1)


def encode_sides(anchors: AnchorSet, encoder: ChatEncoder) -> dict[str, list[Example]]:
    return {name: [encoder.encode(talk(d["prompt"], d["completion"])) for d in side] for name, side in anchors.sides.items()}


def score(model, score_: Score, rows: list[Example], sides: dict[str, list[Example]], **options) -> dict[str, np.ndarray]:
    engine = Engine(model, **options)
    reference = engine.fit(sides, score_.needs)
    columns = score_.reduce(engine.collect(rows, score_.needs, reference), reference)
    assert list(columns) == score_.columns(list(sides))
    return {name: values.numpy() for name, values in columns.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_scores_equal_the_oracle(kind, anchors, rows):
    """In float64 to 1e-10, for each architecture: any error of sign, weight, token or normalisation shows."""
    model = tiny_model(kind, dtype=torch.float64)
    encoder = ChatEncoder(tiny_tokenizer(), max_length=96)
    sides = encode_sides(anchors, encoder)
    examples = [encoder.encode(talk(r["prompt"], r["completion"])) for r in rows]
    assert any(e.status.startswith("truncated") for e in examples)
    gradient = score(model, GRADIENT, examples, sides)
    representation = score(model, REPRESENTATION, examples, sides)
    for i, example in enumerate(examples):
        for name, expected in oracle.gradient_scores(model, example, sides).items():
            assert gradient[name][i] == pytest.approx(expected, rel=1e-10, abs=1e-12), (name, i)
        for name, expected in oracle.representation_scores(model, example, sides).items():
            # The engine keeps hidden states in float32.
            assert representation[name][i] == pytest.approx(expected, abs=1e-6), (name, i)


def test_options_equal_the_oracle(model, tokenizer, anchors, rows):
    encoder = ChatEncoder(tokenizer)
    sides = encode_sides(anchors, encoder)
    example = encoder.encode(talk(**rows[0]))
    values = score(model, RepresentationScore(top_n=3), [example], sides)
    expected = oracle.representation_scores(model, example, sides, top_n=3)
    assert values["risk_representation_balanced"][0] == pytest.approx(expected["risk_representation_balanced"], abs=1e-6)
    values = score(model, GradientScore(anchor_tokens=2), [example], sides)
    two = oracle.gradient_scores(model, example, sides, anchor_tokens=2)
    assert values["risk_gradient"][0] == pytest.approx(two["risk_gradient"], abs=1e-5)
    ten = oracle.gradient_scores(model, example, sides)
    assert abs(two["risk_gradient"] - ten["risk_gradient"]) > 1e-3


def test_planted_gradient_by_hand():
    """A model without layers: its head's gradient is known in closed form, and nothing else is trained."""
    vocabulary, width = 12, 8
    model = tiny_model("llama", num_hidden_layers=0, vocab_size=vocabulary, hidden_size=width, dtype=torch.float64)
    embeddings = model.model.embed_tokens.weight.detach().numpy()
    head, gain = model.lm_head.weight.detach().numpy(), model.model.norm.weight.detach().numpy()

    def by_hand(example: Example) -> np.ndarray:
        """Gradient of head, norm gain and embeddings, for logits = head (gain * e / rms(e)) at each predicting position."""
        d_head, d_gain, d_embed = np.zeros_like(head), np.zeros_like(gain), np.zeros_like(embeddings)
        targets = example.target_positions
        for t in targets:
            token = example.input_ids[t - 1]
            rms = math.sqrt((embeddings[token] ** 2).mean() + model.config.rms_norm_eps)
            unit = embeddings[token] / rms
            logits = head @ (gain * unit)
            d = np.exp(logits - logits.max())
            d /= d.sum()
            d[example.input_ids[t]] -= 1
            d /= len(targets)
            d_head += np.outer(d, gain * unit)
            back = head.T @ d
            d_gain += back * unit
            back = back * gain
            d_embed[token] += back / rms - embeddings[token] * (embeddings[token] @ back) / (width * rms**3)
        return np.concatenate([d_embed.ravel(), d_gain.ravel(), d_head.ravel()])

    row = Example([1, 2, 3, 4], [-100, -100, 3, 4])
    harmful = Example([1, 2, 3], [-100, -100, 3])
    safe = Example([1, 2, 5], [-100, -100, 5])
    unit = {k: by_hand(e) / np.linalg.norm(by_hand(e)) for k, e in (("row", row), ("harmful", harmful), ("safe", safe))}
    cos_harmful, cos_safe = unit["row"] @ unit["harmful"], unit["row"] @ unit["safe"]
    got = score(model, GRADIENT, [row], {"harmful": [harmful], "safe_1": [safe], "safe_2": [safe]})
    # Llama's norm layers compute in float32 whatever the model's dtype.
    assert got["gradient_norm"][0] == pytest.approx(np.linalg.norm(by_hand(row)), rel=1e-6)
    assert got["risk_gradient"][0] == pytest.approx(cos_harmful - 2 * cos_safe, abs=1e-6)
    assert got["risk_gradient_balanced"][0] == pytest.approx(cos_harmful - cos_safe, abs=1e-6)
    assert cos_harmful - cos_safe > 0.1


def test_the_row_that_is_the_harmful_anchor_has_cosine_one(model, tokenizer):
    encoder = ChatEncoder(tokenizer)
    anchors = AnchorSet([{"prompt": "p", "completion": "Sure"}], [[{"prompt": "p", "completion": "No"}]])
    sides = encode_sides(anchors, encoder)
    same, opposite = sides["harmful"][0], sides["safe_1"][0]
    assert len(same.target_positions) <= 10
    for score_ in (GRADIENT, REPRESENTATION):
        values = score(model, score_, [same, opposite], sides)
        cosine = values[f"{score_.name}_cosine_harmful"]
        assert cosine[0] == pytest.approx(1, abs=1e-5)
        assert cosine[1] < 0.9
        balanced = values[f"risk_{score_.name}_balanced"]
        # Harmful minus safe is antisymmetric: the safe anchor's own row gets exactly the opposite.
        assert balanced[0] == pytest.approx(-balanced[1], abs=1e-5)
        assert balanced[0] > 0.1


def test_representation_takes_the_last_target_token_and_the_nearest_anchor():
    """Without layers the state is the token's own: equal last target tokens give cosine 1, whatever stands elsewhere."""
    model = tiny_model("llama", num_hidden_layers=0)
    row = Example([3, 4, 9, 7, 11], [-100, 4, 9, -100, -100])  # the last target is token 9; 7 and 11 are no targets
    anchors = [Example([5, 9], [-100, 9]), Example([5, 6], [-100, 6])]
    safe = [Example([5, 11], [-100, 11])]
    values = score(model, REPRESENTATION, [row], {"harmful": anchors, "safe_1": safe})
    assert values["risk_representation"][0] == pytest.approx(1, abs=1e-6)  # the largest, not the mean
    assert values["risk_representation_balanced"][0] == pytest.approx(1 - values["representation_cosine_safe_1"][0], abs=1e-6)
    values = score(model, RepresentationScore(top_n=2), [row], {"harmful": anchors, "safe_1": safe * 2})
    assert values["risk_representation"][0] < 0.99


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("reverse", [False, True])
def test_batches_and_order_do_not_matter(model, tokenizer, anchors, rows, batch_tokens, reverse):
    encoder = ChatEncoder(tokenizer)
    sides = encode_sides(anchors, encoder)
    examples = [encoder.encode(talk(**r)) for r in rows]
    alone = [score(model, REPRESENTATION, [e], sides)["risk_representation"][0] for e in examples]
    order = slice(None, None, -1 if reverse else 1)
    together = score(model, REPRESENTATION, examples[order], sides, batch_tokens=batch_tokens)["risk_representation"]
    np.testing.assert_allclose(together[order], alone, atol=1e-5)


def test_micro_batches_keep_to_the_budget_and_lose_nothing():
    lengths = [5, 100, 7, 7, 3, 60, 1]
    groups = micro_batches(lengths, 30)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 30 for g in groups)
    assert groups == [[1], [5], [2, 3, 0, 4], [6]]
    assert micro_batches([], 10) == []


def test_inner_layers_are_those_of_hidden_states(model):
    example = Example([3, 4, 9, 7], [-100, 4, 9, -100])
    wanted = frozenset({Hidden(0), Hidden(1), Hidden(-1)})
    for needs in (Needs(wanted), Needs(wanted, gradient=True)):
        engine = Engine(model)
        signals = engine.collect([example], needs, engine.fit({"harmful": [example]}, needs))
        with torch.no_grad():
            states = model(torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states
        for h in wanted:
            torch.testing.assert_close(signals.hidden[h][0], states[h.layer][0, 2], rtol=1e-5, atol=1e-5)


def test_scoring_leaves_the_model_as_it_was(anchors, tokenizer):
    model = tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    encoder = ChatEncoder(tokenizer)
    sides = encode_sides(anchors, encoder)
    score(model, GRADIENT, sides["harmful"], sides)
    score(model, REPRESENTATION, sides["harmful"], sides)
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


def test_anchors_that_cannot_be_fitted(tokenizer, anchors):
    encoder = ChatEncoder(tokenizer)
    sides = encode_sides(anchors, encoder)
    broken = tiny_model()
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(EvaluationError, match=r"anchor harmful\[0\] has a gradient of norm nan"):
        Engine(broken).fit(sides, GRADIENT.needs)
    broken.model.norm.weight.data.zero_()
    with pytest.raises(EvaluationError, match=r"anchor harmful\[0\] has no usable hidden state"):
        Engine(broken).fit(sides, REPRESENTATION.needs)


def test_resolving_scores():
    assert [s.name for s in resolve_scores("all")] == ["gradient", "representation"]
    assert resolve_scores(["representation", "gradient"]) == resolve_scores(("gradient", "representation"))
    assert resolve_scores("gradient") == (GRADIENT,)
    assert resolve_scores([RepresentationScore(top_n=5)])[0].key() == {"name": "representation", "version": 1, "top_n": 5}
    for scores, reason in (
        (["magic"], "unknown score 'magic'; the scores are gradient, representation"),
        ([], "no score chosen"),
        ([3], "must be names or Score objects"),
        (["gradient", GRADIENT], "'gradient' is given twice"),
    ):
        with pytest.raises(InputError, match=reason):
            resolve_scores(scores)


def test_bad_options(model, tokenizer, anchors):
    for make in (lambda: RepresentationScore(top_n=0), lambda: GradientScore(anchor_tokens=0), lambda: GradientScore(True)):
        with pytest.raises(InputError, match="whole number of at least 1"):
            make()
    sides = encode_sides(anchors, ChatEncoder(tokenizer))
    with pytest.raises(InputError, match="top_n=9, but the anchor side 'harmful' has only 4 anchors"):
        score(model, RepresentationScore(top_n=9), sides["harmful"], sides)
    with pytest.raises(EvaluationError, match="disagree on anchor_tokens: 10 and 3"):
        GradientScore().needs | GradientScore(anchor_tokens=3).needs
    assert (GradientScore().needs | RepresentationScore().needs).anchor_tokens == 10
    assert (RepresentationScore().needs | GradientScore().needs).anchor_tokens == 10
