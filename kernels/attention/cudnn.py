"""Attention of long pairs by cuDNN's fused kernels, through torch; what is shorter goes to FlashAttention.

cuDNN builds a plan for each new length, which takes far longer than a step of attention: so causal squares are lengthened to a few lengths
per power of two, and only pairs from LEAST rows on are its. Source: torch.ops.aten._scaled_dot_product_cudnn_attention*.
"""

import torch
from torch import Tensor

from ltrain.kernels.attention import by_pair, flash
from ltrain.kernels.attention.pairs import Pair, merge

LEAST = 4096  # rows and keys of a pair
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
        out, lse = merge(out, lse, *flash.forward_pairs(q, k, v, short, scale))
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
        others = flash.backward_pairs(dout, q, k, v, out, lse, short, scale)
        grads = tuple(a.float() + b for a, b in zip(grads, others, strict=True))  # type: ignore[assignment]
    return grads
