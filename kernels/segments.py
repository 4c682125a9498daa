"""Segments of a packed stream: reading their boundaries, and moving rows between the stream and a padded buffer."""

import os
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def boundaries(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The boundaries as Python numbers, checked: [0, ..., tokens], never falling.

    cu_seqlens lives on the host so that plans are made from it without waiting for a device.

    Raises:
        ValueError: cu_seqlens is not an int32 vector on the CPU that rises from 0 to `tokens`.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.device.type != "cpu" or not len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens is a {cu_seqlens.ndim}-axis {cu_seqlens.dtype} tensor on {cu_seqlens.device} of {cu_seqlens.numel()} numbers: "
            "pass a vector of [segments + 1] int32 boundaries on the CPU"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the stream's {tokens} tokens without falling, but is {summary(bounds)}")
    return bounds


class Part(NamedTuple):
    """Queries of one document, and the keys that it has up to the last of them, which may be more: queries [start, stop) belong to the keys from
    `first` on, of a document whose keys begin at `begin`."""

    start: int
    stop: int
    begin: int
    first: int


def parts(cu_seqlens: Tensor, tokens: int) -> list[Part]:
    """Of a stream whose queries and keys are all here."""
    return [Part(a, b, a, a) for a, b in pairwise(boundaries(cu_seqlens, tokens))]


def documents(parts: Iterable[Part]) -> dict[int, int]:
    """Where each document's keys begin -> where those of its last queries end."""
    return {part.begin: part.first + part.stop - part.start for part in parts}


def summary(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"


def ceil_div(count: int, size: int) -> int:
    """count / size, rounded up. triton.cdiv and triton.next_power_of_2 serve programs too: on the host they take 5 microseconds a call, which
    come to as much as the launches themselves."""
    return -(-count // size)


def power_of_two(n: int) -> int:
    """The least one from n on."""
    return 1 << max(n - 1, 0).bit_length()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float32, or the input's if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def choose(backend: str, known: tuple[str, ...]) -> None:
    """Refuse a backend that does not exist.

    Raises:
        ValueError: backend is neither "auto" nor one of `known`.
    """
    if backend != "auto" and backend not in known:
        raise ValueError(f"backend={backend!r} does not exist: choose auto, {', '.join(known)}")


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None  # looks through folders: not for every call of a layer


def plain_only() -> bool:
    """Whether LTRAIN_KERNELS=reference says that `auto` is to take plain torch everywhere, as when a kernel is suspected.

    Raises:
        ValueError: it says something else.
    """
    forced = os.environ.get("LTRAIN_KERNELS", "")
    if forced not in ("", "reference"):
        raise ValueError(f"LTRAIN_KERNELS={forced} is not known: write LTRAIN_KERNELS=reference for plain torch everywhere, or unset it")
    return bool(forced)


def wants_triton(backend: str, x: Tensor) -> bool:
    """Whether the Triton kernels are to be asked: by name, or by auto for a tensor on a GPU."""
    return backend == "triton" or (backend == "auto" and x.is_cuda and _triton_is_installed() and not plain_only())


TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # of inputs


def device_refusal(x: Tensor) -> str | None:
    """Why no Triton kernel takes a tensor that lies where this one does, or None: on a GPU, or in Triton's interpreter."""
    return None if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else f"runs on CUDA, not on {x.device.type}"


def plain_refusal(x: Tensor) -> str | None:
    """As `device_refusal`, and of a type that they do not take."""
    return device_refusal(x) or (None if x.dtype in TRITON_TYPES else f"takes bfloat16, float16 or float32, not {x.dtype}")


def permitted(why: str | None, backend: str, others: str) -> bool:
    """Whether kernels run, asked for by `backend`'s name or by auto, which refuse for the reason `why` (None: they do not).

    Raises:
        ValueError: they were asked for by name and refuse; `others` are the backends to choose instead.
    """
    if why is not None and backend != "auto":
        raise ValueError(f"backend={backend!r} {why}: choose {others}")
    return why is None


class _Scatter(torch.autograd.Function):
    """Indexing's own backward would add row by row; distinct rows need only be copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].new_zeros(ctx.total, *grads[0].shape[1:]).index_copy_(0, ctx.saved_tensors[0], grads[0]), None


def scatter_rows(x: Tensor, rows: Tensor, total: int) -> Tensor:
    """A buffer of `total` rows, zero but for x [n, ...] at the distinct `rows` [n]."""
    result: Tensor = _Scatter.apply(x, rows, total)
    return result


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], where no row is taken twice."""
    result: Tensor = _Gather.apply(x, rows)
    return result
