"""The refusal margin: how much more likely the model is to open with a refusal than with "Sure". No generation.

    margin(prompt)      = mean over refusal openings o of (1/|o|) log p(o | prompt)
                        - mean over affirmative openings of the same                    in nats per token
    probability(prompt) = sum over refusal openings o of p(o | prompt)

Higher: it leans more to refusing. Its zero means nothing (openings differ in how likely their later tokens are): compare values
of one model. The gradient of this margin on the anchors is what the score `margin_step` follows. All openings of
all prompts are read in one forward: the openings form a tree of tokens behind each prompt, in which a token sees its own
ancestors only, and what all prompts begin with (the system prompt) is computed once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from ..chat import IGNORE, ChatEncoder, Example
from ..engine.backward import Targets, forward
from ..engine.batching import collate
from ..engine.loading import accepts_logits_to_keep
from ..errors import EvaluationError, InputError, UnscorableRow
from ..formats import Message
from .generation import contiguous_head, undisturbed
from .judges import margin_openings
from .prompts import load_prompts, prompt_ids

# A shared start is worth its own forward from this many tokens on.
_LEAST_PREFIX = 4
_SIDES = ("refusal", "affirmative")


@dataclass(frozen=True)
class Margin:
    """`values[i]`: each prompt's margin in nats per token; `mean` and its 95% interval (normal, over prompts).

    `probabilities[i]`: how likely an answer, sampled at temperature 1, opens with one of the refusal openings.
    """

    values: list[float] = field(repr=False)
    probabilities: list[float] = field(repr=False)

    @property
    def mean(self) -> float:
        """Over prompts."""
        return sum(self.values) / len(self.values)

    @property
    def probability(self) -> float:
        """Of opening with a refusal, over prompts."""
        return sum(self.probabilities) / len(self.probabilities)

    @property
    def interval(self) -> tuple[float, float]:
        """Mean +- 1.96 standard errors; infinite with one prompt."""
        n, mean = len(self.values), self.mean
        if n < 2:
            return -math.inf, math.inf
        half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in self.values) / (n - 1) / n)
        return mean - half, mean + half


@dataclass(frozen=True)
class _Tree:
    """Openings as a tree of tokens behind a prompt.

    `tokens[k]`, `parents[k]`, `depths[k]` describe the inner nodes, which are read; node -1 is the prompt's last token.
    `steps` lists every predicted token as (node that predicts it, token, weight, event): the margin is the sum of
    weight * log p, and each event (a refusal opening that extends no other) has the product of its tokens' p; -1 is no event.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    steps: tuple[tuple[int, int, float, int], ...]

    @classmethod
    def of(cls, openings: Sequence[Sequence[tuple[int, ...]]]) -> _Tree:
        """Of openings by side."""
        inner = sorted({o[:k] for side in openings for o in side for k in range(1, len(o))}, key=lambda p: (len(p), p))
        index = {path: k for k, path in enumerate(inner)} | {(): -1}
        events = [o for o in openings[0] if not any(o[: len(p)] == p for p in openings[0] if p != o)]
        steps = [
            (index[o[:k]], o[k], (1 - 2 * s) / (len(o) * len(side)), events.index(o) if s == 0 and o in events else -1)
            for s, side in enumerate(openings)
            for o in side
            for k in range(len(o))
        ]
        return cls(tuple(p[-1] for p in inner), tuple(index[p[:-1]] for p in inner), tuple(map(len, inner)), tuple(steps))

    def visible(self) -> torch.Tensor:
        """[nodes, nodes] bool: which nodes a node sees: itself and its ancestors."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for k, parent in enumerate(self.parents):
            if parent >= 0:
                seen[k] |= seen[parent]
        return seen


class MarginProbe:
    """Prompts and openings, encoded once, whose margin can be taken of a model again and again while it trains.

    Args:
        encoder: renders prompts with the model's chat template.
        prompts: harmful requests; see `load_prompts`.
        openings: `{"refusal": [...], "affirmative": [...]}`; the built-in ones by default.
        batch_size: prompts at a time.

    Raises:
        InputError: no prompts or openings, or openings that a prompt's tokens swallow.
    """

    def __init__(
        self,
        encoder: ChatEncoder,
        prompts: Any = "default",
        openings: Mapping[str, Sequence[str]] | None = None,
        *,
        batch_size: int = 64,
    ) -> None:
        texts = dict(openings or margin_openings())
        if set(texts) != set(_SIDES) or not all(texts[s] and all(texts[s]) for s in _SIDES):
            raise InputError("openings must be {'refusal': [...], 'affirmative': [...]}, texts that are not empty")
        sides = [list(texts[side]) for side in _SIDES]
        rows: list[tuple[_Tree, list[int]]] = []
        self.examples: list[Example] = []
        for i, conversation in enumerate(load_prompts(prompts, "harmful")):
            ids, tails = _encoded(encoder, conversation, sides, f"harmful prompt {i}")
            rows.append((_Tree.of(tails), ids))
            if i == 0:
                self.examples = [Example(ids + list(o), [IGNORE] * len(ids) + list(o)) for side in tails for o in side]
                self._signs = [(1 - 2 * s) / len(side) for s, side in enumerate(tails) for _ in side]
        # Every row must keep a token of its own to read.
        self.prefix = _common([ids[:-1] for _, ids in rows])
        if len(self.prefix) < _LEAST_PREFIX:
            self.prefix = []
        # Prompts whose openings are the same tokens (all, as a rule) go together, in length order against padding.
        order = sorted(range(len(rows)), key=lambda i: (rows[i][0].tokens, rows[i][0].steps, -len(rows[i][1]), i))
        self._groups: list[tuple[_Tree, list[int], list[list[int]]]] = []
        for tree, same in groupby(order, key=lambda i: rows[i][0]):
            members = list(same)
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                self._groups.append((tree, part, [rows[i][1][len(self.prefix) :] for i in part]))
        self.count = len(rows)
        self._checked = False

    def __call__(self, model: Any) -> Margin:
        """The margin of a model, in evaluation mode; the model and all random states stay as they were.

        Raises:
            EvaluationError: the model cannot read a tree (it has recurrent layers, say), or a margin is not finite.
        """
        values, probabilities = [0.0] * self.count, [0.0] * self.count
        with undisturbed(model), contiguous_head(model):
            if not self._checked:
                self._check(model)
            shared = self._shared(model)
            for tree, members, rows in self._groups:
                found = self._margins(model, tree, rows, shared)
                for i, value, probability in zip(members, *(f.tolist() for f in found), strict=True):
                    values[i], probabilities[i] = value, probability
        if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
            raise EvaluationError(f"the margin of harmful prompt {bad[0]} is not finite")
        return Margin(values, probabilities)

    def _check(self, model: Any) -> None:
        """Compare the first prompt's margin with that of its openings read one by one in the plain way."""
        batch = collate(self.examples, next(model.parameters()).device)
        losses = forward(model, batch, Targets.of(batch.labels), gradients=False)[1].mean.tolist()
        plain = -sum(sign * loss for sign, loss in zip(self._signs, losses, strict=True))
        tree, row = next((tree, rows[members.index(0)]) for tree, members, rows in self._groups if 0 in members)
        found = float(self._margins(model, tree, [row], self._shared(model))[0][0])
        # In 16 bits each of the two is rounded in its own way.
        if not abs(plain - found) <= 0.15 + 0.02 * abs(plain):
            raise EvaluationError(
                f"no margin for {type(model).__name__}: it does not read openings as a tree "
                f"({found:.3f}, and {plain:.3f} one by one)"
            )
        self._checked = True

    def _shared(self, model: Any) -> Any:
        """The key-value cache of what all prompts begin with, one row; `None` where that is nothing."""
        if not self.prefix:
            return None
        ids = torch.tensor([self.prefix], device=next(model.parameters()).device)
        return model(input_ids=ids, use_cache=True, **_logits(model, 1)).past_key_values

    def _margins(self, model: Any, tree: _Tree, rows: list[list[int]], shared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Margins and probabilities, each [rows] float64."""
        parameter = next(model.parameters())
        device, past = parameter.device, len(self.prefix)
        nodes, width = len(tree.tokens), max(map(len, rows))
        size = width + nodes
        ids = torch.zeros(len(rows), size, dtype=torch.long)
        positions = torch.zeros(len(rows), size, dtype=torch.long)
        allowed = torch.eye(size, dtype=torch.bool).repeat(len(rows), 1, 1)  # [rows, size, size]; padding sees itself
        visible = tree.visible()
        depths = torch.tensor(tree.depths, dtype=torch.long)
        for i, row in enumerate(rows):
            start = width - len(row)  # padding on the left, so that the nodes stand at the same places in all rows
            ids[i, start:width] = torch.tensor(row)
            ids[i, width:] = torch.tensor(tree.tokens)
            positions[i, start:width] = past + torch.arange(len(row))
            positions[i, width:] = past + len(row) - 1 + depths
            allowed[i, start:width, start:width] = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            allowed[i, width:, start:width] = True
            allowed[i, width:, width:] = visible
        seen = torch.cat([torch.ones(len(rows), size, past, dtype=torch.bool), allowed], dim=2)
        mask = torch.zeros(seen.shape, dtype=parameter.dtype).masked_fill_(~seen, torch.finfo(parameter.dtype).min)
        arguments: dict[str, Any] = {
            "input_ids": ids.to(device),
            "attention_mask": mask[:, None].to(device),
            "position_ids": positions.to(device),
            "use_cache": False,
        }
        if past:
            cache = copy.deepcopy(shared)  # the forward writes into it
            cache.batch_repeat_interleave(len(rows))
            arguments |= {"past_key_values": cache, "use_cache": True}
        logits = model(**arguments, **_logits(model, nodes + 1)).logits[:, -(nodes + 1) :]
        at, tokens, weights, events = zip(*tree.steps, strict=True)
        place = [k + 1 for k in at]
        # log p only where it is asked for: of a whole vocabulary it would be the largest tensor of all.
        total = torch.stack([logits[:, k].float().logsumexp(dim=1) for k in range(nodes + 1)], dim=1)  # [rows, 1 + nodes]
        picked = (logits[:, place, list(tokens)].float() - total[:, place]).double().cpu()  # [rows, steps]
        belongs = torch.tensor(events)[:, None] == torch.arange(max(events) + 1)  # [steps, events]
        return picked @ torch.tensor(weights, dtype=torch.float64), (picked @ belongs.double()).exp().sum(dim=1)


def refusal_margin(
    model: Any, tokenizer: Any, prompts: Any = "default", openings: Mapping[str, Sequence[str]] | None = None
) -> Margin:
    """The refusal margin of a loaded model: one forward, no generation.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: harmful requests; see `load_prompts`.
        openings: `{"refusal": [...], "affirmative": [...]}`; the built-in ones by default.

    Raises:
        InputError: unusable prompts or openings.
        EvaluationError: the model cannot be asked this way.
    """
    return MarginProbe(ChatEncoder(tokenizer), prompts, openings)(model)


def _logits(model: Any, last: int) -> dict[str, int]:
    return {"logits_to_keep": last} if accepts_logits_to_keep(model) else {}


def _encoded(
    encoder: ChatEncoder, conversation: list[Message], sides: list[list[str]], where: str
) -> tuple[list[int], list[list[tuple[int, ...]]]]:
    """The prompt's tokens, and each opening's after them.

    A tokenizer may join the end of the prompt with the start of an opening; what all openings leave as it is counts as prompt.
    """
    prompt = prompt_ids(encoder, conversation, where, 2**31)
    text = encoder.render(conversation, add_generation_prompt=True)
    whole = [[_tokens(encoder, conversation, text, o) for o in side] for side in sides]
    start = len(_common([prompt, *(ids for side in whole for ids in side)]))
    tails = [[tuple(ids[start:]) for ids in side] for side in whole]
    if start == 0 or not all(tail for side in tails for tail in side) or set(tails[0]) & set(tails[1]):
        raise InputError(f"{where}: the openings cannot be told apart in tokens")
    return prompt[:start], tails


def _tokens(encoder: ChatEncoder, conversation: list[Message], text: str, opening: str) -> list[int]:
    # Some templates put a space before an answer that is not part of the generation prompt.
    try:
        answered = encoder.render([*conversation, {"role": "assistant", "content": opening}])
    except UnscorableRow:
        answered = ""
    rest = answered.removeprefix(text) if answered.startswith(text) else ""
    lead = rest[: rest.find(opening)] if opening in rest else ""
    found: list[int] = encoder.tokenizer(text + (lead if lead.isspace() else "") + opening, add_special_tokens=False)[
        "input_ids"
    ]
    return found


def _common(rows: Sequence[list[int]]) -> list[int]:
    """What all rows begin with."""
    shortest = min(map(len, rows))
    return rows[0][: next((k for k in range(shortest) if len({row[k] for row in rows}) > 1), shortest)]
