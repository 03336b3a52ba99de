"""One pass over rows: run the model once a micro-batch and gather the union of what the chosen scores asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..chat import Example
from ..errors import EvaluationError
from .attribution import Attribution
from .backward import Losses, Targets, backward, checkpointing, forward, frozen, inputs
from .batching import collate, default_batch_tokens, micro_batches
from .directions import Directions
from .ghost import accumulator
from .hidden import Hidden, Probe, States, catching
from .identity import is_sharded
from .layers import Layer, check_parameters, find_layers, trainable, units
from .loading import context_length, input_device
from .margin import MARGIN, MARGIN_ADAM, margin_directions
from .measure import Accumulation, Measurement, Visitor, together

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Sides = Mapping[str, Sequence[Example]]

# The extra side of anchors that are ordinary requests: states only.
HARMLESS = "harmless"

_ANCHOR_TOKENS = 1024


@dataclass(frozen=True)
class Needs:
    """What a score asks the pass to collect; `a | b` is what both need.

    `loss` is each row's cross-entropy; `gradient` its gradient's norm; `directions` also its inner products with the anchor
    sides' directions; `margin` also with those of the refusal margin. `anchor_tokens` is how many response tokens of an anchor
    gradients are taken over. `attribution`, pairs of a direction's name and weight, asks for the terms by position of the inner
    product with their sum. `harmless` asks for states of ordinary requests beside the anchors', `text` for responses' text.
    """

    hidden: frozenset[Hidden] = frozenset()
    probes: frozenset[Probe] = frozenset()
    loss: bool = False
    gradient: bool = False
    directions: bool = False
    margin: bool = False
    anchor_tokens: int | None = None
    attribution: tuple[tuple[str, float], ...] = ()
    harmless: bool = False
    text: bool = False

    def __or__(self, other: Needs) -> Needs:
        anchor_tokens = self.anchor_tokens if self.anchor_tokens is not None else other.anchor_tokens
        if other.anchor_tokens not in (None, anchor_tokens):
            raise EvaluationError(f"scores disagree on anchor_tokens: {anchor_tokens} and {other.anchor_tokens}")
        flags = ("loss", "gradient", "directions", "margin", "harmless", "text")
        either = {flag: getattr(self, flag) or getattr(other, flag) for flag in flags}
        attribution = self.attribution or other.attribution
        hidden, probes = self.hidden | other.hidden, self.probes | other.probes
        return Needs(hidden, probes, anchor_tokens=anchor_tokens, attribution=attribution, **either)


@dataclass
class Signals:
    """What a pass collected, in the order of the rows; what was not asked for is empty.

    `hidden[h]` is [rows, hidden] float32; `energies[probe]` a list of [target tokens, bases]; `loss` and `first_loss` [rows]
    float64, the cross-entropy in nats: mean over target tokens, and at the first; `tokens` [rows] how many targets.
    `squared_norms` [rows, units] and `dots[direction]` [rows, units], float64: of the gradient of the mean loss, a unit for
    each parameter; inner products are not yet divided by anything. `attribution` is a list of
    [tokens] float64, a row's inner product by position. `texts` are the responses.
    """

    hidden: dict[Hidden, torch.Tensor] = field(default_factory=dict)
    energies: dict[Probe, list[torch.Tensor]] = field(default_factory=dict)
    loss: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    first_loss: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    squared_norms: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    dots: dict[str, torch.Tensor] = field(default_factory=dict)
    attribution: list[torch.Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def norm(self) -> torch.Tensor:
        """[rows]: the gradient's norm over all units."""
        return self.squared_norms.sum(dim=1).clamp(min=0).sqrt()


@dataclass
class Reference:
    """What rows are compared with: what each score made of the anchors (tensors by name), and directions of gradients.

    `norms` [directions, units] are the directions' norms.
    """

    fitted: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    directions: Directions | None = None

    def unit_norms(self, direction: str) -> torch.Tensor:
        """[units]: a direction's norm in each unit."""
        assert self.directions is not None
        k = self.directions.names.index(direction)
        return torch.stack([squares[k] for squares in self.directions.squared_norms().values()]).sqrt()


class Engine:
    """A loaded causal language model that signals are collected from.

    Args:
        model: the model, on its device.
        batch_tokens: padded tokens in a micro-batch; see `default_batch_tokens`. Float32 results do not depend on it.
        parameters: the subset that gradients are taken over; see `find_layers`.
        gradient_checkpointing: compute activations again in the backward pass: less memory, a third more time.
        energy: the least share of each anchor direction's squared norm to keep; under 1, directions are stored factored.
    """

    def __init__(
        self,
        model: Any,
        batch_tokens: int | None = None,
        *,
        parameters: str = "all",
        gradient_checkpointing: bool = False,
        energy: float = 1.0,
    ) -> None:
        self.model = model
        # FSDP2 gathers a model's weights when the whole of it is called, and no part of it can be called alone.
        self._sharded = any(is_sharded(p) for p in model.parameters())
        self.device = input_device(model)
        self.batch_tokens = batch_tokens or default_batch_tokens(self.device, trainable(model)[0].dtype)
        # Anchors are fitted in the same micro-batches whatever rows are scored in, unless memory is short.
        self._anchor_tokens = min(_ANCHOR_TOKENS, batch_tokens or _ANCHOR_TOKENS)
        self.parameters = check_parameters(parameters)
        self.gradient_checkpointing = gradient_checkpointing
        self.energy = energy

    @property
    def context_length(self) -> int:
        """The most tokens that the model reads."""
        return context_length(self.model)

    @cached_property
    def _layers(self) -> list[Layer]:
        return find_layers(self.model, self.parameters)

    @property
    def units(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that gradients are taken over, by name."""
        return dict(units(self._layers))

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def states(self, sides: Sides, hidden: frozenset[Hidden]) -> dict[str, dict[Hidden, torch.Tensor]]:
        """Each side's anchors' hidden states [anchors, hidden].

        Raises:
            EvaluationError: an anchor's hidden state is zero or not finite.
        """
        needs, tokens = Needs(hidden), self._anchor_tokens
        found = {side: self.collect(e, needs, Reference(), batch_tokens=tokens).hidden for side, e in sides.items()}
        for side, states in found.items():
            for state in states.values():
                if bad := (~torch.isfinite(state).all(dim=1) | (state.norm(dim=1) == 0)).nonzero().flatten().tolist():
                    raise EvaluationError(f"anchor {side}[{bad[0]}] has no usable hidden state; try dtype='float32'")
        return found

    def directions(self, sides: Sides, needs: Needs, progress: Progress = iter) -> Directions:
        """Directions of the anchors' gradients over their first `needs.anchor_tokens` targets.

        A side's direction is the mean of its anchors' unit gradients, not normalised again (He et al. 2024, as their code
        does), so that a unit gradient's inner product with it is the mean of its cosines to the anchors. With `needs.margin`
        also those of the refusal margin; see `margin_directions`.

        Args:
            sides: `harmful` and safe sides of anchors.
            needs: what rows will be asked for.
            progress: wraps the iteration over micro-batches (a progress bar).

        Raises:
            EvaluationError: an anchor's gradient is zero or not finite.
        """
        short = {s: [e.first_targets(needs.anchor_tokens or len(e.labels)) for e in side] for s, side in sides.items()}
        needed, tokens = Needs(gradient=True), self._anchor_tokens
        norms = {side: self.collect(e, needed, Reference(), progress, tokens).norm for side, e in short.items()}
        for side, values in norms.items():
            if bad := (~torch.isfinite(values) | (values == 0)).nonzero().flatten().tolist():
                norm = float(values[bad[0]])
                raise EvaluationError(f"anchor {side}[{bad[0]}] has a gradient of norm {norm}; try dtype='float32'")
        rows = [(side, i) for side, examples in short.items() for i in range(len(examples))]
        names = [*short, *((MARGIN, MARGIN_ADAM) if needs.margin else ())]
        weights = torch.zeros(len(names), len(rows), dtype=accumulator(trainable(self.model)[0].dtype), device=self.device)
        for row, (side, i) in enumerate(rows):
            weights[names.index(side), row] = 1 / (norms[side][i] * len(short[side]))
            if needs.margin:
                # Mean gradients of the two sides, of which the margin's directions are made below.
                place, sets = (MARGIN, 1) if side == "harmful" else (MARGIN_ADAM, len(short) - 1)
                weights[names.index(place), row] = 1 / (len(short[side]) * sets)
        layers = self._layers
        directions = Directions.zeros(names, self.units)
        examples = [short[side][i] for side, i in rows]
        with frozen(self.model), self._checkpointing():
            for group in progress(micro_batches([len(e.input_ids) for e in examples], tokens)):
                batch = collate([examples[i] for i in group], self.device)
                targets = Targets.of(batch.labels)
                backward(
                    self.model, layers, batch, targets,
                    Accumulation(batch, targets, directions, weights[:, group]),
                )  # fmt: skip
        if needs.margin:
            margin_directions(directions)
        return directions.compress(self.energy)

    def collect(
        self,
        examples: Sequence[Example],
        needs: Needs,
        reference: Reference,
        progress: Progress = iter,
        batch_tokens: int | None = None,
    ) -> Signals:
        """Collect the signals of rows, in one pass over length-sorted micro-batches; `progress` wraps the iteration over them.

        States alone take a forward pass up to the last layer that is needed; losses a whole one, gradients also a backward.
        """
        signals = Signals(tokens=torch.tensor([len(e.target_positions) for e in examples]))
        if not examples or not (needs.hidden or needs.probes or needs.loss or needs.gradient):
            return signals
        groups = micro_batches([len(e.input_ids) for e in examples], batch_tokens or self.batch_tokens)
        layers = self._layers if needs.gradient else []
        caught: list[States] = []
        losses: list[Losses] = []
        measured: list[Measurement] = []
        attributed: list[torch.Tensor] = []
        with frozen(self.model), self._checkpointing() if needs.gradient else nullcontext():
            for group in progress(groups):
                batch = collate([examples[i] for i in group], self.device)
                targets = Targets.of(batch.labels)
                only_states = not (needs.loss or needs.gradient or self._sharded)
                with catching(self.model, needs.hidden, needs.probes, batch.labels, stop=only_states) as states:
                    if needs.gradient:
                        visit = Measurement(batch, targets, reference.directions if needs.directions else None)
                        visits: list[Visitor] = [visit]
                        if needs.attribution:
                            assert reference.directions is not None
                            terms = Attribution(batch, targets, reference.directions, dict(needs.attribution))
                            visits.append(terms)
                        losses.append(backward(self.model, layers, batch, targets, together(visits)))
                        measured.append(visit)
                        if needs.attribution:
                            lengths = [len(examples[i].input_ids) for i in group]
                            attributed += [t[:n].cpu() for n, t in zip(lengths, terms.terms, strict=True)]
                    else:
                        # FSDP2 gathers weights into buffers that it uses again, which inference mode would spoil.
                        with torch.no_grad() if self._sharded else torch.inference_mode():
                            if only_states:
                                self.model.get_decoder()(**inputs(batch, self.model))
                            else:
                                losses.append(forward(self.model, batch, targets, gradients=False)[1])
                caught.append(states)
        order = torch.tensor([i for group in groups for i in group]).argsort()
        rows = lambda parts: torch.cat([p.cpu() for p in parts])[order].clone()  # noqa: E731
        signals.hidden = {h: rows([s.pooled[h] for s in caught]) for h in needs.hidden}
        for probe in needs.probes:
            energies = [e.cpu() for s in caught for e in s.energies[probe]]
            signals.energies[probe] = [energies[i] for i in order.tolist()]
        if losses:
            signals.loss, signals.first_loss = rows([x.mean for x in losses]), rows([x.first for x in losses])
        if measured:
            names = list(self.units)
            signals.squared_norms = rows([torch.stack([m.squares[n].cpu() for n in names], dim=1) for m in measured])
        if measured and needs.directions:
            assert reference.directions is not None
            dots = rows([torch.stack([m.dots[n].cpu() for n in names], dim=1) for m in measured])  # [rows, units, directions]
            signals.attribution = [attributed[i] for i in order.tolist()] if attributed else []
            signals.dots = {name: dots[:, :, k] for k, name in enumerate(reference.directions.names)}
        return signals

    def _checkpointing(self) -> Any:
        return checkpointing(self.model) if self.gradient_checkpointing else nullcontext()
