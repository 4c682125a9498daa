"""The chunked recurrence on a GPU: autograd around the programs of `triton_kernels`.

The inputs are kept for the backward, and of pairs of tokens in a block the inverse T and per channel the scores, 64 numbers per token and head
each, which take the most to compute. The states of the chunks are made again: for chunks of one block they are K V / 64 numbers per token and
head, as much as q or v and more.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.linear_recurrence.triton_kernels import additive, backward, forward
from ltrain.kernels.linear_recurrence.triton_parts import Parts, gradients_after, part_length, parts_of, states_before
from ltrain.kernels.segments import TRITON_TYPES, device_refusal

BLOCK = 64  # tokens that meet in one product
# Blocks of a chunk where nothing is erased. A state is stored and loaded about 14 times, and each token meets those of half a chunk in 8
# products: with 128 channels, 2 blocks take as long for the states as 4 to 8 for the products.
BLOCKS = 4
WIDEST = 256  # of keys and values: what the state of one program in `pass_states` holds
WARPS = 8  # with 4, tiles of 64 are in the range that Triton 3.4 to 3.7 gets wrong on Hopper
LEVELS = BLOCK.bit_length() - 1  # see tiles.pair_spans
ROWS = 16  # of `backward.scale_rows`
NUMBERS = 512  # of a state in a program of `additive.accumulate`
PROGRAMS = 128  # about as many as an H100 has processors
COLUMNS = 64  # of a state in a program that goes through a part of a long segment
SHARED = 2  # such programs at once on a processor


class Launch(NamedTuple):
    """How a program is launched; channels of keys and of values at a time, half as many of float32; two: programs at once on a processor, which
    takes half of its registers for each, and sooner spills some than waits for memory; stages: tiles that a loop loads ahead."""

    key: int = 128
    value: int = 64
    two: bool = False
    stages: int = 3
    warps: int = WARPS


LAUNCHES = {
    "sum_decays": Launch(key=64, two=True, stages=1),
    "prepare": Launch(key=64, two=True, stages=1),
    "prepare per channel": Launch(key=64, two=True, stages=1),
    "add_chunks": Launch(value=128, two=True),
    "read": Launch(value=128, two=True, stages=2),
    "read per channel": Launch(value=128, stages=2),
    "pair_gradients": Launch(value=128, stages=2),
    "pair_gradients per channel": Launch(key=64, stages=2),
    "pair_gradients grouped": Launch(key=64, stages=1),
    "decay_gradients": Launch(key=64, stages=2),
    "score_gradients": Launch(two=True, stages=1),
    "key_gradients": Launch(key=64, two=True, stages=2),
    "key_gradients per channel": Launch(key=64, stages=2),
    "key_gradients grouped": Launch(key=64, two=True, stages=1),
}


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


class Chunks(NamedTuple):
    """On the device, int32. Of each block: its first and last + 1 token, and the chunk it is in [blocks]; of each chunk: its first and last + 1
    token and its first block [chunks]; the tokens and the chunks of each segment, cuts and bounds [N + 1]."""

    starts: Tensor
    stops: Tensor
    chunks: Tensor
    begins: Tensor
    ends: Tensor
    firsts: Tensor
    cuts: Tensor
    bounds: Tensor


def _pieces(cuts: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each segment in pieces of `length` tokens: first and last + 1 token and segment of each, and those of each segment [N + 1]"""
    counts = (cuts.diff() + length - 1) // length
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    segment = torch.repeat_interleave(torch.arange(len(counts)), counts)
    starts = cuts[segment] + (torch.arange(len(segment)) - bounds[segment]) * length
    return starts, torch.minimum(starts + length, cuts[segment + 1]), segment, bounds


@lru_cache(maxsize=64)  # all layers of a micro-batch share it
def _chunks(cuts: tuple[int, ...], blocks: int, device: torch.device) -> Chunks:
    """blocks: of a chunk, but for the last of a segment."""
    tokens = torch.tensor(cuts, dtype=torch.int64)
    starts, stops, segment, first = _pieces(tokens, BLOCK)
    begins, ends, _, bounds = _pieces(tokens, blocks * BLOCK)
    chunks = bounds[segment] + (torch.arange(len(segment)) - first[segment]) // blocks
    firsts = torch.searchsorted(chunks, torch.arange(len(begins)))
    found = starts, stops, chunks, begins, ends, firsts, tokens, bounds
    return Chunks(*(x.to(torch.int32).to(device, non_blocking=True) for x in found))


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

    @property
    def blocks(self) -> int:
        """Blocks of a chunk: with the delta rule one, since the tokens of a chunk are solved for together."""
        return 1 if self.delta else BLOCKS

    def pairs(self, grouped: bool) -> tuple[int, ...]:
        """PAIRS of each launch of a program; grouped: of all value heads of a key head, whose chunks may differ."""
        return (1, 2) if self.decay == 2 and not (grouped and self.group > 1) else (0,)

    def options(self, program: str) -> dict[str, Any]:
        """Compile-time options."""
        kinds = [" grouped"] * (self.group > 1) + [" per channel"] * (self.decay == 2)
        launch = next((LAUNCHES[program + kind] for kind in kinds if program + kind in LAUNCHES), LAUNCHES.get(program, Launch()))
        key, value = (block // 2 if self.exact else block for block in launch[:2])
        registers = {"maxnreg": 65536 // (64 * launch.warps)} if launch.two and not self.exact else {}
        stages = 1 if self.exact else launch.stages
        pipeline = {"DOT": "ieee" if self.exact else "tf32", "num_warps": launch.warps, "num_stages": stages}
        return {"C": BLOCK, "BK": min(key, _padded(self.key)), "BV": min(value, _padded(self.value)), "DECAY": self.decay, **pipeline, **registers}

    def part(self, cuts: tuple[int, ...]) -> int:
        """Chunks of a part of a long segment, or 0: see triton_parts.part_length."""
        at_once = SHARED * PROGRAMS // (self.heads * triton.cdiv(self.value, COLUMNS))
        return part_length(cuts, at_once, BLOCK) if self.delta and self.key <= 128 else 0

    def wide(self, programs: int = SHARED) -> dict[str, Any]:
        """Options of the programs that go through parts; programs: at once on a processor, which what pass_gradients loads ahead allows one."""
        registers = {"maxnreg": 65536 // (programs * 32 * WARPS)} if programs > 1 and not self.exact else {}
        columns = min(16 if self.exact else COLUMNS, _padded(self.value))
        warps, stages = 4 if columns == 16 else WARPS, 1 if self.exact else 2
        return self.options("pass") | {"BK": _padded(self.key), "BV": columns, "num_warps": warps, "num_stages": stages, **registers}

    def narrow(self, segments: int) -> dict[str, Any]:
        """Options of the programs that go chunk by chunk through whole segments. Each loads all of W, K and Q for its few columns of the state:
        few, so that there are programs for all processors, but no fewer."""
        widest = 16 if self.exact else 32 if self.key > 128 else 64
        columns = next((n for n in (64, 32) if n <= widest and segments * self.heads * triton.cdiv(self.value, n) >= PROGRAMS), 16)
        # What a stage loads ahead is W, K and Q of a chunk: 48 KiB of 16-bit numbers for K = 128.
        stages = 1 if self.exact else 2 if self.key > 128 else 4 if columns == 16 else 3
        pipeline = {"num_warps": 4 if columns == 16 else WARPS, "num_stages": stages}
        return self.options("pass") | {"BK": _padded(self.key), "BV": min(columns, _padded(self.value))} | pipeline


class _Prepared(NamedTuple):
    """What `forward.prepare` leaves; what a recurrence does without is None."""

    scores: Tensor | None  # [T, H, C]
    solve: Tensor | None  # [T, H, C]
    firsts: Tensor | None  # [blocks, H]
    w: Tensor | None  # [T, H, K]
    u: Tensor  # [T, H, V]
    reader: Tensor | None  # [T, H, K] or [T, H]
    writer: Tensor | None
    fade: Tensor | None  # [blocks, H, K] or [blocks, H]
    halves: Tensor | None  # [blocks, H, 2, K]


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
        return _Prepared(None, None, None, None, v, None, None, None, None)
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
            options = {name: x for name, x in shapes.options("sum_decays").items() if name not in ("BV", "DECAY")}
            spans = chunks.starts, chunks.stops
            forward.sum_decays[count, heads](
                *(k, decay, *spans, firsts, middle, halves, heads, shapes.key, LEVELS), SOLVED=solved is not None, **options
            )
        alone = {"num_warps": 1} if shapes.decay == 1 and not shapes.delta else {}  # 64 numbers of a head, and no product
        for pairs in shapes.pairs(grouped=False):
            forward.prepare[count, heads](
                *(q, k, v, decay, beta, chunks.starts, chunks.stops, *made, middle, *shapes.numbers, LEVELS),
                **{"DELTA": shapes.delta, "SOLVED": solved is not None, "PAIRS": pairs, **shapes.options("prepare"), **alone},
            )
    return made


def _summed(
    x: Tensor, y: Tensor, factors: Tensor | None, fade: Tensor | None, before: Tensor, chunks: Chunks, shapes: _Shapes, scale: float, back: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is there before each chunk [chunks, H, K, V], in their order or from the last one back, and after all of a segment [N, H, K, V], when
    each adds scale sum_t f_t x_t y_t^T and fades what there was; and what each leaves of it [chunks, H, K] or [chunks, H]."""
    count, heads = len(chunks.begins), shapes.heads
    states, after = y.new_empty(count, heads, shapes.key, shapes.value), torch.empty_like(before)
    left = None if fade is None else fade.new_empty(count, *fade.shape[1:])
    if count:
        options = shapes.options("add_chunks")
        grid = count, heads, triton.cdiv(shapes.key, options["BK"]) * triton.cdiv(shapes.value, options["BV"])
        args = x, y, factors, fade, chunks.begins, chunks.ends, chunks.firsts, states, left, scale
        additive.add_chunks[grid](*args, *shapes.numbers, BACKWARD=back, **options)
    if len(before):
        grid = (len(before), heads, triton.cdiv(shapes.key * shapes.value, NUMBERS))
        numbers = heads, shapes.key, shapes.value
        additive.accumulate[grid](states, left, chunks.bounds, before, after, *numbers, N=NUMBERS, DECAY=shapes.decay, BACKWARD=back, num_warps=4)
    return states, after, left


def _pass(
    k: Tensor, initial: Tensor, u: Tensor | None, states: Tensor | None, cuts: Tensor, bounds: Tensor, shapes: _Shapes, made: _Prepared, options: Any
) -> Tensor:
    """forward.pass_states -> final states [N, H, K, V]"""
    final, (count, _, key, value) = torch.empty_like(initial), initial.shape
    if count:
        grid = (count, shapes.heads, triton.cdiv(value, options["BV"]))
        args = k, made.w, u, made.writer, made.fade, cuts, bounds, initial, states, final
        forward.pass_states[grid](*args, shapes.heads, shapes.group, key, value, **options)
    return final


def _begun(k: Tensor, initial: Tensor, shapes: _Shapes, made: _Prepared, parts: Parts) -> tuple[Tensor, Tensor]:
    """The state before each part [P, H, K, V] and each part's map M [P, H, K, K]"""
    options, places = shapes.wide(), parts[:2]
    ends = _pass(k, initial.new_zeros(parts.number, *initial.shape[1:]), made.u, None, *places, shapes, made, options)
    identity = torch.eye(shapes.key, device=k.device).expand(parts.number, shapes.heads, -1, -1).contiguous()
    maps = _pass(k, identity, None, None, *places, shapes, made, options | {"BV": min(options["BV"], options["BK"])})
    return states_before(initial, maps, ends, parts), maps


def _passed(
    k: Tensor, initial: Tensor, chunks: Chunks, shapes: _Shapes, made: _Prepared, parts: Parts | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The state before each chunk [chunks, H, K, V], final states [N, H, K, V], what each chunk leaves of a state where nothing is erased;
    made.u turns from U0 to U. parts: `initial` is what is before each of them, and the final states are theirs."""
    if not shapes.delta:
        keys, factors = (made.writer, None) if shapes.decay == 2 else (k, made.writer)
        assert keys is not None
        return _summed(keys, made.u, factors, made.fade, initial, chunks, shapes, 1.0, back=False)
    states = k.new_empty(len(chunks.begins), shapes.heads, shapes.key, shapes.value)
    places, options = (parts[:2], shapes.wide()) if parts else ((chunks.cuts, chunks.bounds), shapes.narrow(len(initial)))
    return states, _pass(k, initial, made.u, states, *places, shapes, made, options), None


def _read(
    q: Tensor,
    k: Tensor,
    z: Tensor,
    decay: Tensor | None,
    states: Tensor | None,
    chunks: Chunks,
    shapes: _Shapes,
    made: _Prepared,
    scale: float,
    later: bool,
) -> Tensor:
    """[T, H, V]: the output, z = U; later: the gradient of U, z = dO."""
    out = torch.empty_like(z)
    rows, factors = ((made.reader, made.writer), (None, None)) if shapes.decay == 2 else ((q, k), (made.reader, made.writer))
    if later:
        rows, factors = rows[::-1], factors[::-1]
    if len(chunks.starts):
        options = shapes.options("read")
        axes = {"BLOCKS": shapes.blocks, "KEYS": _padded(shapes.key), "LATER": later, "STATES": states is not None}
        args = *rows, z, decay, made.scores, *factors, made.fade, states, chunks.starts, chunks.chunks, chunks.begins, chunks.ends, out, scale
        grid = len(chunks.starts), shapes.heads, triton.cdiv(shapes.value, options["BV"])
        forward.read[grid](*args, *shapes.numbers, **axes, **options)
    return out


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: None,
    initial: Tensor,
    solved: tuple[Tensor | None, ...],
    do: Tensor,
    dfinal: Tensor,
    chunks: Chunks,
    shapes: _Shapes,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Where nothing is erased: dq, dk, dv, ddecay, None, dinitial"""
    blocks, count, (tokens, heads) = len(chunks.starts), len(chunks.begins), v.shape[:2]
    made = _prepared(q, k, v, decay, beta, chunks, shapes, solved)
    states, _, left = _passed(k, initial, chunks, shapes, made)
    queries, factors = (made.reader, None) if shapes.decay == 2 else (q, made.reader)
    assert queries is not None
    dstates, dinitial, _ = _summed(queries, do, factors, made.fade, dfinal, chunks, shapes, scale, back=True)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), _read(q, k, do, decay, dstates, chunks, shapes, made, scale, later=True)
    options = shapes.options("pair_gradients")
    parts = triton.cdiv(shapes.key, options["BK"])
    moved = recalled = ddecay = None
    if decay is not None:
        of = (shapes.key,) if shapes.decay == 2 else ()
        each = () if of else (parts,)
        moved, recalled = (v.new_empty(*each, n, heads, *of, dtype=torch.float32) for n in (tokens, blocks))
        # per channel it is as large as moved, and takes its place where the type is the same
        ddecay = moved if of and decay.dtype == torch.float32 else torch.empty_like(decay)
    if count:
        axes = {"BLOCKS": shapes.blocks, "VALUES": _padded(shapes.value), "GROUPED": shapes.group > 1}
        places = chunks.starts, chunks.chunks, chunks.begins, chunks.ends
        additive.pair_gradients[blocks * parts, heads // shapes.group](
            *(q, k, v, do, decay, made.reader, made.writer, made.fade, made.firsts, states, dstates, *places, dq, dk, moved, recalled, scale, tokens),
            *(*shapes.numbers, LEVELS),
            **axes,
            **options,
        )
    if count and ddecay is not None:
        options = shapes.options("decay_gradients")
        additive.decay_gradients[count, heads, triton.cdiv(shapes.key, options["BK"]) if shapes.decay == 2 else 1](
            *(moved, recalled, left, states, dstates, chunks.begins, chunks.ends, chunks.firsts, ddecay, blocks, tokens),
            *(heads, shapes.key, shapes.value, parts),
            **options,
        )
    return dq, dk, dv, ddecay, None, dinitial


def _pass_back(
    q: Tensor,
    k: Tensor,
    made: _Prepared,
    do: Tensor,
    du: Tensor,
    dfinal: Tensor,
    dstates: Tensor | None,
    places: tuple[Tensor, ...],
    shapes: _Shapes,
    scale: float,
    parts: Parts | None,
) -> Tensor:
    """backward.pass_gradients -> the gradients of the states before segments or parts [N, H, K, V]"""
    dinitial = torch.empty_like(dfinal)
    if len(dfinal):
        options = shapes.wide(programs=1) if parts else shapes.narrow(len(dfinal))
        backward.pass_gradients[len(dfinal), shapes.heads, triton.cdiv(shapes.value, options["BV"])](
            *(q, k, made.w, made.reader, made.writer, made.fade, do, du, *places, dfinal, dstates, dinitial, scale), *shapes.numbers, **options
        )
    return dinitial


def _delta_gradients(
    parts: Parts | None,
    begun: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    initial: Tensor,
    solved: tuple[Tensor | None, ...],
    do: Tensor,
    dfinal: Tensor,
    chunks: Chunks,
    shapes: _Shapes,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Of the delta rule: dq, dk, dv, ddecay, dbeta, dinitial; begun: of parts."""
    count, (tokens, heads), spans = len(chunks.starts), v.shape[:2], chunks[:2]
    made = _prepared(q, k, v, decay, beta, chunks, shapes, solved)
    states, _, _ = _passed(k, begun[0] if parts else initial, chunks, shapes, made, parts)
    du = _read(q, k, do, decay, None, chunks, shapes, made, scale, later=True)
    places = parts[:2] if parts else (chunks.cuts, chunks.bounds)
    if parts:
        begins = _pass_back(q, k, made, do, du, dfinal.new_zeros(begun[0].shape), None, places, shapes, scale, parts)
        dfinal = gradients_after(dfinal, begun[1], begins, parts)
    dstates = torch.empty_like(states)
    dinitial = _pass_back(q, k, made, do, du, dfinal, dstates, places, shapes, scale, parts)
    if parts:
        dinitial = dinitial[parts.firsts]
    u, solve, firsts, fade, halves = made.u, made.solve, made.firsts, made.fade, made.halves
    del made  # W and the faded queries and keys are as large as the inputs
    options = shapes.options("key_gradients")
    pieces = triton.cdiv(shapes.key, options["BK"])
    on_reads, on_erases = (k.new_empty(tokens, heads, BLOCK) for _ in range(2))
    own, direct = (v.new_empty(tokens, heads, dtype=torch.float32) for _ in range(2))
    dv = torch.empty_like(v)
    dbeta = v.new_empty(pieces, tokens, heads, dtype=torch.float32)
    if count:
        narrow = {name: x for name, x in shapes.options("score_gradients").items() if name != "BK"}
        backward.score_gradients[count, heads](
            *(v, u, decay, solve, do, du, *spans, on_reads, on_erases, own, dv, direct, scale, heads, shapes.value), **narrow
        )
    del du
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    ddecay = None
    if decay is not None:
        ddecay = torch.empty_like(decay) if shapes.decay == 2 else v.new_empty(pieces, tokens, heads, dtype=torch.float32)
    for pairs in shapes.pairs(grouped=True) if count else ():
        backward.key_gradients[count * pieces, heads // shapes.group](
            *(q, k, u, decay, beta, dv, firsts, fade, halves, do, on_reads, on_erases, own, states, dstates, *spans),
            *(dq, dk, ddecay, dbeta, scale, tokens, *shapes.numbers, LEVELS),
            GROUPED=shapes.group > 1,
            PAIRS=pairs,
            **options,
        )
    if ddecay is not None and decay is not None:
        ddecay = (ddecay.sum(0) if shapes.decay == 1 else ddecay).to(decay.dtype)
    # torch takes three times as long for it
    backward.scale_rows[(triton.cdiv(tokens * heads, ROWS),)](dv, beta, tokens * heads, shapes.value, ROWS, _padded(shapes.value))
    return dq, dk, dv, ddecay, dbeta.sum(0).add_(direct).to(beta.dtype), dinitial


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, initial: Tensor, bounds: tuple[int, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        axes = 0 if decay is None else decay.ndim - 1
        shapes = _Shapes(v.shape[1], v.shape[1] // k.shape[1], k.shape[2], v.shape[2], axes, beta is not None, v.dtype == torch.float32)
        chunks = _chunks(bounds, shapes.blocks, v.device)
        made = _prepared(q, k, v, decay, beta, chunks, shapes)
        parts = parts_of(bounds, part, BLOCK, v.device) if (part := shapes.part(bounds)) else None
        begun = _begun(k, initial, shapes, made, parts) if parts else (None, None)
        states, final, _ = _passed(k, initial if begun[0] is None else begun[0], chunks, shapes, made, parts)
        if parts:
            final = final[parts.lasts]
        output = _read(q, k, made.u, decay, states, chunks, shapes, made, scale, later=False)
        ctx.save_for_backward(q, k, v, decay, beta, initial, *made[:3], *begun)
        ctx.chunks, ctx.shapes, ctx.scale, ctx.parts = chunks, shapes, scale, parts
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *inputs, scores, solve, firsts, before, maps = ctx.saved_tensors
        do, dfinal = (grad.contiguous() for grad in grads)
        args = *inputs, (scores, solve, firsts), do, dfinal, ctx.chunks, ctx.shapes, ctx.scale
        found = _delta_gradients(ctx.parts, (before, maps), *args) if ctx.shapes.delta else _gradients(*args)
        return *found, None, None


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
