"""Attention of long pairs by cuDNN's fused kernels, through torch; what is shorter goes to our own kernels, or FlashAttention.

cuDNN builds a plan for each new pair of lengths, which takes far longer than a step of attention: so queries, and keys of causal squares, are
lengthened to a few lengths per power of two, other keys are cut to one, and only pairs from LEAST rows on are its. On one H200, 16/4 heads x
128, forward and backward over 32768 tokens, it takes as long as our own kernels in documents of 4096 tokens, 0.83 of it in those of 8192, and
0.71 in one of 32768; and parts have to be merged. Source: torch.ops.aten._scaled_dot_product_cudnn_attention*.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ltrain.kernels.attention import by_pair, te
from ltrain.kernels.attention.merging import merge_into
from ltrain.kernels.attention.pairs import Pair

LEAST = 8192  # rows and keys of a pair
ALONE = 16384  # and where Transformer Engine has kernels for many pairs at once, which up to here are as fast
LENGTHS = 16  # of a power of two: at most 1/16 of the rows are added
WIDEST = 128  # head that both passes take


def refusal(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> str | None:
    """Why these cannot go through cuDNN, or None."""
    if any(pair.window for pair in pairs):
        return "has no windows"
    if why := te.cudnn_refusal(q):
        return why
    if q.shape[2] != v.shape[2] or q.shape[2] > WIDEST or q.shape[2] % 8:
        return f"takes keys and values of one width, a multiple of 8 up to {WIDEST}, not {q.shape[2]} and {v.shape[2]}"
    if not _parted(tuple(pairs))[0]:
        return f"takes pairs of at least {LEAST} queries and keys, of which there are none"
    return None


def _step(rows: int) -> int:
    """Between the lengths that there are plans for, where `rows` lies."""
    return max((1 << (rows - 1).bit_length()) // (2 * LENGTHS), 1)


def rounded(rows: int) -> int:
    """The next length that there is a plan for."""
    step = _step(rows)
    return -(-rows // step) * step


def _cut(pair: Pair) -> Iterator[Pair]:
    """Queries can be added to a rectangle, keys not: the last of these become one of their own."""
    rest = pair.k_len % _step(pair.k_len) if not pair.causal and min(pair.q_len, pair.k_len) >= LEAST else 0
    yield pair._replace(k_len=pair.k_len - rest)
    if rest:
        yield pair._replace(k_start=pair.k_start + pair.k_len - rest, k_len=rest)


@lru_cache(maxsize=64)  # all layers of a micro-batch have the same
def _parted(pairs: tuple[Pair, ...]) -> tuple[list[Pair], list[Pair]]:
    """Those for cuDNN and the others."""
    found: tuple[list[Pair], list[Pair]] = [], []
    for pair in by_pair.squares(list(pairs)):
        for part in _cut(pair):
            found[min(part.q_len, part.k_len) < LEAST].append(part)
    return found


def worthwhile(pairs: list[Pair]) -> bool:
    """Whether most of the scores are in pairs for cuDNN; all of them, where Transformer Engine would take the others with these."""
    long, short = _parted(tuple(pairs))
    if not isinstance(te.engine(), str):
        return not short and all(min(pair.q_len, pair.k_len) >= ALONE for pair in long)
    scores = [sum(pair.q_len * pair.k_len / (2 if pair.causal else 1) for pair in some) for some in (long, short)]
    return scores[0] > scores[1]


def forward_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse

    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    long, short = _parted(tuple(pairs))
    out, lse = by_pair.forward(q, k, v, long, attend, rounded)
    if short:
        out = out.float()
        merge_into(out, lse, *te.for_others(q, k, v, scale, short).forward_pairs(q, k, v, short, scale))
    return out, lse


def backward_pairs(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dropout = [torch.zeros((), dtype=torch.int64, device=q.device)] * 2  # seed and offset of none

    def differentiate(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        stats = lse.float().contiguous().unsqueeze(-1)  # [1, H, n, 1]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, out, stats, *dropout, None, None, None, q.shape[2], k.shape[2], 0.0, causal), scale=scale
        )
        return dq, dk, dv

    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    long, short = _parted(tuple(pairs))
    # contiguous: of these two a plan has the strides, and torch finds plans by those of q, k and v
    dout, out = dout.to(q.dtype).contiguous(), out.to(q.dtype).contiguous()
    grads = by_pair.backward(dout, q, k, v, out, lse, long, differentiate, rounded)
    if short:
        others = te.for_others(q, k, v, scale, short).backward_pairs(dout, q, k, v, out, lse, short, scale)
        dq, dk, dv = (grad.float() for grad in grads)
        for total, other in zip((dq, dk, dv), others, strict=True):
            total += other
        return dq, dk, dv
    return grads
