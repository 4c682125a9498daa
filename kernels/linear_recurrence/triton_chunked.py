"""The chunked recurrence on a GPU: autograd around the programs of `triton_kernels`.

The inputs are kept for the backward, and of pairs of tokens in a block the inverse T and per channel the scores, 64 numbers per token and head
each, which take the most to compute. The states of the chunks are made again: for chunks of one block they are K V / 64 numbers per token and
head, as much as q or v and more.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.linear_recurrence.triton_launches import BLOCK, Chunks, Shapes, chunks_of
from ltrain.kernels.linear_recurrence.triton_parts import (
    Laid,
    identity_of,
    key_gradients,
    passed,
    passed_back,
    prepared,
    read,
    score_gradients,
    token_gradients,
)
from ltrain.kernels.segments import TRITON_TYPES, device_refusal

WIDEST = 256  # of keys and values: what the state of one program in `pass_states` holds


def refusal(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(v):
        return why
    if v.dtype not in TRITON_TYPES or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v in one type of bfloat16, float16 or float32, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(k.shape[2], v.shape[2]) > WIDEST:
        return f"takes heads of at most {WIDEST}, not {k.shape[2]} and {v.shape[2]}"
    if chunk != BLOCK:
        return f"has chunks of {BLOCK} tokens, not {chunk}"
    return None


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: None,
    initial: Tensor | None,
    solved: tuple[Tensor | None, ...],
    do: Tensor,
    dfinal: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    scale: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Where nothing is erased: dq, dk, dv, ddecay, None, dinitial; wanted: whether the gradients of the decays and of the initial states are"""
    made = prepared(q, k, v, decay, beta, chunks, shapes, solved)
    states, _, left = passed(k, initial, chunks, shapes, made, ends=False)
    dstates, dinitial = passed_back(q, k, do, None, dfinal, chunks, shapes, made, scale, wanted[1])
    return *token_gradients(q, k, v, decay, do, (states, dstates), left, chunks, shapes, made, scale, wanted[0]), None, dinitial


def _delta_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    solved: tuple[Tensor | None, ...],
    do: Tensor,
    dfinal: Tensor | None,
    chunks: Chunks,
    shapes: Shapes,
    scale: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Of the delta rule: dq, dk, dv, ddecay, dbeta, dinitial; wanted as for `_gradients`, though ddecay is always found"""
    made = prepared(q, k, v, decay, beta, chunks, shapes, solved)
    states, _, _ = passed(k, initial, chunks, shapes, made, ends=False)
    du = read(q, k, do, decay, None, chunks, shapes, made, scale, later=True)
    dstates, dinitial = passed_back(q, k, do, du, dfinal, chunks, shapes, made, scale, wanted[1])
    made = made.left
    scored = score_gradients(v, decay, do, du, chunks, shapes, made, scale)
    del du
    return *key_gradients(q, k, decay, beta, do, (states, dstates), scored, chunks, shapes, made, scale), dinitial


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        initial: Tensor | None,
        bounds: tuple[int, ...],
        scale: float,
        ends: bool,
    ) -> tuple[Tensor, Tensor | None]:
        shapes = Shapes.of(k, v, decay, beta)
        chunks = chunks_of(bounds, shapes.blocks, v.device)
        made = prepared(q, k, v, decay, beta, chunks, shapes)
        states, final, _ = passed(k, initial, chunks, shapes, made, ends)
        output = read(q, k, made.u, decay, states, chunks, shapes, made, scale, later=False)
        ctx.save_for_backward(q, k, v, decay, beta, initial, *made[:3])
        ctx.chunks, ctx.shapes, ctx.scale = chunks, shapes, scale
        ctx.set_materialize_grads(False)  # zeros for the final states would be as large as these
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *inputs, scores, solve, firsts = ctx.saved_tensors
        do, dfinal = (None if grad is None else grad.contiguous() for grad in grads)
        do = torch.zeros_like(inputs[2]) if do is None else do
        wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        args = *inputs, (scores, solve, firsts), do, dfinal, ctx.chunks, ctx.shapes, ctx.scale, wanted
        found = (_delta_gradients if ctx.shapes.delta else _gradients)(*args)
        return *found, None, None, None


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bounds: list[int],
    scale: float,
    initial_state: Tensor | None,
    with_final: bool,
    with_map: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """-> output [T, H, V], final states [N, H, K, V] float32 if with_final, (M [N, H, K, K], E [N, H, K, V]) if with_map"""
    segments, heads, width, value = len(bounds) - 1, v.shape[1], k.shape[2], v.shape[2]
    cuts = tuple(bounds)
    q, k, v, decay, beta = Laid.of(q, k, v, decay, beta)
    keys, values = k.shape[2] - width, v.shape[2] - value
    start = initial_state
    if start is not None:
        start = (F.pad(start, (0, values, 0, keys)) if keys or values else start).float().contiguous()
    output, final = _Recurrence.apply(q, k, v, decay, beta, start, cuts, scale, with_final or (with_map and start is None))
    maps = None
    if with_map:  # M is where the identity ends with nothing to store, E where zeros end.
        identity, nothing = identity_of(k, segments, heads), v.new_zeros(len(v), heads, k.shape[2])
        matrix = _Recurrence.apply(k, k, nothing, decay, beta, identity, cuts, 1.0, True)[1]
        end_of_zeros = final if start is None else _Recurrence.apply(k, k, v, decay, beta, None, cuts, 1.0, True)[1]
        maps = matrix[..., :width, :width], end_of_zeros[..., :width, :value]
    final = final if with_final else None
    if keys or values:
        output, final = output[..., :value], None if final is None else final[..., :width, :value]
    return output, final, maps
