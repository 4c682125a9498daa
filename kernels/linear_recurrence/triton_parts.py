"""The parts of the chunked recurrence on a GPU: each fills tensors by a launch or two of `triton_kernels`, forward and backward.

Those of the delta rule take `chunks` of any segments, and of what is there for each chunk the same ones: `triton_over_ranks` runs them for some
segments before others.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.linear_recurrence.triton_kernels import additive, backward, forward
from ltrain.kernels.linear_recurrence.triton_kernels import heads as of_heads
from ltrain.kernels.linear_recurrence.triton_launches import BLOCK, Chunks, Shapes, padded
from ltrain.kernels.segments import ceil_div

# Numbers that rows are made a multiple of: 16-byte loads, and heads of 60 in bfloat16 had wrong gradients on an H200 (Triton 3.6), of 64 not.
ALIGNED = 16
LEVELS = BLOCK.bit_length() - 1  # see tiles.pair_spans
HEADS = 8  # in a program of `heads.sum_decays` or `heads.decay_gradients`: the decays of a token lie together
TOGETHER = 2  # blocks of a chunk that `heads.read_together` has the scores of in its registers
ROWS = 16  # of `backward.sum_parts` and `sum_heads`
NUMBERS = 512  # of a state in a program of `additive.accumulate`
ACROSS = 4096  # of a state at a time in a program of `heads.gradients_across`


def wider(x: Tensor, more: int) -> Tensor:
    """x [..., D] with so many zeros behind each row"""
    return F.pad(x, (0, more)) if more else x


class Laid(NamedTuple):
    """Inputs as the programs take them"""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> "Laid":
        keys, values = -k.shape[2] % ALIGNED, -v.shape[2] % ALIGNED
        if decay is not None and decay.ndim == 3:
            decay = wider(decay, keys).contiguous()
        elif decay is not None and (beta is not None or decay.stride(1) != 1):
            decay = decay.contiguous()  # but for `heads.sum_decays`, which takes one row for all tokens, as constant decays have
        q, k, v = (x.contiguous() for x in (wider(q, keys), wider(k, keys), wider(v, values)))
        return cls(q, k, v, decay, None if beta is None else beta.contiguous())


class Prepared(NamedTuple):
    """What `forward.prepare` leaves; what a recurrence does without is None. With the delta rule, scores and reader have the scale in them."""

    scores: Tensor | None  # [T, H, C]
    solve: Tensor | None  # [T, H, C]
    firsts: Tensor | None  # [blocks, H]
    w: Tensor | None  # [T, H, K], -W
    u: Tensor  # [T, H, V], -U0 until the states are passed
    reader: Tensor | None  # [T, H, K], or of `heads.sum_decays` [T, H]
    writer: Tensor | None
    fade: Tensor | None  # [blocks, H, K] or [blocks, H]; of `heads.sum_decays` [chunks, H]
    halves: Tensor | None  # [blocks, H, 2, K]
    sums: Tensor | None  # [T, H, 2], of decays per head: natural logs of what is left, of `heads.sum_decays` to base 2

    @property
    def left(self) -> "Prepared":
        """What the gradients of scores and keys take: W and the faded queries and keys are as large as the inputs."""
        return self._replace(scores=None, w=None, reader=None, writer=None)

    def saved(self, v: Tensor) -> list[Tensor | None]:
        """For autograd to keep beside v: what is v itself is kept once."""
        return [None if x is v else x for x in self]

    @classmethod
    def restored(cls, saved: Sequence[Any], v: Tensor) -> "Prepared":
        made = cls(*saved)
        return made._replace(u=v) if made.u is None else made


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    scale: float,
    solved: tuple[Tensor | None, ...] | None = None,
) -> Prepared:
    """solved: the first three of an earlier call."""
    tokens, heads, _ = v.shape
    if decay is None and beta is None:
        return Prepared(None, None, None, None, v, None, None, None, None, None)
    if shapes.of_heads:
        assert decay is not None
        shape = tokens, heads
        factors = [v.new_empty(x, dtype=torch.float32) for x in (shape, shape, (chunks.chunk_count, heads), (*shape, 2))]
        if chunks.block_count:
            grid = chunks.chunk_count, ceil_div(heads, HEADS)
            of_heads.sum_decays[grid](decay, chunks.begins, chunks.ends, *factors, decay.stride(0), heads, C=BLOCK, HEADS=HEADS, num_warps=4)
        return Prepared(None, None, None, None, v, factors[0], factors[1], factors[2], None, factors[3])
    made = room(k, v, chunks.block_count, shapes, solved)
    prepare(q, k, v, decay, beta, chunks, shapes, made, scale, solved is not None)
    return made


def room(k: Tensor, v: Tensor, count: int, shapes: Shapes, solved: tuple[Tensor | None, ...] | None) -> Prepared:
    """For `prepare` to fill, of so many blocks"""
    tokens, heads, _ = v.shape
    scores, solve, firsts = solved or (
        k.new_empty(tokens, heads, BLOCK),
        k.new_empty(tokens, heads, BLOCK) if shapes.delta else None,
        k.new_empty(count, heads, dtype=torch.int32) if shapes.decay == 2 else None,
    )
    w, u = (k.new_empty(tokens, heads, shapes.key), torch.empty_like(v)) if shapes.delta else (None, v)
    reader = k.new_empty(tokens, heads, shapes.key)
    writer = torch.empty_like(reader) if shapes.decay else None
    halves = k.new_empty(count, heads, 2, shapes.key, dtype=torch.float32) if shapes.decay == 2 else None
    fade = k.new_empty((count, heads, shapes.key)[: 1 + shapes.decay], dtype=torch.float32) if shapes.decay else None
    sums = k.new_empty(tokens, heads, 2, dtype=torch.float32) if shapes.decay == 1 else None
    return Prepared(scores, solve, firsts, w, u, reader, writer, fade, halves, sums)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    scale: float,
    solved: bool,
) -> None:
    """Of the tokens of these chunks; solved: the first three of `made` are there already."""
    count, (tokens, heads, _) = chunks.block_count, v.shape
    if count:
        middle = k.new_empty(tokens, heads, shapes.key, dtype=torch.float32) if shapes.decay == 2 else None
        if shapes.decay == 2:
            options = shapes.options("sum_decays", without=("BV", "DECAY"))
            forward.sum_decays[count, heads](
                *(k, decay, *chunks.spans, made.firsts, middle, made.halves, heads, shapes.key, LEVELS), SOLVED=solved, **options
            )
        for pairs in shapes.pairs:
            forward.prepare[count, heads](
                *(q, k, v, decay, beta, *chunks.spans, *made, middle, *shapes.numbers, LEVELS, scale if shapes.delta else 1.0),
                **{"DELTA": shapes.delta, "SOLVED": solved, "PAIRS": pairs, **shapes.options("prepare")},
            )


def ends_of(x: Tensor, chunks: Chunks, shapes: Shapes) -> Tensor:
    """For a state of each segment [N, H, K, V]"""
    return x.new_empty(chunks.segments, shapes.heads, shapes.key, shapes.value, dtype=torch.float32)


def add_chunks(rows: Tensor, z: Tensor, chunks: Chunks, shapes: Shapes, made: Prepared, scale: float, back: bool) -> tuple[Tensor, Tensor | None]:
    """Where nothing is erased: what the writes of each chunk, keys and V, add to the state, or, back, its reads, queries and dO, to the gradient
    [chunks, H, K, V], times scale; and what each leaves of a state [chunks, H, K] or [chunks, H]."""
    count, heads, key, value = chunks.chunk_count, shapes.heads, shapes.key, shapes.value
    fade, factors = made.fade, made.reader if back else made.writer
    if shapes.decay == 2:
        assert factors is not None  # the rows are in them
        rows, factors = factors, None
    added = z.new_empty(count, heads, key, value)
    left = fade if fade is None or shapes.of_heads else fade.new_empty(count, *fade.shape[1:])
    if count:
        options = shapes.options("add_chunks of heads" if shapes.of_heads else "add_chunks")
        grid = count, heads, ceil_div(key, options["BK"]) * ceil_div(value, options["BV"])
        args = rows, z, factors, fade, chunks.begins, chunks.ends, chunks.firsts, added, left, scale
        additive.add_chunks[grid](*args, *shapes.numbers, BACKWARD=back, **options)
    return added, left


def accumulate(
    states: Tensor, left: Tensor | None, before: Tensor | None, after: Tensor | None, chunks: Chunks, shapes: Shapes, back: bool, trace: bool = True
) -> None:
    """Turns what each chunk adds into what is there before it, in their order or from the last one back, unless no trace is wanted; fills after
    [N, H, K, V] with what is there behind all of a segment."""
    if chunks.segments:
        grid = chunks.segments, shapes.heads, ceil_div(shapes.key * shapes.value, NUMBERS)
        axes = {"N": NUMBERS, "DECAY": shapes.decay, "BACKWARD": back, "TRACE": trace}
        additive.accumulate[grid](states, left, chunks.bounds, before, after, *(shapes.heads, shapes.key, shapes.value), num_warps=4, **axes)


def passed(
    k: Tensor, initial: Tensor | None, chunks: Chunks, shapes: Shapes, made: Prepared, ends: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The state before each chunk [chunks, H, K, V], if wanted, ends: the final states [N, H, K, V], and what each chunk leaves of a state where
    nothing is erased; made.u turns from -U0 to U."""
    final = ends_of(k, chunks, shapes) if ends else None
    if not shapes.delta:
        states, left = add_chunks(k, made.u, chunks, shapes, made, 1.0, back=False)
        accumulate(states, left, initial, final, chunks, shapes, back=False)
        return states, final, left
    states = k.new_empty(chunks.chunk_count, shapes.heads, shapes.key, shapes.value)
    pass_states(k, made.u, initial, chunks, shapes, made, states, final)
    return states, final, None


def pass_states(
    k: Tensor,
    u: Tensor | None,
    initial: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    states: Tensor | None,
    final: Tensor | None,
) -> None:
    """Of the delta rule: see `forward.pass_states`."""
    if chunks.segments:
        options = shapes.narrow(chunks.segments)
        grid = chunks.segments, shapes.heads, ceil_div(shapes.value, options["BV"])
        args = k, made.w, u, made.writer, made.fade, chunks.opens, chunks.closes, chunks.bounds, initial, states, final
        forward.pass_states[grid](*args, *shapes.numbers, **options)


def identity_of(k: Tensor, segments: int, heads: int) -> Tensor:
    """[N, H, K, K] float32"""
    return torch.eye(k.shape[2], device=k.device).expand(segments, heads, -1, -1).contiguous()


def end_of_identity(k: Tensor, chunks: Chunks, shapes: Shapes, made: Prepared) -> Tensor:
    """M of each segment [N, H, K, K] of the delta rule: what the identity ends with where nothing is stored."""
    square = shapes._replace(value=shapes.key)
    matrix = ends_of(k, chunks, square)
    pass_states(k, None, identity_of(k, chunks.segments, shapes.heads), chunks, square, made, None, matrix)
    return matrix


def read(
    q: Tensor,
    k: Tensor,
    z: Tensor,
    states: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    scale: float,
    later: bool,
    out: Tensor | None = None,
) -> Tensor:
    """[T, H, V]: the output, z = U; later: the gradient of U, z = dO, with the delta rule negative and of each chunk alone; of the tokens of these
    chunks, in `out` where it is given."""
    out = torch.empty_like(z) if out is None else out
    if shapes.of_heads:
        if chunks.block_count:
            options, keys = shapes.options("read of heads"), padded(shapes.key)
            x, y, factor = (k, q, made.writer) if later else (q, k, made.reader)
            given = x, y, z, made.sums, factor, states
            together = shapes.options("read_together")
            whole = together["BK"] == keys and together["BV"] == padded(shapes.value)
            if shapes.group > 1 and shapes.blocks <= TOGETHER and whole and not shapes.exact:  # float32 would spill ten thousand bytes a thread
                of_heads.read_together[chunks.chunk_count, shapes.heads // shapes.group](
                    *(*given, chunks.begins, chunks.ends, out, scale, *shapes.numbers), **together | {"C": shapes.blocks * BLOCK, "LATER": later}
                )
            else:
                grid = chunks.block_count, shapes.heads, ceil_div(shapes.value, options["BV"])
                of_heads.read[grid](*given, *chunks.places, out, scale, *shapes.numbers, KEYS=keys, LATER=later, **options)
        return out
    rows = made.reader, k if made.writer is None else made.writer
    times = scale if not shapes.delta else -1.0 if later else 1.0  # the scale is in the reader and the scores
    if chunks.block_count:
        options = shapes.options("read")
        axes = {"BLOCKS": shapes.blocks, "KEYS": padded(shapes.key), "LATER": later, "STATES": states is not None}
        args = *(rows[::-1] if later else rows), z, made.scores, made.fade, states, *chunks.places, out, times
        grid = chunks.block_count, shapes.heads, ceil_div(shapes.value, options["BV"])
        forward.read[grid](*args, *shapes.numbers, **axes, **options)
    return out


def passed_back(
    q: Tensor,
    k: Tensor,
    do: Tensor,
    du: Tensor | None,
    dfinal: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    scale: float,
    ends: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the state after each chunk [chunks, H, K, V] and, if wanted, ends: of that before each segment [N, H, K, V]; du: of U, of the
    delta rule, which it completes."""
    dinitial = ends_of(k, chunks, shapes) if ends else None
    if not shapes.delta:
        dstates, left = add_chunks(q, do, chunks, shapes, made, scale, back=True)
        accumulate(dstates, left, dfinal, dinitial, chunks, shapes, back=True)
        return dstates, dinitial
    dstates = k.new_empty(chunks.chunk_count, shapes.heads, shapes.key, shapes.value)
    pass_gradients(k, do, du, dfinal, chunks, shapes, made, dstates, dinitial)
    return dstates, dinitial


def pass_gradients(
    k: Tensor,
    do: Tensor,
    du: Tensor | None,
    dfinal: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    dstates: Tensor | None,
    dinitial: Tensor | None,
) -> None:
    """Of the delta rule: see `backward.pass_gradients`."""
    if chunks.segments:
        options = shapes.narrow(chunks.segments)
        grid = chunks.segments, shapes.heads, ceil_div(shapes.value, options["BV"])
        args = k, made.w, made.reader, made.writer, made.fade, do, du, chunks.opens, chunks.closes, chunks.bounds, dfinal, dstates, dinitial
        backward.pass_gradients[grid](*args, *shapes.numbers, **options)


def of_key_heads(x: Tensor, group: int) -> Tensor:
    """[T, H, K] of value heads, summed over those of a key head -> [T, H / group, K]. In one program with what makes them, what one head left stood
    in the way of the next: 4.9 ms in place of 2.2 for two."""
    if group == 1:
        return x
    tokens, heads, key = x.shape
    out, rows = x.new_empty(tokens, heads // group, key), tokens * heads // group
    if rows:
        backward.sum_heads[(ceil_div(rows, ROWS),)](x, out, rows, group, key, ROWS, padded(key), num_warps=4)
    return out


class Scored(NamedTuple):
    """What `backward.score_gradients` leaves."""

    on_reads: Tensor  # [T, H, C]
    on_erases: Tensor
    own: Tensor  # [T, H]
    dv: Tensor  # [T, H, V]
    of_beta: Tensor  # [1 + pieces of K, T, H], of which it fills the first


def score_gradients(v: Tensor, do: Tensor, du: Tensor, chunks: Chunks, shapes: Shapes, made: Prepared, scale: float) -> Scored:
    """Of the delta rule, du the whole gradient of U."""
    (tokens, heads, _), pieces = v.shape, ceil_div(shapes.key, shapes.options("key_gradients")["BK"])
    on_reads, on_erases = (v.new_empty(tokens, heads, BLOCK) for _ in range(2))
    own = v.new_empty(tokens, heads, dtype=torch.float32)
    of_beta = v.new_empty(1 + pieces, tokens, heads, dtype=torch.float32)
    dv = torch.empty_like(v)
    if chunks.block_count:
        options = shapes.options("score_gradients", without=("BK",))
        backward.score_gradients[chunks.block_count, heads](
            *(v, made.u, made.sums, made.solve, do, du, *chunks.spans, on_reads, on_erases, own, dv, of_beta, scale, heads, shapes.value), **options
        )
    return Scored(on_reads, on_erases, own, dv, of_beta)


def key_gradients(
    q: Tensor,
    k: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    do: Tensor,
    through: tuple[Tensor, Tensor],
    scored: Scored,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Of the delta rule, from the states before and their gradients after each chunk: dq, dk, dv, ddecay, dbeta"""
    count, (tokens, heads), options = chunks.block_count, beta.shape, shapes.options("key_gradients")
    pieces = ceil_div(shapes.key, options["BK"])
    on_reads, on_erases, own, dv, of_beta = scored
    dq, dk = (q.new_empty(tokens, heads, shapes.key) for _ in range(2))
    dbeta, ddecay = torch.empty_like(beta), None if decay is None else torch.empty_like(decay)
    of_decay = q.new_empty(pieces, tokens, heads, dtype=torch.float32) if shapes.decay == 1 else None
    for pairs in shapes.pairs if count else ():
        backward.key_gradients[count * pieces, heads](
            *(q, k, made.u, decay, beta, dv, made.firsts, made.fade, made.halves, made.sums, do, on_reads, on_erases, own, *through, *chunks.spans),
            *(dq, dk, ddecay if of_decay is None else of_decay, of_beta, scale, tokens, *shapes.numbers, LEVELS),
            PAIRS=pairs,
            **options,
        )
    sums = of_beta, dbeta, of_decay, None if of_decay is None else ddecay
    backward.sum_parts[(ceil_div(tokens * heads, ROWS),)](dv, beta, *sums, tokens * heads, pieces, shapes.value, ROWS, padded(shapes.value))
    return of_key_heads(dq, shapes.group), of_key_heads(dk, shapes.group), dv, ddecay, dbeta


def head_pair_gradients(
    given: tuple[Tensor | None, ...],
    found: tuple[Tensor, Tensor | None, Tensor | None],
    chunks: Chunks,
    shapes: Shapes,
    scale: float,
    *,
    later: bool,
) -> None:
    """Without decays or with one per head: see `heads.pair_gradients`, whose arguments `given` and `found` are."""
    options = shapes.options("pair_gradients of heads")
    grid = chunks.block_count, ceil_div(shapes.key, options["BK"]), shapes.heads // shapes.group
    axes = {"KEYS": padded(shapes.key), "VALUES": padded(shapes.value), "GROUPED": shapes.group > 1, "MOVES": found[1] is not None}
    args = *given, *chunks.places, *found, scale, chunks.block_count, len(found[0])
    of_heads.pair_gradients[grid](*args, *shapes.numbers, LATER=later, **axes, **options)


def _head_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: Tensor | None,
    states: Tensor,
    after: Callable[[], Tensor],
    left: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    scale: float,
    moves: bool,
) -> tuple[Tensor | None, ...]:
    """`token_gradients` without decays or with one per head, of q, k, v, dO"""
    q, k, v, do = inputs
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    blocks, (tokens, heads, _) = chunks.block_count, v.shape
    parts, grouped = ceil_div(shapes.key, shapes.options("pair_gradients of heads")["BK"]), shapes.group > 1
    ddecay = of_reads = of_writes = recalled = pairs = None
    if moves and decay is not None:
        # Grouped, a part for each of the blocks that a token of a chunk may meet.
        slots = parts + (shapes.blocks if grouped else 0)
        of_reads, of_writes = (v.new_empty(slots, tokens, heads, dtype=torch.float32) for _ in range(2))
        recalled = None if grouped else v.new_empty(parts, blocks, heads, dtype=torch.float32)
        ddecay = torch.empty_like(decay, memory_format=torch.contiguous_format)
    if not blocks:
        return dq, dk, read(q, k, do, after(), chunks, shapes, made, scale, later=True), ddecay
    if grouped:
        pairs = q.new_empty(shapes.blocks, tokens, heads // shapes.group, BLOCK)
        of_heads.pair_scores[blocks, heads // shapes.group, shapes.blocks](
            *(q, k, v, do, made.sums, *chunks.places, pairs, of_reads, of_writes, scale, parts, tokens, *shapes.numbers),
            **{"KEYS": padded(shapes.key), "VALUES": padded(shapes.value), "MOVES": ddecay is not None} | shapes.options("pair_scores"),
        )
    head_pair_gradients((do, v, k, q, pairs, made.sums, made.reader, states), (dq, of_reads, recalled), chunks, shapes, scale, later=False)
    dstates = after()
    dv = read(q, k, do, dstates, chunks, shapes, made, scale, later=True)
    head_pair_gradients((v, do, q, k, pairs, made.sums, made.writer, dstates), (dk, of_writes, recalled), chunks, shapes, scale, later=True)
    if ddecay is not None:
        assert left is not None
        count, passing = chunks.chunk_count, torch.empty_like(left)
        of_heads.gradients_across[(count * heads,)](states, dstates, left, passing, shapes.key * shapes.value, N=ACROSS, num_warps=4)
        of_heads.decay_gradients[count, ceil_div(heads, HEADS)](
            *(of_reads, of_writes, recalled, passing, chunks.begins, chunks.ends, chunks.firsts, ddecay, blocks, tokens, heads, parts),
            C=BLOCK,
            HEADS=HEADS,
            GROUPED=grouped,
            num_warps=4,
        )
    return dq, dk, dv, ddecay


def token_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    do: Tensor,
    states: Tensor,
    after: Callable[[], Tensor],
    left: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    made: Prepared,
    scale: float,
    moves: bool,
) -> tuple[Tensor | None, ...]:
    """Where nothing is erased, from the states before each chunk, their gradients after it, which are asked for when nothing else is left to do, and
    what each leaves of one: dq, dk, dv, ddecay; moves: whether the last is wanted"""
    if shapes.of_heads:
        return _head_gradients((q, k, v, do), decay, states, after, left, chunks, shapes, made, scale, moves)
    blocks, count, (tokens, heads, _) = chunks.block_count, chunks.chunk_count, v.shape
    dstates = after()
    dv = read(q, k, do, dstates, chunks, shapes, made, scale, later=True)
    assert decay is not None
    options = shapes.options("pair_gradients", without=("DECAY",))
    parts = ceil_div(shapes.key, options["BK"])
    dq, dk = (q.new_empty(tokens, heads, shapes.key) for _ in range(2))
    moved, recalled = (v.new_empty(n, heads, shapes.key, dtype=torch.float32) for n in (tokens, blocks))
    # it is as large as moved, and takes its place where the type is the same
    ddecay = moved if decay.dtype == torch.float32 else torch.empty_like(decay)
    if count:
        axes = {"BLOCKS": shapes.blocks, "VALUES": padded(shapes.value)}
        for pairs in shapes.pairs:
            additive.pair_gradients[blocks * parts, heads](
                *(q, k, v, do, decay, made.reader, made.writer, made.fade, made.firsts, made.halves, states, dstates, *chunks.places),
                *(dq, dk, moved, recalled, scale, *shapes.numbers, LEVELS),
                **{"PAIRS": pairs, **axes, **options},
            )
        options = shapes.options("decay_gradients", without=("DECAY",))
        additive.decay_gradients[count, heads, ceil_div(shapes.key, options["BK"])](
            *(moved, recalled, left, states, dstates, chunks.begins, chunks.ends, chunks.firsts, ddecay, heads, shapes.key, shapes.value),
            **options,
        )
    return of_key_heads(dq, shapes.group), of_key_heads(dk, shapes.group), dv, ddecay
