"""Elementwise recurrences token by token: the truth that the others are held to."""

from itertools import pairwise

import torch
from torch import Tensor

from ltrain.kernels.segments import accumulator


def scan(a: Tensor, b: Tensor, bounds: list[int], initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [T, ...], initial_state [N, ...] -> h [T, ...] and the state after each segment [N, ...]"""
    rows, finals = [b[:0]], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        state = initial_state[n]
        for t in range(begin, end):
            state = a[t] * state + b[t]
            rows.append(state[None])
        finals.append(state)
    return torch.cat(rows), torch.stack(finals) if finals else initial_state


def selective_scan(x: Tensor, step: Tensor, rate: Tensor, B: Tensor, C: Tensor, bounds: list[int], initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """x, step [T, D], rate [D, S], B, C [T, S], initial_state [N, D, S] -> y [T, D] in x's type and the states [N, D, S]"""
    wide = accumulator(x.dtype)
    x_, step, B, C = (t.to(wide) for t in (x, step, B, C))
    a = torch.exp(-step.unsqueeze(-1) * rate.to(wide))
    h, final = scan(a, (step * x_).unsqueeze(-1) * B.unsqueeze(1), bounds, initial_state.to(wide))
    return (h @ C.unsqueeze(-1)).squeeze(-1).to(x.dtype), final
