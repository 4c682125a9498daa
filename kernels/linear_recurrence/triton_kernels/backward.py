"""The programs of the delta rule's backward pass: see the package, and `forward` for the shapes of what prepare leaves."""

import triton
import triton.language as tl

from ltrain.kernels.linear_recurrence.triton_kernels.forward import COUNTS
from ltrain.kernels.linear_recurrence.triton_kernels.tiles import (
    ALL,
    CHANNEL,
    HALVES,
    HEAD,
    LEVELS,
    NONE,
    add_rows,
    decays,
    factors_of_halves,
    factors_of_level,
    fade_between,
    fades_of_rows,
    numbers_at,
    put,
    rows_of,
    split,
    state_at,
    state_of_chunk,
    state_or_zeros,
    state_transposed,
    sums_of,
    tile,
    tile_transposed,
)


@triton.jit
def _pass_chunk_back(
    state,
    t,
    inside,
    chunk,
    k,
    w,
    reader,
    writer,
    fade,
    do,
    du,
    dstates,
    h,
    H,
    G,
    K,
    V,
    offset,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of pass_gradients, as forward._pass_chunk, from the last chunk to the first."""
    low, leaves = state_of_chunk(state, dstates, fade, chunk, h, H, K, V, offset, BK, BV, inside is None, DECAY, k.dtype.element_ty)
    out = tile(do, t, inside, h, H, V, BV, offset)
    if DECAY == NONE:
        key = tile(k, t, inside, h // G, H // G, K, BK, 0)
    else:
        key = tile(writer, t, inside, h, H, K, BK, 0)
        state *= leaves
    stored = tl.dot(key, low, input_precision=DOT)
    state += tl.dot(tile_transposed(reader, t, inside, h, H, K, BK, 0), out, input_precision=DOT)
    write = (stored - tile(du, t, inside, h, H, V, BV, offset)).to(k.dtype.element_ty)  # a difference, as in forward.pass_states
    if dstates is not None:
        put(du, write, t, inside, h, H, V, BV, offset)
    return state + tl.dot(tile_transposed(w, t, inside, h, H, K, BK, 0), write, input_precision=DOT)


@triton.jit(do_not_specialize=COUNTS)
def pass_gradients(
    k,
    w,
    reader,
    writer,
    fade,
    do,
    du,
    opens,
    closes,
    bounds,
    dfinal,
    dstates,
    dinitial,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WHOLE: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of the delta rule. Grid (segments, H, V / BV) -> dstates [chunks, H, K, V] after each chunk, dinitial [N, H, K, V] (None: not wanted); turns du
    from what comes from its own chunk, negative, to all of it. opens, closes, bounds: as for `forward.pass_states`; dfinal [N, H, K, V], None:
    zeros; dstates None: only dinitial is wanted, and du stays as it is."""
    segment, h, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    state = state_or_zeros(dfinal, segment * H + h, K, V, BK, BV, offset)
    rows = tl.arange(0, C)
    begin, end = tl.load(opens + segment), tl.load(closes + segment)
    first, stop = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    given = k, w, reader, writer, fade, do, du, dstates, h, H, G, K, V, offset
    whole = (end - begin) // C if WHOLE else 0  # as in forward.pass_states
    for back in range(stop - first - whole):
        chunk = stop - 1 - back
        start = begin + (chunk - first) * C
        t, inside = (start.to(tl.int64), rows), rows < end - start
        state = _pass_chunk_back(state, t, inside, chunk, *given, BK, BV, DECAY, DOT)
    for back in range(whole):
        chunk = first + whole - 1 - back
        t = (begin + (chunk - first) * C).to(tl.int64), rows
        state = _pass_chunk_back(state, t, None, chunk, *given, BK, BV, DECAY, DOT)
    if dinitial is not None:
        at, exists = state_at(dinitial, segment * H + h, K, V, BK, BV, 0, offset)
        tl.store(at, state, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def score_gradients(
    v,
    u,
    sums,
    solve,
    do,
    du,
    starts,
    stops,
    on_reads,
    on_erases,
    own,
    wide,
    of_beta,
    scale,
    H,
    V,
    C: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> for i < t, of scale q_t . k_i: on_reads, and of -beta_t k_t . k_i: on_erases [T, H, C] (per channel, of what all channels
    add up to), the decay of a head in them; of q_t . k_t: own [T, H]; wide = D [T, H, V]; the part of dbeta that comes through values: the first
    of of_beta [.., T, H]."""
    h = tl.program_id(1)
    t, inside = rows_of(starts, stops, tl.program_id(0), C)
    reads = tl.zeros((C, C), dtype=tl.float32)
    erases = tl.zeros((C, C), dtype=tl.float32)
    db = tl.zeros((C,), dtype=tl.float32)
    inverse = tile_transposed(solve, t, inside, h, H, C, C, 0)
    for offset in range(0, V, BV):
        write = tile_transposed(u, t, inside, h, H, V, BV, offset)
        reads += tl.dot(tile(do, t, inside, h, H, V, BV, offset), write, input_precision=DOT)
        d = tl.dot(inverse, tile(du, t, inside, h, H, V, BV, offset), input_precision=DOT)
        db += tl.sum(d * tile(v, t, inside, h, H, V, BV, offset), 1)
        put(wide, d, t, inside, h, H, V, BV, offset)
        erases += tl.dot(d.to(u.dtype.element_ty), write, input_precision=DOT)
    rows = tl.arange(0, C)
    tl.store(numbers_at(own, t, h, H), tl.sum(tl.where(rows[:, None] == rows[None, :], reads, 0.0), 1) * scale, mask=inside)
    high, low = sums_of(sums, t, inside, h, H, DECAY)
    fades = fade_between(high, low, C, DECAY, True)
    put(on_reads, reads * fades, t, inside, h, H, C, C, 0)
    put(on_erases, erases * fades, t, inside, h, H, C, C, 0)
    tl.store(numbers_at(of_beta, t, h, H), db, mask=inside)


@triton.jit
def _of_pairs(
    on_reads, on_erases, t, inside, h, H, scale, far, onto_read, onto_erase, before, after, CHOSEN: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr
):
    """What tokens i < t give each other [C, B]: keys i = far to the reads and erasures of t, queries and keys t = onto_read and onto_erase to
    what i stores. CHOSEN: of the pairs `before` [t, i] and `after` [i, t] alone."""
    on_read, on_erase = tile(on_reads, t, inside, h, H, C, C, 0), tile(on_erases, t, inside, h, H, C, C, 0)
    if CHOSEN:
        on_read, on_erase = tl.where(before, on_read, 0.0).to(far.dtype), tl.where(before, on_erase, 0.0).to(far.dtype)
    of_read, of_erase = tl.dot(on_read, far, input_precision=DOT), tl.dot(on_erase, far, input_precision=DOT)
    on_read, on_erase = tile_transposed(on_reads, t, inside, h, H, C, C, 0), tile_transposed(on_erases, t, inside, h, H, C, C, 0)
    if CHOSEN:
        on_read, on_erase = tl.where(after, on_read, 0.0).to(far.dtype), tl.where(after, on_erase, 0.0).to(far.dtype)
    # Scaled, and in differences: Triton makes a sum the accumulator of a product, and what is laid out for one (see tiles.add_rows), or computed
    # while another is on its way, has products wait for each other.
    of_store = tl.dot(on_read, onto_read, input_precision=DOT) * scale - tl.dot(on_erase, onto_erase, input_precision=DOT)
    return of_read * scale, of_erase, of_store


@triton.jit(do_not_specialize=COUNTS)
def key_gradients(
    q,
    k,
    u,
    decay,
    beta,
    wide,
    firsts,
    fade,
    halves,
    sums,
    do,
    on_reads,
    on_erases,
    own,
    states,
    dstates,
    starts,
    stops,
    dq,
    dk,
    ddecay,
    of_beta,
    scale,
    T,
    H,
    G,
    K,
    V,
    levels,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    PAIRS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks * K / BK, H) -> dq, dk [T, H, K]; ddecay [T, H, K], or per head what the channels of this program add to it,
    [K / BK, T, H]; likewise of_beta [1 + K / BK, T, H], but for the first of them."""
    parts = tl.cdiv(K, BK)
    chunk, part, h = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    here = part * BK
    if PAIRS != ALL:
        if (tl.load(firsts + chunk * H + h) == levels - 1) != (PAIRS == HALVES):
            return
    t, inside = rows_of(starts, stops, chunk, C)
    rows = tl.arange(0, C)
    dtype = k.dtype.element_ty
    # Through the states: of what reads S, is stored in S', and is erased from what S recalls.
    reading = tl.zeros((C, BK), dtype=tl.float32)
    storing = tl.zeros((C, BK), dtype=tl.float32)
    erasing = tl.zeros((C, BK), dtype=tl.float32)
    fading = tl.zeros((BK,), dtype=tl.float32) if DECAY == CHANNEL else 0.0  # of g_C: <dS', S>, and what is stored
    for column in range(0, V, BV):
        state = state_transposed(states, chunk * H + h, K, V, BK, BV, here, column)
        dstate = state_transposed(dstates, chunk * H + h, K, V, BK, BV, here, column)
        reading += tl.dot(tile(do, t, inside, h, H, V, BV, column), state, input_precision=DOT)
        storing += tl.dot(tile(u, t, inside, h, H, V, BV, column), dstate, input_precision=DOT)
        if DECAY == HEAD:
            at, exists = state_at(states, chunk * H + h, K, V, BK, BV, here, column)
            after, _ = state_at(dstates, chunk * H + h, K, V, BK, BV, here, column)
            products = tl.load(at, mask=exists, other=0.0).to(tl.float32) * tl.load(after, mask=exists, other=0.0).to(tl.float32)
            fading += tl.sum(products)
        if DECAY == CHANNEL:
            fading += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
            # A difference: if all three products were added to their sums, Triton 3.6 would let them go on into the next turn, whose states it loads
            # over those that they read, for `fading` has these in registers too (tests/kernels/compiled.py looks for this).
            erasing -= tl.dot(tile(wide, t, inside, h, H, V, BV, column), state, input_precision=DOT)
        else:
            erasing += tl.dot(tile(wide, t, inside, h, H, V, BV, column), state, input_precision=DOT)
    if DECAY != CHANNEL:
        erasing = -erasing
    if DECAY == HEAD:
        high, low = sums_of(sums, t, inside, h, H, DECAY)
        last = sums + ((tl.load(stops + chunk).to(tl.int64) - 1) * H + h) * 2
        from_start = tl.exp(high)[:, None]
        reading *= from_start
        storing *= tl.exp((tl.load(last) - high) + (tl.load(last + 1) - low))[:, None]
        erasing *= from_start
        fading *= tl.load(fade + chunk * H + h)
    reading *= scale
    query, key = tile(q, t, inside, h // G, H // G, K, BK, here), tile(k, t, inside, h // G, H // G, K, BK, here)
    b = tl.load(numbers_at(beta, t, h, H), mask=inside, other=0.0).to(tl.float32)
    # Through the states, then through the scores, added to the same three; but for a token's score with itself, which does not decay.
    pairs = on_reads, on_erases, t, inside, h, H, scale
    if DECAY == CHANNEL:
        channels = here + tl.arange(0, BK)
        fading *= tl.load(fade + (chunk * H + h).to(tl.int64) * K + channels, mask=channels < K, other=0.0)
        high, low = split(decays(decay, t, inside, h, H, K, BK, here), dtype)
        first = tl.load(firsts + chunk * H + h)
        # Branches, though a launch takes one of them: see tiles.add_rows.
        if PAIRS != LEVELS:
            if first == levels - 1:
                later, earlier, from_start, to_end = factors_of_halves(halves, chunk, h, H, K, BK, here, high, low, C, DOT)
                reading *= from_start
                storing *= to_end
                erasing *= from_start
                fading += tl.sum(storing * key, 0)
                far, onto_read, onto_erase = (key * earlier).to(dtype), (query * later).to(dtype), (key * later * b[:, None]).to(dtype)
                of_read, of_erase, of_store = _of_pairs(*pairs, far, onto_read, onto_erase, None, None, False, C, DOT)
                reading += later * of_read
                erasing -= later * of_erase
                storing += earlier * of_store
        if PAIRS != HALVES:
            if first != levels - 1:
                from_start, to_end, _ = fades_of_rows(high, low, C, DOT)
                reading *= from_start
                storing *= to_end
                erasing *= from_start
                fading += tl.sum(storing * key, 0)
                all_pairs = first > 0
                for level in range(first, levels):
                    later, earlier, before, after = factors_of_level(level, all_pairs, high, low, C, DOT)
                    all_pairs = level < 0
                    far, onto_read, onto_erase = (key * earlier).to(dtype), (query * later).to(dtype), (key * later * b[:, None]).to(dtype)
                    of_read, of_erase, of_store = _of_pairs(*pairs, far, onto_read, onto_erase, before, after, True, C, DOT)
                    reading += later * of_read
                    erasing -= later * of_erase
                    storing += earlier * of_store
    else:
        if DECAY == HEAD:
            fading += tl.sum(storing * key)
        of_read, of_erase, of_store = _of_pairs(*pairs, key, query, (key * b[:, None]).to(dtype), None, None, False, C, DOT)
        reading += of_read
        erasing -= of_erase
        storing += of_store
    tl.store(numbers_at(of_beta + (part + 1).to(tl.int64) * T * H, t, h, H), tl.sum(erasing * key, 1), mask=inside)
    erasing *= b[:, None]
    of_decay = reading * query - storing * key + erasing * key  # of g_t
    # g_t is the sum of the decays up to t: a decay has the gradients of all sums from its own on.
    if DECAY == HEAD:
        total = tl.cumsum(tl.sum(of_decay, 1), 0, reverse=True) + fading
        tl.store(numbers_at(ddecay + part.to(tl.int64) * T * H, t, h, H), total, mask=inside)
    if DECAY == CHANNEL:
        high, low = split(of_decay, k.dtype.element_ty)
        put(ddecay, add_rows(rows[:, None] <= rows[None, :], high, low, DOT) + fading[None, :], t, inside, h, H, K, BK, here)  # type: ignore[index]
    itself = tl.load(numbers_at(own, t, h, H), mask=inside, other=0.0)[:, None]
    put(dq, reading + itself * key, t, inside, h, H, K, BK, here)
    put(dk, storing + itself * query + erasing, t, inside, h, H, K, BK, here)


@triton.jit
def _total(part, rows, parts, exists, ROWS: tl.constexpr):
    """Of so many parts, `rows` numbers from one to the next -> [ROWS]"""
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(part, mask=exists, other=0.0)
        part += rows
    return total


@triton.jit(do_not_specialize=["rows", "parts"])
def sum_parts(dv, beta, of_beta, dbeta, of_decay, ddecay, rows, parts, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr):
    """dv [rows, V] times beta [rows], in place; dbeta [rows] of of_beta [1 + parts, rows], and if decays are per head, ddecay [rows] of
    of_decay [parts, rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    columns = tl.arange(0, BV)
    inside = exists[:, None] & (columns < V)[None, :]
    at = dv + row[:, None] * V + columns[None, :]
    scaled = tl.load(at, mask=inside).to(tl.float32) * tl.load(beta + row, mask=exists).to(tl.float32)[:, None]
    tl.store(at, scaled.to(dv.dtype.element_ty), mask=inside)
    through_values = tl.load(of_beta + row, mask=exists, other=0.0)
    total = _total(of_beta + rows + row, rows, parts, exists, ROWS) + through_values
    tl.store(dbeta + row, total.to(dbeta.dtype.element_ty), mask=exists)
    if ddecay is not None:
        tl.store(ddecay + row, _total(of_decay + row, rows, parts, exists, ROWS).to(ddecay.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows", "G"])
def sum_heads(x, out, rows, G, K, ROWS: tl.constexpr, BK: tl.constexpr):
    """x [rows, G, K] -> out [rows, K], its sums over G in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BK)
    inside = (row < rows)[:, None] & (channels < K)[None, :]
    total = tl.zeros((ROWS, BK), dtype=tl.float32)
    for member in range(G):
        total += tl.load(x + (row * G + member)[:, None] * K + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * K + channels[None, :], total.to(out.dtype.element_ty), mask=inside)
