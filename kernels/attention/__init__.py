"""Softmax attention inside the segments of a packed stream, and the pieces ring attention is made of.

Backends: `reference` (all scores at once), `blockwise` (plain torch, memory linear in the stream), `flash` (torch's own fused
kernels: any floating type on a CPU, float16 and bfloat16 on CUDA; plain scores without windows), `te` and `cudnn` (cuDNN's on GPUs from Hopper
on: through Transformer Engine, packed documents and windows at once, or through torch, one long document after the other), `triton` (our own
kernels on CUDA: up to float32, all but relative biases). `auto` takes the first that runs of cudnn and te (where most scores are in documents
that are long enough for them, unless torch is to be deterministic), triton, flash and blockwise; flash before triton for heads wider than 128.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.attention import blockwise, cudnn, flash, reference, te
from ltrain.kernels.attention.merging import merge_into
from ltrain.kernels.attention.pairs import FULL, PLAIN, Mask, Pair, Score, combined, masked_pairs, merge, seen
from ltrain.kernels.segments import accumulator, boundaries, choose, permitted, plain_only, wants_triton

__all__ = [
    "FULL",
    "PLAIN",
    "Mask",
    "Pair",
    "Score",
    "attention",
    "backward_pairs",
    "decode_attention",
    "forward_pairs",
    "merge",
    "merge_into",
    "pair_attention",
    "seen",
    "sinks_gradient",
    "with_sinks",
]

BACKENDS = {"reference": reference, "blockwise": blockwise, "te": te, "cudnn": cudnn, "flash": flash}
FUSED = (te, cudnn, flash)  # for plain scores
LONG = (cudnn, te)  # that are worth their while in long documents, and whose gradients are not promised to be the same twice
NARROW = 128  # heads with which our own kernels are faster than FlashAttention on a GPU: at 1024 tokens 0.8, at 32768 0.82 of its time


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(f"q, k and v are [tokens, heads, width], but have {q.ndim}, {k.ndim} and {v.ndim} axes")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k's heads are {k.shape[2]} wide and q's {q.shape[2]}: they must be equal")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k has {k.shape[0]} tokens of {k.shape[1]} heads and v {v.shape[0]} of {v.shape[1]}: they must be equal")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which is not a multiple of k's {k.shape[1]}: K/V heads serve equal groups of query heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device) or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must share one floating type and device, but are {q.dtype}, {k.dtype} and {v.dtype} on {q.device}, {k.device} and {v.device}"
        )


def _check_pairs(pairs: Sequence[Pair], queries: int, keys: int) -> list[Pair]:
    for pair in pairs:
        q_start, q_len, k_start, k_len, causal, window, gap = pair
        if min(pair[:4]) < 0 or q_start + q_len > queries or k_start + k_len > keys:
            raise ValueError(f"pairs: {pair} leaves q's {queries} or k's {keys} rows")
        ahead = 0 if causal else window - 1  # how far past itself a query sees
        if causal and q_len > k_len or window and q_len > k_len + gap + ahead:
            of = "is causal" if causal else "has a window"
            raise ValueError(f"pairs: {pair} {of} with more queries than keys, so its first queries see nothing: leave those out")
        if window and gap >= window:
            raise ValueError(f"pairs: {pair} has a window that leaves its last query no key: leave that out")
    return [pair for pair in pairs if pair.q_len and pair.k_len]


def _fewest(pairs: list[Pair], score: Score) -> list[Pair]:
    return list(combined(tuple(pairs))) if score.plain and len(pairs) > 1 else pairs


def _backend(name: str, q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float, score: Score) -> Any:
    choose(name, (*BACKENDS, "triton"))
    if name == "auto" and plain_only():
        return blockwise

    def refusal(backend: Any) -> str | None:
        return backend.refusal(q, k, v, pairs) if score.plain else "has no soft caps, slopes and biases"

    if BACKENDS.get(name) in FUSED:
        why = refusal(BACKENDS[name])
        if why is not None:
            raise ValueError(f"backend={name!r} {why}: choose blockwise or auto")
        return BACKENDS[name]
    if name == "auto" and not torch.are_deterministic_algorithms_enabled():
        for backend in LONG:
            if refusal(backend) is None and backend.worthwhile(pairs):
                return backend
    flashes = name == "auto" and refusal(flash) is None
    if wants_triton(name, q) and not (flashes and max(q.shape[2], v.shape[2]) > NARROW):
        from ltrain.kernels.attention import triton_attention

        if permitted(triton_attention.refusal(q, k, v, scale, score), name, "blockwise or auto"):
            return triton_attention
    if flashes:
        return flash
    return BACKENDS["blockwise" if name == "auto" else name]


def _pairs_backend(name: str, q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float, score: Score) -> Any:
    chosen = _backend(name, q, k, v, pairs, scale, score)
    if chosen is reference and not score.plain:
        raise ValueError("backend='reference' takes plain scores in pairs: choose blockwise or auto")
    return chosen


def forward_pairs(
    q: Tensor, k: Tensor, v: Tensor, pairs: Sequence[Pair], *, scale: float, score: Score = PLAIN, backend: str = "auto", wide: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention of query rows over the key rows that `pairs` give them.

    A query in several pairs sees the union of their keys; one in no pair has output 0 and log-sum-exp -inf. Not differentiable:
    `backward_pairs` is its backward.

    Args:
        q: [Tq, H, D].
        k, v: [Tk, Hk, D], [Tk, Hk, Dv]; H is a multiple of Hk and query head h reads K/V head h // (H / Hk).
        pairs: what sees what; of a causal one every query sees a key. No query should meet the same key in two pairs.
        scale: what scores are multiplied with, usually D ** -0.5.
        score: what becomes of scores before the softmax; distances are those of the pairs.
        backend: auto | reference | blockwise | te | cudnn | flash | triton.
        wide: whether more than one other part is to be merged with out; otherwise it comes in the type in which the backend has it.

    Returns:
        out [Tq, H, Dv], in float32 or wider where `wide`, and lse [Tq, H], the natural log of the sum of exponentials of scaled scores, always so.

    Raises:
        ValueError: shapes, types, pairs or backend do not fit.
    """
    _check(q, k, v)
    kept = _fewest(_check_pairs(pairs, len(q), len(k)), score)
    chosen = _pairs_backend(backend, q, k, v, kept, scale, score)
    with torch.no_grad():
        out, lse = chosen.forward_pairs(q, k, v, kept, scale, *(() if score.plain else (score,)))
    return out.to(accumulator(q.dtype)) if wide else out, lse


def backward_pairs(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pairs: Sequence[Pair],
    *,
    scale: float,
    score: Score = PLAIN,
    backend: str = "auto",
    wide: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What `pairs` contribute to the gradients of attention over these and possibly many other keys.

    Args:
        dout: gradient of the final output, [Tq, H, Dv].
        q, k, v, pairs, scale, score, backend: as for `forward_pairs`.
        out, lse: the final ones, merged over every pair of every step, so that exp(score - lse) is the final probability.
        wide: whether more than one other part is to be added to the gradients; otherwise they come in the type in which the backend has them.

    Returns:
        dq [Tq, H, D], dk [Tk, Hk, D], dv [Tk, Hk, Dv] and, where the score has one, dbias [H, buckets], in float32 or wider (the first three where
        `wide`), to be summed over the steps.

    Raises:
        ValueError: shapes, types, pairs or backend do not fit.
    """
    _check(q, k, v)
    if dout.shape != out.shape or out.shape != (*q.shape[:2], v.shape[2]) or lse.shape != q.shape[:2]:
        given = ", ".join(str(list(x.shape)) for x in (dout, out, lse))
        raise ValueError(f"dout and out must be {[*q.shape[:2], v.shape[2]]} and lse {list(q.shape[:2])}, but dout, out and lse are {given}")
    kept = _fewest(_check_pairs(pairs, len(q), len(k)), score)
    chosen, dbias = _pairs_backend(backend, q, k, v, kept, scale, score), None
    with torch.no_grad():
        if score.plain:
            dq, dk, dv = chosen.backward_pairs(dout, q, k, v, out, lse, kept, scale)
        else:
            dq, dk, dv, dbias = chosen.backward_scores(dout, q, k, v, out, lse, kept, scale, score)
    dtype = accumulator(q.dtype)
    return *((dq.to(dtype), dk.to(dtype), dv.to(dtype)) if wide else (dq, dk, dv)), dbias


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the same keys and, for each head, one more that has the score sinks [H] and no value (gpt-oss; OpenAI 2025).

    out [T, H, Dv] and lse [T, H], over all keys; both in float32 or wider.
    """
    total = torch.logaddexp(lse, sinks.to(lse))
    return out * (lse - total).exp().unsqueeze(-1), total


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Of `with_sinks`, whose out and lse these are -> [H]: what these rows contribute."""
    pull = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # [T, H]
    return -((sinks.to(lse) - lse).exp() * pull).sum(0).to(sinks.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        pairs: list[Pair],
        scale: float,
        score: Score,
        backend: Any,
    ) -> Tensor:
        if hasattr(backend, "attend"):  # sinks and the rounding in the same pass
            out, lse = backend.attend(q, k, v, pairs, scale, score, sinks, q.dtype)
        else:
            more = () if backend in FUSED else (score._replace(bias=bias),)
            out, lse = backend.forward_pairs(q, k, v, pairs, scale, *more)
            if sinks is not None:
                out, lse = with_sinks(out, lse, sinks)
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks, bias)
        ctx.pairs, ctx.scale, ctx.score, ctx.backend = pairs, scale, score, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse, sinks, bias = ctx.saved_tensors
        # exp(score - lse) is the final probability, the sink's share taken out: nothing else in these gradients knows of sinks
        arguments, dbias = (grads[0], q, k, v, out, lse, ctx.pairs, ctx.scale), None
        if hasattr(ctx.backend, "attend"):
            return *ctx.backend.gradients(*arguments, ctx.score, sinks, q.dtype), *[None] * 5
        if ctx.backend in FUSED:
            dq, dk, dv = ctx.backend.backward_pairs(*arguments)
        else:
            dq, dk, dv, dbias = ctx.backend.backward_scores(*arguments, ctx.score._replace(bias=bias))
            dbias = None if bias is None or dbias is None else dbias.to(bias.dtype)
        dsinks = None if sinks is None else sinks_gradient(grads[0], out, lse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, dbias, None, None, None, None


@lru_cache(maxsize=64)  # all layers of a micro-batch share it: of thousands of documents it takes milliseconds
def _masked_pairs(bounds: tuple[int, ...], mask: Mask, starts: tuple[int, ...]) -> list[Pair]:
    """Not to be changed by who reads it."""
    return masked_pairs(list(bounds), mask, list(starts))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    mask: Mask = FULL,
    starts: list[int] | None = None,
    score: Score = PLAIN,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside every segment, causal where the mask is. Differentiable in q, k, v, sinks and score.bias.

    Args:
        q: [T, H, D].
        k, v: [T, Hk, D], [T, Hk, Dv]; H is a multiple of Hk and query head h reads K/V head h // (H / Hk).
        cu_seqlens: [segments + 1] int32 boundaries, on the CPU.
        scale: what scores are multiplied with, usually D ** -0.5.
        mask: what a query sees of its segment.
        starts: the position of each segment's first token in its document, for chunks, anchors and globals; None: 0.
        score: what becomes of scores before the softmax.
        sinks: [H], see `with_sinks`; None: there are none.
        backend: auto | reference | blockwise | te (without soft caps, slopes and biases) | cudnn or flash (without windows shorter than a segment,
            too) | triton (without biases).

    Returns:
        [T, H, Dv] in q's type.

    Raises:
        ValueError: shapes, types, boundaries or backend do not fit.
    """
    _check(q, k, v)
    if len(q) != len(k):
        raise ValueError(f"q has {len(q)} tokens and k {len(k)}: attention inside segments takes as many keys as queries")
    if mask.anchors and not mask.window:
        raise ValueError("mask.anchors has an effect with a window only: without one every query sees the first tokens")
    if mask.anchors and not mask.causal:
        raise ValueError("mask.anchors go with a causal mask: leave them out")
    if mask.globals and (mask.causal or not mask.window or mask.chunk):
        raise ValueError("mask.globals go with a window alone that is not causal: leave them out, or write anchors")
    bounds = boundaries(cu_seqlens, len(q))
    starts = starts or [0] * (len(bounds) - 1)
    pairs = _masked_pairs(tuple(bounds), mask, tuple(starts))
    chosen = _backend(backend, q, k, v, pairs, scale, score)
    if chosen is reference:
        return reference.attention(q, k, v, bounds, scale, mask, starts, score, sinks)
    out: Tensor = _Attention.apply(q, k, v, sinks, score.bias, pairs, scale, score._replace(bias=None), chosen)
    return out


def pair_attention(q: Tensor, k: Tensor, v: Tensor, pairs: Sequence[Pair], *, scale: float, backend: str = "auto") -> Tensor:
    """`forward_pairs` with its gradients: softmax attention of query rows over the key rows that `pairs` give them. Differentiable in q, k and v.

    Returns:
        [Tq, H, Dv] in q's type; 0 for a query in no pair.

    Raises:
        ValueError: as `forward_pairs`.
    """
    _check(q, k, v)
    kept = _check_pairs(pairs, len(q), len(k))
    chosen = _pairs_backend(backend, q, k, v, kept, scale, PLAIN)
    if chosen is reference:
        raise ValueError("backend='reference' has no gradients of pairs: choose blockwise or auto")
    out: Tensor = _Attention.apply(q, k, v, None, None, kept, scale, PLAIN, chosen)
    return out


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, behind: Tensor, *, scale: float, score: Score = PLAIN, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One new query per sequence over its cached keys, or those of them that this rank holds.

    Args:
        q: [N, H, D].
        k, v: [N, L, Hk, D], [N, L, Hk, Dv], in any order; what is not seen has weight 0 and must be finite.
        behind: [N, L] integers, how far a key is behind the query; negative: the query does not see it. The new token's own key is among
            them, here or on another rank.
        scale: what scores are multiplied with, usually D ** -0.5.
        score: what becomes of scores before the softmax.
        seen: [N, H, L] or [N, Hk, L], which of the keys each head sees, or those of each K/V head; None: all.

    Returns:
        out [N, H, Dv] and lse [N, H] (natural log of the sum of exponentials of scaled scores) in float32 or wider, for `merge`;
        0 and -inf for a query that sees nothing here.

    Raises:
        ValueError: shapes or types do not fit.
    """
    if q.ndim != 3 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or len(q) != len(k) or k.shape[3] != q.shape[2]:
        raise ValueError(
            f"q, k and v are [N, H, D], [N, L, Hk, D] and [N, L, Hk, Dv], but have shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if not k.shape[2] or q.shape[1] % k.shape[2]:
        raise ValueError(f"q has {q.shape[1]} heads, which is not a multiple of k's {k.shape[2]}: K/V heads serve equal groups of query heads")
    if behind.shape != k.shape[:2] or behind.is_floating_point():
        raise ValueError(f"behind must be integers of shape {list(k.shape[:2])}, one per key, but is {behind.dtype} of shape {list(behind.shape)}")
    queries = q.unflatten(1, (k.shape[2], -1))  # [N, Hk, G, D]
    scores = (queries @ k.permute(0, 2, 3, 1)).to(accumulator(q.dtype)) * scale  # [N, Hk, G, L]
    if score.softcap:
        scores = score.softcap * (scores / score.softcap).tanh_()
    added = score.added(behind, q.shape[1])
    if added is not None:
        scores = scores + added.to(scores).transpose(0, 1).unflatten(1, (k.shape[2], -1))
    hidden = (behind < 0)[:, None, None]
    if seen is not None:
        hidden = hidden | ~seen.unflatten(1, (k.shape[2], -1))
    lse = scores.masked_fill_(hidden, -torch.inf).logsumexp(-1)  # [N, Hk, G]
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp().to(v.dtype)
    return (p @ v.transpose(1, 2)).flatten(1, 2).to(lse.dtype), lse.flatten(1, 2)
