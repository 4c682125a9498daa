"""Matrix products by group: the experts of a mixture, each with its own weight and its own number of tokens.

Backends: `reference` (one product per group, any type and device) and `grouped` (torch's grouped product, bfloat16 on CUDA);
`auto` takes grouped wherever it runs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import choose, plain_only

__all__ = ["grouped_bias", "grouped_linear"]


def _refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why torch's grouped product does not take these tensors, or None."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return f"takes bfloat16 on CUDA, not {x.dtype} on {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or above"
    if any(size * x.element_size() % 16 for size in weight.shape[1:]):
        return f"takes widths whose rows are multiples of 16 bytes, not {weight.shape[2]} -> {weight.shape[1]}"
    return None


class _GroupedLinear(torch.autograd.Function):
    """Rows past each offset belong to the next group; a group without rows has a weight gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        ctx.save_for_backward(x, weight, counts, ends)
        return torch._grouped_mm(x, weight.mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, counts, ends = ctx.saved_tensors
        grad = _aligned(grads[0])
        grad_x = torch._grouped_mm(grad, weight, offs=ends) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # A sum over no rows is not something every kernel writes.
            grad_weight = torch._grouped_mm(grad.mT, x, offs=ends).masked_fill_((counts == 0).view(-1, 1, 1), 0.0)  # [E, out, in]
        return grad_x, grad_weight, None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, *, backend: str = "auto") -> Tensor:
    """y = x W_g^T for the rows of each group g. Differentiable in x and weight.

    Args:
        x: [n, in], sorted by group.
        weight: [E, out, in].
        counts: [E] int64, rows of each group; they sum to n. Groups may be empty: their weights get zero gradients.
        backend: auto | reference | grouped.

    Returns:
        [n, out] in x's type.

    Raises:
        ValueError: shapes, types, counts or backend do not fit.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x is [n, in] and weight [E, out, in], but the shapes are {list(x.shape)} and {list(weight.shape)}")
    if counts.shape != weight.shape[:1] or counts.dtype != torch.int64 or not len(weight):
        raise ValueError(
            f"counts must be {len(weight)} (at least 1) int64 numbers, one per group, but is {counts.dtype} of shape {list(counts.shape)}"
        )
    choose(backend, ("reference", "grouped"))
    why = _refusal(x, weight)
    if backend == "grouped" and why is not None:
        raise ValueError(f"backend='grouped' {why}: choose reference or auto")
    if backend == "reference" or why is not None or not len(x) or (backend == "auto" and plain_only()):
        sizes: list[int] = counts.tolist()
        if sum(sizes) != len(x) or min(sizes) < 0:
            raise ValueError(f"counts must be non-negative and sum to x's {len(x)} rows, but sum to {sum(sizes)} with a least of {min(sizes)}")
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), weight.unbind(), strict=True)])
    y: Tensor = _GroupedLinear.apply(_aligned(x), _aligned(weight), counts.to(x.device))
    return y


def _aligned(x: Tensor) -> Tensor:
    """Contiguous and at an address of whole 16 bytes: ZeRO-3 puts parameters of any size behind each other."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class _GroupedBias(torch.autograd.Function):
    """The gradient is a product and not a sum of unordered additions, so it is the same every time."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        group = torch.repeat_interleave(counts.to(y.device), output_size=len(y))  # [n]
        ctx.save_for_backward(group)
        ctx.groups = len(bias)
        return y + bias.index_select(0, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (group,) = ctx.saved_tensors
        member = group == torch.arange(ctx.groups, device=group.device).unsqueeze(-1)  # [E, n]
        return grads[0], member.to(grads[0].dtype) @ grads[0], None


def grouped_bias(y: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """y + b_g for the rows of each group g. Differentiable in y and bias.

    Args:
        y: [n, out], sorted by group.
        bias: [E, out] in y's type.
        counts: [E] int64, rows of each group; they sum to n.

    Returns:
        [n, out]
    """
    biased: Tensor = _GroupedBias.apply(y, bias, counts)
    return biased
