"""The linear recurrence token by token: the truth the other backends are held to."""

from itertools import pairwise

import torch
from torch import Tensor

from ltrain.kernels.segments import accumulator


def step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k [N, Hk, K], v [N, H, V], decay [N, H] or [N, H, K], beta [N, H], state [N, H, K, V] -> output [N, H, V], state"""
    wide = accumulator(v.dtype)
    group = v.shape[1] // k.shape[1]
    q, k = q.to(wide).repeat_interleave(group, 1), k.to(wide).repeat_interleave(group, 1)  # [N, H, K]
    state = state.to(wide)
    if decay is not None:
        factor = decay.to(wide).exp()
        state = state * (factor if factor.ndim == 3 else factor.unsqueeze(-1)).unsqueeze(-1)
    update = v.to(wide)
    if beta is not None:
        update = beta.to(wide).unsqueeze(-1) * (update - (state * k.unsqueeze(-1)).sum(-2))  # the error of what the state recalls for k
    state = state + k.unsqueeze(-1) * update.unsqueeze(-2)
    return (scale * (state * q.unsqueeze(-1)).sum(-2)).to(v.dtype), state


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, bounds: list[int], scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """-> output [T, H, V], final states [N, H, K, V]"""
    outputs, finals = [v[:0]], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        state = initial_state[n : n + 1]
        for t in range(begin, end):
            at = [None if x is None else x[t : t + 1] for x in (decay, beta)]
            output, state = step(q[t : t + 1], k[t : t + 1], v[t : t + 1], at[0], at[1], state, scale)
            outputs.append(output)
        finals.append(state)
    return torch.cat(outputs), torch.cat(finals) if finals else initial_state


def segment_map(k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """M [N, H, K, K] and E [N, H, K, V]. E is where zeros end; M where the identity ends with nothing to store, column by column."""
    wide = accumulator(v.dtype)
    segments, heads, width = len(bounds) - 1, v.shape[1], k.shape[2]
    zeros = torch.zeros(segments, heads, width, v.shape[2], dtype=wide, device=v.device)
    identity = torch.eye(width, dtype=wide, device=v.device).expand(segments, heads, width, width)
    nothing = torch.zeros(len(v), heads, width, dtype=wide, device=v.device)
    return (
        linear_recurrence(k, k, nothing, decay, beta, bounds, 1.0, identity)[1],
        linear_recurrence(k, k, v, decay, beta, bounds, 1.0, zeros)[1],
    )
