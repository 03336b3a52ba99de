"""The ghost engine against autograd: every layer function, every architecture, every form, one example at a time."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_safefilter.chat import Example
from hf_safefilter.engine import ghost, measure
from hf_safefilter.engine.directions import Dense, Directions, Factored
from hf_safefilter.engine.layers import blocks, check_parameters, find_layers, units
from hf_safefilter.engine.passes import Engine, Needs, Reference
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.testing import KINDS, tiny_model

NEEDS = Needs(loss=True, gradient=True, directions=True, margin=True, anchor_tokens=10)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4))
# A form is forced by what a pass over memory is said to cost.
FORMED, GHOST = 0, 10**9


def example(length: int, prompt: int, seed: int = 0) -> Example:
    ids = torch.randint(1, 400, (length,), generator=torch.Generator().manual_seed(seed * 1000 + length)).tolist()
    return Example(ids, [-100] * prompt + ids[prompt:])


ROWS = [example(n, p) for n, p in ((12, 4), (2, 1), (40, 30), (7, 6), (60, 5), (300, 100), (40, 1))]
SIDES = {
    "harmful": [example(20, 10, 1), example(25, 9, 1)],
    "safe_1": [example(20, 10, 2), example(22, 12, 2)],
    "safe_2": [example(18, 10, 3)],
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def autograd(module: nn.Module, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The module's output gradient [batch, ...] (random) and each example's own gradients of its parameters."""
    torch.manual_seed(0)
    d = torch.randn(module(*inputs).shape, dtype=torch.float64)
    rows = [
        torch.autograd.grad((module(*(x[b : b + 1] for x in inputs)) * d[b : b + 1]).sum(), list(module.parameters()))
        for b in range(len(d))
    ]
    return d, [torch.stack(parts) for parts in zip(*rows, strict=True)]


def check_forms(g: torch.Tensor, directions: torch.Tensor, squares: torch.Tensor, dots: torch.Tensor) -> None:
    flat = g.flatten(1)
    torch.testing.assert_close(squares, flat.square().sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dots, flat @ directions.flatten(1).T, rtol=1e-10, atol=1e-10)


@given(SHAPES)
@settings(max_examples=30, deadline=None)
def test_linear_and_conv1d(shape):
    batch, tokens, inputs, outputs, k = shape
    a, m = random(batch, tokens, inputs), random(k, outputs, inputs)
    d, (weight, bias) = autograd(nn.Linear(inputs, outputs).double(), a)
    torch.testing.assert_close(ghost.linear_gradient(a, d), weight)
    torch.testing.assert_close(ghost.bias_gradient(d), bias)
    check_forms(weight, m, ghost.linear_squared_norm(ghost.gram(a), d), ghost.linear_dots(a, d, m))
    check_forms(weight, m, ghost.squared_norm(weight), ghost.formed_dots(weight, m))
    d, (weight, _) = autograd(Conv1D(outputs, inputs).double(), a)
    torch.testing.assert_close(ghost.conv1d_gradient(a, d), weight)
    check_forms(weight, m.mT, ghost.linear_squared_norm(ghost.gram(a), d), ghost.linear_dots(d, a, m.mT))


@given(SHAPES, st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_factored_directions(shape, rank):
    batch, tokens, inputs, outputs, k = shape
    a, left, right, core = random(batch, tokens, inputs), random(outputs, rank), random(inputs, rank), random(k, rank, rank)
    d, (weight, _) = autograd(nn.Linear(inputs, outputs).double(), a)
    expected = weight.flatten(1) @ Factored(left, right, core).dense().flatten(1).T
    torch.testing.assert_close(ghost.factored_dots(d @ left, a @ right, core), expected)


@given(SHAPES)
@settings(max_examples=20, deadline=None)
def test_norms(shape):
    batch, tokens, heads, features, _ = shape
    x = random(batch, tokens, heads, features)
    d, (weight, bias) = autograd(nn.LayerNorm(features).double(), x)
    torch.testing.assert_close(ghost.scale_gradient(nn.functional.layer_norm(x, (features,)), d), weight)
    torch.testing.assert_close(ghost.bias_gradient(d.flatten(1, 2)), bias)
    d, (weight,) = autograd(nn.RMSNorm(features, eps=1e-6).double(), x)
    torch.testing.assert_close(ghost.scale_gradient(nn.functional.rms_norm(x, (features,), eps=1e-6), d), weight)


@given(SHAPES)
@settings(max_examples=20, deadline=None)
def test_embedding_and_tied_head(shape):
    batch, tokens, features, extra, k = shape
    rows = extra + 2
    ids, m = torch.randint(rows, (batch, tokens)), random(k, rows, features)
    d, (weight,) = autograd(nn.Embedding(rows, features).double(), ids)
    torch.testing.assert_close(ghost.embedding_gradient(ids, d, rows), weight)
    check_forms(weight, m, ghost.embedding_squared_norm(ids, d), ghost.embedding_dots(ids, d, m))
    a, delta = random(batch, extra, features), random(batch, extra, rows)
    head = ghost.linear_gradient(a, delta)
    cross = ghost.token_dots(ghost.tied_rows(ids, a, delta), d)
    torch.testing.assert_close((head + weight).flatten(1).square().sum(1), check_sum(head, weight, cross))


def check_sum(head: torch.Tensor, lookup: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    return head.flatten(1).square().sum(1) + lookup.flatten(1).square().sum(1) + 2 * cross


def test_long_sums_are_accurate_in_float32():
    """Inner products and norms over 30 million entries, as an embedding has them, to 1e-6."""
    torch.manual_seed(0)
    g = torch.rand(1, 50_000, 600) + 0.5
    m = torch.rand(2, 50_000, 600)
    exact = torch.stack([torch.dot(g.flatten().double(), x.flatten().double()) for x in m])
    torch.testing.assert_close(ghost.formed_dots(g, m)[0], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(ghost.squared_norm(g)[0], g.double().square().sum(), rtol=1e-6, atol=0)


def measured(model, rows, sides=SIDES, **options):
    """Norms, cosines to the sides [sides, rows], and losses."""
    engine = Engine(model, **options)
    reference = Reference({}, engine.directions(sides, NEEDS))
    signals = engine.collect(rows, NEEDS, reference)
    cosines = torch.stack([signals.dots[side].sum(1) / signals.norm for side in sides])
    return signals.norm.numpy(), cosines.numpy(), signals.loss.numpy()


def by_autograd(model, rows, sides=SIDES):
    scores = [oracle.gradient_scores(model, row, sides) for row in rows]
    return np.array([s["gradient_norm"] for s in scores]), np.array(
        [[s[f"gradient_cosine_{side}"] for s in scores] for side in sides]
    )


@pytest.mark.parametrize("form", [FORMED, GHOST])
@pytest.mark.parametrize("kind", KINDS)
def test_models_equal_autograd_in_float64(kind, form, monkeypatch):
    monkeypatch.setattr(measure, "_PASS", form)
    model = tiny_model(kind, dtype=torch.float64)
    norm, cosine, _ = measured(model, ROWS, batch_tokens=150)
    expected_norm, expected_cosine = by_autograd(model, ROWS)
    # Gemma's norms sum their weights' gradient in float32, in autograd too.
    tolerance = 1e-7 if kind == "gemma" else 1e-10
    np.testing.assert_allclose(norm, expected_norm, rtol=tolerance)
    np.testing.assert_allclose(cosine, expected_cosine, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("form", [FORMED, GHOST])
@pytest.mark.parametrize("kind", ["llama_tied", "gemma", "gpt2", "qwen3"])
def test_models_equal_autograd_in_float32(kind, form, monkeypatch):
    monkeypatch.setattr(measure, "_PASS", form)
    model = tiny_model(kind)
    norm, cosine, _ = measured(model, ROWS, batch_tokens=150)
    expected_norm, expected_cosine = by_autograd(tiny_model(kind, dtype=torch.float64), ROWS)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-4)
    np.testing.assert_allclose(cosine, expected_cosine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [FORMED, GHOST])
def test_nothing_of_a_pass_is_kept(form, monkeypatch):
    monkeypatch.setattr(measure, "_PASS", form)
    made = []
    init = measure.Measurement.__init__
    monkeypatch.setattr(
        measure.Measurement, "__init__", lambda self, *args: (made.append(weakref.ref(self)), init(self, *args))[1]
    )
    measured(tiny_model("llama_tied"), ROWS, batch_tokens=150)
    gc.collect()
    assert len(made) > 5
    assert [ref() for ref in made if ref() is not None] == []


@given(
    st.sampled_from(["llama_tied", "qwen2", "gpt2"]),
    st.lists(st.tuples(st.integers(2, 40), st.integers(0, 100)), min_size=1, max_size=5),
    st.sampled_from([1, 64, 10_000]),
    st.sampled_from([(16, 24, 2), (8, 40, 4), (32, 16, 1)]),
)
@settings(max_examples=25, deadline=None)
def test_generated_shapes_and_rows(kind, lengths, batch_tokens, size):
    hidden, inner, heads = size
    config = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": 1}
    if kind == "gpt2":
        config = {"n_embd": hidden, "n_head": heads, "n_layer": 1, "n_inner": inner}
    else:
        config |= {"num_key_value_heads": 1, "intermediate_size": inner}
    model = tiny_model(kind, dtype=torch.float64, **config)
    rows = [example(n, 1 + seed % (n - 1), seed) for n, seed in lengths]
    norm, cosine, _ = measured(model, rows, batch_tokens=batch_tokens)
    expected_norm, expected_cosine = by_autograd(model, rows)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-9)
    np.testing.assert_allclose(cosine, expected_cosine, rtol=1e-9, atol=1e-11)


def lora_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama", dtype=torch.float64), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)  # at its start B is zero, and A has no gradient
    return model.double().eval()


def test_lora_factors():
    model = lora_model()
    norm, cosine, _ = measured(model, ROWS[:4])
    expected_norm, expected_cosine = by_autograd(model, ROWS[:4])
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-10)
    np.testing.assert_allclose(cosine, expected_cosine, rtol=1e-10, atol=1e-12)
    norm, cosine, _ = measured(model, ROWS[:4], parameters="lora")
    check_subset(model, norm, cosine, ROWS[:4], lambda name: "lora_" in name)


def check_subset(model, norm, cosine, rows, wanted) -> None:
    def vector(row, count=None):
        labels = row.labels if count is None else oracle.first_labels(row.labels, count)
        parts = [g.flatten() for name, g in oracle.gradients(model, row.input_ids, labels).items() if wanted(name)]
        assert parts
        return torch.cat(parts)

    for i, row in enumerate(rows):
        g = vector(row)
        assert norm[i] == pytest.approx(float(g.norm()), rel=1e-9)
        for k, anchors in enumerate(SIDES.values()):
            unit = [vector(a, 10) / vector(a, 10).norm() for a in anchors]
            assert cosine[k, i] == pytest.approx(float(g / g.norm() @ (sum(unit) / len(unit))), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_parameter_subsets(kind):
    model = tiny_model(kind, dtype=torch.float64, **({"tie_word_embeddings": False} if kind == "gpt2" else {}))
    last = f"{next(n for n, m in model.named_modules() if m is blocks(model))}.1."
    final = {"llama": "model.norm.", "gpt2": "transformer.ln_f.", "phi": "model.final_layernorm."}[kind]
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    subsets = {
        "head": lambda name: name.startswith("lm_head."),
        "last-1": lambda name: name.startswith(("lm_head.", last, final)),
        "linear": lambda name: name.rpartition(".")[0] in linear,
    }
    for parameters, wanted in subsets.items():
        norm, cosine, _ = measured(model, ROWS[:4], parameters=parameters)
        check_subset(model, norm, cosine, ROWS[:4], wanted)


def test_the_head_alone_of_a_tied_model_is_that_of_the_untied_one():
    tied = tiny_model("llama_tied", dtype=torch.float64)
    untied = tiny_model("llama", dtype=torch.float64)
    weights = {**tied.state_dict(), "lm_head.weight": tied.model.embed_tokens.weight.clone()}
    untied.load_state_dict(weights)
    for parameters in ("head", "last-1", "linear"):
        for a, b in zip(
            measured(tied, ROWS[:3], parameters=parameters), measured(untied, ROWS[:3], parameters=parameters), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_a_subset_runs_no_further_back_than_it_must(monkeypatch):
    model = tiny_model()
    seen = []
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, a, output, i=i: seen.append((i, output.requires_grad)))
    Engine(model, parameters="last-1").collect(ROWS[:1], Needs(gradient=True), Reference())
    assert seen == [(0, False), (1, True)]
    seen.clear()
    Engine(model, parameters="head").collect(ROWS[:1], Needs(gradient=True), Reference())
    assert seen == [(0, False), (1, False)]


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "gemma"])
def test_gradient_checkpointing_changes_nothing_but_memory(kind):
    model = tiny_model(kind)
    plain, again = measured(model, ROWS), measured(model, ROWS, gradient_checkpointing=True)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(module.training for module in model.modules())
    assert not model.is_activation_checkpointing
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="has no gradient checkpointing"):
        measured(model, ROWS, gradient_checkpointing=True)


def test_the_padding_entry_has_no_gradient():
    """As in autograd: `padding_idx` is not trained, wherever its token stands in a row."""
    model = tiny_model("llama_tied", dtype=torch.float64, pad_token_id=7)
    assert model.model.embed_tokens.padding_idx == 7
    ids = [3, 7, 5, 7, 9, 7]
    row = Example(ids, [-100, -100, *ids[2:]])
    norm, cosine, _ = measured(model, [row])
    expected_norm, expected_cosine = by_autograd(model, [row])
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-10)
    np.testing.assert_allclose(cosine, expected_cosine, rtol=1e-10)


def test_neighbours_of_a_row_that_overflows_keep_their_scores():
    model = tiny_model()
    model.model.embed_tokens.weight.data[450] = float("nan")
    bad = Example([3, 450, 6, 8], [-100, -100, 6, 8])
    good = [Example([3, 9, 6, 8], [-100, -100, 6, 8]), Example([4, 2, 1], [-100, 2, 1])]
    alone, together = measured(model, good, batch_tokens=1), measured(model, [good[0], bad, good[1]])
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(b[..., [0, 2]], a, rtol=1e-5)
        assert not np.isfinite(b[..., 1]).any()


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_factored_directions_lose_no_more_than_they_say(kind):
    model = tiny_model(kind, hidden_size=128, intermediate_size=256)
    exact = Engine(model).directions(SIDES, NEEDS)
    small = exact.compress(0.5)
    assert any(isinstance(part, Factored) for part in small.parts.values())
    size = lambda d: sum(t.numel() for part in d.parts.values() for t in vars(part).values())  # noqa: E731
    assert size(small) < size(exact) / 1.4
    for k, name in enumerate(exact.names):
        lost = total = 0.0
        for unit, part in small.parts.items():
            dense = part.values if isinstance(part, Dense) else part.dense()
            lost += float((dense[k] - exact.parts[unit].values[k]).square().sum())
            total += float(exact.parts[unit].values[k].square().sum())
        assert small.energy[name] == pytest.approx(1 - lost / total, abs=1e-4)
    assert np.mean(list(small.energy.values())) > 0.5
    assert exact.compress(1.0) is exact
    # Measured with what is left, not with something else.
    engine = Engine(model)
    dense = Directions(small.names, {n: p if isinstance(p, Dense) else Dense(p.dense()) for n, p in small.parts.items()}, {})
    factored, formed = (engine.collect(ROWS, NEEDS, Reference({}, d)).dots for d in (small, dense))
    for name in exact.names:
        np.testing.assert_allclose(factored[name], formed[name], rtol=1e-3, atol=1e-4 * float(formed[name].abs().max()))


def test_layers_without_a_rule_are_refused_by_name():
    model = tiny_model()
    model.model.layers[1].mlp.act_fn = nn.PReLU()
    with pytest.raises(InputError, match=r"no rule for .* model.layers.1.mlp.act_fn \(PReLU\); use parameters='linear'"):
        find_layers(model)
    assert {layer.kind for layer in find_layers(model, "linear")} == {"linear"}


def test_a_layer_that_is_not_what_its_name_says_is_refused():
    class SquaredNorm(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) ** 2

    class DoubledLinear(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for attribute, wrong in (("norm", SquaredNorm(32)), ("embed_tokens", nn.Embedding(512, 32, max_norm=1.0))):
        model = tiny_model()
        setattr(model.model, attribute, wrong)
        with pytest.raises(InputError, match=f"no rule for per-example gradients of model.{attribute}"):
            find_layers(model)
    model = tiny_model()
    model.lm_head = DoubledLinear(32, 512, bias=False)
    with pytest.raises(InputError, match=r"lm_head \(DoubledLinear\)"):
        find_layers(model)


def test_shared_and_unused_layers_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj and model.layers.1.mlp.up_proj share their weight"):
        find_layers(model)
    model = tiny_model()
    model.unused = nn.Linear(3, 3)
    with pytest.raises(EvaluationError, match="unused ran 0 times"):
        measured(model, ROWS[:1])
    model = tiny_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(EvaluationError, match="ran 2 times"):
        measured(model, ROWS[:1])


def test_parameter_subsets_are_checked():
    for wrong in ("magic", "last-0", "last-", 3, None):
        with pytest.raises(InputError, match="parameters must be 'all', 'linear'"):
            check_parameters(wrong)
    with pytest.raises(InputError, match="has only 2 blocks"):
        find_layers(tiny_model(), "last-3")
    with pytest.raises(InputError, match="no parameters in the subset parameters='lora'"):
        find_layers(tiny_model(), "lora")
    named = dict(tiny_model("llama_tied").named_parameters())
    assert {n for n, _ in units(find_layers(tiny_model("llama_tied")))} == set(named)
