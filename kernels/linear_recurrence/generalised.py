"""The generalised delta rule, S_t = (diag(e^{w_t}) - b_t c_t^T) S_{t-1} + k_t v_t^T, by chunks of tokens in plain torch.

With g_t the sum of w up to token t of a chunk, S the state before it and u_t = S_{t-1}^T c_t,

    S_t = e^{g_t} S + sum_{i <= t} e^{g_t - g_i} (k_i v_i^T - b_i u_i^T),

and the u of a chunk solve a unit lower triangular system, (I + A) U = (e^{g_{t-1}} c) S + B V with A_ti = sum c_t b_i e^{g_{t-1} - g_i} and
B_ti likewise with k_i, for i < t. Source: RWKV-7 (Peng et al. 2025, arXiv 2503.14456), section 4, in the manner of `chunked`.
"""

import torch
from torch import Tensor

from ltrain.kernels.linear_recurrence.chunked import _StatePass, plan_chunks
from ltrain.kernels.segments import accumulator, boundaries, gather_rows, scatter_rows

# RWKV-7's decays are at least e^-0.607: e^{-g} of a chunk stays below 2e4, and exponents may be split in two factors.
CHUNK = 16


def generalised_delta(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = S_t^T r_t inside every segment. Differentiable in every tensor.

    Args:
        r, w, k, b, c: [T, H, K]; w, the log decay, from -0.61 to 0.
        v: [T, H, V].
        cu_seqlens: [N + 1] int32 boundaries, on the CPU.
        initial_state: [N, H, K, V], the state before each segment; None: zeros.

    Returns:
        y [T, H, V] in v's type, and the state after each segment [N, H, K, V] in float32 or wider.
    """
    bounds = boundaries(cu_seqlens, len(v))
    wide, (_, heads, width) = accumulator(v.dtype), r.shape
    plan = plan_chunks(bounds, CHUNK)
    rows = None if plan.rows is None else plan.rows.to(v.device, non_blocking=True)

    def chunks(x: Tensor) -> Tensor:
        """[T, H, ...] -> [chunks, H, C, ...]; rows past a segment's end are zero: no write, no decay."""
        x = x.to(wide)
        x = x if rows is None else scatter_rows(x, rows, plan.chunks * plan.chunk)
        return x.unflatten(0, (plan.chunks, plan.chunk)).transpose(1, 2)

    dtype = v.dtype
    r, w, k, v, b, c = (chunks(x) for x in (r, w, k, v, b, c))
    g = w.cumsum(2)
    grow, end = (-g).exp(), g[:, :, -1:].exp()  # [chunks, H, C, K] and [chunks, H, 1, K]
    r_on, c_on, k_back, b_back = r * g.exp(), c * (g - w).exp(), k * grow, b * grow
    solved = torch.linalg.solve_triangular(
        (c_on @ b_back.mT).tril(-1), torch.cat(((c_on @ k_back.mT).tril(-1) @ v, c_on), -1), upper=False, unitriangular=True
    )
    u, by_state = solved.split((v.shape[-1], width), -1)  # U without the state before [.., C, V], and what the state adds [.., C, K]
    k_end, b_end = (k_back * end).mT, (b_back * end).mT
    maps = torch.diag_embed(end.squeeze(2)) - b_end @ by_state
    order = torch.tensor(plan.order, device=v.device)
    state = v.new_zeros(len(bounds) - 1, heads, width, v.shape[-1]) if initial_state is None else initial_state.to(wide)[order]
    before, final = _StatePass.apply(maps, k_end @ v - b_end @ u, state, plan.active)
    u = u + by_state @ before
    y = r_on @ before + (r_on @ k_back.mT).tril() @ v - (r_on @ b_back.mT).tril() @ u
    y = y.transpose(1, 2).flatten(0, 1)
    return (y if rows is None else gather_rows(y, rows)).to(dtype), final[order.argsort()]


def step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each of N sequences: r, w, k, b, c [N, H, K], v [N, H, V], state [N, H, K, V] -> y [N, H, V] in v's type, the new state"""
    wide = state.dtype
    r, w, k, b, c = (x.to(wide).unsqueeze(-1) for x in (r, w, k, b, c))
    state = w.exp() * state - b * (c * state).sum(-2, keepdim=True) + k * v.to(wide).unsqueeze(-2)
    return (state * r).sum(-2).to(v.dtype), state
