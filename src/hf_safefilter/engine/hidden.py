"""Hidden states at chosen layers and tokens, pooled while a forward pass runs; nothing else of a layer is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..chat import IGNORE
from ..errors import InputError
from .layers import blocks

FINAL_LAYER = -1

Pool = Literal["last", "mean", "prompt"]


@dataclass(frozen=True)
class Hidden:
    """A hidden state that a score needs.

    `layer` indexes Hugging Face's `hidden_states`: 0 is the embeddings, l the output of block l, counted from 1 (which is the
    input of the next), -1 the final state, after the last norm. Between 0 and 1 it is that share of the depth, rounded.
    `pool` says at which tokens: the `last` target token; the `mean` over the target tokens but the last, which in a chat row
    ends the turn (a single target token is kept); or the last `prompt` token, before the first target.
    """

    layer: float = FINAL_LAYER
    pool: Pool = "last"


@dataclass(frozen=True, eq=False)
class Probe:
    """Subspaces that the state of each target token is projected on.

    `layers` are as in `Hidden`, their states concatenated; `bases` are [sum of hidden sizes, rank], orthonormal columns.
    """

    layers: tuple[float, ...]
    bases: tuple[torch.Tensor, ...]


@dataclass
class States:
    """What was caught of one micro-batch: `pooled` [batch, hidden] float32 by what was wanted; for each probe and row the
    share of the state's squared length in each subspace, [target tokens, bases] float32."""

    pooled: dict[Hidden, torch.Tensor] = field(default_factory=dict)
    energies: dict[Probe, list[torch.Tensor]] = field(default_factory=dict)


def layer_index(layer: float, depth: int) -> int:
    """The layer as an index of `hidden_states`, 0 to depth - 1, or -1 for the final one.

    Raises:
        InputError: there is no such layer.
    """
    index = round(layer * depth) if 0 < layer < 1 else layer
    index = min(int(index), depth - 1) if 0 < layer < 1 else index
    if index == depth:
        index = FINAL_LAYER
    if index != int(index) or not FINAL_LAYER <= index < max(depth, 1):
        raise InputError(f"layer {layer:g} does not exist: the model has layers 0 to {depth}, and -1 for the last")
    return int(index)


class Stop(Exception):
    """Ends a forward pass early: it has all that it came for."""


@contextmanager
def catching(
    model: Any, wanted: Iterable[Hidden], probes: Iterable[Probe], labels: torch.Tensor, *, stop: bool
) -> Iterator[States]:
    """Catch states of the forward pass that runs inside; with `stop` it ends, silently, at the last layer that is needed.

    Args:
        model: a causal language model.
        wanted: which states, pooled how.
        probes: which subspaces.
        labels: [batch, tokens].
        stop: whether nothing beyond these states is needed.
    """
    depth = model.config.get_text_config().num_hidden_layers
    wanted, probes = list(wanted), list(probes)
    states = States()
    pieces: dict[tuple[Probe, int], list[torch.Tensor]] = {}
    layers = {layer_index(h.layer, depth) for h in wanted} | {layer_index(x, depth) for p in probes for x in p.layers}
    last = FINAL_LAYER if FINAL_LAYER in layers else max(layers, default=0)
    seen: set[int] = set()

    @torch.no_grad()
    def take(index: int, x: torch.Tensor) -> None:
        if index not in seen:  # gradient checkpointing runs blocks twice
            seen.add(index)
            here = labels.to(x.device)  # a model may be spread over devices
            for h in wanted:
                if layer_index(h.layer, depth) == index:
                    states.pooled[h] = pool(x, here, h.pool)
            for probe in probes:
                for place, layer in enumerate(probe.layers):
                    if layer_index(layer, depth) == index:
                        pieces[probe, place] = [row[mask].float() for row, mask in zip(x, here != IGNORE, strict=True)]
        if stop and index == last:
            raise Stop

    def before_block(index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(index, args[0] if args else kwargs["hidden_states"])

        return hook

    handles = []
    if layers - {FINAL_LAYER}:
        of = blocks(model)
        handles += [
            of[index].register_forward_pre_hook(before_block(index), with_kwargs=True) for index in layers - {FINAL_LAYER}
        ]
    if FINAL_LAYER in layers:
        handles.append(model.get_decoder().register_forward_hook(lambda module, args, output: take(FINAL_LAYER, output[0])))
    try:
        yield states
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for probe in probes:
        rows = zip(*(pieces[probe, place] for place in range(len(probe.layers))), strict=True)
        states.energies[probe] = [energies(torch.cat([r.to(row[0].device) for r in row], dim=1), probe.bases) for row in rows]


def pool(x: torch.Tensor, labels: torch.Tensor, how: Pool) -> torch.Tensor:
    """[batch, hidden] in float32 from states [batch, tokens, hidden]; see `Hidden`."""
    target = labels != IGNORE
    tokens = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(target, tokens, -1).amax(dim=1)  # [batch]
    if how == "mean":
        weight = target & ((tokens != last[:, None]) | (target.sum(dim=1, keepdim=True) == 1))
        weight = weight / weight.sum(dim=1, keepdim=True)
        # Not by a product with zeros: what stands at other tokens must not matter, NaN or not.
        return torch.stack([w[w > 0] @ row[w > 0].float() for w, row in zip(weight.float(), x, strict=True)])
    where = last if how == "last" else target.int().argmax(dim=1) - 1
    return x[torch.arange(len(last), device=last.device), where].float()


def energies(x: torch.Tensor, bases: Iterable[torch.Tensor]) -> torch.Tensor:
    """[rows, bases]: the share of each row's squared length that lies in each subspace; 0 for a zero row."""
    squares = x.square().sum(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.stack([(x @ basis.to(x)).square().sum(dim=1) / squares for basis in bases], dim=1)
