"""The layers of a model that is sharded over tensor ranks (with sequence parallelism) and expert ranks.

Linear layers and embeddings are megatron-core's. Between blocks a rank holds tokens / tensor of its context rank's tokens;
a column layer gathers them, a row layer sums and scatters them again.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from ltrain.config import Config
from ltrain.kernels.cross_entropy import Losses, linear_cross_entropy_sum
from ltrain.kernels.cross_entropy.reference import bounded
from ltrain.model.head import main_grad
from ltrain.model.layers import Experts, LocalLayers, ParamLayout, declare, layout_of, normal, settings, split
from ltrain.model.options import MoEOptions
from ltrain.model.sequence import Sequence
from ltrain.parallel.experts import ExpertParallelExperts
from ltrain.parallel.mesh import Mesh


def _unfilled(weight: Tensor) -> None:
    """megatron's init_method: weights are filled by `seed_parameters`, the same on every layout."""


class ColumnLinear(ColumnParallelLinear):
    def __init__(self, in_features: int, parts: tuple[int, ...], local: tuple[int, ...], config: ModelParallelConfig, group: dist.ProcessGroup):
        super().__init__(
            in_features, sum(parts), config=config, init_method=_unfilled, bias=False, gather_output=False, skip_bias_add=False, tp_group=group
        )
        self.parts = local

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, _ = super().forward(x.unsqueeze(1))  # [T / tensor, 1, in] -> [T, 1, sum(parts) / tensor]
        return split(y.squeeze(1), self.parts)


class RowLinear(RowParallelLinear):
    def __init__(self, in_features: int, out_features: int, config: ModelParallelConfig, group: dist.ProcessGroup):
        super().__init__(
            in_features, out_features, config=config, init_method=_unfilled, bias=False, input_is_parallel=True, skip_bias_add=False, tp_group=group
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y, _ = super().forward(x.unsqueeze(1))  # [T, 1, in / tensor] -> [T / tensor, 1, out]
        return y.squeeze(1)


class _SumOverRanks(torch.autograd.Function):
    """The sum over a group of what each of its ranks adds to, for something that each of them then uses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class FullRMSNorm(nn.Module):
    """RMSNorm over a width that is sharded over a group: x [T, width / ranks]."""

    def __init__(self, weight: nn.Parameter, eps: float, zero_centred: bool, group: dist.ProcessGroup):
        super().__init__()
        self.weight, self.eps, self.offset, self.group = weight, eps, float(zero_centred), group

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares: Tensor = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), self.group)
        mean = squares / (x.shape[-1] * self.group.size())
        return (wide * torch.rsqrt(mean + self.eps) * (self.weight.to(wide.dtype) + self.offset)).to(x.dtype)


class VocabEmbedding(VocabParallelEmbedding):
    """Each tensor rank embeds its part of the vocabulary; the sum is scattered over the tokens."""

    def __init__(self, vocab: int, hidden: int, config: ModelParallelConfig, group: dist.ProcessGroup):
        super().__init__(vocab, hidden, init_method=_unfilled, reduce_scatter_embeddings=True, config=config, tp_group=group)

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens.unsqueeze(0)).squeeze(1)  # [1, T] -> [T / tensor, 1, hidden] -> [T / tensor, hidden]


class VocabShards:
    """The tensor ranks, to `ltrain.kernels.cross_entropy`: each has as many rows of the vocabulary as `local`."""

    def __init__(self, local: int, group: dist.ProcessGroup):
        self.first, self.count, self._group = group.rank() * local, group.size(), group

    def gather(self, x: Tensor) -> Tensor:
        parts = x.new_empty(self.count, *x.shape)
        dist.all_gather(list(parts), x, group=self._group)
        return parts


class VocabHead(nn.Module):
    """The output layer over a vocabulary that is sharded over tensor ranks; scale and softcap as of `ltrain.model.layers.Head`."""

    def __init__(self, linear: ColumnLinear, group: dist.ProcessGroup, tied: nn.Parameter | None, scale: float, softcap: float):
        super().__init__()
        self.scale, self.softcap = scale, softcap
        self.linear, self.group = linear, group
        if tied is None:
            self.weight = linear.weight
        # megatron's layer holds the parameter as its own: the model's name for it is head.weight, or the embedding's
        del linear._parameters["weight"]
        self._weight = [self.weight if tied is None else tied]

    def _local_logits(self, x: Tensor) -> Tensor:
        """x [T / tensor, hidden] -> [T, vocab / tensor]"""
        logits, _ = ColumnParallelLinear.forward(self.linear, x.unsqueeze(1), weight=self._weight[0])
        return logits.squeeze(1)

    def logits(self, x: Tensor) -> Tensor:
        """x [T / tensor, hidden] -> [T, vocab], gathered without a gradient: for evaluation and decoding."""
        local = bounded(self._local_logits(x).detach(), self.scale, self.softcap).contiguous()
        parts = [torch.empty_like(local) for _ in range(self.group.size())]
        dist.all_gather(parts, local, group=self.group)
        return torch.cat(parts, dim=-1)

    def loss(self, x: Tensor, labels: Tensor, z_loss: float = 0.0, factor: float = 1.0) -> Losses:
        """As `ltrain.model.layers.Head.loss`, of x [T / tensor, hidden] and labels [T] of all the tokens; the same on every tensor rank."""
        whole = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        weight = self._weight[0]
        return linear_cross_entropy_sum(
            whole,
            weight,
            labels,
            z_loss=z_loss,
            scale=self.scale,
            softcap=self.softcap,
            factor=factor,
            weight_grad=main_grad(weight),
            shards=VocabShards(len(weight), self.group),
        )


class ParallelLayers(LocalLayers):
    """This rank's layers under a mesh. Where a degree is 1, the one-device layer serves."""

    def __init__(self, mesh: Mesh, *, std: float, depth: int, eps: float, dtype: torch.dtype, norm_kind: str = "rms"):
        super().__init__(std=std, depth=depth, eps=eps, norm_kind=norm_kind, device=mesh.device, dtype=dtype)
        self.mesh = mesh
        self.shard = mesh.shard
        self.tensor_parallel = mesh.shard.tensor_size > 1
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=mesh.shard.tensor_size,
            sequence_parallel=self.tensor_parallel,
            params_dtype=dtype,
            perform_initialization=False,
            use_cpu_initialization=mesh.device.type == "cpu",
            gradient_accumulation_fusion=False,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """What the forward of these layers runs under."""
        return nullcontext()

    def parameter(self, layout: ParamLayout, dtype: torch.dtype | None = None) -> nn.Parameter:
        return _mark(super().parameter(layout, dtype))

    def _declare(self, param: nn.Parameter, layout: ParamLayout) -> None:
        _mark(declare(param, layout, self.shard))

    def column(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> nn.Module:
        if not self.tensor_parallel:
            return super().column(in_features, parts, bias)
        local = tuple(self.heads(part, "projection width") for part in parts)
        linear = ColumnLinear(in_features, parts, local, self.config, self.mesh.tensor)
        self._declare(linear.weight, ParamLayout((sum(parts), in_features), normal(self.std), axis=0, splits=parts))
        if bias:
            linear.bias = self.column_bias(parts)
        return linear

    def row(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        if not self.tensor_parallel:
            return super().row(in_features, out_features, bias)
        linear = RowLinear(in_features, out_features, self.config, self.mesh.tensor)
        self._declare(linear.weight, ParamLayout((out_features, in_features), normal(self.output_std), axis=1))
        if bias:
            linear.bias = self.row_bias(out_features)
        return linear

    def gather(self, x: Tensor) -> Tensor:
        if not self.tensor_parallel:
            return x
        gathered: Tensor = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.mesh.tensor)
        return gathered

    def mine(self, x: Tensor) -> Tensor:
        return x.chunk(self.shard.tensor_size)[self.shard.tensor_rank]

    def shift(self, x: Tensor, seq: Sequence) -> Tensor:
        if not self.tensor_parallel:
            return super().shift(x, seq)
        # every rank needs its own tokens of the result alone, so that the gradient of what was gathered is not summed again
        whole = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.mesh.tensor)
        mine: Tensor = scatter_to_sequence_parallel_region(seq.exchange.before(whole, seq), group=self.mesh.tensor)
        return mine

    def _full_norm(self, weight: nn.Parameter, eps: float, zero_centred: bool) -> nn.Module:
        if not self.tensor_parallel:
            return super()._full_norm(weight, eps, zero_centred)
        return FullRMSNorm(weight, eps, zero_centred, self.mesh.tensor)

    def embedding(self, vocab: int, hidden: int) -> Any:
        if not self.tensor_parallel:
            return super().embedding(vocab, hidden)
        embedding = VocabEmbedding(vocab, hidden, self.config, self.mesh.tensor)
        self._declare(embedding.weight, ParamLayout((vocab, hidden), normal(self.std), axis=0))
        return embedding

    def head(self, vocab: int, hidden: int, tied: nn.Parameter | None, scale: float = 1.0, softcap: float = 0.0) -> Any:
        if not self.tensor_parallel:
            return super().head(vocab, hidden, tied, scale, softcap)
        linear = ColumnLinear(hidden, (vocab,), (vocab // self.shard.tensor_size,), self.config, self.mesh.tensor)
        if tied is None:
            self._declare(linear.weight, ParamLayout((vocab, hidden), normal(self.std), axis=0))
        return VocabHead(linear, self.mesh.tensor, tied, scale, softcap)

    def experts(self, width: int, options: MoEOptions) -> nn.Module:
        local = super().experts(width, options)
        assert isinstance(local, Experts)
        if self.shard.expert_size == 1:
            return local
        return ExpertParallelExperts(local, options, self.mesh)


def build_layers(config: Config, mesh: Mesh, dtype: torch.dtype) -> ParallelLayers:
    options = {**settings(config.model), "dtype": dtype}
    if config.fp8.recipe == "none":
        return ParallelLayers(mesh, **options)
    from ltrain.parallel import fp8

    fp8.refuse(config, mesh.device)
    from ltrain.parallel.fp8_layers import FP8Layers

    return FP8Layers(mesh, config.fp8, fp8.half_layers(config), **options)


def _mark(param: nn.Parameter) -> nn.Parameter:
    """Tell megatron's data parallelism and gradient norm how this parameter is held."""
    layout = layout_of(param)
    param.tensor_model_parallel = layout.axis is not None or layout.experts > 0  # type: ignore[attr-defined]
    param.allreduce = layout.experts == 0  # type: ignore[attr-defined]
    return param
