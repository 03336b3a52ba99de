"""The MLP of each block: the matrices that read its input, and that input at the last token of prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import EvaluationError, InputError
from .backward import evaluation_mode
from .hidden import Stop
from .layers import blocks

# A shared start of all prompts (the system prompt) is worth its own forward from this many tokens on.
_LEAST_PREFIX = 4


def mlp_of(block: nn.Module) -> nn.Module:
    """The block's feed-forward part.

    Raises:
        InputError: the block has none by a known name.
    """
    for name in ("mlp", "feed_forward", "ffn", "block_sparse_moe"):
        if isinstance(found := getattr(block, name, None), nn.Module):
            return found
    raise InputError(f"{type(block).__name__} has no MLP by a known name; geometry is measured on models with one")


def readers(mlp: nn.Module) -> list[Any]:
    """The linear layers that read the MLP's input (`gate_proj` and `up_proj`, or `c_fc`), as peft wraps them or plain.

    Raises:
        InputError: there are none, as in a mixture of experts.
    """
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    # A LoRA layer stands for its parts.
    within = {m for wrap in mlp.modules() if isinstance(wrap, LoraLayer) for m in wrap.modules() if m is not wrap}
    linear = [m for m in mlp.modules() if isinstance(m, LoraLayer | nn.Linear | Conv1D) and m not in within]
    # What writes the MLP's output comes last, and everywhere else reads the width within.
    if len(linear) not in (2, 3):
        raise InputError(
            f"{type(mlp).__name__} has {len(linear)} linear layers instead of 2 or 3: its first matrix is not known"
        )
    return linear[:-1]


def layer_indices(layers: Sequence[float] | None, depth: int) -> list[int]:
    """Blocks, counted from 0, in ascending order: all by default, indices, or shares of the depth between 0 and 1.

    Raises:
        InputError: there is no such block.
    """
    found = []
    for layer in range(depth) if layers is None else layers:
        index = int(layer * depth) if isinstance(layer, float) and 0 < layer < 1 else layer
        if isinstance(index, bool) or index != int(index) or not 0 <= index < depth:
            raise InputError(f"layer {layer!r} does not exist: the model has blocks 0 to {depth - 1}; or give a share of them")
        found.append(int(index))
    if not found:
        raise InputError("layers: give at least one")
    return sorted(set(found))


@torch.no_grad()
def mlp_inputs(
    model: Any, prompts: Sequence[Sequence[int]], layers: Sequence[float] | None = None, batch_size: int = 32
) -> dict[int, torch.Tensor]:
    """What the MLP of each block reads at the last token of each prompt: {block: [prompts, hidden]}, float32, on the CPU.

    The forward stops after the last block asked for; what all prompts begin with is computed once.

    Args:
        model: a causal language model, plain or wrapped by peft; its mode comes back afterwards.
        prompts: tokens [tokens] of each prompt; the answer would begin after the last.
        layers: blocks; see `layer_indices`.
        batch_size: prompts at a time, of like lengths. Values do not depend on it but for rounding.

    Raises:
        InputError: no prompts, an empty one, a block that does not exist or has no MLP.
        EvaluationError: values that are not finite.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise InputError("no prompts, or an empty one: each must have a token")
    chosen = layer_indices(layers, len(blocks(model)))
    # Every prompt keeps a token of its own to read.
    shortest = min(len(p) for p in prompts) - 1
    shared = next((k for k in range(shortest) if len({p[k] for p in prompts}) > 1), shortest)
    shared = shared if shared >= _LEAST_PREFIX and len(prompts) > 1 else 0
    decoder, device = model.get_decoder(), model.get_input_embeddings().weight.device
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    pieces: dict[int, list[torch.Tensor]] = {layer: [] for layer in chosen}
    with evaluation_mode(model):
        past = None
        if shared:
            past = decoder(input_ids=torch.tensor([list(prompts[0][:shared])], device=device), use_cache=True).past_key_values
        for start in range(0, len(order), batch_size):
            rows = [list(prompts[i][shared:]) for i in order[start : start + batch_size]]
            width = len(rows[0])
            # On the right, where causal attention never looks from a real token; so no mask is needed.
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
            if past is not None:
                cache = copy.deepcopy(past)  # the forward writes into it
                cache.batch_repeat_interleave(len(rows))
                arguments |= {"past_key_values": cache, "use_cache": True}
            for layer, x in _caught(model, decoder, arguments, last, chosen).items():
                pieces[layer].append(x)
    back = torch.tensor(order).argsort()
    found = {layer: torch.cat(parts)[back] for layer, parts in pieces.items()}
    if bad := [layer for layer, x in found.items() if not torch.isfinite(x).all()]:
        raise EvaluationError(f"what the MLP of block {bad[0]} reads is not finite")
    return found


def _caught(
    model: Any, decoder: Any, arguments: dict[str, Any], last: torch.Tensor, chosen: Sequence[int]
) -> dict[int, torch.Tensor]:
    """MLP inputs [batch, hidden] at positions `last` [batch] of one forward, which ends at the last chosen block."""
    of, row = blocks(model), torch.arange(len(last), device=last.device)
    found: dict[int, torch.Tensor] = {}

    def catch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            found[layer] = x[row.to(x.device), last.to(x.device)].float().cpu()
            if layer == chosen[-1]:
                raise Stop

        return hook

    handles = [mlp_of(of[layer]).register_forward_pre_hook(catch(layer), with_kwargs=True) for layer in chosen]
    try:
        decoder(**arguments)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
