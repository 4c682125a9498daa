"""The factory a model is built from, and how each of its parameters lies in the whole model.

Model code asks a `Layers` for its linear layers, norms, embeddings and experts and never learns how many ranks there are.
`LocalLayers` is one device. `ltrain.parallel.layers` gives the sharded ones.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from ltrain.model.activation import Activation
from ltrain.model.experts import Experts
from ltrain.model.head import Head
from ltrain.model.norm import GroupRMSNorm, LayerNorm, RMSNorm, WeightlessNorm
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import Sequence

__all__ = [
    "Embedding",
    "Experts",
    "Head",
    "Init",
    "LayerNorm",
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
    "joined",
    "layout_of",
    "new_parameter",
    "normal",
    "pieces",
    "seed_parameters",
    "settings",
    "shard_of",
    "split",
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


def split(y: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """y [..., sum(parts)] -> one tensor per part. One part is y itself: the gradient of a split is a copy."""
    return (y,) if len(parts) == 1 else y.split(parts, dim=-1)


def joined(linear: nn.Module, first: int) -> nn.Module:
    """A layer of `LocalLayers.column`, which now gives its first parts as one tensor, where they lie side by side."""
    parts: tuple[int, ...] = linear.parts  # type: ignore[assignment]
    linear.parts = (sum(parts[:first]), *parts[first:])  # type: ignore[assignment]
    return linear


class Linear(nn.Module):
    """y = x W^T + b. `forward` returns a tuple, one tensor per fused output part."""

    def __init__(self, weight: nn.Parameter, parts: tuple[int, ...], bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.parts, self.bias = weight, parts, bias

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(F.linear(x, self.weight, self.bias), self.parts)


class RowLinear(nn.Module):
    """y = x W^T + b with x sharded along its width, as the column layer before it left it."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)  # [T] -> [T, hidden]


def settings(model: ModelConfig) -> dict[str, Any]:
    """What a factory is told of a model."""
    return {"std": model.init_std, "depth": model.depth, "eps": model.norm_eps, "norm_kind": model.norm}


class LocalLayers:
    """Everything on one device."""

    shard = Shard()

    def __init__(
        self,
        *,
        std: float = 0.02,
        depth: int = 1,
        eps: float = 1e-6,
        norm_kind: str = "rms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.std, self.eps, self.device, self.dtype = std, eps, device, dtype
        self.depth, self.layer = depth, 0  # of the model, and the index of the layer that this factory serves
        self.norm_kind = norm_kind  # model.norm
        self.output_std = std / math.sqrt(2 * depth)  # of what adds to the residual stream (GPT-2)

    @classmethod
    def of(cls, model: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LocalLayers":
        """What this model asks of its layers."""
        return cls(**settings(model), device=device, dtype=dtype)

    def parameter(self, layout: ParamLayout, dtype: torch.dtype | None = None) -> nn.Parameter:
        return new_parameter(layout, self.shard, self.device, dtype or self.dtype)

    def at(self, layer: int) -> "LocalLayers":
        """The factory of this layer of the model: layers may differ in precision, and some in what depends on their depth."""
        here = copy.copy(self)
        here.layer = layer
        return here

    def fused(self, norm: nn.Module, linear: nn.Module) -> nn.Module | None:
        """A module with both's parameters that takes linear's place and applies the norm too, or None: the norm stays a step of its own."""
        return None

    def checkpointed(self, function: Callable[..., Any], *args: Any, contexts: Callable[[], tuple[Any, Any]] = noop_context_fn) -> Any:
        """function(*args), whose activations are made again in the backward; `contexts` gives what the first pass and the second run under."""
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def heads(self, count: int, what: str) -> int:
        """How many of `count` heads this rank holds."""
        size = self.shard.tensor_size
        if count % size:
            raise ValueError(f"{what}={count} does not divide over parallel.tensor={size}: choose a tensor degree that divides it")
        return count // size

    def column(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> nn.Module:
        """[T, in_features] -> one tensor [T, part / ranks] per part: fused projections, each sharded over its outputs."""
        layout = ParamLayout((sum(parts), in_features), normal(self.std), axis=0, splits=parts)
        local = tuple(self.heads(p, "projection width") for p in parts)
        return Linear(self.parameter(layout), local, self.column_bias(parts) if bias else None)

    def column_of_all(self, in_features: int, parts: tuple[int, ...]) -> nn.Module:
        """As `column`, of rows that every rank has whole, [M, in_features], and for whose gradient each rank adds what its own outputs give."""
        return LocalLayers.column(self, in_features, parts)

    def column_bias(self, parts: tuple[int, ...]) -> nn.Parameter:
        return self.parameter(ParamLayout((sum(parts),), constant(0.0), axis=0, splits=parts, decay=False))

    def row(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """[T, in_features / ranks] -> [T, out_features], summed over the ranks; a bias is added once, after the sum."""
        weight = self.parameter(ParamLayout((out_features, in_features), normal(self.output_std), axis=1))
        return RowLinear(weight, self.row_bias(out_features) if bias else None)

    def output(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """The `row` that a mixer ends with."""
        return self.row(in_features, out_features, bias)

    def row_bias(self, width: int) -> nn.Parameter:
        return self.parameter(ParamLayout((width,), constant(0.0), partial_gradient=True, decay=False))

    def norm(self, width: int) -> nn.Module:
        """Norm of the residual stream."""
        return self._norm(width, self.norm_kind)

    def head_norm(self, width: int) -> nn.Module:
        """Norm inside each query or key head, of the residual stream's kind, one weight for all heads of all ranks."""
        return self._norm(width, self.norm_kind)

    def full_norm(self, width: int) -> nn.Module:
        """RMSNorm over all heads together [T, width / ranks], whose mean square is over all ranks' heads."""
        zero_centred = self.norm_kind == "rms_zero_centred"
        layout = ParamLayout((width,), constant(0.0 if zero_centred else 1.0), axis=0, decay=False)
        return self._full_norm(self.parameter(layout), self.eps, zero_centred)

    def _full_norm(self, weight: nn.Parameter, eps: float, zero_centred: bool) -> nn.Module:
        return RMSNorm(weight, eps, zero_centred)

    def weightless_norm(self, eps: float | None = None) -> nn.Module:
        """RMSNorm without a weight."""
        return WeightlessNorm(eps or self.eps)

    def of_heads(self, values: Tensor) -> Tensor:
        """values [heads, ...], constants of all heads -> those of this rank's."""
        count = self.heads(len(values), "heads")
        return values[self.shard.tensor_rank * count :][:count].to(self.device)

    def latent_norm(self, width: int, eps: float) -> nn.Module:
        """RMSNorm of a latent that every rank has, of its own eps."""
        return RMSNorm(self.parameter(ParamLayout((width,), constant(1.0), partial_gradient=True, decay=False)), eps)

    def shift(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T / ranks, ...] -> for each of this rank's tokens the one before it in its document, zeros before the first."""
        return seq.exchange.before(x, seq)

    def mine(self, x: Tensor) -> Tensor:
        """x [T, ...], which all ranks have and which has no gradient -> [T / ranks, ...], of the tokens between blocks of this rank."""
        return x

    def positions(self, count: int, hidden: int) -> nn.Parameter:
        """[count, hidden], whole on every rank, where each sees its own tokens."""
        return self.parameter(ParamLayout((count, hidden), normal(self.std), partial_gradient=True))

    def latent_layer_norm(self, width: int, eps: float) -> nn.Module:
        """LayerNorm with a bias of what every rank has, of its own eps."""

        def vector(value: float) -> nn.Parameter:
            return self.parameter(ParamLayout((width,), constant(value), partial_gradient=True, decay=False))

        return LayerNorm(vector(1.0), vector(0.0), eps)

    def gather(self, x: Tensor) -> Tensor:
        """x [T / ranks, ...], this rank's tokens of what `whole` gave, -> [T, ...] on every rank, as a column layer gathers its input."""
        return x

    def output_norm(self, width: int, eps: float | None = None) -> nn.Module:
        """RMSNorm inside each head of a recurrence's output: its weight starts at 1 also where the others are zero-centred."""
        return self.latent_norm(width, eps or self.eps)

    def full_output_norm(self, width: int, groups: int, eps: float | None = None) -> nn.Module:
        """RMSNorm of a recurrence's output [T, width / ranks], over so many groups of heads each on its own."""
        weight = self.parameter(ParamLayout((width,), constant(1.0), axis=0, decay=False))
        if groups == 1:
            return self._full_norm(weight, eps or self.eps, False)
        return GroupRMSNorm(weight, self.heads(groups, "groups"), eps or self.eps)

    def _norm(self, width: int, kind: str) -> nn.Module:
        def vector(value: float) -> nn.Parameter:
            return self.parameter(ParamLayout((width,), constant(value), partial_gradient=True, decay=False))

        if kind in ("layer", "layer_bias"):
            return LayerNorm(vector(1.0), vector(0.0) if kind == "layer_bias" else None, self.eps)
        return RMSNorm(vector(0.0 if kind == "rms_zero_centred" else 1.0), self.eps, kind == "rms_zero_centred")

    def per_head(self, count: int, init: Init) -> nn.Parameter:
        """A vector with one number per head, sharded with the heads, without weight decay, in float32 or wider: decays near 1
        and their steps need more digits than bfloat16 has."""
        return self.parameter(ParamLayout((count,), init, axis=0, decay=False), torch.promote_types(self.dtype or torch.float32, torch.float32))

    def conv(self, parts: tuple[int, ...], width: int) -> nn.Parameter:
        """Depthwise convolution weights [channels, width] for the channels of a `column` with these parts."""
        bound = 1 / math.sqrt(width)
        return self.parameter(ParamLayout((sum(parts), width), uniform(-bound, bound), axis=0, splits=parts, decay=False))

    def router(self, hidden: int, experts: int) -> nn.Parameter:
        """[experts, hidden], whole on every rank, where each sees its own tokens."""
        return self.parameter(ParamLayout((experts, hidden), normal(self.std), partial_gradient=True))

    def embedding(self, vocab: int, hidden: int) -> Embedding:
        return Embedding(self.parameter(ParamLayout((vocab, hidden), normal(self.std), axis=0)))

    def head(self, vocab: int, hidden: int, tied: nn.Parameter | None, scale: float = 1.0, softcap: float = 0.0) -> Head:
        return Head(self.parameter(ParamLayout((vocab, hidden), normal(self.std), axis=0)) if tied is None else tied, scale, softcap)

    def experts(self, width: int, options: MoEOptions) -> nn.Module:
        """Routed experts: [T, width] -> [T, width], each with the inner width, activation and biases that the options say."""
        o, activation = options, Activation.of(options, options.limit)

        def of_each(shape: tuple[int, ...], init: Init, decay: bool = True) -> nn.Parameter:
            return self.parameter(ParamLayout(shape, init, experts=o.experts, decay=decay))

        up = of_each((activation.parts * o.inner, width), normal(self.std))
        down = of_each((width, o.inner), normal(self.output_std))
        up_bias = of_each((activation.parts * o.inner,), constant(0.0), decay=False) if o.bias else None
        down_bias = of_each((width,), constant(0.0), decay=False) if o.bias else None
        return Experts(up, down, activation, up_bias, down_bias, o.scale_input)

    def whole(self, in_features: int, out_features: int, bias: bool = False, to_residual: bool = False) -> nn.Module:
        """[T, in_features] -> [T, out_features] with the same weights on every rank, where each sees its own tokens."""
        std = self.output_std if to_residual else self.std
        weight = self.parameter(ParamLayout((out_features, in_features), normal(std), partial_gradient=True))
        return RowLinear(weight, self.row_bias(out_features) if bias else None)
