"""What tuning did to a model: the update dW of each weight matrix, kept as LoRA's factors where it is one, and models at
theta(alpha) = theta_base + alpha (theta_tuned - theta_base).

All matrices here are [out, in], y = W x, whatever a module stores: GPT-2's `Conv1D` keeps [in, out], which would swap left and
right singular vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import InputError
from .layers import blocks
from .mlp import layer_indices, mlp_of, readers

Part = Literal["all", "mlp", "attention", "mlp_in"]
Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Update:
    """How one weight matrix changed. `delta()` and `base` are [out, in] float32.

    Attributes:
        name: of the parameter in the plain model.
        layer: its block, counted from 0; `None` outside of blocks.
        base: the matrix before.
        factors: `(left [out, rank], right [rank, in])` with dW = left right, where it is known in this form.
    """

    name: str
    layer: int | None
    base: torch.Tensor
    factors: Factors | None
    _delta: Callable[[], torch.Tensor] = field(repr=False)

    def delta(self) -> torch.Tensor:
        """dW, formed."""
        return self._delta()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """dW x of each row of x [rows, in]: [rows, out]."""
        x = x.to(self.base.device)
        return x @ self.factors[1].T @ self.factors[0].T if self.factors else x @ self.delta().T

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`left [out, rank]`, `values [rank]`, `right [in, rank]` of dW, float64; see `thin_svd`."""
        if self.factors is None:
            return thin_svd(self.delta())
        q1, r1 = torch.linalg.qr(self.factors[0].double())
        q2, r2 = torch.linalg.qr(self.factors[1].double().T)
        u, s, v = thin_svd(r1 @ r2.T)
        return q1 @ u, s, q2 @ v

    def norm(self) -> float:
        """The Frobenius norm of dW."""
        if self.factors is None:
            return float(self.delta().norm())
        left, right = (f.double() for f in self.factors)
        return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))


def relative_change(of_layer: Sequence[Update], x: torch.Tensor) -> torch.Tensor:
    """|dW x| / |W x| [rows] of the layer's matrices, one above the other, at MLP inputs x [rows, in]."""
    x = x.float()
    moved = torch.stack([u.apply(x.to(u.base.device)).double().square().sum(dim=1).cpu() for u in of_layer]).sum(dim=0)
    whole = torch.stack([(x.to(u.base.device) @ u.base.T).double().square().sum(dim=1).cpu() for u in of_layer]).sum(dim=0)
    return (moved / whole.clamp(min=1e-300)).sqrt()


def thin_svd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left singular vectors [m, rank], values [rank] in descending order and right vectors [n, rank] of x [m, n], in float64.

    By the smaller Gram matrix, several times faster than a full decomposition. Values under max(m, n) float32 roundings of the
    largest are taken for zero and left out: a zero matrix has rank 0.
    """
    x = x.double()
    tall = x.shape[0] >= x.shape[1]
    squares, q = torch.linalg.eigh(x.T @ x if tall else x @ x.T)
    s, q = squares.flip(0).clamp(min=0).sqrt(), q.flip(1)
    rank = int((s > s[:1] * max(x.shape) * torch.finfo(torch.float32).eps).sum())
    s, q = s[:rank], q[:, :rank]
    other = (x if tall else x.T) @ q / s
    return (other, s, q) if tall else (q, s, other)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter as a model computes with it: `tensor`, stored transposed or not, plus LoRA `factors` that are not merged."""

    tensor: torch.Tensor
    transposed: bool = False
    factors: Factors | None = None


def updates(base: Any, tuned: Any, layers: Sequence[float] | None = None, part: Part = "all") -> list[Update]:
    """The update of each matrix (parameter with two dimensions), in the model's order; tied weights once.

    Args:
        base: the model before, plain; or `None` where `tuned` has a LoRA adapter that is not merged: then its own base.
        tuned: the model after, plain or with a LoRA adapter. Its factors are kept where the weights under it are the base's.
        layers: blocks, see `layer_indices`; without them, matrices outside of blocks are among the result.
        part: `"mlp"`, `"attention"`, or `"mlp_in"`: the MLP's matrices that read its input.

    Raises:
        InputError: names or shapes differ; an adapter of another kind than LoRA; quantized weights.
    """
    home = tuned if base is None else base
    wanted = None if layers is None else set(layer_indices(layers, len(blocks(home))))
    where = _places(home)
    found = []
    for name, before, after in _pairs(base, tuned):
        layer, parts = where.get(name, (None, frozenset[str]()))
        if before.tensor.dim() == 2 and (part == "all" or part in parts) and (wanted is None or layer in wanted):
            found.append(_update(name, layer, before, after))
    if not found:
        raise InputError(f"{type(home).__name__} has no matrices in part={part!r}")
    return found


def _update(name: str, layer: int | None, before: _Weight, after: _Weight) -> Update:
    turned = (lambda x: x.T) if before.transposed else (lambda x: x)
    w0, factors = turned(before.tensor.detach()).float(), after.factors
    same = _equal(before.tensor, after.tensor)
    if same and factors is None:
        factors = w0.new_zeros(w0.shape[0], 0), w0.new_zeros(0, w0.shape[1])  # no update at all
    elif not same and factors is not None:
        left, right = factors
        moved = turned(after.tensor.detach()).float() - w0
        return Update(name, layer, w0, None, lambda: moved + left @ right)
    if factors is not None:
        left, right = factors
        return Update(name, layer, w0, factors, lambda: left @ right)
    return Update(name, layer, w0, None, lambda: turned(after.tensor.detach()).float().to(w0.device) - w0)


@contextmanager
def shifted(base: Any, tuned: Any, alpha: float, part: Part = "all", *, onto: Any = None) -> Iterator[Any]:
    """The model at base + alpha (tuned - base), over all parameters or one part's: alpha=0 is the base bit by bit, 1 the tuned.

    It is `base` itself, changed while the block runs; its own weights come back, bit by bit.

    Args:
        base: the model before, plain.
        tuned: the model after, plain or with a LoRA adapter.
        alpha: how much of the update; 0 to 2 in the paper; negative takes it away.
        part: which parameters move: `"all"`, `"mlp"`, `"attention"` or `"mlp_in"`, the rest stay the base's.
        onto: another model of the same shape that gets the update instead of the base (transplanting it; with a negative
            alpha subtracting it).

    Raises:
        InputError: names or shapes differ, an alpha that is not a number, an unknown part.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"alpha must be a number, got {alpha!r}")
    if part not in get_args(Part):
        raise InputError(f"part must be one of {', '.join(get_args(Part))}, got {part!r}")
    target = base if onto is None else onto
    where = _places(base)
    own = {} if onto is None else {name: after for name, _, after in _pairs(base, onto)}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for name, before, after in _pairs(base, tuned):
                if not alpha or not (part == "all" or part in where.get(name, (None, frozenset[str]()))[1]):
                    continue
                if after.factors is None and _equal(before.tensor, after.tensor):
                    continue
                place = own[name].tensor if own else before.tensor
                moved = _moved(place, before, after, alpha)
                kept.append((place, place.data))
                # Another tensor in the parameter's place: the weights themselves are never written to.
                place.data = moved
        yield target
    finally:
        for parameter, data in kept:
            parameter.data = data


def _moved(place: torch.Tensor, before: _Weight, after: _Weight, alpha: float) -> torch.Tensor:
    start, end = before.tensor.detach().float(), after.tensor.detach().to(before.tensor.device).float()
    if after.factors is not None:
        left, right = after.factors
        change = left @ right
        end = end + (change.T if before.transposed else change)
    # lerp is exact at both ends.
    moved = torch.lerp(start, end, alpha) if place is before.tensor else place.detach().float() + alpha * (end - start)
    return moved.to(place.dtype)


def shift_table(
    base: Any,
    tuned: Any,
    measure: Callable[[Any], dict[str, Any]],
    alphas: Sequence[float] = (0, 0.25, 0.5, 0.75, 1, 1.1, 1.25, 1.5, 2),
    parts: Sequence[Part] = ("all", "mlp", "attention"),
    *,
    onto: Any = None,
) -> list[dict[str, Any]]:
    """What `measure(model)` gives along the update: rows of alpha, part and what it gave; see `shifted`.

    Jain et al. scale the whole state dict only (their release fixes alpha at 1); the parts are ours. alpha=0 is one row, part
    `"none"`.
    """
    points: list[tuple[float, Part | Literal["none"]]] = [(0.0, "none")] if 0 in alphas else []
    points += [(float(alpha), part) for part in parts for alpha in alphas if alpha]
    rows = []
    for alpha, part in points:
        with shifted(base, tuned, alpha, "all" if part == "none" else part, onto=onto) as model:
            rows.append({"alpha": alpha, "part": part, **measure(model)})
    return rows


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b.to(a.device)))


def _pairs(base: Any, tuned: Any) -> Iterator[tuple[str, _Weight, _Weight]]:
    """Each parameter of both models by name, tied ones once."""
    after = _weights(tuned)
    before = {n: _Weight(w.tensor, w.transposed) for n, w in after.items()} if base is None else _weights(base)
    if base is not None and any(w.factors for w in before.values()):
        raise InputError("the base model has a LoRA adapter: merge it first (merge_and_unload), or pass base=None for its own")
    if odd := sorted(before.keys() ^ after.keys()):
        raise InputError(f"base and tuned model have different parameters: {odd[0]!r} is in one only")
    seen = set()
    for name, weight in before.items():
        other = after[name]
        if weight.tensor.shape != other.tensor.shape:
            shapes = f"{list(weight.tensor.shape)} and {list(other.tensor.shape)}"
            raise InputError(f"base and tuned model differ in shape: {name} is {shapes}; compare fine-tunes of one base model")
        if not weight.tensor.is_floating_point() or not other.tensor.is_floating_point():
            raise InputError(f"{name} is quantized; load the model in float32 or bfloat16")
        if (key := (id(weight.tensor), id(other.tensor))) not in seen:
            seen.add(key)
            yield name, weight, other


def _weights(model: Any) -> dict[str, _Weight]:
    """Parameters by the names that they have in the plain model."""
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    config = getattr(model, "peft_config", None) or {}
    if other := [c.peft_type for c in config.values() if str(getattr(c.peft_type, "value", c.peft_type)) != "LORA"]:
        raise InputError(f"an adapter of kind {other[0]} has no update in the weights; merge it first: merge_and_unload()")
    modules = dict(model.named_modules(remove_duplicate=False))
    active = {a for m in modules.values() if isinstance(m, LoraLayer) for a in m.active_adapters}
    found = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        if ".lora_" in path or ".original_module." in path:
            continue
        if (saved := re.search(r"\.modules_to_save\.([^.]+)", path)) and active and saved[1] not in active:
            continue
        owner = modules[path.rpartition(".")[0]]
        wrap = modules.get(path.removesuffix(".base_layer.weight")) if path.endswith(".base_layer.weight") else None
        factors = lora_factors(wrap) if isinstance(wrap, LoraLayer) else None
        found[plain_name(path)] = _Weight(p, isinstance(owner, Conv1D) and p.dim() == 2, factors)
    return found


def plain_name(path: str) -> str:
    """A parameter's or module's name without what peft puts in it."""
    return re.sub(r"\.base_layer|\.modules_to_save\.[^.]+", "", path.removeprefix("base_model.model."))


def lora_factors(module: Any) -> Factors | None:
    """`(left [out, rank], right [rank, in])` of a LoRA layer's active, unmerged adapters, scaled; `None` without any.

    Raises:
        InputError: a variant whose update is no such product (DoRA, embeddings).
    """
    adapters = [] if module.merged or module.disable_adapters else module.active_adapters
    lefts, rights = [], []
    for name in adapters:
        if name in module.lora_embedding_A or getattr(module, "lora_variant", {}).get(name) or module.use_dora.get(name):
            raise InputError("a LoRA adapter with DoRA or embeddings has no plain update; merge it first: merge_and_unload()")
        if name in module.lora_A:
            lefts.append(module.lora_B[name].weight.detach().float() * module.scaling[name])
            rights.append(module.lora_A[name].weight.detach().float())
    return (torch.cat(lefts, dim=1), torch.cat(rights)) if lefts else None


def _places(model: Any) -> dict[str, tuple[int, frozenset[str]]]:
    """Block and parts of each parameter inside of blocks, by name."""
    names = {id(p): plain_name(path) for path, p in model.named_parameters()}
    found: dict[str, tuple[int, frozenset[str]]] = {}
    for index, block in enumerate(blocks(model)):
        mlp = mlp_of(block)
        of_mlp = {id(p) for p in mlp.parameters()}
        of_attention = {id(p) for n, m in block.named_children() if "att" in n and "norm" not in n for p in m.parameters()}
        reading = {id(p) for m in _readers(mlp) for n, p in m.named_parameters() if ".lora_" not in f".{n}"}
        for p in block.parameters():
            parts = {"mlp": of_mlp, "attention": of_attention, "mlp_in": reading}
            found[names[id(p)]] = index, frozenset(part for part, ids in parts.items() if id(p) in ids)
    return found


def _readers(mlp: nn.Module) -> list[Any]:
    try:
        return readers(mlp)
    except InputError:  # a mixture of experts: its other parts can still be looked at
        return []
