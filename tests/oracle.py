"""The scores in the plainest form: one row at a time, whole flattened gradients, straight from the papers' definitions.

Shares nothing with the engine but the tokens and labels.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, cross_entropy


def flat_gradient(model, input_ids: list[int], labels: list[int]) -> torch.Tensor:
    """Gradient of the mean cross-entropy over labels, over all parameters, in one float64 vector.

    Not transformers' own loss: it rounds float64 logits to float32.
    """
    for p in model.parameters():
        p.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=torch.tensor([input_ids])).logits[0]
    cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    vector = torch.cat([p.flatten().double() for p in parts])
    model.zero_grad(set_to_none=True)
    return vector


def first_labels(labels: list[int], count: int) -> list[int]:
    """Labels with all but the first `count` targets ignored; the sequence itself stays whole."""
    left = count
    kept = []
    for label in labels:
        kept.append(label if label != -100 and left > 0 else -100)
        left -= label != -100
    return kept


def gradient_scores(model, row, sides: dict[str, list], anchor_tokens: int = 10) -> dict[str, float]:
    """He et al. 2024: unit row gradient against each side's mean of unit anchor gradients (first 10 response tokens)."""
    g = flat_gradient(model, row.input_ids, row.labels)
    means = {}
    for side, anchors in sides.items():
        units = [flat_gradient(model, a.input_ids, first_labels(a.labels, anchor_tokens)) for a in anchors]
        means[side] = sum(u / u.norm() for u in units) / len(units)
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
