"""Elementwise recurrences on a GPU: what one program computes, one chunk of tokens x one block of channels.

Channels alone do not fill a GPU, so time is cut into chunks of tokens, wherever documents begin in them: a pass makes each chunk's state from zeros
(`scan_locals`, `selective_locals`), `carry` makes of those the states that chunks begin with, and a second pass goes through the chunk again from
there. The gradient of the state takes the same three passes from the other end. Inside a chunk a program goes token by token.

Arrays of states are [.., S, C] with channels last, S the states of a channel: tiles of states are [states, channels] with one or more whole
channels to a thread, so that sums over states stay inside threads. `begins` [T] is the document that begins at a token and `ends` [T] the one
that ends there, or -1. Tokens behind the stream's end read as zeros, which leave states as they are (selective scan) or are followed by nothing.
Rows are read a few at a time ahead of their use, because loads do not move above stores by themselves.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(C, first, BC: tl.constexpr):
    """Of this program: its chunk's number counted from 0 and from the stream's, which begins with `first`, and its channels [BC]"""
    blocks = tl.cdiv(C, BC)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    return slot, slot + first, (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)


@triton.jit
def _rows(base, t, T, width, at, exists, COUNT: tl.constexpr):
    """COUNT rows of base [T, width] from row t on at the offsets `at`, a tuple of float32 [channels]"""
    rows = tl.tuple(())
    begin = base + t * width  # 64 bits wide, unlike offsets inside a few rows
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(begin + (i * width + at), mask=exists & (t + i < T), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _documents(base, t, T, COUNT: tl.constexpr):
    """COUNT numbers of `begins` or `ends` from token t on"""
    found = tl.tuple(())
    for i in tl.static_range(COUNT):
        found = found + (tl.load(base + t + i, mask=t + i < T, other=-1),)
    return found


@triton.jit
def _numbers(base, S, COUNT: tl.constexpr):
    """The numbers that COUNT rows [S] have at `base`"""
    numbers = tl.tuple(())
    for i in tl.static_range(COUNT):
        numbers = numbers + (tl.load(base + i * S),)
    return numbers


@triton.jit
def _before(h, document, initial, width, at, exists, INITIAL: tl.constexpr):
    """The state before a token: h, unless `document` begins with it, at the offsets `at` of initial states [documents, width]"""
    given = 0.0
    if INITIAL:
        given = tl.load(initial + document.to(tl.int64) * width + at, mask=exists & (document >= 0), other=0.0)
    return tl.where(document >= 0, given, h)


@triton.jit
def _after(g, document, dfinal, width, at, exists, FINAL: tl.constexpr):
    """g and, where `document` ends, the gradient of its final state, at the offsets `at` of dfinal [documents, width]"""
    if FINAL:
        g += tl.load(dfinal + document.to(tl.int64) * width + at, mask=exists & (document >= 0), other=0.0)
    return g


# ---- h_t = a_t h_{t-1} + b_t: a, b, h [T, C]


@triton.jit(do_not_specialize=["T"])
def scan_locals(
    a, b, begins, ends, initial, dfinal, local, products, T, C,
    CHUNK: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Of each chunk [chunks, C]: its last state if it began with zeros, and the product of its decays, 0 where a document begins.

    REVERSED: b is the gradient of h, and local what the chunk's own outputs make of the gradient of the state before it.
    """
    _, chunk, c = _place(C, 0, BC)
    exists = c < C
    h = tl.zeros((BC,), dtype=tl.float32)
    product = h + 1.0
    for i in range(0, CHUNK, L):
        t = chunk * CHUNK + (CHUNK - L - i if REVERSED else i)
        decays, added = _rows(a, t, T, C, c, exists, L), _rows(b, t, T, C, c, exists, L)
        first, last = _documents(begins, t, T, L), _documents(ends, t, T, L)
        for j in tl.static_range(L):
            if REVERSED:
                h = _after(h + added[L - 1 - j], last[L - 1 - j], dfinal, C, c, exists, FINAL)
                h = tl.where(first[L - 1 - j] >= 0, 0.0, decays[L - 1 - j] * h)
                product = tl.where(first[L - 1 - j] >= 0, 0.0, product * decays[L - 1 - j])
            else:
                h = decays[j] * _before(h, first[j], initial, C, c, exists, INITIAL) + added[j]
                product = tl.where(first[j] >= 0, 0.0, product * decays[j])
    tl.store(local + chunk * C + c, h, mask=exists)
    tl.store(products + chunk * C + c, product, mask=exists)


@triton.jit(do_not_specialize=["chunks"])
def scan_carry(local, products, chunks, C, BC: tl.constexpr, L: tl.constexpr, REVERSED: tl.constexpr):
    """In place of each chunk's own end, the state that it begins with. REVERSED: the gradient of the state that it ends with."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    state = tl.zeros((BC,), dtype=tl.float32)
    for i in range(0, tl.cdiv(chunks, L) * L, L):
        at = tl.full((), 0, tl.int64) + (tl.cdiv(chunks, L) * L - L - i if REVERSED else i)
        own, kept = _rows(local, at, chunks, C, c, c < C, L), _rows(products, at, chunks, C, c, c < C, L)
        for j in tl.static_range(L - 1 if REVERSED else 0, -1 if REVERSED else L, -1 if REVERSED else 1):
            tl.store(local + (at + j) * C + c, state, mask=(at + j < chunks) & (c < C))
            state = own[j] + kept[j] * state


@triton.jit(do_not_specialize=["T"])
def scan_states(
    a, b, begins, initial, starts, h, T, C, CHUNK: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, INITIAL: tl.constexpr
):  # fmt: skip
    """h, from the states that chunks begin with, starts [chunks, C]"""
    _, chunk, c = _place(C, 0, BC)
    exists = c < C
    state = tl.load(starts + chunk * C + c, mask=exists, other=0.0)
    for i in range(0, CHUNK, L):
        t = chunk * CHUNK + i
        decays, added, first = _rows(a, t, T, C, c, exists, L), _rows(b, t, T, C, c, exists, L), _documents(begins, t, T, L)
        for j in tl.static_range(L):
            state = decays[j] * _before(state, first[j], initial, C, c, exists, INITIAL) + added[j]
            tl.store(h + (t + j) * C + c, state, mask=exists & (t + j < T))


@triton.jit(do_not_specialize=["T"])
def scan_gradients(
    a, h, dh, begins, ends, initial, dfinal, ahead, da, db, dinitial, T, C,
    CHUNK: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """da, db and dinitial [documents, C], from the gradients of the states that chunks end with, ahead [chunks, C]"""
    _, chunk, c = _place(C, 0, BC)
    exists = c < C
    g = tl.load(ahead + chunk * C + c, mask=exists, other=0.0)
    for i in range(0, CHUNK, L):
        t = chunk * CHUNK + CHUNK - L - i
        decays, grads, first, last = (
            _rows(a, t, T, C, c, exists, L),
            _rows(dh, t, T, C, c, exists, L),
            _documents(begins, t, T, L),
            _documents(ends, t, T, L),
        )
        # the states before these tokens; of the stream's first token, which begins a document, it is not used
        states = _rows(h, tl.maximum(t - 1, 0), T, C, c, exists, 1) + _rows(h, t, T, C, c, exists, L - 1)
        for k in tl.static_range(L - 1, -1, -1):
            here = exists & (t + k < T)
            g = _after(g + grads[k], last[k], dfinal, C, c, exists, FINAL)
            tl.store(db + (t + k) * C + c, g, mask=here)
            tl.store(da + (t + k) * C + c, g * _before(states[k], first[k], initial, C, c, exists, INITIAL), mask=here)
            g *= decays[k]
            if INITIAL:
                tl.store(dinitial + first[k].to(tl.int64) * C + c, g, mask=exists & (first[k] >= 0))
            g = tl.where(first[k] >= 0, 0.0, g)


# ---- h_t = exp(-step_t rate) h_{t-1} + step_t x_t B_t, y_t = C_t h_t: x, step, y [T, C], rate [S, C], B, C [T, S]; here B and C are `keys` and
# `queries`, float32 with zeros behind the stream up to the end of the last chunk, and C is the number of channels


@triton.jit
def _decay_rate(rate, at, exists):
    """Of 2 instead of e, which the GPU has an instruction for"""
    return tl.load(rate + at, mask=exists, other=0.0) * -LOG2E


@triton.jit(do_not_specialize=["T", "C"])
def selective_locals(
    x, step, rate, keys, begins, initial, local, totals, T, C,
    S: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, L: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Each chunk's last state if it began with zeros, local [chunks, S, C], and the sum of its steps, totals [chunks, C]"""
    _, chunk, c = _place(C, 0, BC)
    s = tl.arange(0, BS)
    at, exists = s[:, None] * C + c[None, :], (s < S)[:, None] & (c < C)[None, :]
    speed = _decay_rate(rate, at, exists)
    h = tl.zeros((BS, BC), dtype=tl.float32)
    total = tl.zeros((BC,), dtype=tl.float32)
    for i in range(0, CHUNK, L):
        t = chunk * CHUNK + i
        values, steps, first, key = (
            _rows(x, t, T, C, c, c < C, L),
            _rows(step, t, T, C, c, c < C, L),
            _documents(begins, t, T, L),
            _rows(keys, t, T, S, s, s < S, L),
        )
        for j in tl.static_range(L):
            h = _before(h, first[j], initial, S * C, at, exists, INITIAL)
            h = tl.exp2(speed * steps[j][None, :]) * h + (steps[j] * values[j])[None, :] * key[j][:, None]
            total += steps[j]
    tl.store(local + chunk * S * C + at, h, mask=exists)
    tl.store(totals + chunk * C + c, total, mask=c < C)


@triton.jit(do_not_specialize=["chunks"])
def selective_carry(local, totals, rate, whole, chunks, C, S: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, REVERSED: tl.constexpr):
    """`scan_carry` of states [chunks, S, C], of one s; whole [chunks]: 0 where a document begins in the chunk, 1 elsewhere"""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    s = tl.program_id(1)
    speed = _decay_rate(rate, s * C + c, c < C)
    state = tl.zeros((BC,), dtype=tl.float32)
    for i in range(0, tl.cdiv(chunks, L) * L, L):
        at = tl.full((), 0, tl.int64) + (tl.cdiv(chunks, L) * L - L - i if REVERSED else i)
        own, sums = _rows(local, at, chunks, S * C, s * C + c, c < C, L), _rows(totals, at, chunks, C, c, c < C, L)
        kept = _documents(whole, at, chunks, L)
        for j in tl.static_range(L - 1 if REVERSED else 0, -1 if REVERSED else L, -1 if REVERSED else 1):
            tl.store(local + ((at + j) * S + s) * C + c, state, mask=(at + j < chunks) & (c < C))
            state = own[j] + tl.where(kept[j] > 0, tl.exp2(speed * sums[j]) * state, 0.0)


@triton.jit(do_not_specialize=["T", "C", "start"])
def selective_states(
    x, step, rate, keys, queries, begins, ends, initial, starts, y, final, inner, T, start, C,
    S: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, L: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y and, if FINAL, final [documents, S, C], from the states that chunks begin with, starts [chunks, S, C].

    INNER: instead of them the states before every L tokens, inner [chunks here, CHUNK / L, S, C], of the chunks from number `start` on.
    """
    slot, chunk, c = _place(C, start, BC)
    s = tl.arange(0, BS)
    at, exists = s[:, None] * C + c[None, :], (s < S)[:, None] & (c < C)[None, :]
    speed = _decay_rate(rate, at, exists)
    h = tl.load(starts + chunk * S * C + at, mask=exists, other=0.0)
    for i in range(0, CHUNK, L):
        t = chunk * CHUNK + i
        if INNER:
            tl.store(inner + (slot * (CHUNK // L) + i // L) * S * C + at, h, mask=exists)
        values, steps, first = _rows(x, t, T, C, c, c < C, L), _rows(step, t, T, C, c, c < C, L), _documents(begins, t, T, L)
        key = _rows(keys, t, T, S, s, s < S, L)
        if not INNER:
            query, last = _rows(queries, t, T, S, s, s < S, L), _documents(ends, t, T, L)
        for j in tl.static_range(L):
            h = _before(h, first[j], initial, S * C, at, exists, INITIAL)
            h = tl.exp2(speed * steps[j][None, :]) * h + (steps[j] * values[j])[None, :] * key[j][:, None]
            if not INNER:
                out = tl.sum(h * query[j][:, None], 0)
                tl.store(y + (t + j) * C + c, out.to(y.dtype.element_ty), mask=(c < C) & (t + j < T))
                if FINAL:
                    tl.store(final + last[j].to(tl.int64) * S * C + at, h, mask=exists & (last[j] >= 0))


@triton.jit(do_not_specialize=["T", "C"])
def selective_local_gradients(
    step, rate, queries, dy, begins, ends, dfinal, local, T, C,
    S: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, L: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """What each chunk's own outputs make of the gradient of the state before it, local [chunks, S, C]"""
    _, chunk, c = _place(C, 0, BC)
    s = tl.arange(0, BS)
    at, exists = s[:, None] * C + c[None, :], (s < S)[:, None] & (c < C)[None, :]
    speed = _decay_rate(rate, at, exists)
    g = tl.zeros((BS, BC), dtype=tl.float32)
    for i in range(0, CHUNK, L):
        t = chunk * CHUNK + CHUNK - L - i
        grads, steps, query = _rows(dy, t, T, C, c, c < C, L), _rows(step, t, T, C, c, c < C, L), _rows(queries, t, T, S, s, s < S, L)
        first, last = _documents(begins, t, T, L), _documents(ends, t, T, L)
        for k in tl.static_range(L - 1, -1, -1):
            g = _after(g + grads[k][None, :] * query[k][:, None], last[k], dfinal, S * C, at, exists, FINAL)
            g = tl.where(first[k] >= 0, 0.0, tl.exp2(speed * steps[k][None, :]) * g)
    tl.store(local + chunk * S * C + at, g, mask=exists)


@triton.jit(do_not_specialize=["T", "start", "chunks"])
def selective_gradients(
    x, step, rate, keys, queries, dy, begins, ends, initial, dfinal, inner, ahead,
    dx, dstep, drate, dkeys, dqueries, dinitial, T, start, chunks, C,
    S: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The gradients of `chunks` chunks from number `start` on, from the states before every L tokens, `inner`, and the gradients of
    the states that chunks end with, ahead [chunks, S, C], which are overwritten.

    drate [chunks here, S, C] and dkeys, dqueries [channel blocks, tokens here, S] are each program's part. What a run of L tokens needs of one s fits
    into registers: decays, and states times decays; s is the inner loop, and what sums over s stays in registers meanwhile. What goes from one
    run to the run before it, the state's gradient and the sum of drate, waits in memory.
    """
    slot, chunk, c = _place(C, start, BC)
    block = tl.program_id(0) % tl.cdiv(C, BC)
    exists = c < C
    for i in range(CHUNK // L):
        run = CHUNK // L - 1 - i
        t = chunk * CHUNK + run * L
        values, steps, grads = _rows(x, t, T, C, c, exists, L), _rows(step, t, T, C, c, exists, L), _rows(dy, t, T, C, c, exists, L)
        first, last = _documents(begins, t, T, L), _documents(ends, t, T, L)
        stored = tl.tuple(())
        written, faded = tl.tuple(()), tl.tuple(())  # of each token: sum over s of g B, and of g a h_{t-1} log2(a) / step
        for j in tl.static_range(L):
            stored = stored + (values[j] * steps[j],)
            written = written + (tl.zeros((BC,), dtype=tl.float32),)
            faded = faded + (tl.zeros((BC,), dtype=tl.float32),)
        for s in range(S):
            at = s * C + c
            speed = _decay_rate(rate, at, exists)
            h = tl.load(inner + (slot * (CHUNK // L) + run) * S * C + at, mask=exists, other=0.0)
            g = tl.load(ahead + chunk * S * C + at, mask=exists, other=0.0)
            total = tl.load(drate + slot * S * C + at, mask=exists & (i > 0), other=0.0)
            key, query = _numbers(keys + t * S + s, S, L), _numbers(queries + t * S + s, S, L)
            part = ((block * chunks + slot) * CHUNK + run * L) * S + s
            decays, left = tl.tuple(()), tl.tuple(())
            for j in tl.static_range(L):
                decays = decays + (tl.exp2(speed * steps[j]),)
                left = left + (decays[j] * _before(h, first[j], initial, S * C, at, exists, INITIAL),)
                h = left[j] + stored[j] * key[j]
                tl.store(dqueries + part + j * S, tl.sum(grads[j] * h, 0))
            now_written, now_faded = tl.tuple(()), tl.tuple(())
            for k in tl.static_range(L - 1, -1, -1):
                g = _after(g + grads[k] * query[k], last[k], dfinal, S * C, at, exists, FINAL)
                tl.store(dkeys + part + k * S, tl.sum(g * stored[k], 0))
                forgotten = g * left[k]
                now_written = tl.tuple((written[k] + g * key[k],)) + now_written
                now_faded = tl.tuple((faded[k] + forgotten * speed,)) + now_faded
                total -= forgotten * steps[k]
                g *= decays[k]
                if INITIAL:
                    tl.store(dinitial + first[k].to(tl.int64) * S * C + at, g, mask=exists & (first[k] >= 0))
                g = tl.where(first[k] >= 0, 0.0, g)
            written, faded = now_written, now_faded
            tl.store(ahead + chunk * S * C + at, g, mask=exists)
            tl.store(drate + slot * S * C + at, total, mask=exists)
        tl.debug_barrier()  # what was written is there for the next run, whichever thread reads it
        for j in tl.static_range(L):
            here = exists & (t + j < T)
            tl.store(dx + (t + j) * C + c, (steps[j] * written[j]).to(dx.dtype.element_ty), mask=here)
            change = values[j] * written[j] + faded[j] * LN2
            tl.store(dstep + (t + j) * C + c, change.to(dstep.dtype.element_ty), mask=here)
