"""Which layers a model has, and which rule gives their per-example gradients.

A registry of layer kinds. A type of another library that computes the same (there are dozens of RMSNorms) is accepted after its
rule was checked against autograd on random input; any other layer with parameters is refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import InputError
from . import ghost

# Which parameters gradients are taken over.
PARAMETERS = ("all", "linear", "lora", "head", "last-K")
_LAST = re.compile(r"last-([1-9]\d*)")


@dataclass(frozen=True)
class Layer:
    """A layer whose parameters gradients are taken over.

    `kind` is one of `linear`, `conv1d`, `norm`, `embedding`; `weight` and `bias` are the parameters' names in the model, `None`
    where the layer has none or the subset leaves it out. `tied` marks an input embedding and a head that share one weight.
    `scale` is what an embedding's output is multiplied with inside the module. `head` marks the language-model head.
    """

    name: str
    module: nn.Module
    kind: str
    weight: str | None
    bias: str | None
    tied: bool = False
    head: bool = False
    scale: float = 1.0

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """A norm layer's input, normalised but not yet scaled; recomputed, because output / weight fails near zero weights."""
        return _normalise(self.module, x)


def check_parameters(parameters: Any) -> str:
    """The subset, checked.

    Raises:
        InputError: not one of `PARAMETERS`.
    """
    if parameters in ("all", "linear", "lora", "head") or (isinstance(parameters, str) and _LAST.fullmatch(parameters)):
        return str(parameters)
    raise InputError(
        f"parameters must be 'all', 'linear', 'lora', 'head' or 'last-K' (the last K blocks and the head, such as 'last-4'), "
        f"got {parameters!r}"
    )


def trainable(model: Any) -> list[nn.Parameter]:
    """The parameters with floating-point values, tied ones once."""
    return [p for p in model.parameters() if p.is_floating_point()]


def blocks(model: Any) -> nn.ModuleList:
    """The decoder's blocks.

    Raises:
        InputError: none are found.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise InputError(f"{type(model).__name__} has no list of {depth} decoder blocks")


def find_layers(model: Any, parameters: str = "all") -> list[Layer]:
    """The layers of the chosen subset.

    Args:
        model: a causal language model.
        parameters: `all` floating-point parameters; weights and biases of `linear` layers, the head among them; LoRA factors
            (`lora`); the `head`; or the last K blocks, the final norm and the head (`last-K`). Where the head shares its weight
            with the input embedding, only `all` has the embedding's share of that weight's gradient.

    Raises:
        InputError: with `all` or `last-K`, a layer in the subset that no rule covers; or the subset is empty.
    """
    check_parameters(parameters)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    included = _included(model, parameters, head)
    found: list[Layer] = []
    owner: dict[int, str] = {}
    checked: set[type[nn.Module]] = set()
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
        if not own or not included(name, module):
            continue
        kind = _kind(module, set(own))
        if kind is None or not (type(module) in checked or _rule_holds(module, kind)):
            if parameters == "linear":
                continue
            raise InputError(
                f"no rule for per-example gradients of {name} ({type(module).__name__}); "
                "use parameters='linear' to leave out such layers"
            )
        checked.add(type(module))
        if parameters == "linear" and kind not in ("linear", "conv1d"):
            continue
        shares = tied and module in (head, embedding)
        for n, p in own.items():
            if not shares and owner.setdefault(id(p), name) != name:
                raise InputError(
                    f"{owner[id(p)]} and {name} share their {n}: there is no rule for that; use parameters='head' or 'last-K'"
                )
        path = {n: f"{name}.{n}" for n in own}
        weight = f"{_name_of(model, embedding)}.weight" if shares and parameters == "all" else path.get("weight")
        scale = float(getattr(module, "embed_scale", 1.0)) if kind == "embedding" else 1.0
        both = shares and parameters == "all"
        found.append(Layer(name, module, kind, weight, path.get("bias"), both, module is head, scale))
    if not found:
        raise InputError(f"{type(model).__name__} has no parameters in the subset parameters={parameters!r}")
    return found


def _included(model: Any, parameters: str, head: nn.Module) -> Callable[[str, nn.Module], bool]:
    if parameters == "lora":
        return lambda name, module: ".lora_" in name
    if parameters == "head":
        return lambda name, module: module is head
    if last := _LAST.fullmatch(parameters):
        layers = blocks(model)
        if int(last[1]) > len(layers):
            raise InputError(f"parameters={parameters!r}, but the model has only {len(layers)} blocks")
        before = {m for block in list(layers)[: len(layers) - int(last[1])] for m in block.modules()}
        return lambda name, module: module not in before and not isinstance(module, nn.Embedding)
    return lambda name, module: True


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _kind(module: nn.Module, parameters: set[str]) -> str | None:
    """The kind that a module looks like."""
    from transformers.pytorch_utils import Conv1D

    if not parameters <= {"weight", "bias"}:
        return None
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if plain else None
    if type(module).__name__.endswith("Norm") and "weight" in parameters and module.get_parameter("weight").dim() == 1:
        return "norm"
    return None


# Types that compute exactly what their rule says; others are checked.
_KNOWN = (nn.Linear, nn.Embedding, nn.LayerNorm)


def _rule_holds(module: Any, kind: str) -> bool:
    """Whether the rule gives autograd's gradient for this module, in float32 on random input."""
    if type(module) in _KNOWN:
        return True
    if kind == "embedding":
        module = copy.copy(module)
        module.padding_idx = None  # its entry has no gradient, whatever the rule
    generator = torch.Generator().manual_seed(0)
    device = next(module.parameters()).device
    random = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    weight = random(*((5, module.weight.shape[1]) if kind == "embedding" else module.weight.shape)).requires_grad_()
    parameters = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        parameters["bias"] = random(*module.bias.shape)
    width = {"linear": 1, "conv1d": 0, "norm": 0, "embedding": 1}[kind]
    x = torch.tensor([[1, 2, 1], [0, 3, 4]], device=device) if kind == "embedding" else random(2, 3, weight.shape[width])
    try:
        with torch.enable_grad():
            y = functional_call(module, parameters, (x,))
            d = random(*y.shape)
            (expected,) = torch.autograd.grad((y * d).sum(), weight)
        if kind == "linear":
            g = ghost.linear_gradient(x, d)
        elif kind == "conv1d":
            g = ghost.conv1d_gradient(x, d)
        elif kind == "norm":
            g = ghost.scale_gradient(_normalise(module, x), d)
        else:
            g = ghost.embedding_gradient(x, d * float(getattr(module, "embed_scale", 1.0)), 5)
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
        return False  # it takes or gives something else than its name says
    return torch.allclose(g.sum(dim=0), expected, rtol=1e-3, atol=1e-4)


def _normalise(module: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, x.shape[-1:], None, None, module.eps)
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 1e-6
    x32 = x.float()  # as transformers' RMSNorms do, in float64 models too
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def units(layers: list[Layer]) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of each unit that a gradient consists of, tied weights once."""
    seen = set()
    for layer in layers:
        for name, attribute in ((layer.weight, "weight"), (layer.bias, "bias")):
            if name is not None and name not in seen:
                seen.add(name)
                yield name, getattr(layer.module, attribute)
