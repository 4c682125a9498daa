"""The chunked recurrence with one decay per head, or none, on a GPU: autograd around the programs of `triton_kernels`.

Only the inputs are kept for the backward, which makes the states of the chunks again: a state per chunk is K V / C numbers per
token and head, as much as q or v and more.
"""

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.linear_recurrence import triton_kernels as kernels

CHUNK = 64
WIDEST = 128  # of keys and values: what the accumulators of one program hold
WARPS = 8  # with 4, tiles of 64 are in the range that Triton 3.4 to 3.7 gets wrong on Hopper


def refusal(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, chunk: int) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (v.is_cuda or interpreted):
        return f"runs on CUDA, not on {v.device.type}"
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v in one type of bfloat16, float16 or float32, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(k.shape[2], v.shape[2]) > WIDEST:
        return f"takes heads of at most {WIDEST}, not {k.shape[2]} and {v.shape[2]}"
    if decay is not None and decay.ndim == 3:
        return "takes one decay per head, not per channel"
    if chunk != CHUNK:
        return f"has chunks of {CHUNK} tokens, not {chunk}"
    return None


class Chunks(NamedTuple):
    """On the device: first and last + 1 token of each chunk [chunks], and the chunks of each segment, bounds [N + 1]; int32."""

    starts: Tensor
    stops: Tensor
    bounds: Tensor


@lru_cache(maxsize=64)  # all layers of a micro-batch share it
def _chunks(bounds: tuple[int, ...], device: torch.device) -> Chunks:
    cuts = torch.tensor(bounds, dtype=torch.int64)
    lengths = cuts.diff()
    counts = (lengths + CHUNK - 1) // CHUNK
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # [N + 1]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    starts = cuts[segment] + (torch.arange(len(segment)) - first[segment]) * CHUNK
    stops = torch.minimum(starts + CHUNK, cuts[segment + 1])
    return Chunks(*(x.to(torch.int32).to(device, non_blocking=True) for x in (starts, stops, first)))


class _Shapes(NamedTuple):
    heads: int
    group: int
    key: int
    value: int
    decay: bool
    delta: bool
    exact: bool  # float32 inputs

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.heads, self.group, self.key, self.value

    def options(self, block: int = 64) -> dict[str, Any]:
        """Compile-time options; block: value columns at a time."""
        width = max(16, triton.next_power_of_2(self.key))
        value = min(block, max(16, triton.next_power_of_2(self.value)))
        return {"C": CHUNK, "BK": width, "BV": value, "DECAY": self.decay, "DOT": "ieee" if self.exact else "tf32"}


PASS_BLOCK = 16  # value columns of one program where chunks follow one another: narrow, so that there are many programs


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, initial: Tensor, chunks: Chunks, shapes: _Shapes
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W [T, H, K], U [T, H, V], T [T, H, C], the state before each chunk [chunks, H, K, V], final states [N, H, K, V]"""
    count, heads = len(chunks.starts), shapes.heads
    w = solve = k  # unused without the delta rule
    u = v
    if beta is not None:
        w, u, solve = k.new_empty(len(v), heads, shapes.key), torch.empty_like(v), k.new_empty(len(v), heads, CHUNK)
        if count:
            kernels.prepare[(count, heads)](k, v, decay, beta, *chunks[:2], w, u, solve, *shapes.numbers, **shapes.options(), num_warps=WARPS)
    states = k.new_empty(count, heads, shapes.key, shapes.value)
    final = torch.empty_like(initial)
    if len(initial):
        options = shapes.options(PASS_BLOCK)
        grid = (len(initial), heads, triton.cdiv(shapes.value, options["BV"]))
        kernels.pass_states[grid](
            k, decay, w, u, *chunks, initial, states, final, *shapes.numbers, **options, DELTA=shapes.delta, num_warps=4, num_stages=2
        )
    return w, u, solve, states, final


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, initial: Tensor, bounds: tuple[int, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        chunks = _chunks(bounds, v.device)
        shapes = _Shapes(v.shape[1], v.shape[1] // k.shape[1], k.shape[2], v.shape[2], decay is not None, beta is not None, v.dtype == torch.float32)
        _, u, _, states, final = _prepared(q, k, v, decay, beta, initial, chunks, shapes)
        output = torch.empty_like(v)
        if len(chunks.starts):
            grid = (len(chunks.starts), shapes.heads)
            kernels.read[grid](q, k, u, decay, states, *chunks[:2], output, scale, *shapes.numbers, **shapes.options(), num_warps=WARPS)
        ctx.save_for_backward(q, k, v, decay, beta, initial)
        ctx.chunks, ctx.shapes, ctx.scale = chunks, shapes, scale
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, decay, beta, initial = ctx.saved_tensors
        chunks, shapes, scale = ctx.chunks, ctx.shapes, ctx.scale
        do, dfinal = (grad.contiguous() for grad in grads)
        count, heads, wide = len(chunks.starts), shapes.heads, torch.float32
        w, u, solve, states, _ = _prepared(q, k, v, decay, beta, initial, chunks, shapes)
        du, dv, dinitial = torch.empty_like(v), torch.empty_like(v), torch.empty_like(initial)
        dstates = torch.empty_like(states)
        dq, dk = v.new_empty(len(v), heads, shapes.key, dtype=wide), v.new_empty(len(v), heads, shapes.key, dtype=wide)
        on_reads = k.new_empty(len(v), heads, CHUNK)
        erase = torch.empty_like(on_reads) if shapes.delta else on_reads
        dg, dbeta, ddecay = (v.new_empty(len(v), heads, dtype=wide) for _ in range(3))
        grid, numbers, options = (count, heads), shapes.numbers, shapes.options(32)
        delta = {"DELTA": shapes.delta}
        if count:
            kernels.write_gradients[grid](q, k, do, decay, *chunks[:2], du, scale, *numbers, **shapes.options(), num_warps=WARPS)
        if len(initial):
            narrow = shapes.options(PASS_BLOCK)
            kernels.pass_gradients[len(initial), heads, triton.cdiv(shapes.value, narrow["BV"])](
                q, k, decay, w, do, du, *chunks, dfinal, dstates, dinitial, scale, *numbers, **narrow, **delta, num_warps=4, num_stages=2
            )
        if count:
            kernels.products[grid](
                *(k, v, u, decay, beta, solve, do, du, states, dstates, *chunks[:2], on_reads, erase, dq, dk, dv, dg, dbeta, scale),
                *numbers,
                **options,
                **delta,
                num_warps=WARPS,
                num_stages=1,
            )
            options.pop("BV")
            kernels.token_gradients[grid](
                q, k, decay, beta, on_reads, erase, *chunks[:2], dq, dk, dg, dbeta, ddecay, *numbers[:3], **options, **delta, num_warps=WARPS
            )
        if shapes.group > 1:
            dq, dk = (x.unflatten(1, (-1, shapes.group)).sum(2) for x in (dq, dk))
        return (
            dq.to(q.dtype),
            dk.to(k.dtype),
            dv if shapes.delta else du,
            None if decay is None else ddecay.to(decay.dtype),
            None if beta is None else dbeta.to(beta.dtype),
            dinitial,
            None,
            None,
        )


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
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """-> output [T, H, V], final states [N, H, K, V] float32, (M [N, H, K, K], E [N, H, K, V]) if with_map"""
    segments, heads, width = len(bounds) - 1, v.shape[1], k.shape[2]
    cuts = tuple(bounds)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay, beta = (None if x is None else x.contiguous() for x in (decay, beta))
    zeros = v.new_zeros(segments, heads, width, v.shape[2], dtype=torch.float32)
    start = zeros if initial_state is None else initial_state.float().contiguous()
    output, final = _Recurrence.apply(q, k, v, decay, beta, start, cuts, scale)
    if not with_map:
        return output, final, None
    # M is where the identity ends with nothing to store, E where zeros end.
    identity = torch.eye(width, device=v.device).expand(segments, heads, width, width).contiguous()
    nothing = v.new_zeros(len(v), heads, width)
    matrix = _Recurrence.apply(k, k, nothing, decay, beta, identity, cuts, 1.0)[1]
    end_of_zeros = final if initial_state is None else _Recurrence.apply(k, k, v, decay, beta, zeros, cuts, 1.0)[1]
    return output, final, (matrix, end_of_zeros)
