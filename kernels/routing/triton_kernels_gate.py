"""The programs of `triton_gate`: rows are tokens, columns experts, and of what has K columns the choices of a token."""

import triton
import triton.language as tl

from ltrain.kernels.routing.triton_kernels import LOWEST, ranked


@triton.jit
def scores_of(logits, t, e, inside, E, SIGMOID: tl.constexpr):
    """[ROWS, BE] float32, 0 in columns that are none"""
    there = (e < E)[None, :]
    x = tl.load(logits + t[:, None] * E + e[None, :], mask=inside[:, None] & there, other=0.0)
    if SIGMOID:
        found = tl.where(there, tl.sigmoid(x), 0.0)
    else:
        x = tl.where(there, x, float("-inf"))
        powers = tl.exp(x - tl.max(x, 1)[:, None])
        found = powers / tl.sum(powers, 1)[:, None]
    return found


@triton.jit(do_not_specialize=["tokens"])
def route(
    logits,
    bias,
    given,
    weights,
    indices,
    loads,
    shares,
    tokens,
    E,
    scale,
    tiny,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid (tokens / ROWS): logits [T, E], bias [E], given [T, K] or None -> weights and indices [T, K], loads and shares [blocks, E]. As in
    `best`, floats are compared as integers."""
    block = tl.program_id(0).to(tl.int64)
    t, e, j = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BE), tl.arange(0, BK)
    inside = t < tokens
    scores = scores_of(logits, t, e, inside, E, SIGMOID)
    share = scores / (tl.sum(scores, 1) + tiny)[:, None] if SIGMOID else scores
    tl.store(shares + block * E + e, tl.sum(tl.where(inside[:, None], share, 0.0), 0), mask=e < E)

    bits = ranked(scores + tl.load(bias + e, mask=e < E, other=0.0)[None, :], (e < E)[None, :])
    taken = tl.zeros((ROWS, BE), dtype=tl.int32)
    chosen = tl.zeros((ROWS, BK), dtype=tl.int32)
    weight = tl.zeros((ROWS, BK), dtype=tl.float32)
    for i in tl.static_range(K):
        if given is not None:
            expert = tl.load(given + t * K + i, mask=inside, other=0).to(tl.int32)
        else:
            expert = tl.argmax(bits, 1, tie_break_left=True).to(tl.int32)
        hit = e[None, :] == expert[:, None]
        bits = tl.where(hit, LOWEST, bits)
        taken += hit.to(tl.int32)
        here = (j == i)[None, :]
        chosen = tl.where(here, expert[:, None], chosen)
        weight = tl.where(here, tl.sum(tl.where(hit, scores, 0.0), 1)[:, None], weight)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, 1) + tiny)[:, None]
    at, there = t[:, None] * K + j[None, :], inside[:, None] & (j < K)[None, :]
    tl.store(weights + at, weight * scale, mask=there)
    tl.store(indices + at, chosen.to(tl.int64), mask=there)
    tl.store(loads + block * E + e, tl.sum(tl.where(inside[:, None], taken, 0), 0), mask=e < E)


@triton.jit(do_not_specialize=["tokens"])
def logit_gradients(
    logits,
    indices,
    dweights,
    dshares,
    dlogits,
    tokens,
    E,
    scale,
    tiny,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid (tokens / ROWS): dweights [T, K] and dshares [E], one of which may be None -> dlogits [T, E]"""
    t, e = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    inside, there = t < tokens, (e < E)[None, :]
    scores = scores_of(logits, t, e, inside, E, SIGMOID)
    grad = tl.zeros((ROWS, BE), dtype=tl.float32)  # of the scores
    if dshares is not None:
        share = tl.load(dshares + e, mask=e < E, other=0.0)[None, :]
        if SIGMOID:
            total = tl.sum(scores, 1) + tiny
            grad += (share - (tl.sum(share * scores, 1) / total)[:, None]) / total[:, None]
        else:
            grad += share
    if dweights is not None:
        of_chosen = tl.zeros((ROWS, BE), dtype=tl.float32)
        taken = tl.zeros((ROWS, BE), dtype=tl.float32)
        for i in tl.static_range(K):
            expert = tl.load(indices + t * K + i, mask=inside, other=0).to(tl.int32)
            given = tl.load(dweights + t * K + i, mask=inside, other=0.0) * scale
            hit = e[None, :] == expert[:, None]
            of_chosen += tl.where(hit, given[:, None], 0.0)
            taken += hit.to(tl.float32)
        if RENORMALISE:
            total = tl.sum(taken * scores, 1) + tiny
            of_chosen = taken * (of_chosen - (tl.sum(of_chosen * scores, 1) / total)[:, None]) / total[:, None]
        grad += of_chosen
    if SIGMOID:
        grad *= scores * (1 - scores)
    else:
        grad = scores * (grad - tl.sum(grad * scores, 1)[:, None])
    tl.store(dlogits + t[:, None] * E + e[None, :], grad, mask=inside[:, None] & there)
