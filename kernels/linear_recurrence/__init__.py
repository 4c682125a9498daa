"""Linear recurrences: one K x V state per value head, faded by a decay and updated by each token's key and value.

    S_t = diag(exp(decay_t)) S_{t-1}, then
    S_t += k_t v_t^T                              (beta None: additive; linear attention, RetNet, GLA, Mamba-2), or
    S_t += beta_t k_t (v_t - S_t^T k_t)^T         (the delta rule: DeltaNet, Gated DeltaNet, KDA),
    o_t = scale S_t^T q_t.

Backends: `reference` (token by token), `chunked` (matrix products over chunks of tokens, in torch), `triton` (the same on a GPU, for keys and
values of up to 256 channels) and `fla` (flash-linear-attention's and FlashQLA's, in bfloat16, for DeltaNet, Gated DeltaNet and constant decays).
`auto` takes fla where it was measured faster (`fla.FASTER`) unless torch is to be deterministic, triton wherever else it runs, chunked elsewhere.
Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" and "Gated Delta Networks".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.carry import Carry
from ltrain.kernels.linear_recurrence import chunked, fla, reference
from ltrain.kernels.segments import accumulator, boundaries, choose, permitted, plain_only, wants_triton

__all__ = ["Result", "linear_recurrence", "over_ranks", "segment_map", "step"]


class Result(NamedTuple):
    """output [T, H, V]; final_state [N, H, K, V]; segment_map (M [N, H, K, K], E [N, H, K, V])."""

    output: Tensor
    final_state: Tensor | None
    segment_map: tuple[Tensor, Tensor] | None


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> None:
    if q.ndim != 3 or v.ndim != 3 or k.shape != q.shape or len(v) != len(k):
        raise ValueError(f"q and k are both [T, Hk, K] and v is [T, H, V], but the shapes are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    rows, heads, width = len(v), v.shape[1], k.shape[2]
    if not k.shape[1] or heads % k.shape[1]:
        raise ValueError(f"v has {heads} heads, which is not a multiple of k's {k.shape[1]}: a key head serves equal groups of value heads")
    if decay is not None and decay.shape not in ((rows, heads), (rows, heads, width)):
        raise ValueError(f"decay must be [{rows}, {heads}] (per head) or [{rows}, {heads}, {width}] (per channel), but is {list(decay.shape)}")
    if beta is not None and beta.shape != (rows, heads):
        raise ValueError(f"beta must be [{rows}, {heads}], but is {list(beta.shape)}")
    for name, x in (("q", q), ("k", k), ("decay", decay), ("beta", beta)):
        if x is not None and (x.device != v.device or not x.is_floating_point()):
            raise ValueError(f"{name} must be floating-point on v's device {v.device}, but is {x.dtype} on {x.device}")


def _check_state(name: str, state: Tensor, segments: int, k: Tensor, v: Tensor) -> None:
    expected = (segments, v.shape[1], k.shape[2], v.shape[2])
    if state.shape != expected or state.device != v.device:
        raise ValueError(f"{name} must be {list(expected)} on {v.device}, but is {list(state.shape)} on {state.device}")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    return_segment_map: bool = False,
    backend: str = "auto",
    chunk: int = 64,
    recompute: bool = False,
) -> Result:
    """The recurrence over every segment of a packed stream. Differentiable in every tensor, through states and maps too.

    Args:
        q, k: [T, Hk, K]. Delta-rule keys should have length at most 1, or the state can grow without bound.
        v: [T, H, V]; H is a multiple of Hk and value head h reads key head h // (H / Hk).
        decay: None, [T, H] or [T, H, K]: natural logs of the factors, finite and <= 0.
        beta: None (additive) or [T, H] (delta rule).
        cu_seqlens: [N + 1] int32 boundaries, on the CPU.
        scale: what outputs are multiplied with, usually K ** -0.5.
        initial_state: [N, H, K, V], the state before each segment; None: zeros.
        return_final_state: whether to return the state after each segment.
        return_segment_map: whether to return M and E of each segment, with final_state = M initial_state + E: what ranks exchange.
        backend: auto | reference | chunked | triton | fla.
        chunk: tokens of a chunk, for chunked; triton and fla have 64.
        recompute: whether triton makes again in the backward what it would keep beside the inputs, as much as these and more; chunked keeps it and
            fla makes it again either way.

    Returns:
        output in v's type, states and maps in float32 or wider; what was not asked for is None.

    Raises:
        ValueError: shapes, types, boundaries or backend do not fit.
    """
    _check(q, k, v, decay, beta)
    bounds = boundaries(cu_seqlens, len(v))
    choose(backend, ("reference", "chunked", "triton", "fla"))
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be a number of tokens, such as 64")
    if initial_state is not None:
        _check_state("initial_state", initial_state, len(bounds) - 1, k, v)
    if backend == "reference":
        wide = accumulator(v.dtype)
        start = initial_state if initial_state is not None else v.new_zeros(len(bounds) - 1, v.shape[1], k.shape[2], v.shape[2], dtype=wide)
        output, final = reference.linear_recurrence(q, k, v, decay, beta, bounds, scale, start.to(wide))
        maps = reference.segment_map(k, v, decay, beta, bounds) if return_segment_map else None
        return Result(output, final if return_final_state else None, maps)
    if backend == "fla" or backend == "auto" and fla.worthwhile(k, v, decay, beta) and not plain_only():
        why = fla.refusal(q, k, v, decay, beta, bounds, scale, initial_state, return_segment_map)
        if permitted(why, backend, "triton, chunked or auto"):
            return Result(*fla.linear_recurrence(q, k, v, decay, beta, bounds, scale, initial_state, return_final_state), None)
    if wants_triton(backend, v):
        from ltrain.kernels.linear_recurrence import triton_chunked

        if permitted(triton_chunked.refusal(q, k, v, chunk), backend, "chunked or auto"):
            args = q, k, v, decay, beta, bounds, scale, initial_state, return_final_state, return_segment_map, recompute
            return Result(*triton_chunked.linear_recurrence(*args))
    output, final, maps = chunked.linear_recurrence(q, k, v, decay, beta, bounds, scale, initial_state, return_segment_map, chunk)
    return Result(output, final if return_final_state else None, maps)


def _on_triton(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not wants_triton("auto", v):
        return False
    from ltrain.kernels.linear_recurrence import triton_chunked

    return triton_chunked.refusal(q, k, v, triton_chunked.BLOCK) is None


def segment_map(k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, *, with_map: bool) -> tuple[Tensor | None, Tensor]:
    """What one segment makes of the state S before it: M S + E, without gradient. What context ranks send where no kernel has `over_ranks`.

    Args:
        k, v, decay, beta: as for `linear_recurrence`, of the segment's tokens.
        with_map: whether to return M.

    Returns:
        M [H, K, K] or None, and E [H, K, V], in float32 or wider.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check(k, k, v, decay, beta)
    cu_seqlens = torch.tensor([0, len(v)], dtype=torch.int32)
    with torch.no_grad():
        _, final, maps = linear_recurrence(k, k, v, decay, beta, cu_seqlens, scale=1.0, return_final_state=not with_map, return_segment_map=with_map)
    if maps is not None:
        return maps[0][0], maps[1][0]
    assert final is not None  # it was asked for
    return None, final[0]


def over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor,
    carry: Carry,
    *,
    scale: float,
    return_final_state: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """As `linear_recurrence` where other ranks have the rest of some documents, in phases that share what they make.

    Args:
        q, k, v, decay, beta, cu_seqlens, scale, return_final_state, recompute: as for `linear_recurrence`, of this rank's segments.
        carry: where the states before and after them come from and go to, in the backward too.

    Returns:
        output [T, H, V] and, without gradient, the state after each segment [N, H, K, V] in float32 or None; None in place of both where triton does
        not run, which alone has phases. It runs also where `auto` takes fla for one rank.

    Raises:
        ValueError: shapes, types or boundaries do not fit.
    """
    _check(q, k, v, decay, beta)
    bounds = boundaries(cu_seqlens, len(v))
    if not _on_triton(q, k, v):
        return None
    from ltrain.kernels.linear_recurrence import triton_over_ranks

    return triton_over_ranks.over_ranks(q, k, v, decay, beta, bounds, scale, carry, return_final_state, recompute)


def step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """One token for each of N sequences, for decoding. Several at once are `linear_recurrence` of as many segments, each behind its state.

    Args:
        q, k: [N, Hk, K].
        v: [N, H, V].
        decay: None, [N, H] or [N, H, K] logs.
        beta: None or [N, H].
        state: [N, H, K, V].
        scale: what outputs are multiplied with.

    Returns:
        output [N, H, V] in v's type and the new state in float32 or wider.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check(q, k, v, decay, beta)
    _check_state("state", state, len(v), k, v)
    return reference.step(q, k, v, decay, beta, state, scale)
