"""Tokens on their way to experts and back: the best experts of each token, rows sorted by expert, and their weighted sum.

Backends: `reference` (torch) and `triton` (on a GPU); `auto` takes triton wherever it runs. Both give the same every time: no sum depends
on the order in which additions come.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import choose, permitted, wants_triton

__all__ = ["Permutation", "best", "combine", "permutation", "spread"]

BACKENDS = ("reference", "triton")


class Permutation(NamedTuple):
    """Of the T k slots that T tokens have with k experts each: slot t k + j is token t's choice j."""

    order: Tensor  # [T k]: the slot in each row by expert; slots of an expert keep their order
    places: Tensor  # [T k]: the row of each slot
    counts: Tensor  # [E] int64: rows of each expert
    choices: int  # k


def _takes(x: Tensor, backend: str, *, indices: bool = False) -> bool:
    choose(backend, BACKENDS)
    if not x.numel() or not wants_triton(backend, x):
        return False
    from ltrain.kernels.routing import triton_routing

    return permitted(triton_routing.refusal(x, indices), backend, "reference or auto")


@torch.no_grad()
def best(scores: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """scores [T, E] -> numbers of the k highest of each row [T, k] int64, falling. Of equal ones triton takes the first, torch any.

    Raises:
        ValueError: k is not from 1 to E, or backend does not fit.
    """
    if not 0 < k <= scores.shape[1]:
        raise ValueError(f"k={k} is not from 1 to the {scores.shape[1]} scores of a row")
    if _takes(scores, backend):
        from ltrain.kernels.routing import triton_routing

        return triton_routing.best(scores, k)
    return scores.topk(k, dim=-1).indices


@torch.no_grad()
def permutation(indices: Tensor, experts: int, *, backend: str = "auto") -> Permutation:
    """indices [T, k] int64, each from 0 to experts - 1."""
    flat = indices.flatten()
    if _takes(indices, backend, indices=True):
        from ltrain.kernels.routing import triton_routing

        return Permutation(*triton_routing.sort(flat, experts), indices.shape[1])
    by_expert, order = flat.sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=flat.device), right=True)
    return Permutation(order, places, ends.diff(prepend=ends.new_zeros(1)), indices.shape[1])


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, k: int, triton: bool) -> Tensor:
        ctx.save_for_backward(order, places)
        ctx.k, ctx.triton = k, triton
        return _rows(x, order, k, None, triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _, places = ctx.saved_tensors
        return _sums(grads[0], places, ctx.k, None, ctx.triton), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor | None, order: Tensor, places: Tensor, k: int, triton: bool) -> Tensor:
        learns = weights is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(y if learns else None, weights, order, places)
        ctx.k, ctx.triton = k, triton
        return _sums(y, places, k, weights, triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, weights, order, places = ctx.saved_tensors
        dweights = None
        if weights is not None and ctx.needs_input_grad[1]:
            dweights = _products(grads[0], y, places, ctx.k, ctx.triton).to(weights.dtype)
        dy = _rows(grads[0], order, ctx.k, weights, ctx.triton) if ctx.needs_input_grad[0] else None
        return dy, dweights, None, None, None, None


def _rows(x: Tensor, order: Tensor, k: int, weights: Tensor | None, triton: bool) -> Tensor:
    """x [T, D], its rows by expert [T k, D], times their weights [T, k]"""
    if triton:
        from ltrain.kernels.routing import triton_routing

        return triton_routing.rows(x, order, k, weights)
    rows = x.index_select(0, order // k)
    return rows if weights is None else rows * weights.flatten().index_select(0, order).to(x.dtype).unsqueeze(-1)


def _sums(y: Tensor, places: Tensor, k: int, weights: Tensor | None, triton: bool) -> Tensor:
    """y [T k, D] by expert -> [T, D], the sum of each token's rows, times their weights [T, k]"""
    if triton:
        from ltrain.kernels.routing import triton_routing

        return triton_routing.sums(y, places, k, weights)
    rows = y.index_select(0, places).unflatten(0, (-1, k))
    return (rows if weights is None else rows * weights.to(y.dtype).unsqueeze(-1)).sum(1)


def _products(grad: Tensor, y: Tensor, places: Tensor, k: int, triton: bool) -> Tensor:
    """grad [T, D], y [T k, D] by expert -> [T, k], the product of each token's row with each of y's"""
    if triton:
        from ltrain.kernels.routing import triton_routing

        return triton_routing.products(grad, y, places, k)
    return (y.index_select(0, places).unflatten(0, (-1, k)) * grad.unsqueeze(1)).sum(-1)


def spread(x: Tensor, p: Permutation, *, backend: str = "auto") -> Tensor:
    """x [T, D] -> [T k, D]: the token's row for each of its experts, sorted by expert. Differentiable.

    Raises:
        ValueError: the permutation is of another number of tokens, or backend does not fit.
    """
    if len(x) * p.choices != len(p.order):
        raise ValueError(f"x has {len(x)} tokens and the permutation {len(p.order) // p.choices}: they must be equal")
    y: Tensor = _Spread.apply(x, p.order, p.places, p.choices, _takes(x, backend))
    return y


def combine(y: Tensor, p: Permutation, weights: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y [T k, D], sorted by expert -> [T, D]: the sum of each token's rows, times weights [T, k] where given. Differentiable in both.

    Raises:
        ValueError: shapes or backend do not fit.
    """
    tokens = len(p.order) // p.choices
    if len(y) != len(p.order) or (weights is not None and weights.shape != (tokens, p.choices)):
        given = "none" if weights is None else list(weights.shape)
        raise ValueError(f"y has {len(y)} rows and weights {given}, but the permutation is of {tokens} tokens with {p.choices} experts each")
    out: Tensor = _Combine.apply(y, weights, p.order, p.places, p.choices, _takes(y, backend))
    return out
