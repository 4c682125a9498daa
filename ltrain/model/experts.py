"""Routed SwiGLU experts of one device."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels import experts as kernels


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is gathered by the inverse order: no sum of unordered additions, so it is the same every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class Experts(nn.Module):
    """SwiGLU experts, all on this rank. Tokens are sorted by expert, multiplied in groups, weighted and summed back."""

    def __init__(self, up: nn.Parameter, down: nn.Parameter):
        super().__init__()
        self.up, self.down = (up, down)  # [E, 2 * inner, hidden] (gate above up), [E, hidden, inner]

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [n, hidden] sorted by local expert, counts [E] -> [n, hidden]"""
        gate, up = kernels.grouped_linear(x, self.up, counts).chunk(2, dim=-1)
        return kernels.grouped_linear(F.silu(gate) * up, self.down, counts)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x [T, hidden], weights and indices [T, k] (global expert ids) -> [T, hidden]"""
        tokens, k = indices.shape
        flat = indices.flatten()  # [T * k]
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
        counts = flat.bincount(minlength=self.up.shape[0])
        slots = x.unsqueeze(1).expand(-1, k, -1).flatten(0, 1)  # [T * k, hidden]
        y = self.grouped(_Permute.apply(slots, order, inverse), counts)
        y = _Permute.apply(y, inverse, order).unflatten(0, (tokens, k))  # [T, k, hidden]
        return torch.einsum("tk,tkh->th", weights.to(y.dtype), y)
