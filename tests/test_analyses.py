"""The mechanism's analyses on planted geometry, where the answer is known, and against slow oracles."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from hf_safefilter.engine.mlp import layer_indices
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.mechanistic.analyses import (
    alignment_table,
    auroc,
    cluster_separation,
    column_space_alignment,
    direction_drift,
    group_table,
    local_sensitivity,
    mlp_inputs,
    shift_table,
    shifted,
    singular_gain,
    update_gain,
    updates,
)
from hf_safefilter.testing import KINDS, tiny_model


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_prompts(count: int = 9, seed: int = 0) -> list[list[int]]:
    """Of different lengths, with a start that all share."""
    ids = torch.randint(0, 512, (count, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[5, 6, 7, 8, 9, *row[: 3 + i % 7]] for i, row in enumerate(ids)]


def tuned_from(base, scale: float = 0.05, seed: int = 1):
    """The base with noise on every parameter."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return tuned


def with_lora(model, seed: int = 0, **options):
    """A LoRA adapter whose update is not zero."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 3, "target_modules": "all-linear", **options}))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return adapted.eval()


def plant(model, layer: int, change) -> None:
    """Set gate_proj's and up_proj's weights of a Llama block to `change(weight)`."""
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        for matrix in (mlp.gate_proj, mlp.up_proj):
            matrix.weight.copy_(change(matrix.weight))


# Column space


def test_alignment_of_planted_updates():
    """Inside the column space 0, in the left null space 1, random the baseline: the released code gives 0.92 three times."""
    base = normal(768, 192)
    basis = torch.linalg.qr(base.double()).Q
    noise = normal(768, 10, seed=1).double()
    updates_ = {
        "inside": base @ normal(192, 10, seed=2) @ normal(10, 192, seed=3),
        "null": (noise - basis @ (basis.T @ noise)).float() @ normal(10, 192, seed=4),
        "random": normal(768, 192, seed=5),
    }
    found = {name: column_space_alignment(delta, base, 8) for name, delta in updates_.items()}
    assert all(len(p) == 8 for p, _ in found.values())
    assert all(baseline == pytest.approx(math.sqrt(1 - 192 / 768)) for _, baseline in found.values())
    assert found["inside"].values.abs().max() < 1e-5
    assert (found["null"].values - 1).abs().max() < 1e-5
    assert (found["random"].values - math.sqrt(0.75)).abs().mean() < 0.02


def test_alignment_with_the_leading_directions_only():
    """A base of rank 3 with one strong direction: the full basis has 3 columns, that of 90% of the energy one."""
    left, right = torch.linalg.qr(normal(40, 3)).Q, torch.linalg.qr(normal(12, 3, seed=1)).Q
    base = left @ torch.diag(torch.tensor([10.0, 1.0, 0.5])) @ right.T
    weak = left[:, 1:2] @ normal(1, 12, seed=2)  # in the column space, not in its leading part
    assert column_space_alignment(weak, base, 1).values.item() == pytest.approx(0, abs=1e-5)
    assert column_space_alignment(weak, base, 1).baseline == pytest.approx(math.sqrt(1 - 3 / 40))
    narrow = column_space_alignment(weak, base, 1, energy=0.9)
    assert narrow.values.item() == pytest.approx(1, abs=1e-5)
    assert narrow.baseline == pytest.approx(math.sqrt(1 - 1 / 40))
    # A wide matrix spans everything: nothing is outside, and the baseline says so.
    assert column_space_alignment(normal(6, 30), normal(6, 30, seed=1), 3).values.abs().max() < 1e-6
    assert column_space_alignment(normal(6, 30), normal(6, 30, seed=1), 3).baseline == 0


def test_alignment_of_no_update_and_bad_arguments():
    base = normal(8, 4)
    assert len(column_space_alignment(torch.zeros(8, 4), base, 2).values) == 0
    assert len(column_space_alignment(torch.outer(normal(8), normal(4)), base, 3).values) == 1  # rank 1: one vector
    with pytest.raises(InputError, match=r"one shape, got \[8, 4\] and \[4, 8\]"):
        column_space_alignment(base, base.T, 2)
    with pytest.raises(InputError, match="k must be between 1 and 4"):
        column_space_alignment(base, base, 5)


def test_alignment_table_with_controls():
    base = tiny_model("llama", intermediate_size=96)
    tuned, control = copy.deepcopy(base), copy.deepcopy(base)
    plant(tuned, 0, lambda w: w + w @ normal(32, 2) @ normal(2, 32, seed=1) * 0.1)  # inside
    plant(control, 0, lambda w: w + 0.1 * normal(*w.shape))
    rows = alignment_table(base, tuned, controls={"benign": control}, k=2)
    full = {(r["layer"], r["update"]): r for r in rows if r["basis"] == "full" and "gate" in r["matrix"]}
    assert full[0, "tuned"]["alignment"] < 1e-3
    assert full[0, "tuned"]["baseline"] == pytest.approx(math.sqrt(1 - 32 / 96))
    for name in ("random", "benign"):
        assert abs(full[0, name]["excess"]) < 0.12
    assert full[1, "tuned"]["alignment"] is None
    assert full[1, "tuned"]["reason"].startswith("no update")
    assert full[0, "tuned"]["relative_norm"] == pytest.approx(
        (updates(base, tuned, [0], "mlp_in")[0].delta().norm() / base.model.layers[0].mlp.gate_proj.weight.norm()).item(),
        rel=1e-4,
    )
    assert full[0, "random"]["relative_norm"] == full[0, "tuned"]["relative_norm"]
    assert all(not isinstance(v, float) or math.isfinite(v) for r in rows for v in r.values())


# Clusters


def planted(distance: float, n: int = 40, seed: int = 0) -> tuple[dict, dict]:
    """Two round clouds of 16 dimensions, so far apart along the first."""
    far = torch.zeros(16)
    far[0] = distance
    return {3: normal(n, 16, seed=seed)}, {3: normal(n, 16, seed=seed + 1) + far}


def test_separation_of_planted_clusters():
    (row,) = cluster_separation(*planted(20.0))
    assert row["layer"] == 3
    assert row["n_safe"] == row["n_unsafe"] == 20  # the other halves were fitted on
    assert row["auroc"] == 1
    # Seen from its own cloud, a point is nearer by about the distance.
    assert row["tau_safe"] > 0 > row["tau_unsafe"]
    assert row["gap_normalised"] == pytest.approx(2, abs=0.5)
    assert row["gap_normalised_low"] < row["gap_normalised"] < row["gap_normalised_high"]
    assert row["silhouette"] > 0.6
    (near,) = cluster_separation(*planted(0.0, n=400))
    assert abs(near["auroc"] - 0.5) < 0.12  # on what was fitted it would be 0.8 and more
    assert near["auroc_low"] < 0.5 < near["auroc_high"]
    assert near["silhouette"] < 0.05


def test_scores_are_held_out():
    """With as many dimensions as this, means tell their own points apart, and nothing else."""
    safe, unsafe = {0: normal(8, 4000)}, {0: normal(8, 4000, seed=1)}
    (row,) = cluster_separation(safe, unsafe)
    assert abs(row["gap_normalised"]) < 0.2
    mu = [x[0].mean(dim=0) for x in (safe, unsafe)]
    on_fitted = (safe[0] - mu[1]).norm(dim=1) - (safe[0] - mu[0]).norm(dim=1)
    assert (on_fitted > 0).all()


def test_the_gap_does_not_grow_with_the_activations():
    safe, unsafe = planted(5.0)
    (row,), (larger,) = cluster_separation(safe, unsafe), cluster_separation({3: 7 * safe[3]}, {3: 7 * unsafe[3]})
    assert larger["gap"] == pytest.approx(7 * row["gap"])
    for name in ("gap_normalised", "auroc", "silhouette", "top_singular_share"):
        assert larger[name] == pytest.approx(row[name])


def test_prompts_on_a_line():
    line = normal(20, 1) * normal(1, 16, seed=1)
    (row,) = cluster_separation({0: normal(20, 16, seed=2)}, {0: line})
    assert row["top_singular_share"] == pytest.approx(1)
    same = {0: torch.ones(4, 16)}
    (row,) = cluster_separation(same, same)
    assert (row["auroc"], row["gap_normalised"], row["top_singular_share"], row["silhouette"]) == (0.5, None, None, 0)


def test_too_few_prompts():
    few = {0: normal(3, 4)}
    with pytest.raises(InputError, match="unsafe: 3 prompts; a held-out split needs at least 4"):
        cluster_separation({0: normal(4, 4)}, few)
    with pytest.raises(InputError, match="safe: 2 prompts"):
        group_table(tiny_model(), tiny_model(), {"safe": [[1]] * 2, "unsafe": [[1]] * 9})


def test_auroc_against_counting():
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 2.0])
    assert auroc(a, b) == (1 + 1 + 1 + 0 + 0.5 + 0.5) / 6


def test_drift_of_planted_moves():
    safe, unsafe = planted(4.0, n=6)
    r0 = unsafe[3].mean(dim=0) - safe[3].mean(dim=0)
    still = direction_drift((safe, unsafe), (safe, unsafe))[0]
    assert (still["cosine"], still["norm_ratio"]) == (pytest.approx(1), pytest.approx(1))
    assert (still["projection_safe"], still["projection_unsafe"]) == (0, 0)
    erased = direction_drift((safe, unsafe), (safe, {3: unsafe[3] - 0.75 * r0}))[0]
    assert erased["projection_unsafe"] == pytest.approx(-0.75)
    assert erased["norm_ratio"] == pytest.approx(0.25)
    assert erased["cosine"] == pytest.approx(1)
    over = direction_drift((safe, unsafe), ({3: safe[3] + r0 / 2}, unsafe))[0]
    assert over["projection_safe"] == pytest.approx(0.5)
    aside = torch.zeros(16)
    aside[1:] = normal(15)
    aside -= (aside @ r0) / (r0 @ r0) * r0
    turned = direction_drift((safe, unsafe), (safe, {3: unsafe[3] - r0 + aside}))[0]
    assert turned["cosine"] == pytest.approx(0, abs=1e-6)
    gone = direction_drift((safe, unsafe), (safe, safe))[0]
    assert (gone["cosine"], gone["norm_ratio"]) == (None, 0)


# What the MLP reads


@pytest.mark.parametrize("kind", KINDS)
def test_mlp_inputs_against_one_prompt_at_a_time(kind):
    """Whatever the batch, its padding and the shared start."""
    model, prompts = tiny_model(kind), some_prompts()
    caught: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    layers = model.transformer.h if kind == "gpt2" else model.model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda m, args, i=i: caught[i].append(args[0][0, -1].detach()))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    for batch_size in (1, 4, 32):
        found = mlp_inputs(model, prompts, batch_size=batch_size)
        assert found.keys() == {0, 1}
        for layer, x in found.items():
            torch.testing.assert_close(x, torch.stack(caught[layer]), rtol=1e-4, atol=1e-5)
    assert mlp_inputs(model, prompts, [0.6]).keys() == {1}


def test_the_forward_ends_at_the_last_layer_asked_for():
    model = tiny_model(num_hidden_layers=4)
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    prompts = [[1, 2], [3, 4]]  # no shared start: one forward
    mlp_inputs(model, prompts, [0, 2])
    assert ran == [0, 1]


def test_bad_prompts_and_layers():
    model = tiny_model()
    for prompts in ([], [[1], []]):
        with pytest.raises(InputError, match="each must have a token"):
            mlp_inputs(model, prompts)
        with pytest.raises(InputError, match="each must have a token"):
            local_sensitivity(model, prompts)
    for layers in ([2], [-1], [0, 1.5]):
        with pytest.raises(InputError, match="does not exist"):
            mlp_inputs(model, [[1]], layers)
    with pytest.raises(InputError, match="at least one"):
        mlp_inputs(model, [[1]], [])
    assert layer_indices([0.5, 0.99, 0], 4) == [0, 2, 3]
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="block 1 reads is not finite"):
        mlp_inputs(model, [[1, 2]])


# Updates


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_differences_of_what_layers_compute(kind):
    base = tiny_model(kind)
    tuned = tuned_from(base)
    found = updates(base, tuned, part="mlp_in")
    assert len(found) == (2 if kind in ("gpt2", "phi") else 4)
    for update in found:
        path = update.name.removesuffix(".weight")
        x = normal(5, 32)
        before, after = base.get_submodule(path), tuned.get_submodule(path)
        bias = 0 if getattr(before, "bias", None) is None else after.bias - before.bias
        expected = after(x) - before(x) - bias
        torch.testing.assert_close(update.apply(x), expected, rtol=1e-3, atol=1e-4)
        assert update.base.shape == update.delta().shape == (128 if kind == "gpt2" else 64, 32)
        u, s, v = update.svd()
        torch.testing.assert_close(u @ torch.diag(s) @ v.T, update.delta().double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(s, torch.linalg.svdvals(update.delta().double()))
        assert update.norm() == pytest.approx(float(s.norm()))


def test_which_matrices_there_are():
    base = tiny_model("llama")
    tuned = tuned_from(base)
    names = [u.name for u in updates(base, tuned)]
    assert len(names) == 2 * 7 + 2  # the blocks' matrices, the embedding and the head
    assert {u.layer for u in updates(base, tuned)} == {None, 0, 1}
    of = lambda part: {u.name.split(".")[-2] for u in updates(base, tuned, [1], part)}  # noqa: E731
    assert of("mlp") == {"gate_proj", "up_proj", "down_proj"}
    assert of("attention") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    tied = tiny_model("llama_tied")
    assert len(updates(tied, tuned_from(tied))) == 2 * 7 + 1


def test_the_answers_do_not_depend_on_how_a_layer_stores_its_weights():
    """GPT-2's Conv1D keeps the transposed matrix."""
    base = tiny_model("gpt2")
    tuned = tuned_from(base)
    for update in updates(base, tuned, part="mlp_in"):
        mine, theirs = (m.get_parameter(update.name).detach() for m in (base, tuned))
        assert mine.shape == (32, 128)  # stored [in, out]
        plain = column_space_alignment((theirs - mine).T, mine.T, 4)
        row = next(
            r
            for r in alignment_table(base, tuned, k=4)
            if (r["matrix"], r["update"], r["basis"]) == (update.name, "tuned", "full")
        )
        assert row["alignment"] == pytest.approx(float(plain.values.mean()), rel=1e-6)
        assert row["baseline"] == pytest.approx(math.sqrt(0.75))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}])
def test_lora_is_the_merged_difference(kind, options):
    base = tiny_model(kind)
    adapted = with_lora(base, **options)
    merged = copy.deepcopy(adapted).merge_and_unload()
    plain = {u.name: u for u in updates(base, merged)}
    for given in (base, None):
        found = [u for u in updates(given, adapted) if u.norm()]
        assert len(found) == (8 if kind == "gpt2" else 14)
        for update in found:
            assert update.factors is not None
            assert update.factors[0].shape == (update.base.shape[0], 3)
            torch.testing.assert_close(update.delta(), plain[update.name].delta(), rtol=1e-4, atol=1e-5)
            x = normal(4, update.base.shape[1])
            torch.testing.assert_close(update.apply(x), plain[update.name].apply(x), rtol=1e-3, atol=1e-4)
            u, s, v = update.svd()
            torch.testing.assert_close(u @ torch.diag(s) @ v.T, update.delta().double(), rtol=1e-4, atol=1e-5)
            assert update.norm() == pytest.approx(float(update.delta().norm()), rel=1e-4)
    prompts = some_prompts()
    safe, unsafe = mlp_inputs(adapted, prompts[:4]), mlp_inputs(adapted, prompts[4:])
    for one, other in zip(*(update_gain(base, m, safe, unsafe) for m in (adapted, merged)), strict=True):
        assert one["gain"] == pytest.approx(other["gain"], rel=1e-3)


def test_lora_on_other_weights_than_the_base():
    """An adapter on a model that was tuned before: both count."""
    base = tiny_model()
    moved = tuned_from(base)
    adapted = with_lora(moved)
    merged = copy.deepcopy(adapted).merge_and_unload()
    for one, other in zip(updates(base, adapted), updates(base, merged), strict=True):
        torch.testing.assert_close(one.delta(), other.delta(), rtol=1e-3, atol=1e-5)


def test_adapters_that_are_no_plain_update():
    base = tiny_model()
    with pytest.raises(InputError, match="DoRA.*merge it first"):
        updates(base, with_lora(base, use_dora=True))
    with pytest.raises(InputError, match="kind .*IA3.*merge it first"):
        updates(
            base,
            get_peft_model(tiny_model(), IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])),
        )
    with pytest.raises(InputError, match="base model has a LoRA adapter"):
        updates(with_lora(base), base)


def test_modules_saved_beside_an_adapter():
    base = tiny_model()
    adapted = with_lora(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        adapted.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight.mul_(2)
    found = {u.name: u for u in updates(base, adapted)}
    torch.testing.assert_close(found["lm_head.weight"].delta(), base.lm_head.weight.detach())


def test_models_that_do_not_fit_together():
    base = tiny_model()
    with pytest.raises(InputError, match=r"differ in shape: .*embed_tokens.weight is \[512, 32\] and \[512, 16\]"):
        updates(base, tiny_model(hidden_size=16))
    with pytest.raises(InputError, match="different parameters: .* is in one only"), shifted(base, tiny_model("gpt2"), 1):
        pass
    # The same weights, tied in one: an untied head is a head that moved.
    tied = tiny_model("llama_tied")
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach() * 2)
    assert sorted(u.name for u in updates(tied, untied) if u.norm()) == ["lm_head.weight"]


@pytest.mark.parametrize("tuned", ["itself", "a copy", "an adapter that is new"])
def test_identical_models(tuned):
    base = tiny_model()
    others = {
        "itself": lambda: base,
        "a copy": lambda: copy.deepcopy(base),
        "an adapter that is new": lambda: get_peft_model(
            copy.deepcopy(base), LoraConfig(target_modules=["gate_proj", "up_proj"])
        ),
    }
    other, prompts = others[tuned](), some_prompts(16)
    assert all(u.norm() == 0 for u in updates(base, other))
    assert all(
        r["alignment"] is None and "no update" in r["reason"] for r in alignment_table(base, other) if r["update"] != "random"
    )
    safe, unsafe = mlp_inputs(base, prompts[:8]), mlp_inputs(base, prompts[8:])
    assert all(r["gain"] is None and "no update" in r["reason"] for r in update_gain(base, other, safe, unsafe))
    assert singular_gain(base, other, safe, unsafe) == []
    rows = group_table(base, other, {"safe": prompts[:8], "unsafe": prompts[8:]})
    assert {r["measure"] for r in rows} == {"tau", "sensitivity_logit", "sensitivity_log_probability"}
    assert all(abs(r["mean"]) < 1e-3 for r in rows if r["measure"].startswith("sensitivity"))


# Gain


def test_gain_of_a_planted_update():
    """A rank-1 update that reads one direction, at inputs with known components along it."""
    base = tiny_model()
    tuned = copy.deepcopy(base)
    e = torch.zeros(32)
    e[0] = 1
    plant(tuned, 1, lambda w: w + torch.outer(normal(64), e))
    rest = normal(10, 32)
    rest[:, 0] = 0
    safe, unsafe = {1: rest + 0.5 * e}, {1: rest + 2 * e}
    tuned_row, random_row = update_gain(base, tuned, safe, unsafe)
    # By hand: the update's length is 0.5 or 2 times |u|, that of W a is what it is.
    w = torch.cat([base.model.layers[1].mlp.gate_proj.weight, base.model.layers[1].mlp.up_proj.weight]).detach()
    parts = [c / (x[1] @ w.T).norm(dim=1) for c, x in ((0.5, safe), (2, unsafe))]
    assert tuned_row["gain"] == pytest.approx(float(parts[1].mean() / parts[0].mean()), rel=1e-4)
    assert tuned_row["gain_low"] < tuned_row["gain"] < tuned_row["gain_high"]
    assert 3 < tuned_row["gain"] < 4.5
    assert 0.8 < random_row["gain"] < 1.2
    first, *others = singular_gain(base, tuned, safe, unsafe)
    assert others == []  # rank 1, in both matrices along one direction
    length = math.sqrt(2) * float(normal(64).norm())
    assert first["value"] == pytest.approx(length, rel=1e-4)
    assert first["unsafe"] == pytest.approx(float((2 * length / unsafe[1].norm(dim=1)).mean()), rel=1e-4)
    assert first["safe"] == pytest.approx(float((0.5 * length / safe[1].norm(dim=1)).mean()), rel=1e-4)


# Sensitivity


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_sensitivity_against_one_prompt_at_a_time(kind):
    model, prompts = tiny_model(kind), some_prompts()
    found = [local_sensitivity(model, prompts, batch_size=size) for size in (1, 4, 16)]
    for i, prompt in enumerate(prompts):
        e = model.get_input_embeddings()(torch.tensor([prompt])).detach().requires_grad_()
        z = model(inputs_embeds=e).logits[0, -1]
        (by_logit,) = torch.autograd.grad(z.max(), e, retain_graph=True)
        (by_p,) = torch.autograd.grad(z.log_softmax(0).max(), e)
        for values in found:
            assert values["logit"][i].item() == pytest.approx(by_logit.norm().item(), rel=1e-3)
            assert values["log_probability"][i].item() == pytest.approx(by_p.norm().item(), rel=1e-3)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_sensitivity_against_finite_differences():
    model = tiny_model(dtype=torch.float64)
    prompt = [4, 8, 15]
    e = model.get_input_embeddings()(torch.tensor([prompt])).detach()
    largest = lambda x: model(inputs_embeds=x).logits[0, -1].max()  # noqa: E731
    squares = 0.0
    with torch.no_grad():
        for place in range(e[0].numel()):
            step = torch.zeros_like(e).flatten()
            step[place] = 1e-3  # norms compute in float32
            step = step.view_as(e)
            squares += float((largest(e + step) - largest(e - step)) / 2e-3) ** 2
    assert local_sensitivity(model, [prompt])["logit"].item() == pytest.approx(math.sqrt(squares), rel=5e-3)


# Groups


def test_groups_by_success():
    base = tiny_model()
    tuned = tuned_from(base)
    prompts = some_prompts(40)
    groups = {"safe": prompts[:10], "unsafe": prompts[10:20], "jb_misgen": prompts[20:]}
    outcomes = [True] * 8 + [False] * 10 + [None] * 2
    rows = group_table(base, tuned, groups, success={"jb_misgen": outcomes}, layers=[1])
    of = {(r["measure"], r["group"], r["outcome"]): r for r in rows}
    assert {m for m, _, _ in of} == {"tau", "change", "sensitivity_logit", "sensitivity_log_probability"}
    for measure in ("tau", "change"):
        assert [of[measure, "jb_misgen", o]["n"] for o in ("all", "success", "failure")] == [20, 8, 10]
        assert of[measure, "safe", "all"]["n"] == 5  # the half that means were not taken over
        assert (measure, "safe", "success") not in of
    # Tau by hand.
    found = {name: mlp_inputs(tuned, p)[1] for name, p in groups.items()}
    mu = {name: found[name][::2].mean(dim=0) for name in ("safe", "unsafe")}
    x = found["jb_misgen"]
    tau = ((x - mu["unsafe"]).norm(dim=1) - (x - mu["safe"]).norm(dim=1)) / (mu["safe"] - mu["unsafe"]).norm()
    row = of["tau", "jb_misgen", "all"]
    assert row["mean"] == pytest.approx(tau.mean().item(), rel=1e-3, abs=1e-5)
    assert row["auroc"] == pytest.approx(auroc(tau[:8], tau[8:18]))
    assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
    assert "auroc" not in of["tau", "safe", "all"]
    after, before = (local_sensitivity(m, groups["jb_misgen"])["logit"] for m in (tuned, base))
    assert of["sensitivity_logit", "jb_misgen", "all"]["mean"] == pytest.approx((after / before).log2().mean().item(), rel=1e-3)
    assert group_table(base, tuned, groups, sensitivity=False, layers=[1])[0].keys() == row.keys() - {
        "auroc", "auroc_low", "auroc_high"
    }  # fmt: skip
    with pytest.raises(InputError, match="'unsafe' is missing"):
        group_table(base, tuned, {"safe": prompts})
    with pytest.raises(InputError, match="2 outcomes for 20 prompts of 'jb_misgen'"):
        group_table(base, tuned, groups, success={"jb_misgen": [True, False]})


# Moving along the update


def state(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_ends_at_the_base_and_at_the_tuned_model(kind, dtype):
    base = tiny_model(kind, dtype=dtype)
    tuned = tuned_from(base)
    before, after = state(base), state(tuned)
    ids = torch.tensor([[1, 2, 3]])
    for alpha, expected in ((0, before), (1, after)):
        with shifted(base, tuned, alpha) as model:
            assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
            if alpha:
                torch.testing.assert_close(model(ids).logits, tuned(ids).logits, rtol=0, atol=0)
    with shifted(base, tuned, 1.5) as model:
        name = "transformer.h.0.mlp.c_fc.weight" if kind == "gpt2" else "model.layers.0.mlp.gate_proj.weight"
        expected = before[name].float() + 1.5 * (after[name].float() - before[name].float())
        torch.testing.assert_close(
            model.get_parameter(name).float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in tuned.named_parameters())


@pytest.mark.parametrize(("part", "within"), [("mlp", ".mlp."), ("attention", ".self_attn.")])
def test_shifted_in_one_part_only(part, within):
    base = tiny_model("qwen2")
    tuned = tuned_from(base)
    before, after = state(base), state(tuned)
    with shifted(base, tuned, 1, part) as model:
        for name, p in model.named_parameters():
            assert torch.equal(p, after[name] if within in name else before[name]), name
    with pytest.raises(ZeroDivisionError), shifted(base, tuned, 1, part):
        raise ZeroDivisionError
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


def test_shifted_with_an_adapter_and_onto_another_model():
    base = tiny_model("gpt2")
    adapted = with_lora(base)
    merged = copy.deepcopy(adapted).merge_and_unload()
    ids = torch.tensor([[1, 2, 3]])
    with shifted(base, adapted, 1) as model:
        torch.testing.assert_close(model(ids).logits, merged(ids).logits)
    # Transplanted, and taken away again from the model that has it.
    other = tuned_from(base, seed=5)
    before, tuned = state(other), tuned_from(base, seed=6)
    with shifted(base, tuned, 1, onto=other) as model:
        assert model is other
        name = "transformer.h.1.mlp.c_fc.weight"
        expected = before[name] + tuned.get_parameter(name) - base.get_parameter(name)
        torch.testing.assert_close(model.get_parameter(name), expected)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    with shifted(base, tuned, -1, onto=tuned) as model:
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_table_along_the_update():
    base = tiny_model()
    tuned = tuned_from(base)
    weight = lambda m: {"first": m.model.layers[0].mlp.gate_proj.weight[0, 0].item()}  # noqa: E731
    rows = shift_table(base, tuned, weight, (0, 1, 2), ("all", "attention"))
    assert [(r["alpha"], r["part"]) for r in rows] == [(0, "none"), (1, "all"), (2, "all"), (1, "attention"), (2, "attention")]
    start, end = weight(base)["first"], weight(tuned)["first"]
    assert [r["first"] for r in rows] == pytest.approx([start, end, 2 * end - start, start, start])
    for alpha in (float("nan"), "1", True):
        with pytest.raises(InputError, match="alpha must be a number"), shifted(base, tuned, alpha):
            pass
    with pytest.raises(InputError, match="part must be one of all, mlp, attention"), shifted(base, tuned, 1, "head"):
        pass
    with pytest.raises(InputError, match="no matrices in part='norm'"):
        updates(base, tuned, part="norm")
