"""The chunked recurrence on a GPU: autograd around the programs of `triton_kernels`.

All that the backward takes is kept for it, unless it is to be made again: states of the chunks, for chunks of one block K V / 64 numbers per token
and head, as much as q or v and more, and what is made of keys, queries and values. What takes the most to compute is kept all the same, of pairs of
tokens in a block the inverse T and the scores, 64 numbers per token and head each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.linear_recurrence.triton_launches import BLOCK, Shapes, chunks_of
from ltrain.kernels.linear_recurrence.triton_parts import (
    Laid,
    Prepared,
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
        recompute: bool,
    ) -> tuple[Tensor, Tensor | None]:
        shapes = Shapes.of(k, v, decay, beta)
        chunks = chunks_of(bounds, shapes.blocks, v.device)
        made = prepared(q, k, v, decay, beta, chunks, shapes, scale)
        states, final, left = passed(k, initial, chunks, shapes, made, ends)
        output = read(q, k, made.u, states, chunks, shapes, made, scale, later=False)
        kept = made[:3] if recompute else (*made.saved(v), states, left)
        ctx.save_for_backward(q, k, v, decay, beta, initial if recompute else None, *kept)
        ctx.chunks, ctx.shapes, ctx.scale = chunks, shapes, scale
        ctx.set_materialize_grads(False)  # zeros for the final states would be as large as these
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        q, k, v, decay, beta, initial, *kept = ctx.saved_tensors
        chunks, shapes, scale = ctx.chunks, ctx.shapes, ctx.scale
        do, dfinal = (None if grad is None else grad.contiguous() for grad in grads)
        do = torch.zeros_like(v) if do is None else do
        with_ddecay, _, with_dinitial = ctx.needs_input_grad[3:6]
        if len(kept) > 3:
            made, states, left = Prepared.restored(kept[:-2], v), kept[-2], kept[-1]
        else:
            made = prepared(q, k, v, decay, beta, chunks, shapes, scale, kept)
            states, _, left = passed(k, initial, chunks, shapes, made, ends=False)
        found: tuple[Tensor | None, ...]
        if shapes.delta:
            du = read(q, k, do, None, chunks, shapes, made, scale, later=True)
            dstates, dinitial = passed_back(q, k, do, du, dfinal, chunks, shapes, made, scale, with_dinitial)
            made = made.left
            del kept
            scored = score_gradients(v, do, du, chunks, shapes, made, scale)
            del du
            found = key_gradients(q, k, decay, beta, do, (states, dstates), scored, chunks, shapes, made, scale)
        else:
            dstates, dinitial = passed_back(q, k, do, None, dfinal, chunks, shapes, made, scale, with_dinitial)
            found = *token_gradients(q, k, v, decay, do, states, lambda: dstates, left, chunks, shapes, made, scale, with_ddecay), None
        return *found, dinitial, None, None, None, None


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
    recompute: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """-> output [T, H, V], final states [N, H, K, V] float32 if with_final, (M [N, H, K, K], E [N, H, K, V]) if with_map"""
    segments, heads, width, value = len(bounds) - 1, v.shape[1], k.shape[2], v.shape[2]
    cuts = tuple(bounds)
    q, k, v, decay, beta = Laid.of(q, k, v, decay, beta)
    keys, values = k.shape[2] - width, v.shape[2] - value
    start = initial_state
    if start is not None:
        start = (F.pad(start, (0, values, 0, keys)) if keys or values else start).float().contiguous()
    output, final = _Recurrence.apply(q, k, v, decay, beta, start, cuts, scale, with_final or (with_map and start is None), recompute)
    maps = None
    if with_map:  # M is where the identity ends with nothing to store, E where zeros end.
        identity, nothing = identity_of(k, segments, heads), v.new_zeros(len(v), heads, k.shape[2])
        matrix = _Recurrence.apply(k, k, nothing, decay, beta, identity, cuts, 1.0, True, recompute)[1]
        end_of_zeros = final if start is None else _Recurrence.apply(k, k, v, decay, beta, None, cuts, 1.0, True, recompute)[1]
        maps = matrix[..., :width, :width], end_of_zeros[..., :width, :value]
    final = final if with_final else None
    if keys or values:
        output, final = output[..., :value], None if final is None else final[..., :width, :value]
    return output, final, maps
