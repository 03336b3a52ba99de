"""One forward and one backward over a micro-batch with all weights frozen; each layer's input and output gradient are shown
to a visitor, which reduces them at once. No parameter ever gets a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ..chat import IGNORE
from ..errors import EvaluationError, InputError
from .batching import Batch
from .ghost import accumulator, widest
from .layers import Layer, blocks

# Called with a layer, its input (or the ids looked up) and its output's gradient. The head's are [1, predicting tokens, ...],
# the rows' one after the other; all others' [batch, tokens, ...].
Visit = Callable[[Layer, torch.Tensor, torch.Tensor], None]

# Logits are taken at a multiple of this many positions. The CPU's matrix product in the head's backward takes what is left
# over after groups of 4 or 8 by summing over the vocabulary in one go: gradients at such positions were wrong by 1.2e-4
# (SmolLM2-135M, float32), against 1e-6 at the others.
_LOGITS_MULTIPLE = 8


@dataclass(frozen=True)
class Targets:
    """Where a micro-batch predicts its targets: `row`, `position` [predictions] by row, then position; `counts` [batch].

    A token is predicted from the one before it, so a position is one less than its target's.
    """

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, labels: torch.Tensor) -> Targets:
        """From labels [batch, tokens]."""
        row, position = (labels[:, 1:] != IGNORE).nonzero().unbind(1)
        counts = torch.bincount(row, minlength=len(labels)).tolist()
        return cls(row, position, labels[row, position + 1], counts)

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(self.row.to(device), self.position.to(device), self.token.to(device), self.counts)

    def slices(self) -> list[slice]:
        """Each row's part of the predictions."""
        ends = torch.tensor([0, *self.counts]).cumsum(0).tolist()
        return [slice(start, end) for start, end in pairwise(ends)]


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats, each [batch] float64: the mean over a row's targets, and at its first target."""

    mean: torch.Tensor
    first: torch.Tensor


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, was_training in training:
            module.training = was_training


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients for any parameter; what the user had set comes back afterwards."""
    required = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with evaluation_mode(model):
            for p, _ in required:
                p.requires_grad_(False)
            yield
    finally:
        for p, was_required in required:
            p.requires_grad_(was_required)


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Gradient checkpointing: a block's activations are computed again in the backward pass instead of kept.

    Raises:
        InputError: the model has none.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"{type(model).__name__} has no gradient checkpointing")
    # Renamed in transformers 5.2x; the old names still work there, with a warning.
    new = hasattr(model, "activation_checkpointing_enable")
    was = model.is_activation_checkpointing if new else model.is_gradient_checkpointing
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    disable = model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable
    # transformers checkpoints only what is in training mode; the blocks' children stay in evaluation mode. Reentrant: there
    # the first forward is without gradients, and layers are seen once, while their block is computed again.
    enable({"use_reentrant": True})
    training = [(block, block.training) for block in blocks(model)]
    try:
        for block, _ in training:
            block.training = True
        yield
    finally:
        for block, was_training in training:
            block.training = was_training
        if not was:
            disable()


def inputs(batch: Batch, model: Any) -> dict[str, Any]:
    """Arguments of the model's forward for a micro-batch."""
    # No attention mask: padding stands on the right, where causal attention never looks, and what comes out at padding is not
    # used. Attention is faster without one, and computes the same way whether a row is padded or not.
    arguments = {"input_ids": batch.input_ids, "use_cache": False}
    if sum(isinstance(m, torch.nn.Embedding) for m in model.modules()) > 1:
        # Learned positions must be looked up for each row, or their gradients come summed over the batch.
        arguments["position_ids"] = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(
            batch.input_ids
        )
    return arguments


@contextmanager
def predicting_positions(model: Any, row: torch.Tensor, position: torch.Tensor) -> Iterator[None]:
    """Let the head see these positions only: its output is [1, positions, vocabulary] for `row`, `position` [positions]."""

    def keep(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = args[0]
        return (x[row.to(x.device), position.to(x.device)][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def forward(model: Any, batch: Batch, targets: Targets, *, gradients: bool) -> tuple[torch.Tensor, Losses, torch.Tensor | None]:
    """Logits at the predicting positions only, losses, and with `gradients` the losses' gradient at the logits.

    Returns:
        Logits [1, predictions, vocabulary] (up to 7 more positions follow, without a gradient), the losses, and the gradient of
        each row's mean loss at them.
    """
    extra = -len(targets.row) % _LOGITS_MULTIPLE
    row = torch.cat([targets.row, targets.row.new_zeros(extra)])
    position = torch.cat([targets.position, targets.position.new_zeros(extra)])
    with predicting_positions(model, row, position):
        logits: torch.Tensor = model(**inputs(batch, model)).logits
    targets = targets.to(logits.device)
    with torch.no_grad():
        count = len(targets.row)
        log_p = torch.log_softmax(logits[0], dim=1, dtype=accumulator(logits.dtype))  # [predictions, vocabulary]
        picked = torch.arange(count, device=log_p.device)
        loss = widest(-log_p[picked, targets.token])
        counts = torch.tensor(targets.counts, device=log_p.device)
        mean = loss.new_zeros(len(counts)).index_add_(0, targets.row, loss) / counts
        first = loss[counts.cumsum(0) - counts]
        if not gradients:
            return logits, Losses(mean, first), None
        d = log_p.exp_()
        d[picked, targets.token] -= 1
        d *= torch.cat([1 / counts.to(loss.dtype)[targets.row], loss.new_zeros(extra)]).to(d.dtype)[:, None]
    return logits, Losses(mean, first), d.to(logits.dtype)[None]


def backward(model: Any, layers: Sequence[Layer], batch: Batch, targets: Targets, visit: Visit) -> Losses:
    """Run a micro-batch and show each of `layers` to `visit`, last layer first.

    The gradients are those of each row's mean loss over its targets.

    Args:
        model: frozen (see `frozen`).
        layers: the layers to see; the backward pass goes no deeper than the first of them.
        batch: right-padded rows.
        targets: of the batch.
        visit: gets a layer, its input and its output's gradient.

    Raises:
        EvaluationError: a layer did not take part, or more than once, so that its gradient would be wrong.
    """
    seen = dict.fromkeys((layer.name for layer in layers), 0)

    def catch(layer: Layer, module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            return  # gradient checkpointing: the block runs again later
        if not output.requires_grad:
            output.requires_grad_()  # the first layer of the graph: what lies before needs no gradients
        # Detached: a visitor that kept an input with its graph would be kept by it in turn, through this hook, for ever.
        output.register_hook(partial(show, layer, [args[0].detach()]))

    @torch.no_grad()
    def show(layer: Layer, held: list[torch.Tensor], d: torch.Tensor) -> None:
        a = held.pop()  # so that it is freed when the visitor is done
        seen[layer.name] += 1
        if len(d) != (1 if layer.head else len(batch.input_ids)) or d.dim() < 3:
            raise EvaluationError(
                f"{layer.name} computes on {list(d.shape)} instead of [rows, tokens, features]: no per-example gradients"
            )
        count = len(targets.row) if layer.head else d.shape[1]
        visit(layer, a[:, :count], d[:, :count])

    handles = [layer.module.register_forward_hook(partial(catch, layer)) for layer in layers]
    try:
        with torch.enable_grad():
            logits, losses, d = forward(model, batch, targets, gradients=True)
            torch.autograd.backward(logits, d)
    finally:
        for handle in handles:
            handle.remove()
    if wrong := [name for name, times in seen.items() if times != 1]:
        raise EvaluationError(
            f"{wrong[0]} ran {seen[wrong[0]]} times in one pass, so its gradient is not known; choose other parameters=..."
        )
    return losses
