"""The chunked recurrence on a GPU: autograd around the programs of `triton_kernels`.

The inputs are kept for the backward, and of pairs of tokens in a block the inverse T and per channel the scores, 64 numbers per token and head
each, which take the most to compute. The states of the chunks are made again: for chunks of one block they are K V / 64 numbers per token and
head, as much as q or v and more.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.linear_recurrence.triton_kernels import additive, backward, forward
from ltrain.kernels.linear_recurrence.triton_kernels import heads as of_heads
from ltrain.kernels.linear_recurrence.triton_launches import BLOCK, Chunks, Shapes, chunks_of, padded
from ltrain.kernels.segments import TRITON_TYPES, ceil_div, device_refusal

# Numbers that rows are made a multiple of: 16-byte loads, and heads of 60 in bfloat16 had wrong gradients on an H200 (Triton 3.6), of 64 not.
ALIGNED = 16
LEVELS = BLOCK.bit_length() - 1  # see tiles.pair_spans
ROWS = 16  # of `backward.sum_parts`
HEADS = 16  # in a program of `heads.sum_decays`: the decays of a token lie together
MEMBERS = 2  # value heads of one key head in a program of `heads.read`
NUMBERS = 512  # of a state in a program of `additive.accumulate`
WIDEST = 256  # of keys and values: what the state of one program in `pass_states` holds


def refusal(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(v):
        return why
    if v.dtype not in TRITON_TYPES or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v in one type of bfloat16, float16 or float32, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(k.shape[2], v.shape[2]) > WIDEST:
        return f"takes heads of at most {WIDEST}, not {k.shape[2]} and {v.shape[2]}"
    if chunk != BLOCK:
        return f"has chunks of {BLOCK} tokens, not {chunk}"
    return None


class _Prepared(NamedTuple):
    """What `forward.prepare` leaves; what a recurrence does without is None."""

    scores: Tensor | None  # [T, H, C]
    solve: Tensor | None  # [T, H, C]
    firsts: Tensor | None  # [blocks, H]
    w: Tensor | None  # [T, H, K]
    u: Tensor  # [T, H, V]
    reader: Tensor | None  # [T, H, K] or [T, H]
    writer: Tensor | None
    fade: Tensor | None  # [blocks, H, K] or [blocks, H]; of `heads.sum_decays` [chunks, H]
    halves: Tensor | None  # [blocks, H, 2, K]
    sums: Tensor | None = None  # [T, H, 2], of `heads.sum_decays` alone


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    solved: tuple[Tensor | None, ...] | None = None,
) -> _Prepared:
    """solved: the first three of an earlier call."""
    count, (tokens, heads, _) = chunks.block_count, v.shape
    if decay is None and beta is None:
        return _Prepared(None, None, None, None, v, None, None, None, None)
    if shapes.of_heads:
        assert decay is not None
        shape = tokens, heads
        factors = [v.new_empty(x, dtype=torch.float32) for x in (shape, shape, (chunks.chunk_count, heads), (*shape, 2))]
        if count:
            grid = chunks.chunk_count, ceil_div(heads, HEADS)
            of_heads.sum_decays[grid](decay, chunks.begins, chunks.ends, *factors, decay.stride(0), heads, C=BLOCK, HEADS=HEADS, num_warps=4)
        return _Prepared(None, None, None, None, v, factors[0], factors[1], factors[2], None, factors[3])
    scores, solve, firsts = solved or (
        k.new_empty(tokens, heads, BLOCK) if shapes.decay == 2 else None,
        k.new_empty(tokens, heads, BLOCK) if shapes.delta else None,
        k.new_empty(count, heads, dtype=torch.int32) if shapes.decay == 2 else None,
    )
    w, u = (k.new_empty(tokens, heads, shapes.key), torch.empty_like(v)) if shapes.delta else (None, v)
    reader = writer = fade = halves = middle = None
    if shapes.decay == 2:
        halves = k.new_empty(count, heads, 2, shapes.key, dtype=torch.float32)
        middle = k.new_empty(tokens, heads, shapes.key, dtype=torch.float32)
        reader, writer = (k.new_empty(tokens, heads, shapes.key) for _ in range(2))
        fade = k.new_empty(count, heads, shapes.key, dtype=torch.float32)
    elif shapes.decay == 1:
        reader, writer, fade = (k.new_empty(n, heads, dtype=torch.float32) for n in (tokens, tokens, count))
    made = _Prepared(scores, solve, firsts, w, u, reader, writer, fade, halves)
    if count:
        if shapes.decay == 2:
            options = shapes.options("sum_decays", without=("BV", "DECAY"))
            forward.sum_decays[count, heads](
                *(k, decay, *chunks.spans, firsts, middle, halves, heads, shapes.key, LEVELS), SOLVED=solved is not None, **options
            )
        for pairs in shapes.pairs(grouped=False):
            forward.prepare[count, heads](
                *(q, k, v, decay, beta, *chunks.spans, *made[:9], middle, *shapes.numbers, LEVELS),
                **{"DELTA": shapes.delta, "SOLVED": solved is not None, "PAIRS": pairs, **shapes.options("prepare")},
            )
    return made


def _ends(x: Tensor, chunks: Chunks, shapes: Shapes) -> Tensor:
    """For a state of each segment [N, H, K, V]"""
    return x.new_empty(chunks.segments, shapes.heads, shapes.key, shapes.value, dtype=torch.float32)


def _summed(
    x: Tensor,
    y: Tensor,
    factors: Tensor | None,
    fade: Tensor | None,
    before: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    scale: float,
    back: bool,
    ends: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is there before each chunk [chunks, H, K, V], in their order or from the last one back, and if wanted, ends: after all of a segment
    [N, H, K, V], when each adds scale sum_t f_t x_t y_t^T and fades what there was; and what each leaves of it [chunks, H, K] or [chunks, H]."""
    count, heads, key, value = chunks.chunk_count, shapes.heads, shapes.key, shapes.value
    states, after = y.new_empty(count, heads, key, value), _ends(y, chunks, shapes) if ends else None
    left = fade if fade is None or shapes.of_heads else fade.new_empty(count, *fade.shape[1:])
    if count:
        options = shapes.options("add_chunks of heads" if shapes.of_heads else "add_chunks")
        grid = count, heads, ceil_div(key, options["BK"]) * ceil_div(value, options["BV"])
        args = x, y, factors, fade, chunks.begins, chunks.ends, chunks.firsts, states, left, scale
        additive.add_chunks[grid](*args, *shapes.numbers, BACKWARD=back, **options)
    if chunks.segments:
        grid = chunks.segments, heads, ceil_div(key * value, NUMBERS)
        axes = {"N": NUMBERS, "DECAY": shapes.decay, "BACKWARD": back}
        additive.accumulate[grid](states, left, chunks.bounds, before, after, heads, key, value, num_warps=4, **axes)
    return states, after, left


def _passed(
    k: Tensor, initial: Tensor | None, chunks: Chunks, shapes: Shapes, made: _Prepared, ends: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The state before each chunk [chunks, H, K, V], if wanted, ends: the final states [N, H, K, V], and what each chunk leaves of a state where
    nothing is erased; made.u turns from U0 to U."""
    if not shapes.delta:
        keys, factors = (made.writer, None) if shapes.decay == 2 else (k, made.writer)
        assert keys is not None
        return _summed(keys, made.u, factors, made.fade, initial, chunks, shapes, 1.0, back=False, ends=ends)
    states = k.new_empty(chunks.chunk_count, shapes.heads, shapes.key, shapes.value)
    final = _ends(k, chunks, shapes) if ends else None
    if chunks.segments:
        options = shapes.narrow(chunks.segments)
        grid = chunks.segments, shapes.heads, ceil_div(shapes.value, options["BV"])
        args = k, made.w, made.u, made.writer, made.fade, chunks.cuts, chunks.bounds, initial, states, final
        forward.pass_states[grid](*args, *shapes.numbers, **options)
    return states, final, None


def _read(
    q: Tensor,
    k: Tensor,
    z: Tensor,
    decay: Tensor | None,
    states: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: _Prepared,
    scale: float,
    later: bool,
) -> Tensor:
    """[T, H, V]: the output, z = U; later: the gradient of U, z = dO."""
    out = torch.empty_like(z)
    if shapes.of_heads:
        if chunks.block_count:
            options, members = shapes.options("read of heads"), math.gcd(shapes.group, MEMBERS)
            of_heads.read[chunks.block_count, shapes.heads // members, ceil_div(shapes.value, options["BV"])](
                *((k, q) if later else (q, k)),
                *(z, made.sums, made.writer if later else made.reader, states, *chunks.places, out, scale),
                *shapes.numbers,
                **{"KEYS": padded(shapes.key), "MEMBERS": members, "LATER": later, **options},
            )
        return out
    rows, factors = ((made.reader, made.writer), (None, None)) if shapes.decay == 2 else ((q, k), (made.reader, made.writer))
    if later:
        rows, factors = rows[::-1], factors[::-1]
    if chunks.block_count:
        options = shapes.options("read")
        axes = {"BLOCKS": shapes.blocks, "KEYS": padded(shapes.key), "LATER": later, "STATES": states is not None}
        args = *rows, z, decay, made.scores, factors[0], made.fade, states, *chunks.places, out, scale
        grid = chunks.block_count, shapes.heads, ceil_div(shapes.value, options["BV"])
        forward.read[grid](*args, *shapes.numbers, **axes, **options)
    return out


def _passed_back(
    q: Tensor,
    k: Tensor,
    do: Tensor,
    du: Tensor | None,
    dfinal: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: _Prepared,
    scale: float,
    ends: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the state after each chunk [chunks, H, K, V] and, if wanted, ends: of that before each segment [N, H, K, V]; du: of U, of the
    delta rule, which it completes."""
    if not shapes.delta:
        queries, factors = (made.reader, None) if shapes.decay == 2 else (q, made.reader)
        assert queries is not None
        return _summed(queries, do, factors, made.fade, dfinal, chunks, shapes, scale, back=True, ends=ends)[:2]
    dstates = k.new_empty(chunks.chunk_count, shapes.heads, shapes.key, shapes.value)
    dinitial = _ends(k, chunks, shapes) if ends else None
    if chunks.segments:
        options = shapes.narrow(chunks.segments)
        backward.pass_gradients[chunks.segments, shapes.heads, ceil_div(shapes.value, options["BV"])](
            *(q, k, made.w, made.reader, made.writer, made.fade, do, du, chunks.cuts, chunks.bounds, dfinal, dstates, dinitial, scale),
            *shapes.numbers,
            **options,
        )
    return dstates, dinitial


def _head_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: Tensor | None,
    through: tuple[Tensor, Tensor],
    left: Tensor | None,
    grads: tuple[Tensor, Tensor],
    chunks: Chunks,
    shapes: Shapes,
    made: _Prepared,
    scale: float,
    moves: bool,
) -> Tensor | None:
    """Of `_gradients`, without decays or with one per head, from q, k, v, dO and the states and their gradients: fills dq and dk -> ddecay, if
    wanted: moves"""
    (q, k, v, do), (states, dstates), (dq, dk) = inputs, through, grads
    blocks, (tokens, heads, _) = chunks.block_count, v.shape
    options = shapes.options("pair_gradients of heads")
    parts, grouped = ceil_div(shapes.key, options["BK"]), shapes.group > 1
    ddecay = of_reads = of_writes = recalled = None
    if moves and decay is not None:
        # Grouped, a part for each of the blocks that a token of a chunk may meet.
        slots = parts + (shapes.blocks if grouped else 0)
        of_reads, of_writes = (v.new_empty(slots, tokens, heads, dtype=torch.float32) for _ in range(2))
        recalled = v.new_empty(parts, blocks, heads, dtype=torch.float32)
        ddecay = torch.empty_like(decay, memory_format=torch.contiguous_format)
    if not blocks:
        return ddecay
    axes = {"KEYS": padded(shapes.key), "VALUES": padded(shapes.value), "GROUPED": grouped, "MOVES": ddecay is not None}
    reads = do, v, k, q, made.sums, made.reader, states, *chunks.places, dq, of_reads, recalled
    writes = v, do, q, k, made.sums, made.writer, dstates, *chunks.places, dk, of_writes, recalled
    for args, later in ((reads, False), (writes, True)):
        of_heads.pair_gradients[blocks, parts, heads // shapes.group](*args, scale, blocks, tokens, *shapes.numbers, LATER=later, **axes, **options)
    if ddecay is not None:
        options = shapes.options("decay_gradients of heads", without=("DECAY", "DOT"))
        of_heads.decay_gradients[chunks.chunk_count, heads](
            *(of_reads, of_writes, recalled, left, states, dstates, chunks.begins, chunks.ends, chunks.firsts, ddecay, blocks, tokens),
            *(heads, shapes.key, shapes.value, parts),
            **{"GROUPED": grouped, **options},
        )
    return ddecay


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: None,
    initial: Tensor | None,
    solved: tuple[Tensor | None, ...],
    do: Tensor,
    dfinal: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    scale: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Where nothing is erased: dq, dk, dv, ddecay, None, dinitial; wanted: whether the gradients of the decays and of the initial states are"""
    blocks, count, (tokens, heads, _) = chunks.block_count, chunks.chunk_count, v.shape
    made = _prepared(q, k, v, decay, beta, chunks, shapes, solved)
    states, _, left = _passed(k, initial, chunks, shapes, made, ends=False)
    dstates, dinitial = _passed_back(q, k, do, None, dfinal, chunks, shapes, made, scale, wanted[1])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), _read(q, k, do, decay, dstates, chunks, shapes, made, scale, later=True)
    if shapes.of_heads:
        ddecay = _head_gradients((q, k, v, do), decay, (states, dstates), left, (dq, dk), chunks, shapes, made, scale, wanted[0])
        return dq, dk, dv, ddecay, None, dinitial
    assert decay is not None
    options = shapes.options("pair_gradients", without=("DECAY",))
    parts = ceil_div(shapes.key, options["BK"])
    moved, recalled = (v.new_empty(n, heads, shapes.key, dtype=torch.float32) for n in (tokens, blocks))
    # it is as large as moved, and takes its place where the type is the same
    ddecay = moved if decay.dtype == torch.float32 else torch.empty_like(decay)
    if count:
        axes = {"BLOCKS": shapes.blocks, "VALUES": padded(shapes.value), "GROUPED": shapes.group > 1}
        additive.pair_gradients[blocks * parts, heads // shapes.group](
            *(q, k, v, do, decay, made.reader, made.writer, made.fade, made.firsts, states, dstates, *chunks.places, dq, dk, moved, recalled),
            *(scale, *shapes.numbers, LEVELS),
            **axes,
            **options,
        )
        options = shapes.options("decay_gradients", without=("DECAY",))
        additive.decay_gradients[count, heads, ceil_div(shapes.key, options["BK"])](
            *(moved, recalled, left, states, dstates, chunks.begins, chunks.ends, chunks.firsts, ddecay, heads, shapes.key, shapes.value),
            **options,
        )
    return dq, dk, dv, ddecay, None, dinitial


def _delta_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    solved: tuple[Tensor | None, ...],
    do: Tensor,
    dfinal: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    scale: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Of the delta rule: dq, dk, dv, ddecay, dbeta, dinitial; wanted as for `_gradients`, though ddecay is always found"""
    count, (tokens, heads, _), spans = chunks.block_count, v.shape, chunks.spans
    made = _prepared(q, k, v, decay, beta, chunks, shapes, solved)
    states, _, _ = _passed(k, initial, chunks, shapes, made, ends=False)
    du = _read(q, k, do, decay, None, chunks, shapes, made, scale, later=True)
    dstates, dinitial = _passed_back(q, k, do, du, dfinal, chunks, shapes, made, scale, wanted[1])
    u, solve, firsts, fade, halves = made.u, made.solve, made.firsts, made.fade, made.halves
    del made  # W and the faded queries and keys are as large as the inputs
    options = shapes.options("key_gradients")
    pieces = ceil_div(shapes.key, options["BK"])
    on_reads, on_erases = (k.new_empty(tokens, heads, BLOCK) for _ in range(2))
    own = v.new_empty(tokens, heads, dtype=torch.float32)
    of_beta = v.new_empty(1 + pieces, tokens, heads, dtype=torch.float32)
    dv = torch.empty_like(v)
    if count:
        narrow = shapes.options("score_gradients", without=("BK",))
        backward.score_gradients[count, heads](
            *(v, u, decay, solve, do, du, *spans, on_reads, on_erases, own, dv, of_beta, scale, heads, shapes.value), **narrow
        )
    del du
    dq, dk, dbeta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(beta)
    ddecay = None if decay is None else torch.empty_like(decay)
    of_decay = v.new_empty(pieces, tokens, heads, dtype=torch.float32) if shapes.decay == 1 else None
    for pairs in shapes.pairs(grouped=True) if count else ():
        backward.key_gradients[count * pieces, heads // shapes.group](
            *(q, k, u, decay, beta, dv, firsts, fade, halves, do, on_reads, on_erases, own, states, dstates, *spans),
            *(dq, dk, ddecay if of_decay is None else of_decay, of_beta, scale, tokens, *shapes.numbers, LEVELS),
            GROUPED=shapes.group > 1,
            PAIRS=pairs,
            **options,
        )
    sums = of_beta, dbeta, of_decay, None if of_decay is None else ddecay
    backward.sum_parts[(ceil_div(tokens * heads, ROWS),)](dv, beta, *sums, tokens * heads, pieces, shapes.value, ROWS, padded(shapes.value))
    return dq, dk, dv, ddecay, dbeta, dinitial


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        initial: Tensor | None,
        bounds: tuple[int, ...],
        scale: float,
        ends: bool,
    ) -> tuple[Tensor, Tensor | None]:
        shapes = Shapes.of(k, v, decay, beta)
        chunks = chunks_of(bounds, shapes.blocks, v.device)
        made = _prepared(q, k, v, decay, beta, chunks, shapes)
        states, final, _ = _passed(k, initial, chunks, shapes, made, ends)
        output = _read(q, k, made.u, decay, states, chunks, shapes, made, scale, later=False)
        ctx.save_for_backward(q, k, v, decay, beta, initial, *made[:3])
        ctx.chunks, ctx.shapes, ctx.scale = chunks, shapes, scale
        ctx.set_materialize_grads(False)  # zeros for the final states would be as large as these
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *inputs, scores, solve, firsts = ctx.saved_tensors
        do, dfinal = (None if grad is None else grad.contiguous() for grad in grads)
        do = torch.zeros_like(inputs[2]) if do is None else do
        wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        args = *inputs, (scores, solve, firsts), do, dfinal, ctx.chunks, ctx.shapes, ctx.scale, wanted
        found = (_delta_gradients if ctx.shapes.delta else _gradients)(*args)
        return *found, None, None, None


def _identity(segments: int, heads: int, k: Tensor) -> Tensor:
    """[N, H, K, K]"""
    return torch.eye(k.shape[2], device=k.device).expand(segments, heads, -1, -1).contiguous()


def _wider(x: Tensor, more: int) -> Tensor:
    """x [..., D] with so many zeros behind each row"""
    return F.pad(x, (0, more)) if more else x


class _Laid(NamedTuple):
    """Inputs as the programs take them"""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> "_Laid":
        keys, values = -k.shape[2] % ALIGNED, -v.shape[2] % ALIGNED
        if decay is not None and decay.ndim == 3:
            decay = _wider(decay, keys).contiguous()
        elif decay is not None and (beta is not None or decay.stride(1) != 1):
            decay = decay.contiguous()  # but for `heads.sum_decays`, which takes one row for all tokens, as constant decays have
        q, k, v = (x.contiguous() for x in (_wider(q, keys), _wider(k, keys), _wider(v, values)))
        return cls(q, k, v, decay, None if beta is None else beta.contiguous())

    @property
    def alone(self) -> tuple[Shapes, Chunks]:
        """Of all tokens as one segment"""
        shapes = Shapes.of(self.k, self.v, self.decay, self.beta)
        return shapes, chunks_of((0, len(self.v)), shapes.blocks, self.v.device)


@torch.no_grad()
def segment_map(k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, with_map: bool) -> tuple[Tensor | None, Tensor]:
    """-> M [H, K, K] if with_map, E [H, K, V]: what chunks prepare serves both, each is one pass of states, and no output is made."""
    laid, width, value = _Laid.of(k, k, v, decay, beta), k.shape[2], v.shape[2]
    shapes, chunks = laid.alone
    made, matrix = _prepared(*laid, chunks, shapes), None
    if with_map:
        nothing, square = v.new_zeros(*v.shape[:2], shapes.key), shapes._replace(value=shapes.key)
        matrix = _passed(laid.k, _identity(1, shapes.heads, laid.k), chunks, square, made._replace(u=nothing), True)[1]
    final = _passed(laid.k, None, chunks, shapes, made, True)[1]
    assert final is not None  # it was asked for
    return None if matrix is None else matrix[0, :, :width, :width], final[0, :, :width, :value]


@torch.no_grad()
def state_gradient(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, do: Tensor, scale: float) -> Tensor:
    """do [T, H, V] -> [H, K, V]: one pass of gradients of states, and of nothing else."""
    laid, width, value = _Laid.of(q, k, v, decay, beta), k.shape[2], v.shape[2]
    do = _wider(do, laid.v.shape[2] - value).contiguous()
    shapes, chunks = laid.alone
    made = _prepared(*laid, chunks, shapes)
    du = _read(laid.q, laid.k, do, laid.decay, None, chunks, shapes, made, scale, later=True) if shapes.delta else None
    dinitial = _passed_back(laid.q, laid.k, do, du, None, chunks, shapes, made, scale, True)[1]
    assert dinitial is not None  # it was asked for
    return dinitial[0, :, :width, :value]


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bounds: list[int],
    scale: float,
    initial_state: Tensor | None,
    with_final: bool,
    with_map: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """-> output [T, H, V], final states [N, H, K, V] float32 if with_final, (M [N, H, K, K], E [N, H, K, V]) if with_map"""
    segments, heads, width, value = len(bounds) - 1, v.shape[1], k.shape[2], v.shape[2]
    cuts = tuple(bounds)
    q, k, v, decay, beta = _Laid.of(q, k, v, decay, beta)
    keys, values = k.shape[2] - width, v.shape[2] - value
    start = initial_state
    if start is not None:
        start = (F.pad(start, (0, values, 0, keys)) if keys or values else start).float().contiguous()
    output, final = _Recurrence.apply(q, k, v, decay, beta, start, cuts, scale, with_final or (with_map and start is None))
    maps = None
    if with_map:  # M is where the identity ends with nothing to store, E where zeros end.
        identity, nothing = _identity(segments, heads, k), v.new_zeros(len(v), heads, k.shape[2])
        matrix = _Recurrence.apply(k, k, nothing, decay, beta, identity, cuts, 1.0, True)[1]
        end_of_zeros = final if start is None else _Recurrence.apply(k, k, v, decay, beta, None, cuts, 1.0, True)[1]
        maps = matrix[..., :width, :width], end_of_zeros[..., :width, :value]
    final = final if with_final else None
    if keys or values:
        output, final = output[..., :value], None if final is None else final[..., :width, :value]
    return output, final, maps
