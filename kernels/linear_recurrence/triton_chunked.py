"""The chunked recurrence on a GPU: autograd around the programs of `triton_kernels`.

The inputs are kept for the backward, and of pairs of tokens in a chunk the inverse T and per channel the scores, 64 numbers per token and head
each, which take the most to compute. The states of the chunks are made again: they are K V / 64 numbers per token and head, as much as q or v
and more.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.linear_recurrence.triton_kernels import backward, forward
from ltrain.kernels.segments import TRITON_TYPES, device_refusal

CHUNK = 64
WIDEST = 256  # of keys and values: what the state of one program in `pass_states` holds
WARPS = 8  # with 4, tiles of 64 are in the range that Triton 3.4 to 3.7 gets wrong on Hopper
LEVELS = CHUNK.bit_length() - 1  # see tiles.pair_spans
ROWS = 16  # of `backward.scale_rows`
NUMBERS = 512  # of a state in a program of `forward.accumulate`
PROGRAMS = 128  # about as many as an H100 has processors


def refusal(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(v):
        return why
    if v.dtype not in TRITON_TYPES or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v in one type of bfloat16, float16 or float32, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(k.shape[2], v.shape[2]) > WIDEST:
        return f"takes heads of at most {WIDEST}, not {k.shape[2]} and {v.shape[2]}"
    if chunk != CHUNK:
        return f"has chunks of {CHUNK} tokens, not {chunk}"
    return None


class Chunks(NamedTuple):
    """On the device, int32: first and last + 1 token of each chunk [chunks]; the tokens and the chunks of each segment, cuts and bounds [N + 1]."""

    starts: Tensor
    stops: Tensor
    cuts: Tensor
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
    return Chunks(*(x.to(torch.int32).to(device, non_blocking=True) for x in (starts, stops, cuts, first)))


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


class _Shapes(NamedTuple):
    heads: int
    group: int
    key: int
    value: int
    decay: int  # axes that decays have beside the tokens': none, per head or per channel
    delta: bool
    exact: bool  # float32 inputs

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.heads, self.group, self.key, self.value

    def options(self, key: int = 128, value: int = 64, two: bool = False, **more: Any) -> dict[str, Any]:
        """Compile-time options; key, value: channels at a time, half as many of float32; two: programs at once on a processor, which takes
        half of its registers for each, and sooner spills some than waits for memory."""
        key, value = (block // 2 if self.exact else block for block in (key, value))
        blocks = {"C": CHUNK, "BK": min(key, _padded(self.key)), "BV": min(value, _padded(self.value))}
        registers = {"maxnreg": 65536 // (64 * WARPS)} if two and not self.exact else {}
        return {**blocks, "DECAY": self.decay, "DOT": "ieee" if self.exact else "tf32", "num_warps": WARPS, **registers, **more}

    def narrow(self, segments: int) -> dict[str, Any]:
        """Options of the programs that go chunk by chunk. Each loads all of W, K and Q for its few columns of the state: few, so that there
        are programs for all processors, but no fewer."""
        widest = 16 if self.exact else 32 if self.key > 128 else 64
        columns = next((n for n in (64, 32) if n <= widest and segments * self.heads * triton.cdiv(self.value, n) >= PROGRAMS), 16)
        # What a stage loads ahead is W, K and Q of a chunk: 48 KiB of 16-bit numbers for K = 128.
        stages = 1 if self.exact else 2 if self.key > 128 else 4 if columns == 16 else 3
        pipeline = {"num_warps": 4 if columns == 16 else WARPS, "num_stages": stages}
        return self.options() | {"BK": _padded(self.key), "BV": min(columns, _padded(self.value))} | pipeline


class _Prepared(NamedTuple):
    """What `forward.prepare` leaves; what a recurrence does without is None."""

    scores: Tensor | None  # [T, H, C]
    solve: Tensor | None  # [T, H, C]
    firsts: Tensor | None  # [chunks, H]
    w: Tensor | None  # [T, H, K]
    u: Tensor  # [T, H, V]
    reader: Tensor | None  # [T, H, K] or [T, H]
    writer: Tensor | None
    fade: Tensor | None  # [chunks, H, K] or [chunks, H]


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    chunks: Chunks,
    shapes: _Shapes,
    solved: tuple[Tensor | None, ...] | None = None,
) -> _Prepared:
    """solved: the first three of an earlier call."""
    count, (tokens, heads) = len(chunks.starts), v.shape[:2]
    if decay is None and beta is None:
        return _Prepared(None, None, None, None, v, None, None, None)
    scores, solve, firsts = solved or (
        k.new_empty(tokens, heads, CHUNK) if shapes.decay == 2 else None,
        k.new_empty(tokens, heads, CHUNK) if shapes.delta else None,
        k.new_empty(count, heads, dtype=torch.int32) if shapes.decay == 2 else None,
    )
    w, u = (k.new_empty(tokens, heads, shapes.key), torch.empty_like(v)) if shapes.delta else (None, v)
    reader = writer = fade = None
    if shapes.decay == 2:
        reader, writer = (k.new_empty(tokens, heads, shapes.key) for _ in range(2))
        fade = k.new_empty(count, heads, shapes.key, dtype=torch.float32)
    elif shapes.decay == 1:
        reader, writer, fade = (k.new_empty(n, heads, dtype=torch.float32) for n in (tokens, tokens, count))
    made = _Prepared(scores, solve, firsts, w, u, reader, writer, fade)
    if count:
        options = shapes.options(32 if shapes.decay == 2 else 64, 64, two=True, DELTA=shapes.delta, SOLVED=solved is not None, num_stages=1)
        forward.prepare[count, heads](q, k, v, decay, beta, chunks.starts, chunks.stops, *made, *shapes.numbers, LEVELS, **options)
    return made


def _summed(
    x: Tensor | None,
    y: Tensor,
    factors: Tensor | None,
    fade: Tensor | None,
    before: Tensor,
    chunks: Chunks,
    shapes: _Shapes,
    scale: float,
    back: bool,
) -> tuple[Tensor, Tensor]:
    """What is there before each chunk [chunks, H, K, V], in their order or from the last one back, and after all of a segment [N, H, K, V], when
    each adds scale sum_t f_t x_t y_t^T and fades what there was."""
    count, heads = len(chunks.starts), shapes.heads
    states, after = y.new_empty(count, heads, shapes.key, shapes.value), torch.empty_like(before)
    if count:
        args = x, y, factors if shapes.decay == 1 else None, chunks.starts, chunks.stops, states, scale
        forward.add_chunks[count, heads](*args, *shapes.numbers, **shapes.options())
    if len(before):
        grid = (len(before), heads, triton.cdiv(shapes.key * shapes.value, NUMBERS))
        numbers = heads, shapes.key, shapes.value
        forward.accumulate[grid](states, fade, chunks.bounds, before, after, *numbers, N=NUMBERS, DECAY=shapes.decay, BACKWARD=back, num_warps=4)
    return states, after


def _passed(k: Tensor, initial: Tensor, chunks: Chunks, shapes: _Shapes, made: _Prepared) -> tuple[Tensor, Tensor]:
    """The state before each chunk [chunks, H, K, V], final states [N, H, K, V]; made.u turns from U0 to U."""
    if not shapes.delta:
        keys = made.writer if shapes.decay == 2 else k
        return _summed(keys, made.u, made.writer, made.fade, initial, chunks, shapes, 1.0, back=False)
    states = k.new_empty(len(chunks.starts), shapes.heads, shapes.key, shapes.value)
    final = torch.empty_like(initial)
    if len(initial):
        options = shapes.narrow(len(initial))
        grid = (len(initial), shapes.heads, triton.cdiv(shapes.value, options["BV"]))
        args = k, made.w, made.u, made.writer, made.fade, chunks.cuts, chunks.bounds, initial, states, final
        forward.pass_states[grid](*args, *shapes.numbers, **options)
    return states, final


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, initial: Tensor, bounds: tuple[int, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        chunks = _chunks(bounds, v.device)
        axes = 0 if decay is None else decay.ndim - 1
        shapes = _Shapes(v.shape[1], v.shape[1] // k.shape[1], k.shape[2], v.shape[2], axes, beta is not None, v.dtype == torch.float32)
        made = _prepared(q, k, v, decay, beta, chunks, shapes)
        states, final = _passed(k, initial, chunks, shapes, made)
        output = torch.empty_like(v)
        if len(chunks.starts):
            args = q, k, made.u, decay, made.scores, made.reader, states, chunks.starts, chunks.stops, output, scale
            forward.read[len(chunks.starts), shapes.heads](*args, *shapes.numbers, **shapes.options(64 if axes == 2 else 128))
        ctx.save_for_backward(q, k, v, decay, beta, initial, *made[:3])
        ctx.chunks, ctx.shapes, ctx.scale = chunks, shapes, scale
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, decay, beta, initial, scores, solve, firsts = ctx.saved_tensors
        chunks, shapes, scale = ctx.chunks, ctx.shapes, ctx.scale
        do, dfinal = (grad.contiguous() for grad in grads)
        count, (tokens, heads), spans = len(chunks.starts), v.shape[:2], chunks[:2]
        made = _prepared(q, k, v, decay, beta, chunks, shapes, (scores, solve, firsts))
        states, _ = _passed(k, initial, chunks, shapes, made)
        du = torch.empty_like(v)
        if shapes.delta:
            dstates, dinitial = torch.empty_like(states), torch.empty_like(initial)
        else:
            dstates, dinitial = _summed(made.reader if shapes.decay == 2 else q, do, made.reader, made.fade, dfinal, chunks, shapes, scale, back=True)
        if count:
            args = q, k, do, decay, scores, made.writer, None if shapes.delta else dstates, *spans, du, scale
            backward.write_gradients[count, heads](*args, *shapes.numbers, DELTA=shapes.delta, **shapes.options())
        if len(initial) and shapes.delta:
            options = shapes.narrow(len(initial))
            backward.pass_gradients[len(initial), heads, triton.cdiv(shapes.value, options["BV"])](
                *(q, k, made.w, made.reader, made.writer, made.fade, do, du, chunks.cuts, chunks.bounds, dfinal, dstates, dinitial, scale),
                *shapes.numbers,
                **options,
            )
        u, fade = made.u, made.fade
        del made  # W and the faded queries and keys are as large as the inputs
        options = shapes.options(64, two=shapes.decay < 2, DELTA=shapes.delta, num_stages=1 if shapes.exact or shapes.group > 1 else 2)
        parts = triton.cdiv(shapes.key, options["BK"])
        on_reads = k.new_empty(tokens, heads, CHUNK)
        on_erases, dv, direct, dbeta = None, du, None, None
        if shapes.delta:
            on_erases, dv, direct = torch.empty_like(on_reads), torch.empty_like(v), v.new_empty(tokens, heads, dtype=torch.float32)
            dbeta = v.new_empty(parts, tokens, heads, dtype=torch.float32)
        if count:
            narrow = {name: x for name, x in shapes.options(two=True, DELTA=shapes.delta, num_stages=1).items() if name != "BK"}
            backward.score_gradients[count, heads](
                *(v, u, decay, solve, do, du, *spans, on_reads, on_erases, dv, direct, scale, heads, shapes.value), **narrow
            )
        del du
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        ddecay = None
        if decay is not None:
            ddecay = torch.empty_like(decay) if shapes.decay == 2 else v.new_empty(parts, tokens, heads, dtype=torch.float32)
        if count:
            backward.key_gradients[count * parts, heads // shapes.group](
                *(q, k, u, decay, beta, dv, firsts, fade, do, on_reads, on_erases, states, dstates, *spans, dq, dk, ddecay, dbeta, scale, tokens),
                *shapes.numbers,
                LEVELS,
                GROUPED=shapes.group > 1,
                **options,
            )
        if ddecay is not None:
            ddecay = (ddecay.sum(0) if shapes.decay == 1 else ddecay).to(decay.dtype)
        if dbeta is not None:
            dbeta = dbeta.sum(0).add_(direct).to(beta.dtype)
            # torch takes three times as long for it
            backward.scale_rows[(triton.cdiv(tokens * heads, ROWS),)](dv, beta, tokens * heads, shapes.value, ROWS, _padded(shapes.value))
        return dq, dk, dv, ddecay, dbeta, dinitial, None, None


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
