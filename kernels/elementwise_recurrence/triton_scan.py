"""Elementwise recurrences on a GPU: autograd around the programs of `triton_kernels`.

Beside the inputs the states are kept for the backward that chunks begin with; those between are made again, for as many chunks at a time as fit
into SCRATCH.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.elementwise_recurrence import triton_kernels as kernels
from ltrain.kernels.segments import TRITON_TYPES, ceil_div, device_refusal, power_of_two

CHUNK = 64  # tokens of one program
SCRATCH = 256 * 2**20  # bytes of states that the backward of the selective scan holds at a time
STATES = 32  # a thread holds those of a channel and their rates in registers: 64 do not fit


class Tile(NamedTuple):
    """Channels of one program, at least 32 to a warp so that threads hold whole channels; tokens whose rows are read at a time, of which CHUNK is
    a multiple; warps; registers of a thread, or as many as the compiler likes."""

    BC: int
    L: int
    num_warps: int
    maxnreg: int | None = None


SCAN = Tile(128, 8, 4)
CARRY = Tile(32, 8, 1)
FORWARD = Tile(128, 4, 4)  # of the selective scan
BACKWARD = Tile(128, 4, 1, 168)  # one warp, four channels to a thread: sums over channels go through few threads and need no other warp


def refusal(values: Tensor, *others: Tensor, types: tuple[torch.dtype, ...] = TRITON_TYPES, states: int = 1) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(values):
        return why
    unknown = [x.dtype for x in (values, *others) if x.dtype not in types]
    if unknown:
        return f"takes {', '.join(str(x).removeprefix('torch.') for x in types)}, not {unknown[0]}"
    if states > STATES:
        return f"takes at most {STATES} states of a channel, not {states}"
    return None


class Places(NamedTuple):
    """On the device, int32: the document that begins and the one that ends at each token, or -1, begins and ends [T]; whole [chunks]: 0 where a
    document begins in the chunk; the last tokens of documents that have any, and their numbers, lasts and filled, int64."""

    begins: Tensor
    ends: Tensor
    whole: Tensor
    lasts: Tensor
    filled: Tensor


@lru_cache(maxsize=8)  # all layers of a micro-batch share it
def _places(bounds: tuple[int, ...], chunk: int, device: torch.device) -> Places:
    cuts = torch.tensor(bounds, dtype=torch.int64)
    filled = cuts.diff().nonzero()[:, 0]
    firsts, lasts = cuts[filled], cuts[filled + 1] - 1
    begins = torch.full((bounds[-1],), -1, dtype=torch.int32)
    ends = begins.clone()
    begins[firsts], ends[lasts] = filled.int(), filled.int()
    whole = torch.ones(ceil_div(bounds[-1], chunk), dtype=torch.int32)
    whole[firsts // chunk] = 0
    return Places(*(x.to(device, non_blocking=True) for x in (begins, ends, whole, lasts, filled)))


class _Scan(torch.autograd.Function):
    """a, b [T, C], initial [N, C] -> h [T, C], final [N, C], zeros for documents without tokens"""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor | None, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        places = _places(bounds, CHUNK, b.device)
        starts, h = _scan_bounds(a, b, places, initial, None), torch.empty_like(b)
        options = {"CHUNK": CHUNK, **SCAN._asdict(), "INITIAL": initial is not None}
        kernels.scan_states[_grid(len(starts), b, SCAN)](a, b, places.begins, initial, starts, h, *b.shape, **options)
        ctx.save_for_backward(a, h, initial)
        ctx.places, ctx.documents = places, len(bounds) - 1
        return h, h.new_zeros(ctx.documents, b.shape[1]).index_copy_(0, places.filled, h[places.lasts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        a, h, initial = ctx.saved_tensors
        dh, dfinal = (None if x is None else x.contiguous() for x in grads)
        dh = torch.zeros_like(h) if dh is None else dh
        places: Places = ctx.places
        ahead = _scan_bounds(a, dh, places, None, dfinal, reverse=True)
        da, db = torch.empty_like(a), torch.empty_like(a)
        dinitial = None if initial is None else torch.zeros_like(initial)  # documents without tokens have no part in it
        args = a, h, dh, places.begins, places.ends, initial, dfinal, ahead, da, db, dinitial, *h.shape
        options = {"CHUNK": CHUNK, **SCAN._asdict(), "INITIAL": initial is not None, "FINAL": dfinal is not None}
        kernels.scan_gradients[_grid(len(ahead), a, SCAN)](*args, **options)
        return da, db, dinitial, None


def _grid(chunks: int, x: Tensor, tile: Tile) -> tuple[int]:
    return (chunks * ceil_div(x.shape[1], tile.BC),)


def _scan_bounds(a: Tensor, b: Tensor, places: Places, initial: Tensor | None, dfinal: Tensor | None, reverse: bool = False) -> Tensor:
    """The states that chunks begin with [chunks, C] or, in reverse, the gradients of those that they end with."""
    chunks, channels = len(places.whole), b.shape[1]
    local, products = b.new_empty(2, chunks, channels).unbind()
    options = {"INITIAL": initial is not None, "FINAL": dfinal is not None, "REVERSED": reverse}
    args = a, b, places.begins, places.ends, initial, dfinal, local, products, *b.shape
    kernels.scan_locals[_grid(chunks, b, SCAN)](*args, CHUNK=CHUNK, **SCAN._asdict(), **options)
    kernels.scan_carry[_grid(1, b, CARRY)](local, products, chunks, channels, **CARRY._asdict(), REVERSED=reverse)
    return local


class _SelectiveScan(torch.autograd.Function):
    """x, step [T, C] and in float32 rate [S, C], B, C [T, S], initial [N, S, C] -> y [T, C] and, if asked for, final [N, S, C], zeros for
    documents without tokens"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, rate: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, bounds: tuple[int, ...], final: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        places = _places(bounds, CHUNK, x.device)
        (states, channels), chunks = rate.shape, len(places.whole)
        B, C = (F.pad(t, (0, 0, 0, chunks * CHUNK - len(x))) for t in (B, C))  # so that no program need look where they end
        starts = x.new_empty(chunks, states, channels, dtype=torch.float32)
        totals = x.new_empty(chunks, channels, dtype=torch.float32)
        options = {"CHUNK": CHUNK, **FORWARD._asdict(), "S": states, "BS": power_of_two(states), "INITIAL": initial is not None}
        grid = _grid(chunks, x, FORWARD)
        kernels.selective_locals[grid](x, step, rate, B, places.begins, initial, starts, totals, len(x), channels, **options)
        _selective_carry(starts, totals, rate, places, reverse=False)
        y = torch.empty_like(x)
        after = x.new_zeros(len(bounds) - 1, states, channels, dtype=torch.float32) if final else None
        args = x, step, rate, B, C, places.begins, places.ends, initial, starts, y, after, None, len(x), 0, channels
        kernels.selective_states[grid](*args, **options, FINAL=final, INNER=False)
        ctx.save_for_backward(x, step, rate, B, C, initial, starts, totals)
        ctx.places = places
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, step, rate, B, C, initial, starts, totals = ctx.saved_tensors
        dy, dfinal = (None if g is None else g.contiguous() for g in grads)
        dy = torch.zeros_like(x) if dy is None else dy
        places: Places = ctx.places
        (states, channels), chunks, blocks = rate.shape, len(starts), ceil_div(x.shape[1], BACKWARD.BC)
        given, ended = {"INITIAL": initial is not None}, {"FINAL": dfinal is not None}
        tile = {"CHUNK": CHUNK, **FORWARD._asdict(), "S": states, "BS": power_of_two(states)}

        ahead = torch.empty_like(starts)
        args = step, rate, C, dy, places.begins, places.ends, dfinal, ahead, len(x), channels
        kernels.selective_local_gradients[_grid(chunks, x, FORWARD)](*args, **tile, **ended)
        _selective_carry(ahead, totals, rate, places, reverse=True)

        dx, dstep = torch.empty_like(x), torch.empty_like(step)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dinitial = None if initial is None else torch.zeros_like(initial)  # documents without tokens have no part in it
        runs = CHUNK // BACKWARD.L
        at_once = max(1, min(chunks, SCRATCH // (4 * runs * states * channels)))
        inner = starts.new_empty(at_once, runs, states, channels)
        drates = starts.new_empty(at_once, states, channels)
        parts = starts.new_empty(2, blocks * at_once * CHUNK * states)
        drate = torch.zeros_like(rate)
        for first in range(0, chunks, at_once):
            count = min(at_once, chunks - first)
            rows = slice(first * CHUNK, (first + count) * CHUNK)
            again = x, step, rate, B, None, places.begins, None, initial, starts, None, None, inner, len(x), first, channels
            kernels.selective_states[_grid(count, x, FORWARD)](*again, **tile | {"L": BACKWARD.L}, **given, FINAL=False, INNER=True)
            dB_, dC_ = (part[: blocks * count * CHUNK * states].view(blocks, count * CHUNK, states) for part in parts)
            own = x, step, rate, B, C, dy, places.begins, places.ends, initial, dfinal, inner, ahead, dx, dstep, drates, dB_, dC_, dinitial
            grid = _grid(count, x, BACKWARD)
            kernels.selective_gradients[grid](*own, len(x), first, count, channels, S=states, CHUNK=CHUNK, **BACKWARD._asdict(), **given, **ended)
            drate += drates[:count].sum(0)
            dB[rows], dC[rows] = dB_.sum(0), dC_.sum(0)
        return dx, dstep, drate, dB[: len(x)], dC[: len(x)], dinitial, None, None


def _selective_carry(local: Tensor, totals: Tensor, rate: Tensor, places: Places, *, reverse: bool) -> None:
    """What `_scan_bounds` makes of the chunks' own ends [chunks, S, C], in their place."""
    chunks, states, channels = local.shape
    grid = ceil_div(channels, CARRY.BC), states
    kernels.selective_carry[grid](local, totals, rate, places.whole, chunks, channels, S=states, **CARRY._asdict(), REVERSED=reverse)


def scan(a: Tensor, b: Tensor, bounds: list[int], initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """a, b [T, ...], initial [N, ...] -> h [T, ...] and the state after each document [N, ...], of documents without tokens zeros"""
    flat = None if initial is None else initial.reshape(len(initial), -1).contiguous()
    h, final = _Scan.apply(a.reshape(len(a), -1).contiguous(), b.reshape(len(b), -1).contiguous(), flat, tuple(bounds))
    return h.view(b.shape), final.view(-1, *b.shape[1:])


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, B: Tensor, C: Tensor, bounds: list[int], initial: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    """x, step [T, D], rate [D, S], B, C [T, S], initial [N, D, S] -> y [T, D] in x's type, and if `final` the state after each document
    [N, D, S] in float32, of documents without tokens zeros"""
    before = None if initial is None else initial.transpose(1, 2).contiguous()
    # every thread reads all of B and C, which are small: they are made wide here once instead of there each time
    inputs = x.contiguous(), step.contiguous(), *(t.float().contiguous() for t in (rate.t(), B, C))
    y, after = _SelectiveScan.apply(*inputs, before, tuple(bounds), final)
    return y, None if after is None else after.transpose(1, 2)
