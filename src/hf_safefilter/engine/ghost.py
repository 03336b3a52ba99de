"""Per-example gradients from what a layer saw: its input `a` and the gradient `d` of its output.

With all weights frozen a backward pass still gives `d` at every layer, and then the gradient of example b is known without
autograd: `G[b] = sum_t d[b,t] a[b,t]'` for a linear layer. Its norm and its inner products with given directions need not even
form it ("ghost" forms; Li et al. 2021, arXiv 2110.05679, for norms). Each function here is one identity for one kind of layer,
pure, and accumulates in float32 (float64 for float64 models). The sum is over all positions, prompt included: prompt tokens
get gradients through attention.

Shapes: `a` [batch, tokens, in], `d` [batch, tokens, out], directions `M` [directions, ...shape of the weight].
"""

from __future__ import annotations

import torch

# Entries summed in float32 before the sum goes on in float64: a float32 sum over an embedding's 28 million products is wrong
# by 4e-4 on the CPUs measured; over this many, by under 1e-6.
_CHUNK = 1 << 14


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widest(x: torch.Tensor) -> torch.Tensor:
    """In float64, to go on summing in; in float32 on Apple's devices, which have no float64."""
    return x.float() if x.device.type == "mps" else x.double()


# Formed gradients: G itself.


def linear_gradient(a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """[batch, out, in]: `G[b] = sum_t d[b,t] a[b,t]'`."""
    return torch.bmm(d.transpose(1, 2), a).to(accumulator(d.dtype))


def conv1d_gradient(a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """[batch, in, out]: GPT-2's `Conv1D` is a linear layer with its weight transposed."""
    return linear_gradient(d, a)


def bias_gradient(d: torch.Tensor) -> torch.Tensor:
    """[batch, out]: `sum_t d[b,t]`."""
    return d.sum(dim=1, dtype=accumulator(d.dtype))


def scale_gradient(normalised: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """[batch, features]: the gradient of a norm layer's weight w in `y = (c + w) * normalised` (c is 0, or 1 in Gemma).

    `normalised` and `d` are [batch, tokens, ..., features]; what lies between (heads, in q- and k-norms) is summed over too.
    """
    product = (normalised * d).to(accumulator(d.dtype))
    return product.flatten(1, -2).sum(dim=1)


def embedding_gradient(ids: torch.Tensor, d: torch.Tensor, rows: int) -> torch.Tensor:
    """[batch, rows, features], for an embedding with `rows` entries looked up at `ids` [batch, tokens]."""
    g = torch.zeros(len(ids), rows, d.shape[2], dtype=accumulator(d.dtype), device=d.device)
    return g.scatter_add_(1, ids[:, :, None].expand_as(d), d.to(g.dtype))


# Squared norms.


def squared_norm(g: torch.Tensor) -> torch.Tensor:
    """[batch] float64: of formed gradients [batch, ...]."""
    if g.dim() == 2:
        g = g[:, None]
    return widest(torch.linalg.vector_norm(g, dim=-1)).square().flatten(1).sum(dim=1)


def gram(x: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, tokens]: inner products of a tensor's tokens."""
    return torch.bmm(x, x.transpose(1, 2))


def linear_squared_norm(gram_a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """[batch] float64: `||G[b]||^2 = sum_{t,s} (a_t.a_s) (d_t.d_s)`, from the Gram matrix of `a`."""
    product = gram_a.to(accumulator(d.dtype)) * gram(d)
    return widest(product.sum(dim=2)).sum(dim=1)


def embedding_squared_norm(ids: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """[batch] float64: each looked-up entry gets the sum of its tokens' `d`."""
    rows = int(ids.max()) + 1
    key = (ids + rows * torch.arange(len(ids), device=ids.device)[:, None]).flatten()
    entries, place = key.unique(return_inverse=True)
    g = torch.zeros(len(entries), d.shape[2], dtype=accumulator(d.dtype), device=d.device)
    g.index_add_(0, place, d.flatten(0, 1).to(g.dtype))
    squares = widest(torch.linalg.vector_norm(g, dim=1)).square()
    return squares.new_zeros(len(ids)).index_add_(0, entries // rows, squares)


def tied_rows(ids: torch.Tensor, a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, features]: the head's gradient at the rows that `ids` look up, where head and embedding are one weight.

    With `e` the embedding output's gradient, `||G_head + G_embedding||^2 = ||G_head||^2 + ||G_embedding||^2 + 2 tied_rows.e`.
    """
    at_ids = d.gather(2, ids[:, None].expand(-1, d.shape[1], -1))  # [batch, predicting tokens, tokens]
    return torch.bmm(at_ids.transpose(1, 2), a)


def token_dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[batch] float64: `sum_{t,f} x[b,t,f] y[b,t,f]`."""
    return widest((x.to(accumulator(x.dtype)) * y).sum(dim=2)).sum(dim=1)


# Inner products with dense directions.


def formed_dots(g: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """[batch, directions] float64, of formed gradients [batch, ...] with directions [directions, ...]."""
    g, directions = g.flatten(1), directions.flatten(1)
    whole = g.shape[1] - g.shape[1] % _CHUNK
    # chunks[c,b,k] = sum_n g[b,c,n] directions[k,c,n]
    chunks = torch.bmm(
        g[:, :whole].unflatten(1, (-1, _CHUNK)).transpose(0, 1),
        directions[:, :whole].unflatten(1, (-1, _CHUNK)).permute(1, 2, 0),
    ) if whole else g.new_zeros(1, len(g), len(directions))  # fmt: skip
    return widest(chunks).sum(dim=0) + widest(g[:, whole:] @ directions[:, whole:].T)


def linear_dots(a: torch.Tensor, d: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """[batch, directions] float64: `<G[b], M> = sum_t d_t . M a_t`, for directions [directions, out, in]."""
    return torch.stack([token_dots(d, a @ m.to(a.dtype).T) for m in directions], dim=1)


def embedding_dots(ids: torch.Tensor, d: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """[batch, directions] float64: `sum_t d_t . M[ids_t]`, for directions [directions, rows, features]."""
    return torch.stack([token_dots(d, m[ids]) for m in directions], dim=1)


# Inner products with directions in the factored form U core_k V', U [out, rank], V [in, rank], core [directions, rank, rank].


def factored_dots(x: torch.Tensor, y: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """[batch, directions] float64: `sum_t x_t' core_k y_t`, with `x = d U` and `y = a V`, both [batch, tokens, rank]."""
    inner = torch.bmm(x.transpose(1, 2), y).to(core.dtype)  # [batch, rank, rank]
    return formed_dots(inner, core)
