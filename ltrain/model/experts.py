"""Routed experts of one device."""

from typing import Any

import torch
from torch import Tensor, nn

from ltrain.kernels import experts as kernels
from ltrain.model.activation import Activation
from ltrain.model.recompute import cheap


class _Gather(torch.autograd.Function):
    """x[order // copies] for a permutation `order` of copies * len(x) rows, `inverse` its inverse. The gradient is gathered too: no sum
    of unordered additions, so it is the same every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return (grad.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else grad), None, None, None


class Experts(nn.Module):
    """Experts, all on this rank. Tokens are sorted by expert, multiplied in groups, weighted and summed back.

    scale_input: the weights multiply what goes into the experts, not what comes out (Llama 4).
    """

    def __init__(
        self,
        up: nn.Parameter,
        down: nn.Parameter,
        activation: Activation,
        up_bias: nn.Parameter | None = None,
        down_bias: nn.Parameter | None = None,
        scale_input: bool = False,
    ):
        super().__init__()
        self.up, self.down = (up, down)  # [E, parts * inner, hidden] (the gate above up), [E, hidden, inner]
        self.up_bias, self.down_bias = up_bias, down_bias  # [E, parts * inner], [E, hidden]
        self.activation, self.scale_input = activation, scale_input

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [n, hidden] sorted by local expert, counts [E] -> [n, hidden]"""
        inner = self._biased(kernels.grouped_linear(x, self.up, counts), self.up_bias, counts)
        y = kernels.grouped_linear(cheap(self.activation.fused, inner), self.down, counts)
        return self._biased(y, self.down_bias, counts)

    def _biased(self, y: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
        return y if bias is None else kernels.grouped_bias(y, bias, counts)

    def weighted(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """As `grouped`, with the weights [n] of the rows."""
        weights = weights.to(x.dtype).unsqueeze(-1)
        return self.grouped(x * weights, counts) if self.scale_input else self.grouped(x, counts) * weights

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x [T, hidden], weights and indices [T, k] (global expert ids) -> [T, hidden]"""
        tokens, k = indices.shape
        flat = indices.flatten()  # [T * k]
        by_expert, order = flat.sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
        ends = torch.searchsorted(by_expert, torch.arange(self.up.shape[0], device=flat.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        rows = cheap(_Gather.apply, x, order, inverse, k)  # [T * k, hidden] by expert
        if self.scale_input:
            y = self.weighted(rows, _Gather.apply(weights.flatten(), order, inverse, 1), counts)
            return _Gather.apply(y, inverse, order, 1).unflatten(0, (tokens, k)).sum(1)  # type: ignore[no-any-return]
        y = self.grouped(rows, counts)
        y = _Gather.apply(y, inverse, order, 1).unflatten(0, (tokens, k))  # [T, k, hidden]
        return (weights.to(y.dtype).unsqueeze(-1) * y).sum(1)
