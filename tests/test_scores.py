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
from hf_safefilter.engine.hidden import Hidden, layer_index
from hf_safefilter.engine.passes import HARMLESS, Engine, Needs, Reference
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.formats import Conversation
from hf_safefilter.scores import (
    SCORES,
    BaselineScore,
    ComplianceScore,
    GradientModulewiseScore,
    GradientScore,
    LarfScore,
    MarginStepScore,
    RefusalDirectionScore,
    RepresentationScore,
    Score,
    SelfInfluenceScore,
    SubspaceScore,
    resolve_scores,
)
from hf_safefilter.scores.base import fisher_ratio
from hf_safefilter.scores.baselines import is_list, is_math
from hf_safefilter.session import fit, harmless_requests
from hf_safefilter.testing import KINDS, tiny_model, tiny_tokenizer

GRADIENT, REPRESENTATION = GradientScore(), RepresentationScore()


def talk(prompt: str, completion: str) -> Conversation:
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": completion}), 1)


def encode_sides(anchors: AnchorSet, encoder: ChatEncoder) -> dict[str, list[Example]]:
    return {name: [encoder.encode(talk(d["prompt"], d["completion"])) for d in side] for name, side in anchors.sides.items()}


def score(model, score_: Score, rows: list[Example], sides: dict[str, list[Example]], **options) -> dict[str, np.ndarray]:
    engine = Engine(model, **options)
    reference = fit(engine, sides, [score_])
    signals = engine.collect(rows, score_.row_needs(reference.fitted[score_.name]), reference)
    signals.texts = [str(row.input_ids) for row in rows]
    columns = score_.reduce(signals, reference)
    assert list(columns) == score_.columns([side for side in sides if side != HARMLESS])
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
            # Gemma's norms sum their weights' gradient in float32, in autograd too.
            tolerance = {"rel": 1e-7, "abs": 1e-8} if kind == "gemma" else {"rel": 1e-10, "abs": 1e-12}
            assert gradient[name][i] == pytest.approx(expected, **tolerance), (name, i)
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


ALL = [*resolve_scores("all")[:-1], SubspaceScore(rank=3, spans=True)]


def everything(model, examples, sides, **options) -> dict[str, np.ndarray]:
    """All scores from one pass."""
    engine = Engine(model, **options)
    reference = fit(engine, sides, ALL)
    needs = Needs()
    for s in ALL:
        needs |= s.row_needs(reference.fitted[s.name])
    signals = engine.collect(examples, needs, reference)
    signals.texts = [str(e.input_ids) for e in examples]
    return {name: v.double().numpy() for s in ALL for name, v in s.reduce(signals, reference).items()}


def with_harmless(sides, encoder: ChatEncoder):
    return {**sides, HARMLESS: [encoder.encode(talk(d["prompt"], d["completion"])) for d in harmless_requests()[:4]]}


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_batches_order_and_the_tokenizers_padding_do_not_matter(kind, anchors, rows, batch_tokens):
    model = tiny_model(kind)
    encoder = ChatEncoder(tiny_tokenizer(padding_side="left"))
    examples = [encoder.encode(talk(**r)) for r in rows]
    alone = everything(model, examples, with_harmless(encode_sides(anchors, encoder), encoder), batch_tokens=1)
    encoder = ChatEncoder(tiny_tokenizer(padding_side="right"))
    sides = with_harmless(encode_sides(anchors, encoder), encoder)
    together = everything(model, examples[::-1], sides, batch_tokens=batch_tokens)
    for name, values in alone.items():
        np.testing.assert_allclose(together[name][::-1], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_other_scores_equal_the_oracle(anchors, rows):
    model = tiny_model("llama_tied", dtype=torch.float64, num_hidden_layers=4)
    encoder = ChatEncoder(tiny_tokenizer())
    sides = encode_sides(anchors, encoder)
    harmless = [encoder.encode(talk(d["prompt"], d["completion"])) for d in harmless_requests()[:5]]
    examples = [encoder.encode(talk(**r)) for r in rows[:4]]
    larf = score(model, LarfScore(3), examples, sides)
    subspace = score(model, SubspaceScore((1, 3), rank=3, spans=True), examples, sides)
    compliance = score(model, ComplianceScore(2), examples, sides)
    refusal = score(model, RefusalDirectionScore(0.5), examples, {**sides, HARMLESS: harmless})
    modulewise = score(model, GradientModulewiseScore(), examples, sides)
    influence = score(model, SelfInfluenceScore(), examples, sides)
    margin = score(model, MarginStepScore(), examples, sides)
    baseline = score(model, BaselineScore(), examples, sides)
    close = lambda expected: pytest.approx(expected, rel=1e-5, abs=1e-6)  # noqa: E731  # states are kept in float32
    for i, e in enumerate(examples):
        assert larf["risk_larf"][i] == close(oracle.larf_score(model, e, sides, 3))
        last, span = oracle.subspace_scores(model, e, sides, [1, 3], 3)
        assert (subspace["risk_subspace"][i], subspace["risk_subspace_span"][i]) == (close(last), close(span))
        assert compliance["risk_compliance"][i] == close(oracle.compliance_score(model, e, sides, 2))
        at_prompt, shift = oracle.refusal_direction_scores(model, e, sides["harmful"], harmless, 2)
        assert refusal["risk_refusal_direction"][i] == close(at_prompt)
        assert refusal["risk_refusal_direction_shift"][i] == close(shift)
        exact = lambda expected: pytest.approx(expected, rel=1e-8, abs=1e-10)  # noqa: E731
        assert modulewise["risk_gradient_modulewise"][i] == exact(oracle.modulewise_score(model, e, sides))
        for name, expected in oracle.margin_scores(model, e, sides).items():
            assert margin[name][i] == exact(expected), name
        squared = float(oracle.flat_gradient(model, e.input_ids, e.labels).square().sum())
        count = len(e.target_positions)
        assert influence["risk_self_influence"][i] == exact(squared)
        assert influence["risk_self_influence_n"][i] == exact(math.log(squared + 1) + math.log(count + 1))
        log_p = model(torch.tensor([e.input_ids])).logits[0].log_softmax(-1)
        losses = [-float(log_p[t - 1, e.input_ids[t]].detach()) for t in e.target_positions]
        assert baseline["risk_baseline_length"][i] == count
        assert baseline["risk_baseline_loss"][i] == exact(sum(losses) / count)
        assert baseline["risk_baseline_first_token_loss"][i] == exact(losses[0])


def test_a_step_on_the_row_lowers_the_margin_by_the_margin_step(anchors):
    """The definition itself: take the step, measure the margin again."""
    model = tiny_model("llama", dtype=torch.float64)
    encoder = ChatEncoder(tiny_tokenizer())
    sides = encode_sides(anchors, encoder)
    row = encoder.encode(talk("Name a colour.", "Blue"))
    values = score(model, MarginStepScore(), [row], sides)

    @torch.no_grad()
    def margin() -> float:
        mean = {}
        for side, examples in sides.items():
            log_p = []
            for e in (x.first_targets(10) for x in examples):
                p = model(torch.tensor([e.input_ids])).logits[0].log_softmax(-1)
                log_p.append(torch.stack([p[t - 1, e.input_ids[t]] for t in e.target_positions]).mean())
            mean[side] = float(torch.stack(log_p).mean())
        return (mean["safe_1"] + mean["safe_2"]) / 2 - mean["harmful"]

    g = oracle.gradients(model, row.input_ids, row.labels)
    rate, start = 1e-6, margin()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.sub_(rate * g[name])
    assert (start - margin()) / rate == pytest.approx(float(values["risk_margin_step"][0]), rel=1e-3)
    assert values["risk_margin_step_sum"][0] == pytest.approx(values["risk_margin_step"][0] * len(row.target_positions))


def test_the_layer_that_separates_best_is_chosen():
    """States are planted: only at layer 2 do the groups differ in more than noise."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda n: torch.randn(n, 16, generator=generator)  # noqa: E731
    shift = torch.zeros(16)
    shift[3] = 8.0
    for s, pool, other in ((ComplianceScore(), "mean", "safe_1"), (RefusalDirectionScore(), "prompt", HARMLESS)):
        layers = sorted(s.anchor_states(5), key=lambda h: h.layer)
        assert layers == [Hidden(layer, pool) for layer in (1, 2, 3, 4)]
        states = {"harmful": {h: noise(40) + shift * (h.layer == 2) for h in layers}, other: {h: noise(40) for h in layers}}
        fitted = s.fit(states, 5)
        assert fitted["layer"] == 2
        assert fitted["direction"][3] > 0.95
        assert s.row_needs(fitted).hidden == {Hidden(2.0, "mean"), Hidden(2.0, "prompt")}


def test_fisher_ratio():
    a, b = torch.randn(200, 4), torch.randn(200, 4)
    assert fisher_ratio(a, b) < 0.2
    assert fisher_ratio(a, b + torch.tensor([9.0, 0, 0, 0])) > 0.85
    assert fisher_ratio(a * 0 + 1, a * 0 - 1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "listed", "computes"),
    [
        ("1. Apple\n2. Pear", True, False),
        ("- flour\n- water", True, False),
        ("* a\ntext\n  • b", True, False),
        ("- only one line", False, False),
        ("It is -3 degrees. Not a list.", False, False),
        ("6 * 7 = 42", False, True),
        ("So 12 - 5 is seven.\n#### 7", False, True),
        ("\\frac{1}{2}", False, True),
        ("From 1914-1918, 2-3 people.", False, False),
        ("a - b - c", False, False),
        ("", False, False),
    ],
)
def test_format_flags(text, listed, computes):
    assert (is_list(text), is_math(text)) == (listed, computes)


def test_micro_batches_keep_to_the_budget_and_lose_nothing():
    lengths = [5, 100, 7, 7, 3, 60, 1]
    groups = micro_batches(lengths, 30)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 30 for g in groups)
    assert groups == [[1], [5], [2, 3, 0, 4], [6]]
    assert micro_batches([], 10) == []


def test_inner_layers_are_those_of_hidden_states(model):
    example = Example([3, 4, 9, 7], [-100, 4, 9, -100])
    pools = ("last", "mean", "prompt")
    wanted = frozenset(Hidden(layer, pool) for layer in (0, 1, -1, 2, 0.5) for pool in pools)
    for needs in (Needs(wanted), Needs(wanted, loss=True), Needs(wanted, gradient=True)):
        signals = Engine(model).collect([example], needs, Reference())
        for h in wanted:
            expected = oracle.pooled(model, example, layer_index(h.layer, 2), h.pool)
            torch.testing.assert_close(signals.hidden[h][0].double(), expected, rtol=1e-5, atol=1e-5)
    for layer in (3, -2, 1.5):
        with pytest.raises(InputError, match="does not exist: the model has layers 0 to 2"):
            Engine(model).collect([example], Needs(frozenset({Hidden(layer)})), Reference())


@pytest.mark.parametrize(("layer", "ran"), [(0, 0), (1, 1), (-1, 2), (2, 2)])
def test_states_alone_stop_the_model_at_the_last_layer_needed(model, layer, ran):
    calls = []
    handles = [m.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, m in enumerate(model.model.layers)]
    handles.append(model.lm_head.register_forward_hook(lambda *_: calls.append("head")))
    Engine(model).collect([Example([3, 4, 9, 7], [-100, 4, 9, -100])], Needs(frozenset({Hidden(layer)})), Reference())
    for handle in handles:
        handle.remove()
    assert calls == list(range(ran))


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
        fit(Engine(broken), sides, [GRADIENT])
    broken.model.norm.weight.data.zero_()
    with pytest.raises(EvaluationError, match=r"anchor harmful\[0\] has no usable hidden state"):
        fit(Engine(broken), sides, [REPRESENTATION])


def test_resolving_scores():
    assert [s.name for s in resolve_scores("all")] == sorted(SCORES)
    assert resolve_scores(["representation", "gradient"]) == resolve_scores(("gradient", "representation"))
    assert resolve_scores("gradient") == (GRADIENT,)
    assert resolve_scores([RepresentationScore(top_n=5)])[0].key() == {"name": "representation", "version": 1, "top_n": 5}
    for scores, reason in (
        (["magic"], "unknown score 'magic'; the scores are baseline, compliance, gradient"),
        ([], "no score chosen"),
        ([3], "must be names or Score objects"),
        (["gradient", GRADIENT], "'gradient' is given twice"),
    ):
        with pytest.raises(InputError, match=reason):
            resolve_scores(scores)


def test_bad_options(model, tokenizer, anchors):
    for make in (
        lambda: RepresentationScore(top_n=0),
        lambda: GradientScore(anchor_tokens=0),
        lambda: GradientScore(True),
        lambda: GradientModulewiseScore(1.5),
        lambda: MarginStepScore(0),
        lambda: SubspaceScore(rank=0),
    ):
        with pytest.raises(InputError, match="whole number of at least 1"):
            make()
    for make in (
        lambda: LarfScore("x"),
        lambda: ComplianceScore(-3),
        lambda: RefusalDirectionScore(True),
        lambda: SubspaceScore([]),
    ):
        with pytest.raises(InputError, match="layer"):
            make()
    sides = encode_sides(anchors, ChatEncoder(tokenizer))
    with pytest.raises(InputError, match="top_n=9, but the anchor side 'harmful' has only 4 anchors"):
        score(model, RepresentationScore(top_n=9), sides["harmful"], sides)
    with pytest.raises(EvaluationError, match="disagree on anchor_tokens: 10 and 3"):
        GradientScore().needs | GradientScore(anchor_tokens=3).needs
    assert (GradientScore().needs | RepresentationScore().needs).anchor_tokens == 10
    assert (RepresentationScore().needs | GradientScore().needs).anchor_tokens == 10
