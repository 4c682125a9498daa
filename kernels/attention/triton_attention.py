"""Attention over pairs on a GPU by our own programs, those of `triton_kernels`: windows, soft caps, slopes and sinks beside plain scores.

Work follows what the pairs leave, not queries x keys; memory is linear in the stream. The backward makes probabilities again from the
log-sum-exp over all keys, so that a ring can hand it one piece at a time, and gives the same bits each time.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ltrain.kernels.attention.intervals import Plan, plan
from ltrain.kernels.attention.pairs import PLAIN, Pair, Score
from ltrain.kernels.attention.triton_kernels import backward, forward
from ltrain.kernels.attention.triton_kernels.tiles import REST
from ltrain.kernels.segments import plain_refusal, power_of_two

WIDEST = 256  # of heads: what a program has room for
SHARED = {128: 0, 256: 192 << 10}  # bytes of shared memory that heads of 16-bit numbers take: H100s have as many, A100s and desktop GPUs not
MOST = 1 << 30  # rows: their numbers and sums of two are int32


class Tiles(NamedTuple):
    rows: int  # of the side whose results a program sums
    columns: int  # of the other side, at a time
    warps: int  # 8: with 4, narrow tiles are in the range that Triton 3.4 to 3.7 gets wrong on Hopper
    stages: int  # loads under way


# by the width of heads up to which they hold, for inputs of 16 bits
FORWARD = {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)}
QUERY_GRADIENTS = {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)}
KEY_GRADIENTS = {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)}
EXACT = {128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)}  # for float32, whose products take no tensor cores


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have."""
    bytes_: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return bytes_


def refusal(q: Tensor, k: Tensor, v: Tensor, scale: float, score: Score) -> str | None:
    """Why the kernels do not take these, or None."""
    if why := plain_refusal(q):
        return why
    width = max(q.shape[2], v.shape[2])
    if width > WIDEST:
        return f"takes heads up to {WIDEST} wide, not {width}"
    shared = next(size for most, size in SHARED.items() if width <= most) if q.is_cuda and q.dtype != torch.float32 else 0
    if shared and _shared_memory(q.device) < shared:
        return f"takes {shared >> 10} KiB of shared memory for heads {width} wide, and {q.device} has {_shared_memory(q.device) >> 10}"
    if score.bias is not None:
        return "has no relative biases"
    if not scale > 0:
        return f"takes a scale above 0, not {scale}"
    if max(len(q), len(k)) > MOST:
        return f"takes at most {MOST} tokens, not {max(len(q), len(k))}"
    return None


def _laid(x: Tensor) -> Tensor:
    """With the numbers of a head one after another, and steps between heads and in a tile of rows that int32 holds."""
    return x if x.stride(2) == 1 and x.stride(0) < 1 << 23 and x.stride(1) * x.shape[1] < 1 << 31 else x.contiguous()


def _padded(width: int) -> int:
    return max(16, power_of_two(width))


def _options(q: Tensor, k: Tensor, v: Tensor, score: Score, table: dict[int, Tiles]) -> dict[str, Any]:
    """Compile-time options."""
    width, exact = max(q.shape[2], v.shape[2]), q.dtype == torch.float32
    tiles = next(found for most, found in (EXACT if exact else table).items() if width <= most)
    return {
        "H": q.shape[1],
        "G": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "BD": _padded(q.shape[2]),
        "BV": _padded(v.shape[2]),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "CAPPED": bool(score.softcap),
        "SLOPED": score.slopes is not None,
        "DOT": "ieee" if exact else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _plan(pairs: list[Pair], keys: bool, side: Tensor, options: dict[str, Any]) -> Plan:
    return plan(tuple(pairs), keys, len(side), options["ROWS"], side.device)


def _steps(*tensors: Tensor) -> list[int]:
    """From a token to the next, and from a head, of each."""
    return [x.stride(axis) for x in tensors for axis in (0, 1)]


def attend(
    q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float, score: Score, sinks: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """-> out [Tq, H, Dv] in `dtype`, lse [Tq, H] float32 as of `with_sinks`"""
    q, k, v = _laid(q), _laid(k), _laid(v)
    out = q.new_empty(*q.shape[:2], v.shape[2], dtype=dtype)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if not len(q):
        return out, lse
    options = _options(q, k, v, score, FORWARD)
    intervals = _plan(pairs, False, q, options)
    slopes, below = (lse if x is None else x.detach().to(q.device, torch.float32).contiguous() for x in (score.slopes, sinks))
    forward.attend[(len(intervals.order) * q.shape[1],)](
        *(q, k, v, slopes, below, out, lse, *intervals, float(scale), float(score.softcap), len(q), *_steps(q, k, v)),
        SUNK=sinks is not None,
        **options,
    )
    return out, lse


def forward_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float, score: Score = PLAIN) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, pairs, scale, score)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pairs: list[Pair],
    scale: float,
    score: Score,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """-> dq, dk and dv in `dtype`, and of sinks what these rows contribute as of `sinks_gradient`"""
    q, k, v, out, dout = (_laid(x) for x in (q, k, v, out, dout.to(q.dtype)))
    lse = lse.to(torch.float32).contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    if not (len(q) and len(k)):
        return dq.zero_(), dk.zero_(), dv.zero_(), None if sinks is None else torch.zeros_like(sinks)
    rest = torch.empty(q.shape[1], len(q), REST.value, dtype=torch.float32, device=q.device)
    slopes = lse if score.slopes is None else score.slopes.detach().to(q.device, torch.float32).contiguous()
    options = _options(q, k, v, score, QUERY_GRADIENTS)
    intervals = _plan(pairs, False, q, options)
    backward.query_gradients[(len(intervals.order) * q.shape[1],)](
        *(q, k, v, slopes, out, dout, lse, rest, dq, *intervals, float(scale), float(score.softcap), len(q), *_steps(q, k, v, out, dout)), **options
    )
    options = _options(q, k, v, score, KEY_GRADIENTS)
    intervals = _plan(pairs, True, k, options)
    backward.key_gradients[(len(intervals.order) * k.shape[1],)](
        *(q, k, v, slopes, dout, rest, dk, dv, *intervals, float(scale), float(score.softcap), len(q), len(k), *_steps(q, k, v, dout)), **options
    )
    if sinks is None:
        return dq, dk, dv, None
    pull = rest[..., 1]  # [H, Tq]: the sum of out times its gradient
    return dq, dk, dv, -((sinks.to(lse).unsqueeze(1) - lse.T).exp() * pull).sum(1).to(sinks.dtype)


def backward_pairs(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float, score: Score = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(dout, q, k, v, out, lse, pairs, scale, score)[:3]


def backward_scores(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float, score: Score
) -> tuple[Tensor, Tensor, Tensor, None]:
    """As `backward_pairs`, with no gradient of score.bias: there is none."""
    return *backward_pairs(dout, q, k, v, out, lse, pairs, scale, score), None
