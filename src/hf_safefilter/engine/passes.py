"""One pass over rows: run the model once a micro-batch and gather the union of what the chosen scores asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..chat import IGNORE, Example
from ..errors import EvaluationError
from .batching import Batch, collate, default_batch_tokens, micro_batches
from .gradients import Directions, Gradient, gradient, norm, scoring_mode, trainable
from .hidden import FINAL_LAYER, Hidden, HiddenCatcher, catching
from .loading import accepts_logits_to_keep

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Needs:
    """What a score asks the pass to collect; `a | b` is what both need.

    `anchor_tokens` is how many response tokens of an anchor its gradient is taken over.
    """

    hidden: frozenset[Hidden] = frozenset()
    gradient: bool = False
    anchor_tokens: int | None = None

    def __or__(self, other: Needs) -> Needs:
        anchor_tokens = self.anchor_tokens if self.anchor_tokens is not None else other.anchor_tokens
        if other.anchor_tokens not in (None, anchor_tokens):
            raise EvaluationError(f"scores disagree on anchor_tokens: {anchor_tokens} and {other.anchor_tokens}")
        return Needs(self.hidden | other.hidden, self.gradient or other.gradient, anchor_tokens)


@dataclass
class Signals:
    """What a pass collected, in the order of the rows.

    `hidden[h]` is [rows, hidden] float32; `loss`, `gradient_norm` and each of `gradient_dots` are [rows] float64. `loss` is the
    mean cross-entropy over target tokens in nats; `gradient_dots[side]` is the row's gradient times that anchor side's
    direction, not yet divided by `gradient_norm`. All but `hidden` are empty without gradients.
    """

    hidden: dict[Hidden, torch.Tensor]
    loss: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    gradient_norm: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    gradient_dots: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Reference:
    """What rows are compared with: each anchor side's hidden states [anchors, hidden] and gradient direction."""

    hidden: dict[str, dict[Hidden, torch.Tensor]]
    directions: Directions | None = None


class Engine:
    """A loaded causal language model that signals are collected from.

    Args:
        model: the model, on its device.
        batch_tokens: padded tokens in a micro-batch; see `default_batch_tokens`. Float32 results do not depend on it.
    """

    def __init__(self, model: Any, batch_tokens: int | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or default_batch_tokens(self.device, trainable(model)[0].dtype)
        self._slices_logits = accepts_logits_to_keep(model)

    @property
    def context_length(self) -> int:
        """The most tokens that the model reads."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 2**31

    def fit(self, sides: Mapping[str, Sequence[Example]], needs: Needs, progress: Progress = iter) -> Reference:
        """Fit what rows are compared with, from each side's encoded anchors.

        Args:
            sides: anchors by side.
            needs: hidden states are taken at the anchor's last target token; gradients over its first `anchor_tokens` targets.
            progress: wraps the iteration over anchors (a progress bar).

        Raises:
            EvaluationError: an anchor's gradient or hidden state is zero or not finite.
        """
        hidden = {side: self._hidden(examples, needs.hidden) for side, examples in sides.items()}
        for side, states in hidden.items():
            for state in states.values():
                if bad := (~torch.isfinite(state).all(dim=1) | (state.norm(dim=1) == 0)).nonzero().flatten().tolist():
                    raise EvaluationError(f"anchor {side}[{bad[0]}] has no usable hidden state; try dtype='float32'")
        directions = self._fit_directions(sides, needs.anchor_tokens, progress) if needs.gradient else None
        return Reference(hidden, directions)

    def collect(self, examples: Sequence[Example], needs: Needs, reference: Reference, progress: Progress = iter) -> Signals:
        """Collect the signals of rows, in one pass; `progress` wraps the iteration over rows or micro-batches.

        Without gradients rows go in length-sorted micro-batches through the decoder alone; with gradients they go one by one
        through the whole model, and their hidden states come from the same forward pass.
        """
        if not needs.gradient or not examples:
            return Signals(self._hidden(examples, needs.hidden, progress))
        assert reference.directions is not None
        hidden: dict[Hidden, list[torch.Tensor]] = {h: [] for h in needs.hidden}
        loss, norms = [], []
        dots: dict[str, list[float]] = {side: [] for side in reference.directions.names}
        with scoring_mode(self.model, gradients=True), catching(self.model) as catcher:
            for example in progress(examples):
                row_loss, g, labels = self._backward(example, output_hidden_states=_inner_layers(needs.hidden))
                for h in needs.hidden:
                    hidden[h].append(catcher.at_last_target(h, labels))
                row_norm, row_dots = reference.directions.measure(g)
                loss.append(row_loss)
                norms.append(row_norm)
                for side, value in row_dots.items():
                    dots[side].append(value)
        as_tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
        return Signals(
            {h: torch.cat(rows).cpu() for h, rows in hidden.items()},
            as_tensor(loss),
            as_tensor(norms),
            {side: as_tensor(values) for side, values in dots.items()},
        )

    def _hidden(
        self, examples: Sequence[Example], wanted: frozenset[Hidden], progress: Progress = iter
    ) -> dict[Hidden, torch.Tensor]:
        """Hidden states [rows, hidden] in the rows' order, from micro-batches through the decoder alone."""
        if not wanted or not examples:
            return {h: torch.empty(0) for h in wanted}
        groups = micro_batches([len(e.input_ids) for e in examples], self.batch_tokens)
        rows: dict[Hidden, list[torch.Tensor]] = {h: [] for h in wanted}
        decoder = self.model.get_decoder()
        with scoring_mode(self.model, gradients=False), torch.inference_mode():
            for group in progress(groups):
                batch = collate([examples[i] for i in group], self.device)
                catcher = HiddenCatcher(decoder(**self._inputs(batch), output_hidden_states=_inner_layers(wanted)))
                for h in wanted:
                    rows[h].append(catcher.at_last_target(h, batch.labels).cpu())
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return {h: torch.cat(states)[order].clone() for h, states in rows.items()}

    def _backward(self, example: Example, **options: Any) -> tuple[float, Gradient, torch.Tensor]:
        """Loss, gradient of the mean loss over the target tokens, and labels [1, tokens] of one row."""
        batch = collate([example], self.device)
        targets = (batch.labels[0] != IGNORE).nonzero().flatten()
        predicting = targets - 1  # a token is predicted from the one before it
        if self._slices_logits:
            kept = _at_least(predicting, _MIN_LOGITS)
            output = self.model(**self._inputs(batch), logits_to_keep=kept, **options)
            logits = output.logits[0, torch.isin(kept, predicting)]
        else:
            logits = self.model(**self._inputs(batch), **options).logits[0, predicting]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(logits, batch.labels[0, targets])
        return loss.item(), gradient(loss, trainable(self.model)), batch.labels

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        # Without padding a mask says nothing, and attention is faster without one.
        mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        return {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}

    def _fit_directions(self, sides: Mapping[str, Sequence[Example]], tokens: int | None, progress: Progress) -> Directions:
        directions = Directions.zeros(list(sides), trainable(self.model))
        anchors = [(side, i, example) for side, examples in sides.items() for i, example in enumerate(examples)]
        with scoring_mode(self.model, gradients=True):
            for side, i, example in progress(anchors):
                _, g, _ = self._backward(example if tokens is None else example.first_targets(tokens))
                length = norm(g)
                if not (0 < length < math.inf):
                    raise EvaluationError(f"anchor {side}[{i}] has a gradient of norm {length}; try dtype='float32'")
                directions.add(side, g, 1 / (length * len(sides[side])))
        return directions


# Positions that logits are taken at, at least. With under 4, the CPU's matrix product in the head's backward sums over the
# vocabulary in one go: its gradient was wrong by 1.5e-4 (SmolLM2-135M, float32), against 1e-5 with 4 and more.
_MIN_LOGITS = 8


def _at_least(positions: torch.Tensor, count: int) -> torch.Tensor:
    """The positions, and if they are fewer than `count` those just before the last of them too; sorted."""
    if len(positions) >= count:
        return positions
    last = int(positions[-1])
    more = torch.arange(max(0, last - count + 1), last + 1, device=positions.device)
    return torch.unique(torch.cat([positions, more]))


def _inner_layers(wanted: Iterable[Hidden]) -> bool:
    return any(h.layer != FINAL_LAYER for h in wanted)
