"""The linear recurrence by chunks of tokens in plain torch.

With g_t the sum of the log decays of a chunk up to token t and S the state before the chunk,

    S_t = e^{g_t} S + sum_{i <= t} e^{g_t - g_i} k_i u_i^T,

where u_i is what token i writes: v_i (additive), or for the delta rule beta_i times the error of what the state recalled. The errors
of a chunk solve a unit lower triangular system, (I + A) U = beta V - (beta e^g K) S, so U = U0 - W S with W, U0 independent of S
(the WY form; Yang et al. 2024). A chunk is thus an affine map of its state, S' = M S + E; all maps are made at once, and only a
product with M is left to do one chunk after the other.

Every exponent taken is a sum of decays, hence <= 0: nothing overflows, and what underflows is 0 in truth.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import accumulator, gather_rows, scatter_rows

BLOCK = 16  # tokens between the points that per-channel exponents are taken from
LOWEST = -1e4  # log decay from which on it makes no difference, e^-1e4 being 0: sums with lower ones would lose the decays beside them


@dataclass(frozen=True)
class Plan:
    """Where tokens lie in chunks. Chunk 0 of every segment comes first, then chunk 1 of those that have one...: longest segments first."""

    chunk: int
    order: list[int]  # segments, longest first
    active: list[int]  # how many segments have a j-th chunk: a prefix of `order`
    rows: Tensor | None  # [T] int64: row of each token in the [chunks * chunk] buffer; None: where it already is

    @property
    def chunks(self) -> int:
        return sum(self.active)


def plan_chunks(bounds: list[int], chunk: int) -> Plan:
    lengths = [end - begin for begin, end in pairwise(bounds)]
    # Short documents alone do not need long chunks.
    chunk = min(chunk, 1 << (max(lengths, default=1) - 1).bit_length()) if max(lengths, default=0) else 1
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    counts = [-(-lengths[n] // chunk) for n in order]
    active = [sum(count > j for count in counts) for j in range(max(counts, default=0))]
    first = torch.tensor([0, *active]).cumsum(0)  # row of chunks j
    rows = torch.empty(bounds[-1], dtype=torch.int64)
    for place, n in enumerate(order):
        inside = torch.arange(lengths[n])
        rows[bounds[n] : bounds[n + 1]] = (first[inside // chunk] + place) * chunk + inside % chunk
    in_place = sum(active) * chunk == bounds[-1] and rows.equal(torch.arange(bounds[-1]))
    return Plan(chunk, order, active, None if in_place else rows)


class _StatePass(torch.autograd.Function):
    """The state before every chunk and after the last of every segment. The loop holds one product and one sum per chunk.

    maps [chunks, H, K, K], or [chunks, H, K, 1] where they are diagonal; adds [chunks, H, K, V] or None; state [N, H, K, V].
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, adds: Tensor | None, state: Tensor, active: list[int]) -> tuple[Tensor, Tensor]:
        diagonal = maps.shape[-1] == 1 and state.shape[-2] != 1
        final = state.clone()
        before = state.new_empty(len(maps), *state.shape[1:])
        row = 0
        for count in active:
            now = slice(row, row + count)
            before[now] = final[:count]
            after = maps[now] * before[now] if diagonal else maps[now] @ before[now]
            final[:count] = after if adds is None else after.add_(adds[now])
            row += count
        ctx.save_for_backward(maps, before)
        ctx.active, ctx.diagonal, ctx.added = active, diagonal, adds is not None
        return before, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        maps, before = ctx.saved_tensors
        grad_before, grad = grads[0], grads[1].clone()
        grad_after = torch.empty_like(before)  # of the state after each chunk, which is also that of its add
        row = len(maps)
        for count in reversed(ctx.active):
            now = slice(row - count, row)
            grad_after[now] = grad[:count]
            through = maps[now] * grad_after[now] if ctx.diagonal else maps[now].mT @ grad_after[now]
            grad[:count] = through.add_(grad_before[now])
            row -= count
        grad_maps = (grad_after * before).sum(-1, keepdim=True) if ctx.diagonal else grad_after @ before.mT
        return grad_maps, grad_after if ctx.added else None, grad, None


def _head_products(x: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """sum_c x_tc k_ic e^{g_t - g_i} for i <= t, else 0: x, k [chunks, Hk, C, K], g [chunks, H, C] float64 -> [chunks, H, C, C]"""
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    fade = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(later, -torch.inf).to(x.dtype).exp()
    products = (x @ k.mT).unsqueeze(2) * fade.unflatten(1, (k.shape[1], -1))  # [chunks, Hk, H / Hk, C, C]
    return products.flatten(1, 2)


def _channel_products(xs: list[Tensor], k: Tensor, g: Tensor) -> list[Tensor]:
    """As `_head_products` for each x, with one decay per channel: x, k [chunks, H, C, K], g [chunks, H, C, K] -> [chunks, H, C, C]

    e^{g_t - g_i} cannot be split into e^{g_t} e^{-g_i}, which overflows. Between blocks of tokens it is split at r, the first token
    of t's block: e^{g_t - g_r} e^{g_r - g_i} with both exponents <= 0. Inside a block it is taken for each pair of tokens.
    """
    length = k.shape[2]
    bands: list[list[Tensor]] = [[] for _ in xs]
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        split = g[:, :, begin].unsqueeze(2)  # [chunks, H, 1, K]: g_r
        here = (g[:, :, begin:end] - split).to(k.dtype)
        later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=g.device).triu(1).unsqueeze(-1)
        fade = (here.unsqueeze(3) - here.unsqueeze(2)).masked_fill(later, -torch.inf).exp()  # [chunks, H, B, B, K]
        near = fade * k[:, :, None, begin:end]
        far = k[:, :, :begin] * (split - g[:, :, :begin]).to(k.dtype).exp()  # [chunks, H, begin, K]
        for x, band in zip(xs, bands, strict=True):
            rows = x[:, :, begin:end]
            parts = [(near @ rows.unsqueeze(-1)).squeeze(-1), rows.new_zeros(*rows.shape[:3], length - end)]
            if begin:
                parts.insert(0, (rows * here.exp()) @ far.mT)
            band.append(torch.cat(parts, -1))  # [chunks, H, B, C]
    return [torch.cat(band, 2) for band in bands]


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bounds: list[int],
    scale: float,
    initial_state: Tensor | None,
    with_map: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """-> output [T, H, V], final states [N, H, K, V], (M [N, H, K, K], E [N, H, K, V]) if with_map"""
    dtype, wide, device = v.dtype, accumulator(v.dtype), v.device
    segments, heads, width, value_width = len(bounds) - 1, v.shape[1], k.shape[2], v.shape[2]
    group = heads // k.shape[1]
    plan = plan_chunks(bounds, chunk)
    rows = None if plan.rows is None else plan.rows.to(device, non_blocking=True)

    def chunks(x: Tensor, dtype: torch.dtype = wide) -> Tensor:
        """[T, H, ...] -> [chunks, H, C, ...]; rows past a segment's end are zero: no write, no decay."""
        x = x.to(dtype)
        x = x if rows is None else scatter_rows(x, rows, plan.chunks * plan.chunk)
        return x.unflatten(0, (plan.chunks, plan.chunk)).transpose(1, 2)

    def per_head(x: Tensor) -> Tensor:
        """[chunks, Hk, ...] -> [chunks, H, ...]"""
        return x.repeat_interleave(group, 1) if group > 1 else x

    q, k, v = chunks(q), chunks(k), chunks(v)
    # Sums of decays in float64: over a chunk they outgrow what float32 keeps of the differences between them.
    g = chunks(v.new_zeros(bounds[-1], heads) if decay is None else decay.clamp(min=LOWEST), torch.float64).cumsum(2)  # [chunks, H, C(, K)]
    b = None if beta is None else chunks(beta).unsqueeze(-1)  # [chunks, H, C, 1]
    if g.ndim == 4:
        q, k = per_head(q), per_head(k)
        reads, *recalls = _channel_products([q] if b is None else [q, k], k, g)
    else:
        reads = _head_products(q, k, g)
        recalls = [] if b is None else [_head_products(k, k, g)]
        q, k, g = per_head(q), per_head(k), g.unsqueeze(-1)
    from_start, to_end = g.to(wide).exp(), (g[:, :, -1:] - g).to(wide).exp()  # [chunks, H, C, K or 1]
    fade = from_start[:, :, -1:].mT.expand(-1, -1, width, 1)  # [chunks, H, K, 1]
    k_end = (k * to_end).mT  # [chunks, H, K, C]
    if b is None:
        maps, adds = fade, k_end @ v
    else:
        # Only the part below the diagonal is read: a unit lower triangular system.
        solved = torch.linalg.solve_triangular(recalls[0] * b, torch.cat([v, k * from_start], -1) * b, upper=False, unitriangular=True)
        v, w = solved.split((value_width, width), -1)  # U0 [chunks, H, C, V], W [chunks, H, C, K]
        maps, adds = torch.diag_embed(fade.squeeze(-1)) - k_end @ w, k_end @ v

    def in_order(x: Tensor) -> Tensor:
        return x if plan.order == sorted(plan.order) else x[torch.tensor(plan.order, device=device)]

    def back(x: Tensor) -> Tensor:
        return x if plan.order == sorted(plan.order) else x[torch.tensor(plan.order).argsort().to(device)]

    zeros = v.new_zeros(segments, heads, width, value_width)
    before, final = _StatePass.apply(maps, adds, zeros if initial_state is None else in_order(initial_state.to(wide)), plan.active)
    if b is not None:
        v = v - w @ before
    output = scale * ((q * from_start) @ before + reads @ v)  # [chunks, H, C, V]
    output = output.transpose(1, 2).flatten(0, 1)  # [chunks * C, H, V]
    segment_map = None
    if with_map:
        identity = torch.eye(width, dtype=wide, device=device).expand(segments, heads, width, width)
        end_of_zeros = final if initial_state is None else _StatePass.apply(maps, adds, zeros, plan.active)[1]
        segment_map = back(_StatePass.apply(maps, None, identity, plan.active)[1]), back(end_of_zeros)
    return (output if rows is None else gather_rows(output, rows)).to(dtype), back(final), segment_map
