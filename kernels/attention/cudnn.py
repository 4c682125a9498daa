"""Attention of long pairs by cuDNN's fused kernels, through torch; what is shorter goes to our own kernels, or FlashAttention.

cuDNN builds a plan for each new length, which takes far longer than a step of attention: so causal squares are lengthened to a few lengths
per power of two, and only pairs from LEAST rows on are its. On one H200, 16/4 heads x 128, forward and backward over 32768 tokens, it takes
as long as our own kernels in documents of 4096 tokens, 0.83 of it in those of 8192, and 0.71 in one of 32768; and parts have to be merged.
Source: torch.ops.aten._scaled_dot_product_cudnn_attention*.
"""

from typing import Any

import torch
from torch import Tensor

from ltrain.kernels.attention import by_pair, flash
from ltrain.kernels.attention.pairs import PLAIN, Pair, merge
from ltrain.kernels.segments import wants_triton

LEAST = 8192  # rows and keys of a pair
LENGTHS = 16  # of a power of two: at most 1/16 of the rows are added
WIDEST = 128  # head that both passes take


def refusal(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> str | None:
    """Why these cannot go through cuDNN, or None."""
    if q.device.type != "cuda":
        return f"runs on CUDA, not on {q.device.type}"
    if torch.version.hip or torch.cuda.get_device_capability(q.device) < (9, 0):
        return "is for GPUs from Hopper on"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 or bfloat16, not {q.dtype}"
    if q.shape[2] != v.shape[2] or q.shape[2] > WIDEST or q.shape[2] % 8:
        return f"takes keys and values of one width, a multiple of 8 up to {WIDEST}, not {q.shape[2]} and {v.shape[2]}"
    if not any(_long(pair) for pair in by_pair.squares(pairs)):
        return f"takes pairs of at least {LEAST} queries and keys, of which there are none"
    return None


def _long(pair: Pair) -> bool:
    return min(pair.q_len, pair.k_len) >= LEAST


def worthwhile(pairs: list[Pair]) -> bool:
    """Whether most of the scores are in pairs for cuDNN."""
    scores = [(pair.q_len * pair.k_len / (2 if pair.causal else 1), _long(pair)) for pair in by_pair.squares(pairs)]
    return 2 * sum(number for number, long in scores if long) > sum(number for number, _ in scores)


def _for_short(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """The backend for the pairs that are too short."""
    if wants_triton("auto", q):
        from ltrain.kernels.attention import triton_attention

        if triton_attention.refusal(q, k, v, scale, PLAIN) is None:
            return triton_attention
    return flash


def _parted(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Those for cuDNN and the others."""
    kept = list(by_pair.squares(pairs))
    return [pair for pair in kept if _long(pair)], [pair for pair in kept if not _long(pair)]


def rounded(rows: int) -> int:
    """The next length that there is a plan for."""
    step = max((1 << (rows - 1).bit_length()) // (2 * LENGTHS), 1)
    return -(-rows // step) * step


def forward_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse

    long, short = _parted(pairs)
    out, lse = by_pair.forward(q, k, v, long, attend, rounded)
    if short:
        out, lse = merge(out, lse, *_for_short(q, k, v, scale).forward_pairs(q, k, v, short, scale))
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

    long, short = _parted(pairs)
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    grads = by_pair.backward(dout, q, k, v, out, lse, long, differentiate, rounded)
    if short:
        others = _for_short(q, k, v, scale).backward_pairs(dout, q, k, v, out, lse, short, scale)
        grads = tuple(a.float() + b for a, b in zip(grads, others, strict=True))  # type: ignore[assignment]
    return grads
