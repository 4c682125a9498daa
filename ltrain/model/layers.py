"""The factory a model is built from, and how each of its parameters lies in the whole model.

Model code asks a `Layers` for its linear layers, norms, embeddings and experts and never learns how many ranks there are.
`LocalLayers` is one device. `ltrain.parallel.layers` gives the sharded ones.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.model.experts import Experts
from ltrain.model.head import Head
from ltrain.model.norm import RMSNorm

__all__ = [
    "Embedding",
    "Experts",
    "Head",
    "Init",
    "Linear",
    "LocalLayers",
    "ParamLayout",
    "Piece",
    "RMSNorm",
    "RowLinear",
    "Shard",
    "constant",
    "declare",
    "expert_name",
    "layout_of",
    "new_parameter",
    "normal",
    "pieces",
    "seed_parameters",
    "shard_of",
    "uniform",
]

Init = Callable[[Tensor, torch.Generator], None]  # fills a tensor of full shape in place


def normal(std: float) -> Init:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)  # type: ignore[return-value]


def uniform(low: float, high: float) -> Init:
    return lambda tensor, generator: tensor.uniform_(low, high, generator=generator)  # type: ignore[return-value]


def constant(value: float) -> Init:
    return lambda tensor, generator: tensor.fill_(value)  # type: ignore[return-value]


@dataclass(frozen=True)
class ParamLayout:
    """Where a parameter lies in the whole model. Checkpoints, seeding, gradients and import tables read this."""

    shape: tuple[int, ...]  # of the whole parameter (of one expert's, where `experts` > 0)
    init: Init
    axis: int | None = None  # the axis sharded over tensor ranks; None: every rank holds all of it
    splits: tuple[int, ...] = ()  # full widths of parts fused along `axis`, each sharded on its own; empty: one part
    experts: int = 0  # > 0: the parameter has a leading axis of this rank's experts, of so many in all
    partial_gradient: bool = False  # replicated, but each tensor rank sees only part of its gradient: sum over them
    decay: bool = True  # weight decay


@dataclass(frozen=True)
class Shard:
    """Which part of the sharded axes one rank holds."""

    tensor_rank: int = 0
    tensor_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor (global name, whole shape) and where it lies in this rank's parameter."""

    name: str
    shape: tuple[int, ...]  # of the whole logical tensor
    start: tuple[int, ...]  # of the rectangle in the logical tensor
    index: tuple[int | slice, ...]  # of the rectangle in the local parameter


def new_parameter(layout: ParamLayout, shard: Shard, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An unfilled parameter of this rank's local shape; `seed_parameters` fills it."""
    shape = list(layout.shape)
    if layout.axis is not None:
        shape[layout.axis] //= shard.tensor_size
    if layout.experts:
        shape.insert(0, layout.experts // shard.expert_size)
    param = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    return declare(param, layout, shard)


def declare(param: nn.Parameter, layout: ParamLayout, shard: Shard) -> nn.Parameter:
    """Write on a parameter how it lies; `layout_of` and `shard_of` read it. (`Tensor.layout` is taken: torch's strided or sparse.)"""
    param.param_layout, param.param_shard = layout, shard  # type: ignore[attr-defined]
    return param


def layout_of(param: Tensor) -> ParamLayout:
    return param.param_layout  # type: ignore[attr-defined]


def shard_of(param: Tensor) -> Shard:
    return param.param_shard  # type: ignore[attr-defined]


def expert_name(name: str, expert: int) -> str:
    """layers.3.ffn.experts.up -> layers.3.ffn.experts.17.up"""
    head, tail = name.rsplit(".", 1)
    return f"{head}.{expert}.{tail}"


def pieces(name: str, param: nn.Parameter) -> Iterator[Piece]:
    """The rectangles of whole-model tensors that this local parameter holds."""
    layout, shard = layout_of(param), shard_of(param)
    ndim = len(layout.shape)
    rectangles: list[tuple[tuple[int, ...], tuple[slice, ...]]] = []
    if layout.axis is None:
        rectangles.append(((0,) * ndim, (slice(None),) * ndim))
    else:
        full_offset = local_offset = 0
        for width in layout.splits or (layout.shape[layout.axis],):
            local = width // shard.tensor_size
            start = tuple(full_offset + shard.tensor_rank * local if a == layout.axis else 0 for a in range(ndim))
            index = tuple(slice(local_offset, local_offset + local) if a == layout.axis else slice(None) for a in range(ndim))
            rectangles.append((start, index))
            full_offset, local_offset = full_offset + width, local_offset + local
    if not layout.experts:
        for start, index in rectangles:
            yield Piece(name, layout.shape, start, index)
        return
    local_experts = layout.experts // shard.expert_size
    for i in range(local_experts):
        for start, index in rectangles:
            yield Piece(expert_name(name, shard.expert_rank * local_experts + i), layout.shape, start, (i, *index))


@torch.no_grad()
def seed_parameters(module: nn.Module, seed: int) -> None:
    """Fill every parameter: drawn at full shape from (seed, global name), then cut to this rank's part.

    The same model therefore starts from the same weights on any layout.
    """
    for name, param in module.named_parameters():
        layout = layout_of(param)
        drawn: tuple[str, Tensor] | None = None
        for piece in pieces(name, param):
            if drawn is None or drawn[0] != piece.name:
                digest = hashlib.sha256(f"{seed}:{piece.name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                full = torch.empty(piece.shape, dtype=torch.float32)
                layout.init(full, generator)
                drawn = (piece.name, full)
            local = param[piece.index]
            rectangle = tuple(slice(s, s + n) for s, n in zip(piece.start, local.shape, strict=True))
            local.copy_(drawn[1][rectangle])


class Linear(nn.Module):
    """y = x W^T. `forward` returns a tuple, one tensor per fused output part."""

    def __init__(self, weight: nn.Parameter, parts: tuple[int, ...]):
        super().__init__()
        self.weight, self.parts = weight, parts

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight).split(self.parts, dim=-1)


class RowLinear(nn.Module):
    """y = x W^T with x sharded along its width, as the column layer before it left it."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)  # [T] -> [T, hidden]


class LocalLayers:
    """Everything on one device."""

    shard = Shard()

    def __init__(
        self, *, std: float = 0.02, depth: int = 1, eps: float = 1e-6, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        self.std, self.eps, self.device, self.dtype = std, eps, device, dtype
        self.output_std = std / math.sqrt(2 * depth)  # of what adds to the residual stream (GPT-2)

    def parameter(self, layout: ParamLayout, dtype: torch.dtype | None = None) -> nn.Parameter:
        return new_parameter(layout, self.shard, self.device, dtype or self.dtype)

    def heads(self, count: int, what: str) -> int:
        """How many of `count` heads this rank holds."""
        size = self.shard.tensor_size
        if count % size:
            raise ValueError(f"{what}={count} does not divide over parallel.tensor={size}: choose a tensor degree that divides it")
        return count // size

    def column(self, in_features: int, parts: tuple[int, ...]) -> nn.Module:
        """[T, in_features] -> one tensor [T, part / ranks] per part: fused projections, each sharded over its outputs."""
        layout = ParamLayout((sum(parts), in_features), normal(self.std), axis=0, splits=parts)
        return Linear(self.parameter(layout), tuple(self.heads(p, "projection width") for p in parts))

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """[T, in_features / ranks] -> [T, out_features], summed over the ranks."""
        return RowLinear(self.parameter(ParamLayout((out_features, in_features), normal(self.output_std), axis=1)))

    def norm(self, width: int) -> nn.Module:
        """RMSNorm of the residual stream."""
        return RMSNorm(self.parameter(ParamLayout((width,), constant(1.0), partial_gradient=True, decay=False)), self.eps)

    def head_norm(self, width: int) -> nn.Module:
        """RMSNorm inside each head, one weight for all heads of all ranks."""
        return self.norm(width)

    def per_head(self, count: int, init: Init) -> nn.Parameter:
        """A vector with one number per head, sharded with the heads, without weight decay, in float32 or wider: decays near 1
        and their steps need more digits than bfloat16 has."""
        return self.parameter(ParamLayout((count,), init, axis=0, decay=False), torch.promote_types(self.dtype or torch.float32, torch.float32))

    def conv(self, parts: tuple[int, ...], width: int) -> nn.Parameter:
        """Depthwise convolution weights [channels, width] for the channels of a `column` with these parts."""
        bound = 1 / math.sqrt(width)
        return self.parameter(ParamLayout((sum(parts), width), uniform(-bound, bound), axis=0, splits=parts, decay=False))

    def router(self, hidden: int, experts: int) -> nn.Parameter:
        """[experts, hidden], whole on every rank."""
        return self.parameter(ParamLayout((experts, hidden), normal(self.std), partial_gradient=True))

    def embedding(self, vocab: int, hidden: int) -> Embedding:
        return Embedding(self.parameter(ParamLayout((vocab, hidden), normal(self.std), axis=0)))

    def head(self, vocab: int, hidden: int, tied: nn.Parameter | None) -> Head:
        return Head(self.parameter(ParamLayout((vocab, hidden), normal(self.std), axis=0)) if tied is None else tied)

    def experts(self, experts: int, hidden: int, inner: int, top_k: int) -> nn.Module:
        up = self.parameter(ParamLayout((2 * inner, hidden), normal(self.std), experts=experts))
        down = self.parameter(ParamLayout((hidden, inner), normal(self.output_std), experts=experts))
        return Experts(up, down)
