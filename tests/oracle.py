"""The scores in the plainest form: one row at a time, whole flattened gradients, straight from the papers' definitions.

Shares nothing with the engine but the tokens and labels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn.functional import cosine_similarity, cross_entropy


def gradients(model, input_ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    """Gradient of the mean cross-entropy over labels, by parameter (tied ones once), in float64.

    Not transformers' own loss: it rounds float64 logits to float32.
    """
    for p in model.parameters():
        p.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=torch.tensor([input_ids])).logits[0]
    cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {n: g.double() for n, g in found.items()}


def flat_gradient(model, input_ids: list[int], labels: list[int]) -> torch.Tensor:
    """The same in one vector."""
    return torch.cat([g.flatten() for g in gradients(model, input_ids, labels).values()])


def first_labels(labels: list[int], count: int) -> list[int]:
    """Labels with all but the first `count` targets ignored; the sequence itself stays whole."""
    left = count
    kept = []
    for label in labels:
        kept.append(label if label != -100 and left > 0 else -100)
        left -= label != -100
    return kept


def mean_units(model, sides: dict[str, list], anchor_tokens: int = 10) -> dict[str, torch.Tensor]:
    """Each side's mean of unit anchor gradients (first response tokens)."""
    means = {}
    for side, anchors in sides.items():
        units = [flat_gradient(model, a.input_ids, first_labels(a.labels, anchor_tokens)) for a in anchors]
        means[side] = sum(u / u.norm() for u in units) / len(units)
    return means


def gradient_scores(model, row, sides: dict[str, list], anchor_tokens: int = 10, means=None) -> dict[str, float]:
    """He et al. 2024: unit row gradient against each side's mean of unit anchor gradients (first 10 response tokens)."""
    g = flat_gradient(model, row.input_ids, row.labels)
    means = means or mean_units(model, sides, anchor_tokens)
    dots = {side: float(g / g.norm() @ m) for side, m in means.items()}
    safe = [d for side, d in dots.items() if side != "harmful"]
    return {
        "risk_gradient": dots["harmful"] - sum(safe),
        "risk_gradient_balanced": dots["harmful"] - sum(safe) / len(safe),
        "gradient_norm": float(g.norm()),
        **{f"gradient_cosine_{side}": d for side, d in dots.items()},
    }


def representation_scores(model, row, sides: dict[str, list], top_n: int = 1) -> dict[str, float]:
    """He et al. 2024: cosine of final hidden states at the last target token; mean of the `top_n` nearest anchors."""

    def state(example) -> torch.Tensor:
        last = max(i for i, label in enumerate(example.labels) if label != -100)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True)
        return output.hidden_states[-1][0, last].double()

    near = {}
    for side, anchors in sides.items():
        cosines = sorted((float(cosine_similarity(state(row), state(a), dim=0)) for a in anchors), reverse=True)
        near[side] = sum(cosines[:top_n]) / top_n
    safe = [c for side, c in near.items() if side != "harmful"]
    return {
        "risk_representation": near["harmful"],
        "risk_representation_balanced": near["harmful"] - sum(safe) / len(safe),
    }


def side_means(model, sides, anchor_tokens: int = 10, *, unit: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Each side's mean anchor gradient by parameter, of unit gradients or as they are."""
    means = {}
    for side, anchors in sides.items():
        each = [gradients(model, a.input_ids, first_labels(a.labels, anchor_tokens)) for a in anchors]
        if unit:
            lengths = [torch.cat([v.flatten() for v in g.values()]).norm() for g in each]
            each = [{n: v / length for n, v in g.items()} for g, length in zip(each, lengths, strict=True)]
        means[side] = {n: sum(g[n] for g in each) / len(each) for n in each[0]}
    return means


def modulewise_score(model, row, sides) -> float:
    """SQSD's rule: each parameter's gradient and direction normalised; mean over parameters."""
    g, means = gradients(model, row.input_ids, row.labels), side_means(model, sides, unit=True)
    safe = [side for side in means if side != "harmful"]
    total = 0.0
    for name, value in g.items():
        if value.norm() > 0:
            cosine = {s: float(cosine_similarity(value.flatten(), m[name].flatten(), dim=0)) for s, m in means.items()}
            total += cosine["harmful"] - sum(cosine[s] for s in safe) / len(safe)
    return total / len(g)


def margin_scores(model, row, sides, damping: float = 0.01) -> dict[str, float]:
    """The refusal margin's decrease for a step of learning rate 1, plain and preconditioned."""
    g, means = gradients(model, row.input_ids, row.labels), side_means(model, sides, unit=False)
    safe = [side for side in means if side != "harmful"]
    tokens = sum(label != -100 for label in row.labels)
    plain, adam, squares, count = 0.0, 0.0, 0.0, 0
    for name, value in g.items():
        comply, refuse = means["harmful"][name], sum(means[s][name] for s in safe) / len(safe)
        v = (comply**2 + refuse**2) / 2
        squares, count = squares + float(v.sum()), count + v.numel()
        if v.dim() == 1:
            root = (v + damping * v.mean()).sqrt()
        else:
            rows, columns, mean = v.mean(1, keepdim=True), v.mean(0, keepdim=True), v.mean()
            root = ((rows + damping * mean) * (columns + damping * mean) / mean).sqrt()
        plain += float((value * (comply - refuse)).sum())
        adam += float((value * (comply - refuse) / root).sum())
    adam *= (squares / count) ** 0.5
    return {
        "risk_margin_step": plain,
        "risk_margin_step_sum": plain * tokens,
        "risk_margin_step_adam": adam,
        "risk_margin_step_adam_sum": adam * tokens,
    }


def states(model, example) -> list[torch.Tensor]:
    """Hidden states after the embeddings and each block, the last one after the final norm; each [tokens, hidden]."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True)
    return [h[0].double() for h in output.hidden_states]


def pooled(model, example, layer: int, how: str) -> torch.Tensor:
    """The state at the last target token, the mean over all target tokens but the last, or the one before the first target."""
    h = states(model, example)[layer]
    targets = [i for i, label in enumerate(example.labels) if label != -100]
    return {"last": h[targets[-1]], "mean": h[targets[:-1] or targets].mean(0), "prompt": h[targets[0] - 1]}[how]


def larf_score(model, row, sides, layer: int) -> float:
    """LARF as its code has it: the mean over pairs of cosines' differences."""
    h = pooled(model, row, layer, "last")
    mean = {
        side: sum(float(cosine_similarity(h, pooled(model, a, layer, "last"), dim=0)) for a in anchors) / len(anchors)
        for side, anchors in sides.items()
    }
    safe = [m for side, m in mean.items() if side != "harmful"]
    return mean["harmful"] - sum(safe) / len(safe)


def compliance_score(model, row, sides, layer: int) -> float:
    """2606.00160: the shift from prompt to response, projected on the compliance vector."""
    mean = lambda anchors: torch.stack([pooled(model, a, layer, "mean") for a in anchors]).mean(0)  # noqa: E731
    v = mean(sides["harmful"]) - mean([a for side, anchors in sides.items() if side.startswith("safe_") for a in anchors])
    return float((pooled(model, row, layer, "mean") - pooled(model, row, layer, "prompt")) @ v / v.norm())


def refusal_direction_scores(model, row, harmful, harmless, layer: int) -> tuple[float, float]:
    """Arditi et al. 2024: projections on harmful minus harmless, at the last prompt token, and the fall from there."""
    mean = lambda anchors: torch.stack([pooled(model, a, layer, "prompt") for a in anchors]).mean(0)  # noqa: E731
    r = mean(harmful) - mean(harmless)
    prompt, response = (float(pooled(model, row, layer, how) @ r / r.norm()) for how in ("prompt", "mean"))
    return prompt, prompt - response


def subspace_scores(model, row, sides, layers: list[int], rank: int) -> tuple[float, float]:
    """2607.15081: energy in the harmful minus in the safe subspace, at the last token, and its largest half-step."""

    def at(example, position: int) -> torch.Tensor:
        return torch.cat([states(model, example)[layer][position] for layer in layers])

    def basis(anchors) -> torch.Tensor:
        x = torch.stack([at(a, max(i for i, label in enumerate(a.labels) if label != -100)) for a in anchors])
        return torch.linalg.svd(x, full_matrices=False).Vh[:rank]

    harmful = basis(sides["harmful"])
    safe = basis([a for side, anchors in sides.items() if side.startswith("safe_") for a in anchors])
    targets = [i for i, label in enumerate(row.labels) if label != -100]
    q = []
    for t in targets:
        h = at(row, t)
        q.append(float(((harmful @ h).square().sum() - (safe @ h).square().sum()) / h.square().sum()))
    return q[-1], max(((b - a) / 2 for a, b in pairwise(q)), default=0.0)
