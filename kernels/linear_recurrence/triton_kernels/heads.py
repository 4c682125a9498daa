"""The programs of recurrences that only add and whose decays are per head, or that have none, beside `additive.add_chunks` and `accumulate`.

Their chunks have several blocks of C tokens, and inside a chunk tokens meet as in attention: token t takes e^{g_t - g_i} of what i <= t gives,
where g is summed from the chunk's start. Output, dV, dQ and dK are all of one form, rows (X Y^T * fade) Z and rows of X times a state:

    o   X = Q,  Y = K,  Z = V,  and the state before the chunk      dQ  X = dO, Y = V,  Z = K,  and that state transposed
    dV  X = K,  Y = Q,  Z = dO, and its gradient after the chunk    dK  X = V,  Y = dO, Z = Q,  and that gradient transposed

with i <= t for o and dQ, and the other way round for dV and dK. Each is a program of its own: nothing that two of them could share would have
to be computed twice, and a program that holds one result leaves room for others on its processor, which compute while it waits for memory.
Four warps have one tensor core instruction for 64 rows; with eight, two warpgroups would share it.
"""

import math

import triton
import triton.language as tl

from ltrain.kernels.linear_recurrence.triton_kernels.forward import COUNTS
from ltrain.kernels.linear_recurrence.triton_kernels.tiles import (
    HEAD,
    both_of_sums,
    bounded,
    numbers_at,
    place_of,
    products_of_rows,
    put,
    state_at,
    state_transposed,
    tile,
    tile_transposed,
)

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit(do_not_specialize=[*COUNTS, "step"])
def sum_decays(decay, begins, ends, reader, writer, left, sums, step, H, C: tl.constexpr, HEADS: tl.constexpr):
    """Grid (chunks, H / HEADS): of decay [T, H], `step` numbers from one token to the next, with g summed from the start of each chunk, sums
    [T, H, 2]: log2 e^g and what float32 loses of it; reader = e^{g_t} and writer = e^{g_last - g_t} [T, H], left = e^{g_last} [chunks, H]."""
    chunk = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    begin, end = tl.load(begins + chunk).to(tl.int64), tl.load(ends + chunk).to(tl.int64)
    rows = tl.arange(0, C)
    last = tl.zeros((HEADS,), dtype=tl.float64)
    for start in range(begin, end, C):
        t = start + rows
        exists = (t < end)[:, None] & (heads < H)[None, :]
        last += tl.sum(bounded(tl.load(decay + t[:, None] * step + heads[None, :], mask=exists, other=0.0)).to(tl.float64), 0)
    tl.store(left + chunk * H + heads, tl.exp(last.to(tl.float32)), mask=heads < H)
    before = tl.zeros((HEADS,), dtype=tl.float64)
    for start in range(begin, end, C):
        t = start + rows
        exists = (t < end)[:, None] & (heads < H)[None, :]
        at = t[:, None] * H + heads[None, :]
        x = bounded(tl.load(decay + t[:, None] * step + heads[None, :], mask=exists, other=0.0)).to(tl.float64)
        g = tl.cumsum(x, 0) + before[None, :]
        before += tl.sum(x, 0)
        power = g * LOG2E
        high = power.to(tl.float32)
        tl.store(sums + at * 2, high, mask=exists)
        tl.store(sums + at * 2 + 1, (power - high).to(tl.float32), mask=exists)
        tl.store(reader + at, tl.exp(g.to(tl.float32)), mask=exists)
        tl.store(writer + at, tl.exp((last[None, :] - g).to(tl.float32)), mask=exists)


@triton.jit
def _sums(sums, t, inside, h, H, DECAY: tl.constexpr):
    """log2 e^g of a head, and what float32 loses of it [C, 2]; see tiles.both_of_sums."""
    if DECAY == HEAD:
        found = both_of_sums(sums, t, inside, h, H)
    else:
        found = 0.0
    return found


@triton.jit
def _meet(tokens, those, LATER: tl.constexpr, STRICT: tl.constexpr):
    """Whether each row's token takes of those beside it -> [C, C]. Those that are not there are zeros, or come after all that are."""
    t, others = tokens[1], those[1]
    if LATER:
        meet = (others[None, :] > t[:, None]) if STRICT else (others[None, :] >= t[:, None])
    else:
        before = t[:, None] - others[None, :]  # fewer instructions than comparing them
        meet = before > 0 if STRICT else before >= 0
    return meet


@triton.jit
def _faded(x, ours, theirs, DECAY: tl.constexpr, LATER: tl.constexpr):
    """x [C, C] times what is left between each row's token and the tokens beside them, of their _sums. Differences of sums are exact or long ones,
    and no exponent is above 0: where tokens do not _meet, which x or the result is to be 0 for, e^0. A bound takes one instruction, who meets two."""
    if DECAY == HEAD:
        high, low = tl.split(ours)
        high_there, low_there = tl.split(theirs)
        if LATER:
            gaps = (high_there[None, :] - high[:, None]) + (low_there[None, :] - low[:, None])
        else:
            gaps = (high[:, None] - high_there[None, :]) + (low[:, None] - low_there[None, :])
        # A gap that is no number becomes 0 on a GPU: tokens before it do not see it, and those after it are none by their factor of the state.
        x *= tl.exp2(tl.minimum(gaps, 0.0))
    return x


@triton.jit
def _weights(factors, t, inside, h, H, scale, DECAY: tl.constexpr, LATER: tl.constexpr):
    """What rows take of a state has to be multiplied by [C]: the gradient of a state, for LATER, has the scale in it."""
    weights = tl.full(inside.shape, 1.0, dtype=tl.float32)
    if DECAY == HEAD:
        weights = tl.load(numbers_at(factors, t, h, H), mask=inside, other=0.0)
    if not LATER:
        weights *= scale
    return weights


@triton.jit(do_not_specialize=COUNTS)
def read(
    x,
    y,
    z,
    sums,
    factors,
    states,
    starts,
    chunks,
    begins,
    ends,
    out,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,
    DECAY: tl.constexpr,
    LATER: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks, H, V / BV) -> out [T, H, V] of z [T, H, V] for x and y [T, H / G, K]: o, or LATER dV; states [chunks, H, K, V] and their
    factors [T, H]."""
    block, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    chunk, t, length, count, after = place_of(block, starts, chunks, begins, ends, C)
    inside = t[1] < length
    dtype = x.dtype.element_ty
    step = -1
    if LATER:
        count, step = after, 1
    if BK == KEYS:
        query = tile(x, t, inside, h // G, H // G, K, BK, 0)
    result = tl.zeros((C, BV), dtype=tl.float32)
    for row in tl.range(0, K, BK, num_stages=1):  # of one as well: a product in no loop would keep its tiles in shared memory during what follows
        at, exists = state_at(states, chunk * H + h, K, V, BK, BV, row, column)
        if BK != KEYS:
            query = tile(x, t, inside, h // G, H // G, K, BK, row)
        result += tl.dot(query, tl.load(at, mask=exists, other=0.0), input_precision=DOT)
    result *= _weights(factors, t, inside, h, H, scale, DECAY, LATER)[:, None]
    ours = _sums(sums, t, inside, h, H, DECAY)
    for n in range(count + 1):
        others = t[0], t[1] + step * n * C
        exist = others[1] < length
        if BK == KEYS:
            near = tl.dot(query, tile_transposed(y, others, exist, h // G, H // G, K, BK, 0), input_precision=DOT) * scale
        else:
            near = products_of_rows(x, y, t, inside, others, exist, h // G, H // G, K, C, BK, False, DOT) * scale
        near = tl.where(_meet(t, others, LATER, False), near, 0.0)
        faded = _faded(near, ours, _sums(sums, others, exist, h, H, DECAY), DECAY, LATER).to(dtype)
        result += tl.dot(faded, tile(z, others, exist, h, H, V, BV, column), input_precision=DOT)
    put(out, result, t, inside, h, H, V, BV, column)


@triton.jit(do_not_specialize=COUNTS)
def read_together(
    x,
    y,
    z,
    sums,
    factors,
    states,
    begins,
    ends,
    out,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    LATER: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H / G): as `read`, for chunks of no more than C tokens and BK and BV channels that are all. A program has the scores X Y^T of a
    chunk, which the value heads of a key head share, and goes through these in a loop, which loads ahead."""
    chunk, source = tl.program_id(0), tl.program_id(1)
    begin = tl.load(begins + chunk)
    length = tl.load(ends + chunk) - begin
    t = begin.to(tl.int64), tl.arange(0, C)
    inside = t[1] < length
    dtype = x.dtype.element_ty
    query = tile(x, t, inside, source, H // G, K, BK, 0)
    near = tl.dot(query, tile_transposed(y, t, inside, source, H // G, K, BK, 0), input_precision=DOT) * scale
    near = tl.where(_meet(t, t, LATER, False), near, 0.0)
    weights = _weights(factors, t, inside, source * G, H, scale, DECAY, LATER)
    for member in range(G):
        h = source * G + member
        at, exists = state_at(states, chunk * H + h, K, V, BK, BV, 0, 0)
        result = tl.dot(query, tl.load(at, mask=exists, other=0.0), input_precision=DOT) * weights[:, None]
        weights = _weights(factors, t, inside & (member + 1 < G), h + 1, H, scale, DECAY, LATER)  # loaded one value head ahead
        own = _sums(sums, t, inside, h, H, DECAY)
        faded = _faded(near, own, own, DECAY, LATER).to(dtype)
        result += tl.dot(faded, tile(z, t, inside, h, H, V, BV, 0), input_precision=DOT)
        put(out, result, t, inside, h, H, V, BV, 0)


@triton.jit(do_not_specialize=COUNTS)
def pair_scores(
    q,
    k,
    v,
    do,
    sums,
    starts,
    chunks,
    begins,
    ends,
    pairs,
    reads,
    writes,
    scale,
    slot,
    T,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    DECAY: tl.constexpr,
    MOVES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks, H / G, blocks of a chunk), where several value heads have one key head -> pairs [blocks of a chunk, T, H / G, C], of dO and
    V [T, H, V] what all of them have from a query's meeting a key, scale sum_h fade dO_t V_i^T: t's with the keys of its own block, of the one
    before, and so on.

    And for `decay_gradients`, where MOVES: what each value head's queries and keys moved there, sum_i (Q K^T)_ti (fade * dO V^T)_ti and
    sum_t of the same numbers, but for what a token has of itself: in reads and writes [parts, T, H], one for each such block from part `slot` on.
    """
    block, source, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, t, length, count, _ = place_of(block, starts, chunks, begins, ends, C)
    if n > count:
        return
    inside = t[1] < length
    others = t[0], t[1] - n * C
    exist = others[1] < length
    if MOVES:
        scores = products_of_rows(q, k, t, inside, others, exist, source, H // G, K, C, BK, BK == KEYS, DOT) * scale
        scores = tl.where(_meet(t, others, False, True), scores, 0.0)
    near = tl.zeros((C, C), dtype=tl.float32)
    # Loaded one value head ahead: Triton does that for what goes into products only.
    ours, theirs = _sums(sums, t, inside, source * G, H, DECAY), _sums(sums, others, exist, source * G, H, DECAY)
    for member in range(G):
        h = source * G + member
        of_head = products_of_rows(do, v, t, inside, others, exist, h, H, V, C, BV, BV == VALUES, DOT)
        of_head = _faded(of_head, ours, theirs, DECAY, False)
        near += of_head
        more = member + 1 < G
        ours, theirs = _sums(sums, t, inside & more, h + 1, H, DECAY), _sums(sums, others, exist & more, h + 1, H, DECAY)
        if MOVES:
            of_head *= scores
            part = (slot + n).to(tl.int64) * T * H
            tl.store(numbers_at(reads + part, t, h, H), tl.sum(of_head, 1), mask=inside)
            tl.store(numbers_at(writes + part, others, h, H), tl.sum(of_head, 0), mask=exist)
    near = tl.where(_meet(t, others, False, False), near * scale, 0.0)
    put(pairs + n.to(tl.int64) * T * (H // G) * C, near, t, inside, source, H // G, C, C, 0)


@triton.jit(do_not_specialize=[*COUNTS, "blocks"])
def pair_gradients(
    x,
    y,
    z,
    itself,
    pairs,
    sums,
    factors,
    states,
    starts,
    chunks,
    begins,
    ends,
    out,
    moved,
    recalled,
    scale,
    blocks,
    T,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    DECAY: tl.constexpr,
    LATER: tl.constexpr,
    GROUPED: tl.constexpr,
    MOVES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks, K / BK, H / G) -> out [T, H / G, K]: dQ, or LATER dK, of x and y [T, H, V] and z [T, H / G, K]; itself [T, H / G, K]: q or k.

    And for `decay_gradients`, where MOVES: moved = q_t dq_t or k_t dk_t [K / BK, T, H] but for what a token has of itself, and, not LATER,
    what of it comes from the state before the chunk, summed over the block: recalled [K / BK, blocks, H]. GROUPED, what the value heads have in
    a chunk comes from `pair_scores` as a sum, pairs, which has what each moves there, too: moved is only what comes through the state.
    """
    block, part, source = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = part * BK
    chunk, t, length, count, after = place_of(block, starts, chunks, begins, ends, C)
    inside = t[1] < length
    dtype = x.dtype.element_ty
    step = -1
    if LATER:
        count, step = after, 1
    if GROUPED:
        tokens = tl.cast(T, tl.int64)
        total = tl.zeros((C, BK), dtype=tl.float32)
        if MOVES:
            own = tile(itself, t, inside, source, H // G, K, BK, here)
        weights = _weights(factors, t, inside, source * G, H, scale, DECAY, LATER)  # loaded one value head ahead
        for member in range(G):
            h = source * G + member
            if BV == VALUES:  # in no loop of its own, so that this one can load ahead
                row = tile(x, t, inside, h, H, V, BV, 0)
                of_state = tl.dot(row, state_transposed(states, chunk * H + h, K, V, BK, BV, here, 0), input_precision=DOT)
            else:
                of_state = tl.zeros((C, BK), dtype=tl.float32)
                for column in range(0, V, BV):
                    row = tile(x, t, inside, h, H, V, BV, column)
                    of_state += tl.dot(row, state_transposed(states, chunk * H + h, K, V, BK, BV, here, column), input_precision=DOT)
            if MOVES:
                moves = tl.sum(of_state * own, 1) * weights
                tl.store(numbers_at(moved + part.to(tl.int64) * T * H, t, h, H), moves, mask=inside)
            total += of_state * weights[:, None]
            weights = _weights(factors, t, inside & (member + 1 < G), h + 1, H, scale, DECAY, LATER)
        for n in range(count + 1):
            others = t[0], t[1] + step * n * C
            exist = others[1] < length
            slot = pairs + n * tokens * (H // G) * C
            if LATER:
                near = tile_transposed(slot, others, exist, source, H // G, C, C, 0)
            else:
                near = tile(slot, t, inside, source, H // G, C, C, 0)
            total += tl.dot(near, tile(z, others, exist, source, H // G, K, BK, here), input_precision=DOT)
    else:
        if BV == VALUES:
            row = tile(x, t, inside, source, H, V, BV, 0)
        total = tl.zeros((C, BK), dtype=tl.float32)
        for column in tl.range(0, V, BV, num_stages=1):  # see `read`
            if BV != VALUES:
                row = tile(x, t, inside, source, H, V, BV, column)
            total += tl.dot(row, state_transposed(states, chunk * H + source, K, V, BK, BV, here, column), input_precision=DOT)
        total *= _weights(factors, t, inside, source, H, scale, DECAY, LATER)[:, None]
        if MOVES and not LATER:
            recalls = tl.sum(total * tile(itself, t, inside, source, H, K, BK, here), 1)
            tl.store(recalled + (part * blocks + block) * H + source, tl.sum(recalls, 0))
        ours = _sums(sums, t, inside, source, H, DECAY)
        for n in range(count + 1):
            others = t[0], t[1] + step * n * C
            exist = others[1] < length
            if BV == VALUES:
                near = tl.dot(row, tile_transposed(y, others, exist, source, H, V, BV, 0), input_precision=DOT) * scale
            else:
                near = products_of_rows(x, y, t, inside, others, exist, source, H, V, C, BV, False, DOT) * scale
            # Rounded alike for queries and keys: the difference of what they move is a decay's gradient, to which a token itself adds nothing.
            near = tl.where(_meet(t, others, LATER, MOVES), near, 0.0)
            near = _faded(near, ours, _sums(sums, others, exist, source, H, DECAY), DECAY, LATER)
            total += tl.dot(near.to(dtype), tile(z, others, exist, source, H, K, BK, here), input_precision=DOT)
        if MOVES:
            moves = tl.sum(total * tile(itself, t, inside, source, H, K, BK, here), 1)
            tl.store(numbers_at(moved + part.to(tl.int64) * T * H, t, source, H), moves, mask=inside)
            alone = tl.zeros((C,), dtype=tl.float32)
            for column in tl.range(0, V, BV, num_stages=1):
                own = tile(x, t, inside, source, H, V, BV, column).to(tl.float32)
                alone += tl.sum(own * tile(y, t, inside, source, H, V, BV, column), 1)
            total += (alone * scale)[:, None] * tile(z, t, inside, source, H, K, BK, here)
    put(out, total, t, inside, source, H // G, K, BK, here)


@triton.jit
def gradients_across(states, dstates, left, passing, numbers, N: tl.constexpr):
    """Grid (chunks * H): of each state of so many numbers before a chunk and the gradient of that after it, what the decays of all of the chunk
    have of them -> passing [chunks, H]"""
    at = tl.program_id(0).to(tl.int64)
    products = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, numbers, N):
        place = start + tl.arange(0, N)
        x = tl.load(states + at * numbers + place, mask=place < numbers, other=0.0).to(tl.float32)
        products += x * tl.load(dstates + at * numbers + place, mask=place < numbers, other=0.0).to(tl.float32)
    tl.store(passing + at, tl.sum(products, 0) * tl.load(left + at))


@triton.jit(do_not_specialize=[*COUNTS, "blocks", "parts"])
def decay_gradients(
    reads, writes, recalled, passing, begins, ends, firsts, ddecay, blocks, T, H, parts, C: tl.constexpr, HEADS: tl.constexpr, GROUPED: tl.constexpr
):
    """Grid (chunks, H / HEADS) -> ddecay [T, H], of what queries and keys moved and of passing, from `gradients_across`: see `pair_gradients`, and
    additive.decay_gradients for the sums."""
    chunk = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    begin, end = tl.load(begins + chunk).to(tl.int64), tl.load(ends + chunk).to(tl.int64)
    block = tl.load(firsts + chunk)
    count = tl.cdiv(end - begin, C).to(tl.int32)
    rows = tl.arange(0, C)
    passes = tl.load(passing + chunk * H + h, mask=h < H, other=0.0).to(tl.float64)
    for place in range(count):
        t = begin + place * C + rows
        exist = (t < end)[:, None] & (h < H)[None, :]
        for part in range(parts):
            if GROUPED:
                of_state = tl.load(reads + (part * T + t)[:, None] * H + h[None, :], mask=exist, other=0.0)
                passes += tl.sum(of_state.to(tl.float64), 0)
            else:
                passes += tl.load(recalled + (part * blocks + block + place) * H + h, mask=h < H, other=0.0).to(tl.float64)
    for place in range(count):
        t = begin + place * C + rows
        exist = (t < end)[:, None] & (h < H)[None, :]
        read_parts, write_parts = parts, parts
        if GROUPED:
            read_parts, write_parts = parts + place + 1, parts + count - place
        x = tl.zeros((C, HEADS), dtype=tl.float64)
        for part in range(read_parts):
            x += tl.load(reads + (part * T + t)[:, None] * H + h[None, :], mask=exist, other=0.0).to(tl.float64)
        for part in range(write_parts):
            x -= tl.load(writes + (part * T + t)[:, None] * H + h[None, :], mask=exist, other=0.0).to(tl.float64)
        found = passes[None, :] - (tl.cumsum(x, 0) - x)
        tl.store(ddecay + t[:, None] * H + h[None, :], found.to(ddecay.dtype.element_ty), mask=exist)
        passes -= tl.sum(x, 0)
