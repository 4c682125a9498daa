"""Recurrences whose state is multiplied number by number: h_t = a_t h_{t-1} + b_t (RG-LRU), and with it Mamba's selective scan.

Backends: `reference` (token by token), `doubling` (plain torch): after d steps each token holds what the last 2^d made of it, so that a
segment of T tokens takes log2(T) passes (Hillis & Steele 1986), and `triton`: chunks of tokens in parallel on a GPU; `auto` takes triton
wherever it runs, doubling elsewhere. Products of decays alone are taken, which are at most 1: nothing overflows.
"""

from bisect import bisect_left
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ltrain.kernels.elementwise_recurrence import reference
from ltrain.kernels.segments import accumulator, boundaries, choose, permitted, wants_triton

__all__ = ["scan", "selective_scan", "step"]

BACKENDS = ("reference", "doubling", "triton")
CHUNK = 512  # tokens whose states [chunk, D, S] the selective scan holds at a time


def _double(a: Tensor, h: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + h_t over all rows, in place of both; a is 0 where a segment begins."""
    d = 1
    while d < len(h):
        h[d:] += a[d:] * h[:-d]  # the right side is made before the left is written
        a[d:] = a[d:] * a[:-d]
        d *= 2
    return h


class _Scan(torch.autograd.Function):
    """a, b [T, ...] with a = 0 at the first token of each segment -> h [T, ...]. The gradient is the same scan from the other end."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = _double(a.clone(), b.clone())
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        later = torch.cat((a[1:], torch.zeros_like(a[:1]))).flip(0)  # what carries a token's state into the next
        grad = _double(later, grads[0].flip(0)).flip(0)
        return grad * torch.cat((torch.zeros_like(h[:1]), h[:-1])), grad


def _firsts(bounds: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of each nonempty segment's first token, and which segments those are."""
    filled = [n for n in range(len(bounds) - 1) if bounds[n + 1] > bounds[n]]
    return torch.tensor([bounds[n] for n in filled], dtype=torch.int64, device=device), torch.tensor(filled, dtype=torch.int64, device=device)


def _finals(after: Tensor, bounds: list[int], initial_state: Tensor) -> Tensor:
    """The state after each segment, `after` [N, ...]; an empty one keeps its initial state."""
    filled = torch.tensor([end > begin for begin, end in pairwise(bounds)], device=after.device)
    return torch.where(filled.view(-1, *[1] * (after.ndim - 1)), after, initial_state.to(after.dtype))


def scan(a: Tensor, b: Tensor, cu_seqlens: Tensor, *, initial_state: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t inside every segment. Differentiable in every tensor.

    Args:
        a, b: [T, ...], float32 or wider; a in 0..1.
        cu_seqlens: [N + 1] int32 boundaries, on the CPU.
        initial_state: [N, ...]; None: zeros.
        backend: auto | reference | doubling | triton.

    Returns:
        h [T, ...], and the state after each segment [N, ...].

    Raises:
        ValueError: shapes, boundaries or backend do not fit, or triton was asked for and does not take these tensors.
    """
    bounds = boundaries(cu_seqlens, len(b))
    choose(backend, BACKENDS)
    if a.shape != b.shape or a.dtype != b.dtype or not len(a.shape):
        raise ValueError(f"a and b must have one shape and type, but are {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}")
    given = initial_state is not None
    state = initial_state.to(b.dtype) if initial_state is not None else b.new_zeros(len(bounds) - 1, *b.shape[1:])
    if state.shape != (len(bounds) - 1, *b.shape[1:]):
        raise ValueError(f"initial_state must be {[len(bounds) - 1, *b.shape[1:]]}, but is {list(state.shape)}")
    if backend == "reference":
        return reference.scan(a, b, bounds, state)
    if b.numel() and wants_triton(backend, b):
        from ltrain.kernels.elementwise_recurrence import triton_scan

        if permitted(triton_scan.refusal(b, types=(torch.float32,)), backend, "doubling or auto"):
            h, after = triton_scan.scan(a, b, bounds, state if given else None)
            return h, _finals(after, bounds, state)
    rows, segments = _firsts(bounds, b.device)
    if given and len(rows):
        b = b.index_add(0, rows, a[rows] * state[segments])
    h = _Scan.apply(a.index_fill(0, rows, 0.0), b)
    ends = torch.tensor([max(end - 1, 0) for end in bounds[1:]], device=h.device)
    return h, _finals(h[ends], bounds, state) if len(h) else state


def _selective_chunk(
    x: Tensor, step: Tensor, rate: Tensor, B: Tensor, C: Tensor, first: Tensor, before: Tensor, begins: Tensor, initial: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of one chunk: first [L], which of them begin a segment, before [D, S], the state before the chunk, initial [n, D, S], those
    before the rows `begins` -> y [L, D], the state after it, and those after the rows `ends`."""
    wide = accumulator(x.dtype)
    x, step, B, C, rate = (t.to(wide) for t in (x, step, B, C, rate))
    a = torch.exp(-step.unsqueeze(-1) * rate)  # [L, D, S]
    b = (step * x).unsqueeze(-1) * B.unsqueeze(1)
    b = torch.cat((b[:1] + a[:1] * before * ~first[0], b[1:]))
    if len(begins):
        b = b.index_add(0, begins, a[begins] * initial)
    h: Tensor = _Scan.apply(a.masked_fill(first[:, None, None], 0.0), b)
    return (h @ C.unsqueeze(-1)).squeeze(-1), h[-1], h[ends]


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba's recurrence (Gu & Dao 2023): h_t = exp(-step_t rate) h_{t-1} + step_t x_t B_t^T, y_t = h_t C_t, inside every segment.

    States are made chunk by chunk, and again in the backward: memory for them does not grow with the stream. Differentiable in every tensor.

    Args:
        x, step: [T, D]; step above 0.
        rate: [D, S], above 0.
        B, C: [T, S].
        cu_seqlens: [N + 1] int32 boundaries, on the CPU.
        initial_state: [N, D, S], the state before each segment; None: zeros.
        return_final_state: whether to return the state after each segment.
        backend: auto | reference | doubling | triton.

    Returns:
        y [T, D] in x's type, and the final states [N, D, S] in float32 or wider; None if not asked for.

    Raises:
        ValueError: shapes, boundaries or backend do not fit, or triton was asked for and does not take these tensors.
    """
    tokens, channels, states = *x.shape, rate.shape[-1]
    if step.shape != x.shape or rate.shape != (channels, states) or B.shape != (tokens, states) or C.shape != B.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (x, step, rate, B, C))
        raise ValueError(f"x, step, rate, B and C are [T, D], [T, D], [D, S], [T, S] and [T, S], but have shapes {shapes}")
    bounds = boundaries(cu_seqlens, tokens)
    choose(backend, BACKENDS)
    shape = (len(bounds) - 1, channels, states)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"initial_state must be {list(shape)}, but is {list(initial_state.shape)}")
    before = x.new_zeros(shape, dtype=accumulator(x.dtype)) if initial_state is None else initial_state.to(accumulator(x.dtype))
    if backend == "reference":
        y, final = reference.selective_scan(x, step, rate, B, C, bounds, before)
        return y, final if return_final_state else None
    if x.numel() and states and wants_triton(backend, x):
        from ltrain.kernels.elementwise_recurrence import triton_scan

        if permitted(triton_scan.refusal(x, step, rate, B, C, states=states), backend, "doubling or auto"):
            y, after = triton_scan.selective_scan(x, step, rate, B, C, bounds, None if initial_state is None else before, return_final_state)
            return y, None if after is None else _finals(after, bounds, before)
    filled = [(begin, end, n) for n, (begin, end) in enumerate(pairwise(bounds)) if end > begin]
    first = torch.zeros(tokens, dtype=torch.bool, device=x.device).index_fill_(0, _firsts(bounds, x.device)[0], True)
    outputs, state, finals = [], before.new_zeros(channels, states), before

    def inside(rows: slice, places: list[tuple[int, int]]) -> Tensor:
        """Of (row, segment) in the order of rows, those of a chunk's rows -> rows of the chunk, and their segments."""
        first, end = (bisect_left(places, row, key=lambda place: place[0]) for row in (rows.start, rows.stop))
        found = [(row - rows.start, n) for row, n in places[first:end]]
        return torch.tensor(found, dtype=torch.int64, device=x.device).view(-1, 2)

    firsts = [(begin, n) for begin, _, n in filled] if initial_state is not None else []
    lasts = [(end - 1, n) for _, end, n in filled] if return_final_state else []
    for at in range(0, tokens, CHUNK):
        rows = slice(at, min(at + CHUNK, tokens))
        begins, given = inside(rows, firsts).unbind(1)
        ends, numbers = inside(rows, lasts).unbind(1)
        args = (x[rows], step[rows], rate, B[rows], C[rows], first[rows], state, begins, before[given], ends)
        again = torch.is_grad_enabled()
        y, state, after = checkpoint(_selective_chunk, *args, use_reentrant=False, preserve_rng_state=False) if again else _selective_chunk(*args)
        finals = finals.index_copy(0, numbers, after) if len(numbers) else finals
        outputs.append(y)
    y = torch.cat(outputs) if outputs else x.to(before.dtype)
    return y.to(x.dtype), finals if return_final_state else None


def step(x: Tensor, step: Tensor, rate: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the selective scan for each of N sequences: x, step [N, D], rate [D, S], B, C [N, S], state [N, D, S] -> y [N, D] in
    x's type and the new state."""
    wide = state.dtype
    x_, step, B, C = (t.to(wide) for t in (x, step, B, C))
    state = torch.exp(-step.unsqueeze(-1) * rate.to(wide)) * state + (step * x_).unsqueeze(-1) * B.unsqueeze(1)
    return (state @ C.unsqueeze(-1)).squeeze(-1).to(x.dtype), state
