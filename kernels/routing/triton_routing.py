"""Routing on a GPU: a counting sort in two passes over the slots, and rows copied and summed without an intermediate [T, k, D]."""

import torch
from torch import Tensor

from ltrain.kernels.routing import triton_kernels as kernels
from ltrain.kernels.segments import TRITON_TYPES, ceil_div, device_refusal, power_of_two

SLOTS = 256  # of a program of the sort
NUMBERS = 2048  # of a row at a time
SCORES = 4096  # of a program of `best`


def refusal(x: Tensor, indices: bool = False) -> str | None:
    """Why the kernels do not take this tensor, or None."""
    if why := device_refusal(x):
        return why
    if indices and x.dtype != torch.int64:
        return f"takes indices in int64, not {x.dtype}"
    if not indices and x.dtype not in TRITON_TYPES:
        return f"takes bfloat16, float16 or float32, not {x.dtype}"
    return None


def best(scores: Tensor, k: int) -> Tensor:
    """[T, E] -> [T, k] int64"""
    tokens, experts = scores.shape
    found = torch.empty(tokens, k, dtype=torch.int64, device=scores.device)
    block = power_of_two(experts)
    rows = max(1, SCORES // block)
    kernels.best[(ceil_div(tokens, rows),)](scores.contiguous(), found, tokens, experts, k, ROWS=rows, BE=block, num_warps=4)
    return found


def sort(slots: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """slots [n], the expert of each -> order [n], places [n] int32, counts [E] int64; equal ones keep their order."""
    n, blocks = len(slots), ceil_div(len(slots), SLOTS)
    counts = torch.empty(experts, blocks, dtype=torch.int32, device=slots.device)
    kernels.count[(blocks,)](slots, counts, n, experts, blocks, B=SLOTS, COLUMNS=32, num_warps=4)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).unflatten(0, counts.shape)
    order, places = (torch.empty(n, dtype=torch.int32, device=slots.device) for _ in range(2))
    kernels.place[(blocks,)](slots, ends - counts, order, places, n, blocks, B=SLOTS, COLUMNS=32, num_warps=4)
    return order, places, counts.sum(1)


def _columns(width: int) -> int:
    return min(NUMBERS, power_of_two(width))


def rows(x: Tensor, order: Tensor, k: int, weights: Tensor | None) -> Tensor:
    """x [T, D] -> [T k, D]"""
    y, block = x.new_empty(len(order), x.shape[1]), _columns(x.shape[1])
    args = x.contiguous(), order, None if weights is None else weights.contiguous(), y, x.shape[1], k
    kernels.copy_rows[(len(order), ceil_div(x.shape[1], block))](*args, BD=block, num_warps=4)
    return y


def sums(y: Tensor, places: Tensor, k: int, weights: Tensor | None) -> Tensor:
    """y [T k, D] -> [T, D]"""
    x, block = y.new_empty(len(places) // k, y.shape[1]), _columns(y.shape[1])
    args = y.contiguous(), places, None if weights is None else weights.contiguous(), x, y.shape[1], k
    kernels.sum_rows[(len(x), ceil_div(y.shape[1], block))](*args, BD=block, num_warps=4)
    return x


def products(grad: Tensor, y: Tensor, places: Tensor, k: int) -> Tensor:
    """grad [T, D], y [T k, D] -> [T, k] float32"""
    found = torch.empty(len(grad), k, dtype=torch.float32, device=y.device)
    block = _columns(y.shape[1])
    kernels.multiply_rows[(len(places),)](grad.contiguous(), y, places, found, y.shape[1], k, BD=block, num_warps=4)
    return found
