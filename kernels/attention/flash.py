"""Attention by the FlashAttention kernels inside torch: one call per pair on a CPU, packed calls on CUDA.

Both take the log-sum-exp over all keys in their backward, which is what lets a ring hand them one piece at a time.
Source: FlashAttention-2 (Dao 2023); torch.ops.aten._flash_attention_* and _scaled_dot_product_flash_attention_for_cpu*.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.attention import by_pair
from ltrain.kernels.attention.merging import merge_into
from ltrain.kernels.attention.pairs import Pair, merge
from ltrain.kernels.segments import accumulator

MAX_WIDTH = 256  # widest head the CUDA kernels take


def refusal(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> str | None:
    """Why these tensors cannot go through the flash kernels, or None."""
    if any(pair.window for pair in pairs):
        return "has no windows"
    if q.device.type not in ("cpu", "cuda"):
        return f"has no kernel for device {q.device.type}"
    if q.device.type == "cuda" and q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 or bfloat16 on CUDA, not {q.dtype}"
    if q.device.type == "cuda" and max(q.shape[2], v.shape[2]) > MAX_WIDTH:
        return f"takes heads up to {MAX_WIDTH} wide on CUDA, not {max(q.shape[2], v.shape[2])}"
    return None


def _width(q: Tensor, v: Tensor) -> int:
    """One width for q, k and v that the kernels take: columns of zeros change neither scores nor the outputs that are kept."""
    width = max(q.shape[2], v.shape[2])
    return -(-width // 8) * 8 if q.device.type == "cuda" else width


def _widened(x: Tensor, width: int) -> Tensor:
    if x.shape[2] < width:
        return F.pad(x, (0, width - x.shape[2]))
    return x if x.stride(2) == 1 else x.contiguous()  # the kernels read a head as consecutive numbers (a broadcast gradient is not)


# CPU


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse

    return by_pair.forward(q, k, v, pairs, attend)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    def differentiate(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        args = dout, q, k, v, out, lse.contiguous(), 0.0, causal
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, scale=scale)
        return dq, dk, dv

    return by_pair.backward(dout, q, k, v, out, lse, pairs, differentiate)


# CUDA


@dataclass(frozen=True)
class _Side:
    """The query or the key rows of one packed call."""

    bounds: list[int]  # of the packed rows, one interval per pair
    longest: int
    span: slice | None  # where the rows lie, if they follow each other without a gap
    rows: Tensor | None  # otherwise: which they are, [n] int64 on the host

    @classmethod
    def of(cls, ranges: list[tuple[int, int]]) -> "_Side":
        """ranges: (start, length) of each pair"""
        bounds = [0]
        for _, length in ranges:
            bounds.append(bounds[-1] + length)
        # The kernels treat a longest query of 1 as a case of its own, with another layout of lse; an upper bound of 2 is as valid.
        longest = max(2, *(length for _, length in ranges))
        start = ranges[0][0]
        if all(start + packed == first for (first, _), packed in zip(ranges, bounds, strict=False)):
            return cls(bounds, longest, slice(start, start + bounds[-1]), None)
        return cls(bounds, longest, None, torch.cat([torch.arange(first, first + length) for first, length in ranges]))

    def cu_seqlens(self, device: torch.device) -> Tensor:
        return torch.tensor(self.bounds, dtype=torch.int32).to(device, non_blocking=True)

    def take(self, x: Tensor) -> Tensor:
        if self.span is not None:
            return x[self.span].contiguous()
        assert self.rows is not None
        return x.index_select(0, self.rows.to(x.device, non_blocking=True))

    def add(self, total: Tensor, part: Tensor) -> None:
        if self.span is not None:
            total[self.span] += part
        else:
            assert self.rows is not None
            total.index_add_(0, self.rows.to(total.device, non_blocking=True), part.to(total.dtype))


def packed_calls(pairs: list[Pair]) -> list[tuple[_Side, _Side, bool]]:
    """Pairs in as few calls as possible: (queries, keys, causal), where no query is twice in a call."""
    calls: list[list[Pair]] = []
    for pair in sorted(pairs):
        # Sorted by their start, a pair overlaps none of a call's if it begins where the last one has ended.
        for call in calls:
            if call[-1].causal == pair.causal and call[-1].q_start + call[-1].q_len <= pair.q_start:
                call.append(pair)
                break
        else:
            calls.append([pair])
    return [(_Side.of([(p.q_start, p.q_len) for p in call]), _Side.of([(p.k_start, p.k_len) for p in call]), call[0].causal) for call in calls]


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for queries, keys, causal in packed_calls(pairs):
        part, part_lse, *_ = torch.ops.aten._flash_attention_forward(
            queries.take(q),
            keys.take(k),
            keys.take(v),
            queries.cu_seqlens(q.device),
            keys.cu_seqlens(q.device),
            queries.longest,
            keys.longest,
            0.0,
            causal,
            False,
            scale=scale,
        )
        part_lse = part_lse.T  # [H, n] -> [n, H]
        if queries.span == slice(0, len(q)) and len(queries.bounds) == len(pairs) + 1:
            return part, part_lse.contiguous()  # the one-rank case: this call is all there is
        if queries.span is not None:
            merge_into(out[queries.span], lse[queries.span], part, part_lse)
        else:
            assert queries.rows is not None
            merged, merged_lse = merge(queries.take(out), queries.take(lse), part, part_lse)
            rows = queries.rows.to(q.device, non_blocking=True)
            out.index_copy_(0, rows, merged)
            lse.index_copy_(0, rows, merged_lse)
    return out, lse


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    for queries, keys, causal in packed_calls(pairs):
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            queries.take(dout),
            queries.take(q),
            keys.take(k),
            keys.take(v),
            queries.take(out),
            queries.take(lse).T.contiguous(),  # [H, n]
            queries.cu_seqlens(q.device),
            keys.cu_seqlens(q.device),
            queries.longest,
            keys.longest,
            0.0,
            causal,
            *no_dropout,
            scale=scale,
        )
        if queries.span == slice(0, len(q)) and keys.span == slice(0, len(k)) and len(queries.bounds) == len(pairs) + 1:
            return grad_q, grad_k, grad_v
        queries.add(dq, grad_q)
        keys.add(dk, grad_k)
        keys.add(dv, grad_v)
    return dq, dk, dv


# Both


def forward_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    """out may come back in q's type, where no piece had to be merged."""
    width = _width(q, v)
    forward = _cuda_forward if q.device.type == "cuda" else _cpu_forward
    out, lse = forward(_widened(q, width), _widened(k, width), _widened(v, width), pairs, scale)
    return out[..., : v.shape[2]], lse


def backward_pairs(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = _width(q, v)
    backward = _cuda_backward if q.device.type == "cuda" else _cpu_backward
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    wide_dout, wide_q, wide_k, wide_v, wide_out = (_widened(x, width) for x in (dout, q, k, v, out))
    dq, dk, dv = backward(wide_dout, wide_q, wide_k, wide_v, wide_out, lse.to(accumulator(q.dtype)), pairs, scale)
    return dq[..., : q.shape[2]], dk[..., : q.shape[2]], dv[..., : v.shape[2]]
