"""The analyses of Jain et al. 2024 (arXiv 2407.10264), the same for the synthetic model and for any chat model.

    cluster_separation      Fig. 3   do safe and unsafe inputs lie apart in what each MLP reads?
    direction_drift         ours     how the direction between them moved
    column_space_alignment  Fig. 4   does the update write outside of the column space of the weights?
    update_gain             Fig. 5   does the update act on unsafe inputs more than on safe ones?
    local_sensitivity       Fig. 6   how much does the answer depend on the input, around it?
    group_table             Fig. 7   jailbreak inputs under these measures, split by success
    shift_table             4.6      the update scaled, taken apart, moved to another model

Prompts are lists of token ids; the answer begins after the last. Activations are what `mlp_inputs` gives,
{block: [prompts, hidden]}: what a block's MLP reads at that token. Tables are lists of flat dicts. Intervals are 95%, by the
bootstrap over prompts, which says nothing about other seeds of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..engine.backward import frozen, predicting_positions
from ..engine.clusters import (
    Activations,
    Clusters,
    Row,
    auroc,
    check_enough,
    cluster_separation,
    direction_drift,
    draw_weights,
    held_out,
    interval,
    wins,
)
from ..engine.mlp import mlp_inputs
from ..engine.updates import Update, relative_change, shift_table, shifted, thin_svd, updates
from ..errors import InputError

__all__ = [
    "Alignment", "Clusters", "Row", "alignment_table", "auroc", "cluster_separation", "column_space_alignment",
    "direction_drift", "group_table", "local_sensitivity", "mlp_inputs", "relative_change", "shift_table", "shifted",
    "singular_gain", "update_gain", "updates",
]  # fmt: skip

Prompts = Sequence[Sequence[int]]


class Alignment(NamedTuple):
    """`values [k]`: of each leading left singular vector of an update, the length outside of the column space; `baseline`."""

    values: torch.Tensor
    baseline: float


def _leading(left: torch.Tensor, values: torch.Tensor, energy: float) -> torch.Tensor:
    """The first left singular vectors that hold at least `energy` of the squared norm; with 1, a basis of the column space."""
    kept = values.square().cumsum(0)
    return left if energy >= 1 else left[:, : int((kept < energy * kept[-1:]).sum()) + 1]


def column_space_alignment(delta: torch.Tensor, base: torch.Tensor, k: int = 8, *, energy: float = 1.0) -> Alignment:
    """How far an update writes outside of what the weights could write (Fig. 4, left null space).

    p_i = |(I - Q Q') u_i| of the leading left singular vectors u_i of the update, Q a basis of the weights' column space: 0
    inside, 1 outside. A random direction has sqrt(1 - rank(Q) / out), 0.79 to 0.88 in MLPs: a p means nothing without it. The
    released code takes rows of U for singular vectors (they are columns) and the tuned weights for the update; it gives about
    the baseline whatever the update is.

    Args:
        delta, base: [out, in], both as in y = W x.
        k: singular vectors; fewer where the update's rank is less, none for an update of zero.
        energy: under 1, Q spans only the leading directions that hold this share of the weights' squared norm.

    Raises:
        InputError: shapes differ, or k is not a count.
    """
    if delta.shape != base.shape or delta.dim() != 2:
        raise InputError(f"delta and base must be matrices of one shape, got {list(delta.shape)} and {list(base.shape)}")
    _check_k(k, delta)
    left, values, _ = thin_svd(base)
    return _outside(thin_svd(delta)[0][:, :k], _leading(left, values, energy))


def _check_k(k: Any, delta: torch.Tensor) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= min(delta.shape):
        raise InputError(f"k must be between 1 and {min(delta.shape)}, the smaller side of the matrix; got {k!r}")


def _outside(vectors: torch.Tensor, basis: torch.Tensor) -> Alignment:
    inside = basis @ (basis.T @ vectors.double())
    return Alignment((vectors - inside).norm(dim=0), (1 - basis.shape[1] / basis.shape[0]) ** 0.5)


def alignment_table(
    base: Any,
    tuned: Any,
    *,
    controls: Mapping[str, Any] | None = None,
    k: int = 8,
    layers: Sequence[float] | None = None,
    seed: int = 0,
) -> list[Row]:
    """`column_space_alignment` of each matrix that reads an MLP's input (Fig. 4), beside what it has to be compared with.

    Args:
        base, tuned: models before and after; see `updates`.
        controls: further models tuned from the same base, such as a harmless fine-tune, by name.
        k: singular vectors.
        layers: blocks.
        seed: of the random update.

    Returns:
        A row for each matrix, `basis` (`full`, `energy90`) and `update` (`tuned`, `random`: of the same norm in a random
        direction, and the controls): the mean `alignment` of k vectors, the first's `alignment_first`, `baseline`, `excess`
        over it, the `rank` of the basis, the update's `relative_norm` and `top_singular_share`. Without an update, `None` and a
        `reason`.
    """
    generator = torch.Generator().manual_seed(seed)
    of: dict[str, list[Update]] = {"tuned": updates(base, tuned, layers, "mlp_in")}
    of |= {name: updates(base, model, layers, "mlp_in") for name, model in (controls or {}).items()}
    rows: list[Row] = []
    for i, weight in enumerate(of["tuned"]):
        _check_k(k, weight.base)
        out = weight.base.shape[0]
        # The left singular vectors of a Gaussian matrix are random orthonormal ones, whatever its norm.
        noise = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
        candidates: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {
            name: found[i].svd()[:2] for name, found in of.items()
        }
        candidates["random"] = noise.to(weight.base.device), None
        left, strength, _ = thin_svd(weight.base)
        for basis, energy in (("full", 1.0), ("energy90", 0.9)):
            q = _leading(left, strength, energy)
            for name, (vectors, values) in candidates.items():
                p, baseline = _outside(vectors[:, :k], q)
                row: Row = {"layer": weight.layer, "matrix": weight.name, "update": name, "basis": basis, "rank": q.shape[1]}
                size = values if values is not None else candidates["tuned"][1]
                square = 0.0 if size is None else float(size.square().sum())
                mean = float(p.mean()) if len(p) else None
                row |= {
                    "k": len(p), "alignment": mean, "alignment_first": float(p[0]) if len(p) else None, "baseline": baseline,
                    "excess": None if mean is None else mean - baseline,
                    "relative_norm": square**0.5 / max(float(weight.base.norm()), 1e-30),
                    "top_singular_share": None if values is None or not square else float(values[0] ** 2) / square,
                    "reason": "" if len(p) else "no update: the matrix is the base's",
                }  # fmt: skip
                rows.append(row)
    return rows


def update_gain(
    base: Any, tuned: Any, safe: Activations, unsafe: Activations, *, controls: Mapping[str, Any] | None = None, seed: int = 0
) -> list[Row]:
    """How much more the update does to unsafe than to safe prompts (Fig. 5, row space).

    gain = mean over unsafe of |dW a| / |W a|, over the same mean of safe prompts, W the MLP's matrices that read its input, one
    above the other. The released code takes the singular vectors of the centred base weights, not of the update, and for `a`
    what attention gives before the residual is added.

    Args:
        base, tuned: models before and after.
        safe, unsafe: activations, of the tuned model as a rule.
        controls: further models tuned from the same base, by name, at the same activations.
        seed: of the control `random`, an update of the same norm with independent entries.

    Returns:
        A row for each layer and update (`tuned`, `random`, the controls): `gain` with an interval, and its two parts. Without
        an update, `None` and a `reason`.
    """
    layers = sorted(safe)
    of = {"tuned": _by_layer(updates(base, tuned, layers, "mlp_in"))}
    of["random"] = {layer: [_noise(u, seed + i) for i, u in enumerate(found)] for layer, found in of["tuned"].items()}
    of |= {name: _by_layer(updates(base, model, layers, "mlp_in")) for name, model in (controls or {}).items()}
    rows: list[Row] = []
    for layer in layers:
        for name, found in of.items():
            s, u = (relative_change(found[layer], x[layer]) for x in (safe, unsafe))
            row: Row = {"layer": layer, "update": name, "n_safe": len(s), "n_unsafe": len(u)}
            if changed := bool(s.mean() > 0):
                draws = (draw_weights(len(u), stream=1) @ u.numpy()) / np.maximum(draw_weights(len(s)) @ s.numpy(), 1e-300)
            row |= {"gain": float(u.mean() / s.mean()) if changed else None, **interval("gain", draws if changed else None)}
            row |= {"change_safe": float(s.mean()), "change_unsafe": float(u.mean())}
            rows.append(row | {"reason": "" if changed else "no update at these prompts"})
    return rows


def singular_gain(base: Any, tuned: Any, safe: Activations, unsafe: Activations, count: int = 15) -> list[Row]:
    """The same by right singular vector (Fig. 5): s_j |v_j' a| / |a| over safe and unsafe prompts, of its leading ones.

    Returns:
        A row for each layer and vector `index` from 0: `value` s_j, means and standard deviations. None for a zero update.
    """
    rows: list[Row] = []
    for layer, found in _by_layer(updates(base, tuned, sorted(safe), "mlp_in")).items():
        parts = [u.svd() for u in found]
        # Matrices one above the other: their right singular vectors are those of the stacked s_j v_j'.
        _, values, right = thin_svd(torch.cat([s[:, None] * v.T for _, s, v in parts]))
        for index in range(min(count, len(values))):
            row: Row = {"layer": layer, "index": index, "value": float(values[index])}
            for side, x in (("safe", safe[layer]), ("unsafe", unsafe[layer])):
                a = torch.nn.functional.normalize(x.double(), dim=1).to(right.device)
                along = values[index] * (a @ right[:, index]).abs()
                row |= {side: float(along.mean()), f"{side}_sd": float(along.std())}
            rows.append(row)
    return rows


def local_sensitivity(model: Any, prompts: Prompts, *, batch_size: int = 16) -> dict[str, torch.Tensor]:
    """How strongly the first answer token's score depends on the prompt's embeddings (Fig. 6, local Lipschitzness).

    The norm of the gradient of the largest logit at the last prompt token by the embeddings of all prompt tokens, as in the
    paper (`logit`), and of that token's log-probability (`log_probability`): tuning changes the scale of logits alone.

    Args:
        model: a causal language model.
        prompts: tokens of each prompt.
        batch_size: prompts at a time. Values do not depend on it but for rounding.

    Returns:
        `logit` and `log_probability`, each [prompts], float32.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise InputError("no prompts, or an empty one: each must have a token")
    device = model.get_input_embeddings().weight.device
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    pieces: dict[str, list[torch.Tensor]] = {"logit": [], "log_probability": []}
    with frozen(model), torch.enable_grad():
        for start in range(0, len(order), batch_size):
            rows = [list(prompts[i]) for i in order[start : start + batch_size]]
            # Padding on the right: a causal model's logits have no gradient there.
            ids = torch.tensor([row + [0] * (len(rows[0]) - len(row)) for row in rows], device=device)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            with predicting_positions(model, torch.arange(len(rows), device=device), last):
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()  # [batch, vocabulary]
            top = logits.amax(dim=1)
            for name, value in (("logit", top), ("log_probability", top - logits.logsumexp(dim=1))):
                (gradient,) = torch.autograd.grad(value.sum(), embedded, retain_graph=name == "logit")
                pieces[name].append(gradient.float().flatten(1).norm(dim=1).cpu())
    back = torch.tensor(order).argsort()
    return {name: torch.cat(parts)[back] for name, parts in pieces.items()}


def group_table(
    base: Any,
    tuned: Any,
    groups: Mapping[str, Prompts],
    *,
    success: Mapping[str, Sequence[bool | None]] | None = None,
    layers: Sequence[float] | None = None,
    sensitivity: bool = True,
    batch_size: int = 32,
) -> list[Row]:
    """Every group of prompts under every measure (Fig. 7 and the parts of Figs. 3, 5, 6 by prompt), split by success.

    The paper keeps successful attacks alone, which selects what it then finds. Here all are kept, and `auroc` says whether the
    measure tells those that succeed from those that do not.

    Args:
        base, tuned: models before and after.
        groups: prompts by name, `"safe"` and `"unsafe"` among them; of these the half that means are not taken over is shown.
        success: for some groups, whether each prompt's attack succeeded; `None` where it could not be told.
        layers: blocks.
        sensitivity: whether to take gradients, the dearest part.
        batch_size: prompts at a time.

    Returns:
        A row for each `measure`, `layer` (`None` for sensitivity), `group` and `outcome` (`all`, `success`, `failure`): `mean`
        with an interval, `n`, and on `all` the `auroc` of the measure for success, with an interval. Measures: `tau` over the
        distance of the means: higher is nearer to safe; `change`: |dW a| / |W a| over its mean on safe prompts;
        `sensitivity_logit`, `sensitivity_log_probability`: log2 of tuned over base, 0 is unchanged.

    Raises:
        InputError: no group `safe` or `unsafe`, too few prompts, outcomes that do not fit their prompts.
    """
    if missing := {"safe", "unsafe"} - groups.keys():
        raise InputError(f"groups must have 'safe' and 'unsafe', to fit means on; {sorted(missing)[0]!r} is missing")
    check_enough({name: len(groups[name]) for name in ("safe", "unsafe")})
    for name, outcomes in (success or {}).items():
        if len(outcomes) != len(groups.get(name, ())):
            raise InputError(f"success: {len(outcomes)} outcomes for {len(groups.get(name, ()))} prompts of {name!r}")
    # Of the groups that means are taken over, only the other half is shown.
    shown = {name: held_out if name in ("safe", "unsafe") else (lambda x: x) for name in groups}
    found = {name: mlp_inputs(tuned, prompts, layers, batch_size) for name, prompts in groups.items()}
    measured: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
    changes = _by_layer(updates(base, tuned, sorted(found["safe"]), "mlp_in"))
    for layer, of_layer in changes.items():
        clusters = Clusters.of(found["safe"][layer], found["unsafe"][layer])
        distance, usual = clusters.direction.norm().clamp(min=1e-30), relative_change(of_layer, found["safe"][layer]).mean()
        measured["tau", layer] = {n: clusters.tau(shown[n](x[layer])) / distance for n, x in found.items()}
        if usual > 0:
            measured["change", layer] = {n: relative_change(of_layer, shown[n](x[layer])) / usual for n, x in found.items()}
    if sensitivity:
        ratios = {n: (local_sensitivity(tuned, shown[n](p)), local_sensitivity(base, shown[n](p))) for n, p in groups.items()}  # type: ignore[arg-type]
        for kind in ("logit", "log_probability"):
            measured[f"sensitivity_{kind}", None] = {
                n: (after[kind].clamp(min=1e-30) / before[kind].clamp(min=1e-30)).log2()
                for n, (after, before) in ratios.items()
            }
    rows: list[Row] = []
    for (measure, at), by_group in measured.items():
        for name, values in by_group.items():
            outcomes = shown[name](list((success or {}).get(name, [None] * len(groups[name]))))  # type: ignore[arg-type, assignment]
            rows += [{"measure": measure, "layer": at, "group": name, **r} for r in _outcome_rows(values, outcomes)]
    return rows


def _outcome_rows(values: torch.Tensor, outcomes: Sequence[bool | None]) -> list[Row]:
    verdicts = {"success": [o is True for o in outcomes], "failure": [o is False for o in outcomes]}
    parts = {"all": values.double()} | {n: values.double()[torch.tensor(v)] for n, v in verdicts.items() if any(v)}
    rows: list[Row] = []
    for name, part in parts.items():
        row: Row = {"outcome": name, "n": len(part), "mean": float(part.mean())}
        rows.append(row | interval("mean", draw_weights(len(part)) @ part.numpy()))
    if len(parts) == 3:
        won, lost = parts["success"], parts["failure"]
        areas = ((draw_weights(len(won)) @ wins(won, lost).numpy()) * draw_weights(len(lost), stream=1)).sum(axis=1)
        rows[0] |= {"auroc": auroc(won, lost), **interval("auroc", areas)}
    return rows


def _by_layer(found: Sequence[Update]) -> dict[int, list[Update]]:
    layers = sorted({u.layer for u in found if u.layer is not None})
    return {layer: [u for u in found if u.layer == layer] for layer in layers}


def _noise(update: Update, seed: int) -> Update:
    """An update of the same norm with independent Gaussian entries."""
    shape, norm = update.base.shape, update.norm()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(update.base.device)
    noise *= norm / noise.norm()
    return Update(update.name, update.layer, update.base, None, lambda: noise)
