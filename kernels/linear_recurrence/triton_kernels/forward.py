"""The programs of the forward pass: see the package. q, k [T, H / G, K], v [T, H, V], beta [T, H], decay [T, H] or [T, H, K].

For the programs that go chunk by chunk, prepare leaves what the decays make of queries and keys. Per channel: reader = e^{g_t} q_t and
writer = e^{g_C - g_t} k_t [T, H, K]; per head the factors e^{g_t} and e^{g_C - g_t} alone [T, H]; fade = e^{g_C} [chunks, H, K] or [chunks, H].
"""

import triton
import triton.language as tl

from ltrain.kernels.linear_recurrence.triton_kernels.tiles import (
    CHANNEL,
    HEAD,
    NONE,
    add_columns,
    add_rows,
    decays,
    decays_transposed,
    fade_between,
    fade_of,
    first_level,
    from_middle,
    inverse_of,
    last_of,
    pair_spans,
    pair_spans_transposed,
    products_of_rows,
    put,
    rows_of,
    split,
    state_at,
    sums,
    tile,
    tile_transposed,
    to_middle,
)

# No kernel is compiled anew for another number of heads; and a loop over a constant number of levels would be unrolled, beyond all registers.
COUNTS = ["T", "H", "G", "levels"]


@triton.jit
def _scores_by_channel(q, k, decay, t, inside, h, H, G, K, first, levels, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr):
    """R and sum_c k_t k_i e^{g_t - g_i} below the diagonal -> [C, C] each"""
    rows = tl.arange(0, C)
    reads = tl.zeros((C, C), dtype=tl.float32)
    recalls = tl.zeros((C, C), dtype=tl.float32)
    for offset in range(0, K, BK):
        query, key = tile(q, t, inside, h // G, H // G, K, BK, offset), tile(k, t, inside, h // G, H // G, K, BK, offset)
        key_columns = tile_transposed(k, t, inside, h // G, H // G, K, BK, offset)
        high, low = split(decays(decay, t, inside, h, H, K, BK, offset), k.dtype.element_ty)
        high_columns, low_columns = split(decays_transposed(decay, t, inside, h, H, K, BK, offset), k.dtype.element_ty)
        itself = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)
        reads += tl.where(rows[:, None] == rows[None, :], itself[:, None], 0.0)
        all_pairs = first > 0
        for level in range(first, levels):
            spans, odd, pairs = pair_spans(level, all_pairs, C)
            later = from_middle(add_rows(spans, high, low, DOT), odd, all_pairs)
            spans, odd, _ = pair_spans_transposed(level, all_pairs, C)
            earlier = key_columns * to_middle(add_columns(high_columns, low_columns, spans, DOT), odd, all_pairs)
            earlier = earlier.to(k.dtype.element_ty)
            reads += tl.where(pairs, tl.dot((query * later).to(k.dtype.element_ty), earlier, input_precision=DOT), 0.0)
            if DELTA:
                recalls += tl.where(pairs, tl.dot((key * later).to(k.dtype.element_ty), earlier, input_precision=DOT), 0.0)
            all_pairs = level < 0
    return reads, recalls


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    q,
    k,
    v,
    decay,
    beta,
    starts,
    stops,
    scores,
    solve,
    firsts,
    w,
    u,
    reader,
    writer,
    fade,
    H,
    G,
    K,
    V,
    levels,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    SOLVED: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> scores = R, solve = T [T, H, C], firsts [chunks, H] (int32, of
    tiles.first_level), which are there already where SOLVED; w [T, H, K], u = U0 [T, H, V], reader, writer, fade"""
    chunk, h = tl.program_id(0), tl.program_id(1)
    t, inside = rows_of(starts, stops, chunk, C)
    rows = tl.arange(0, C)
    dtype = k.dtype.element_ty
    if DECAY == HEAD:
        g = sums(decay, t, inside, h, H, DECAY, C)
        last = tl.sum(tl.where(rows == C - 1, g, 0.0), 0)
        from_start = tl.exp(g.to(tl.float32))
        tl.store(reader + t * H + h, from_start, mask=inside)
        tl.store(writer + t * H + h, tl.exp((last - g).to(tl.float32)), mask=inside)
        tl.store(fade + (chunk * H + h).to(tl.int64), tl.exp(last.to(tl.float32)))
    if DELTA:
        b = tl.load(beta + t * H + h, mask=inside, other=0.0).to(tl.float32)
    if not SOLVED:
        if DECAY == CHANNEL:
            first = levels - 1
            for offset in range(0, K, BK):
                first = tl.minimum(first, first_level(decays(decay, t, inside, h, H, K, BK, offset), dtype, C))
            tl.store(firsts + chunk * H + h, first)
            reads, recalls = _scores_by_channel(q, k, decay, t, inside, h, H, G, K, first, levels, C, BK, DELTA, DOT)
            put(scores, reads, t, inside, h, H, C, C, 0)
        if DELTA:
            if DECAY == CHANNEL:
                a = recalls
            else:
                a = products_of_rows(k, k, t, inside, h // G, H // G, K, C, BK, DOT) * fade_between(sums(decay, t, inside, h, H, DECAY, C), C, True)
            inverse = inverse_of(a * b[:, None], C, DOT).to(dtype)
            put(solve, inverse, t, inside, h, H, C, C, 0)
    elif DELTA:
        inverse = tile(solve, t, inside, h, H, C, C, 0)
    if DELTA or DECAY == CHANNEL:
        for offset in range(0, K, BK):
            key = tile(k, t, inside, h // G, H // G, K, BK, offset)
            if DECAY == CHANNEL:
                high, low = split(decays(decay, t, inside, h, H, K, BK, offset), k.dtype.element_ty)
                g_channels = add_rows(rows[:, None] >= rows[None, :], high, low, DOT)
                columns = offset + tl.arange(0, BK)
                tl.store(fade + (chunk * H + h).to(tl.int64) * K + columns, tl.exp(last_of(g_channels, C)), mask=columns < K)
                from_start_channels = tl.exp(g_channels)
                query = tile(q, t, inside, h // G, H // G, K, BK, offset)
                put(reader, query * from_start_channels, t, inside, h, H, K, BK, offset)
                to_end = tl.exp(add_rows(rows[:, None] < rows[None, :], high, low, DOT))
                put(writer, key * to_end, t, inside, h, H, K, BK, offset)
            if DELTA:
                faded = key * b[:, None]
                if DECAY == HEAD:
                    faded *= from_start[:, None]
                if DECAY == CHANNEL:
                    faded *= from_start_channels
                put(w, tl.dot(inverse, faded.to(dtype), input_precision=DOT), t, inside, h, H, K, BK, offset)
    if DELTA:
        for offset in range(0, V, BV):
            value = (tile(v, t, inside, h, H, V, BV, offset) * b[:, None]).to(dtype)
            put(u, tl.dot(inverse, value, input_precision=DOT), t, inside, h, H, V, BV, offset)


@triton.jit(do_not_specialize=COUNTS)
def pass_states(
    k,
    w,
    u,
    writer,
    fade,
    cuts,
    bounds,
    initial,
    states,
    final,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of the delta rule. Grid (segments, H, V / BV) -> states [chunks, H, K, V] before each chunk, final [N, H, K, V]; turns u from U0 to U.

    cuts [N + 1]: the tokens, bounds [N + 1]: the chunks of each segment; initial [N, H, K, V].
    """
    segment, h, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    at, exists = state_at(initial, segment * H + h, K, V, BK, BV, 0, offset)
    state = tl.load(at, mask=exists, other=0.0)
    rows = tl.arange(0, C)
    begin, end = tl.load(cuts + segment).to(tl.int64), tl.load(cuts + segment + 1).to(tl.int64)
    first, stop = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    # What is not part of a product is not loaded ahead unless written so, and a chunk would wait for it.
    following = fade_of(fade, first, first < stop, h, H, K, DECAY, BK)
    for chunk in range(first, stop):
        before, here = state_at(states, chunk * H + h, K, V, BK, BV, 0, offset)
        low = state.to(k.dtype.element_ty)
        tl.store(before, low, mask=here)
        # No address is loaded, so that the tiles of the next chunk can be on their way.
        t = begin + (chunk - first) * C + rows
        inside = t < end
        erased = tl.dot(tile(w, t, inside, h, H, K, BK, 0), low, input_precision=DOT)
        write = (tile(u, t, inside, h, H, V, BV, offset) - erased).to(k.dtype.element_ty)
        put(u, write, t, inside, h, H, V, BV, offset)
        if DECAY == CHANNEL:
            key = tile_transposed(writer, t, inside, h, H, K, BK, 0)
        else:
            key = tile_transposed(k, t, inside, h // G, H // G, K, BK, 0)
        if DECAY == HEAD:
            write = (write * tl.load(writer + t * H + h, mask=inside, other=0.0)[:, None]).to(k.dtype.element_ty)
        if DECAY != NONE:
            state *= following
            following = fade_of(fade, chunk + 1, chunk + 1 < stop, h, H, K, DECAY, BK)
        state += tl.dot(key, write, input_precision=DOT)
    at, exists = state_at(final, segment * H + h, K, V, BK, BV, 0, offset)
    tl.store(at, state, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def add_chunks(
    x,
    y,
    factors,
    starts,
    stops,
    added,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> added [chunks, H, K, V] = scale sum_t f_t x_t y_t^T over each chunk's tokens.

    What its writes add to the state (x: keys, y: U) or, in the backward, its reads to the gradient (x: queries, y: dO). factors [T, H]: of
    decays per head; those per channel are in x [T, H, K] already.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    t, inside = rows_of(starts, stops, chunk, C)
    if DECAY == HEAD:
        f = tl.load(factors + t * H + h, mask=inside, other=0.0)
    for column in range(0, V, BV):
        write = tile(y, t, inside, h, H, V, BV, column)
        if DECAY == HEAD:
            write = (write * f[:, None]).to(x.dtype.element_ty)
        for row in range(0, K, BK):
            if DECAY == CHANNEL:
                key = tile_transposed(x, t, inside, h, H, K, BK, row)
            else:
                key = tile_transposed(x, t, inside, h // G, H // G, K, BK, row)
            at, exists = state_at(added, chunk * H + h, K, V, BK, BV, row, column)
            tl.store(at, (tl.dot(key, write, input_precision=DOT) * scale).to(added.dtype.element_ty), mask=exists)


@triton.jit
def meet(at, added, chunk, exists, fade, state, inside, h, H, K, rows, DECAY: tl.constexpr):
    """One chunk of `accumulate`: the state is kept, fades and is added to."""
    tl.store(at, state.to(at.dtype.element_ty), mask=inside & exists)
    if DECAY == CHANNEL:
        state *= tl.load(fade + (chunk * H + h).to(tl.int64) * K + rows, mask=inside & exists, other=1.0)
    if DECAY == HEAD:
        state *= tl.load(fade + (chunk * H + h).to(tl.int64), mask=exists, other=1.0)
    return state + added.to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def accumulate(
    states,
    fade,
    bounds,
    initial,
    final,
    H,
    K,
    V,
    N: tl.constexpr,
    DECAY: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Grid (segments, H, K V / N): turns states [chunks, H, K, V] from what each chunk adds to what is there before it, in the order of the
    chunks or from the last one back; initial and final [N, H, K, V] stand before and after all of a segment."""
    segment, h = tl.program_id(0), tl.program_id(1)
    place = tl.program_id(2) * N + tl.arange(0, N)
    inside = place < K * V
    whole = (segment * H + h).to(tl.int64) * K * V
    state = tl.load(initial + whole + place, mask=inside, other=0.0)
    rows = place // V
    first = tl.load(bounds + segment)
    count = tl.load(bounds + segment + 1) - first
    step = 1
    if BACKWARD:
        first, step = first + count - 1, -1
    # Four chunks are loaded together: each waits for memory, and the next state for each.
    for done in range(0, count, 4):
        a = first + step * done
        b, c, d = a + step, a + 2 * step, a + 3 * step
        at_a = states + (a * H + h).to(tl.int64) * K * V + place
        at_b = states + (b * H + h).to(tl.int64) * K * V + place
        at_c = states + (c * H + h).to(tl.int64) * K * V + place
        at_d = states + (d * H + h).to(tl.int64) * K * V + place
        added_a = tl.load(at_a, mask=inside, other=0.0)
        added_b = tl.load(at_b, mask=inside & (done + 1 < count), other=0.0)
        added_c = tl.load(at_c, mask=inside & (done + 2 < count), other=0.0)
        added_d = tl.load(at_d, mask=inside & (done + 3 < count), other=0.0)
        state = meet(at_a, added_a, a, True, fade, state, inside, h, H, K, rows, DECAY)
        state = meet(at_b, added_b, b, done + 1 < count, fade, state, inside, h, H, K, rows, DECAY)
        state = meet(at_c, added_c, c, done + 2 < count, fade, state, inside, h, H, K, rows, DECAY)
        state = meet(at_d, added_d, d, done + 3 < count, fade, state, inside, h, H, K, rows, DECAY)
    tl.store(final + whole + place, state, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def read(
    q,
    k,
    u,
    decay,
    scores,
    reader,
    states,
    starts,
    stops,
    o,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> o [T, H, V]"""
    chunk, h = tl.program_id(0), tl.program_id(1)
    t, inside = rows_of(starts, stops, chunk, C)
    if DECAY == CHANNEL:
        reads = tile(scores, t, inside, h, H, C, C, 0)
    else:
        g = sums(decay, t, inside, h, H, DECAY, C)
        reads = (products_of_rows(q, k, t, inside, h // G, H // G, K, C, BK, DOT) * fade_between(g, C, False)).to(q.dtype.element_ty)
        from_start = tl.exp(g.to(tl.float32))
    for column in range(0, V, BV):
        out = tl.zeros((C, BV), dtype=tl.float32)
        for row in range(0, K, BK):
            at, exists = state_at(states, chunk * H + h, K, V, BK, BV, row, column)
            if DECAY == CHANNEL:
                query = tile(reader, t, inside, h, H, K, BK, row)
            else:
                query = tile(q, t, inside, h // G, H // G, K, BK, row)
            out += tl.dot(query, tl.load(at, mask=exists, other=0.0), input_precision=DOT)
        if DECAY == HEAD:
            out *= from_start[:, None]
        out += tl.dot(reads, tile(u, t, inside, h, H, V, BV, column), input_precision=DOT)
        put(o, out * scale, t, inside, h, H, V, BV, column)
