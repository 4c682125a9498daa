"""Linear layers, norm-linears and experts that multiply in FP8, by Transformer Engine.

Parameters are ours: bfloat16, under the names and with the layouts they have without FP8, so that checkpoints are the same. Transformer
Engine quantises weights, inputs and gradients for each product, inside `FP8Layers.autocast`; outside of it (evaluation, decoding) the
same layers multiply in bfloat16. Embedding, head, routers, convolutions, norms without a projection after them and numbers per head
are never in FP8, nor is what expands latents where it is multiplied into queries (attention over what an indexer selects) or into latents
of other ranks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformer_engine.pytorch as te
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Recipe
from transformer_engine.pytorch.distributed import get_activation_recompute_contexts
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from ltrain.config import FP8Config
from ltrain.model.experts import Experts
from ltrain.model.layers import LocalLayers, ParamLayout, RMSNorm, normal, split
from ltrain.model.options import MoEOptions
from ltrain.model.recompute import cheap
from ltrain.parallel.experts import ExpertParallelExperts
from ltrain.parallel.fp8 import SIDE
from ltrain.parallel.layers import ParallelLayers, _unfilled
from ltrain.parallel.mesh import Mesh


def recipe_of(fp8: FP8Config) -> Recipe:
    """delayed: one scale per tensor from the largest values of earlier micro-batches, E4M3 forward and E5M2 backward (Micikevicius et
    al. 2022); current: the same from the tensor itself; blockwise: a scale for each 1 x 128 values of inputs and gradients and each
    128 x 128 of weights, E4M3 (DeepSeek-AI 2024)."""
    if fp8.recipe == "delayed":
        return DelayedScaling(amax_history_len=fp8.amax_history, amax_compute_algo="max")
    return {"current": Float8CurrentScaling, "blockwise": Float8BlockScaling}[fp8.recipe]()


def _sharded(mode: str, group: dist.ProcessGroup | None) -> dict[str, Any]:
    if group is None:
        return {}
    return {"parallel_mode": mode, "tp_group": group, "tp_size": group.size(), "sequence_parallel": True}


def _common(weight: nn.Parameter) -> dict[str, Any]:
    """Transformer Engine's own parameters take no memory: ours are put in their place."""
    return {"bias": False, "params_dtype": weight.dtype, "device": "meta", "init_method": _unfilled}


class _WithoutScales:
    """Delayed scales are not part of the state, which Transformer Engine would pickle: a run finds new ones when it starts."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class ColumnLinear(_WithoutScales, te.Linear):
    """y = x W^T + b, split in parts: [T / tensor, in] -> [T, part / tensor] each."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, shape: tuple[int, int], parts: tuple[int, ...], group: Any):
        super().__init__(shape[1], shape[0], **_common(weight), **_sharded("column", group))
        self.weight, self.shape, self.parts, self.group = weight, shape, parts, group
        self.offset = bias is not None
        if bias is not None:
            self.bias = bias

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = super().forward(x)
        return split(y + self.bias if self.offset else y, self.parts)


class NormLinear(_WithoutScales, te.LayerNormLinear):
    """A `ColumnLinear` of RMSNorm(x), whose input is normed and quantised in one pass."""

    def __init__(self, norm: RMSNorm, linear: ColumnLinear):
        out_features, in_features = linear.shape
        super().__init__(
            in_features,
            out_features,
            eps=norm.eps,
            normalization="RMSNorm",
            zero_centered_gamma=norm.zero_centred,
            **_common(linear.weight),
            **_sharded("column", linear.group),
        )
        self.weight, self.parts, self.offset = linear.weight, linear.parts, linear.offset
        if linear.offset:
            self.bias = linear.bias
        # the norm's weight stays the norm's: not a parameter of this module, or it would have two names
        del self._parameters["layer_norm_weight"]
        self.__dict__["layer_norm_weight"] = norm.weight

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = super().forward(x)
        return split(y + self.bias if self.offset else y, self.parts)


class RowLinear(_WithoutScales, te.Linear):
    """y = x W^T + b: [T, in / tensor] -> [T / tensor, out], summed over the tensor ranks."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, shape: tuple[int, int], group: Any):
        super().__init__(shape[1], shape[0], **_common(weight), **_sharded("row", group))
        self.weight = weight
        self.offset = bias is not None
        if bias is not None:
            self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.bias if self.offset else y


class GroupedLinear(_WithoutScales, te.GroupedLinear):
    """y = x W_g^T for the rows of each group; the weights [E, out, in] are given with each call."""

    def __init__(self, weight: nn.Parameter):
        experts, out_features, in_features = weight.shape
        super().__init__(experts, in_features, out_features, **_common(weight))
        self._parameters.clear()
        for i in range(experts):
            setattr(self, f"bias{i}", torch.empty(0, dtype=weight.dtype, device=weight.device))
        self._weights: tuple[Tensor, ...] = ()

    def _get_weight_tensors(self) -> list[Tensor]:
        return list(self._weights)

    def forward(self, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        """x [n, in], sorted by group, sizes: rows of each group, multiples of SIDE -> [n, out]"""
        self._weights = weight.unbind()
        try:
            y: Tensor = super().forward(x, torch.tensor(sizes))
        finally:
            self._weights = ()
        return y


class QuantisedExperts(Experts):
    """`Experts` whose two products are in FP8; the rows of each expert are padded with zeros to a multiple of SIDE."""

    def __init__(self, *made: Any):
        super().__init__(*made)
        self.up_product, self.down_product = GroupedLinear(self.up), GroupedLinear(self.down)
        self.pad, self.unpad = te.Fp8Padding(len(self.up), SIDE), te.Fp8Unpadding(len(self.up), SIDE)

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        if not FP8GlobalStateManager.is_fp8_enabled():
            return super().grouped(x, counts)
        if not len(x):
            # a rank without tokens must not leave out what the others do together: the largest values' reduction, the gradient's exchange
            some = counts.new_zeros(len(counts))
            some[0] = SIDE
            return self.grouped(F.pad(x, (0, 0, 0, SIDE)), some)[:0]
        sizes = counts.tolist()
        rows, padded = self.pad(x, sizes)
        inner = self._biased(self.up_product(rows, self.up, padded), self.up_bias, torch.tensor(padded))
        y: Tensor = self.unpad(self.down_product(cheap(self.activation.fused, inner), self.down, padded), sizes)
        return self._biased(y, self.down_bias, counts)


class QuantisedParallelExperts(QuantisedExperts, ExpertParallelExperts):
    """The same, for this rank's experts and the tokens that come to them."""


class FP8Layers(ParallelLayers):
    """`ParallelLayers` with FP8 products in all layers but `half`."""

    def __init__(self, mesh: Mesh, fp8: FP8Config, half: frozenset[int], **options: Any):
        super().__init__(mesh, **options)
        self.recipe, self.half, self.in_half = recipe_of(fp8), half, ParallelLayers(mesh, **options)
        self.group = mesh.tensor if self.tensor_parallel else None
        FP8GlobalStateManager.reset()  # of what an earlier model of this process left there

    def at(self, layer: int) -> LocalLayers:
        return self.in_half.at(layer) if layer in self.half else super().at(layer)

    def autocast(self) -> AbstractContextManager[Any]:
        """What a stage's forward runs under: FP8 in training, bfloat16 without gradients.

        The largest values that delayed scaling keeps are reduced over tensor x context ranks: what they quantise is sharded over them
        (inputs and gradients over tokens and widths, weights over widths), and one scale must fit it all. Data ranks hold the same
        weights, hence the same scales of them.
        """
        return te.autocast(enabled=torch.is_grad_enabled(), recipe=self.recipe, amax_reduction_group=self.mesh.tensor_context)

    def checkpointed(self, function: Callable[..., Any], *args: Any, contexts: Callable[[], tuple[Any, Any]] = noop_context_fn) -> Any:
        """The second pass quantises with the scales of the first: Transformer Engine keeps them where it is told which pass it is."""
        enabled = FP8GlobalStateManager.is_fp8_enabled()

        def passes() -> tuple[Any, Any]:
            first, second = contexts()
            keeping, replaying = get_activation_recompute_contexts()
            return _all(first, keeping), _all(second, replaying, self._again(enabled))

        return super().checkpointed(function, *args, contexts=passes)

    @contextmanager
    def _again(self, enabled: bool) -> Any:
        # inside another region, for leaving the outermost one would move the scales on once more
        with te.autocast(enabled=False), te.autocast(enabled=enabled, recipe=self.recipe, amax_reduction_group=self.mesh.tensor_context):
            yield

    def column(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> nn.Module:
        shape, local = (sum(parts), in_features), tuple(self.heads(part, "projection width") for part in parts)
        weight = self.parameter(ParamLayout(shape, normal(self.std), axis=0, splits=parts))
        return ColumnLinear(weight, self.column_bias(parts) if bias else None, shape, local, self.group)

    def row(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        shape = (out_features, in_features)
        weight = self.parameter(ParamLayout(shape, normal(self.output_std), axis=1))
        return RowLinear(weight, self.row_bias(out_features) if bias else None, shape, self.group)

    def fused(self, norm: nn.Module, linear: nn.Module) -> nn.Module | None:
        assert isinstance(linear, ColumnLinear)
        return NormLinear(norm, linear) if isinstance(norm, RMSNorm) else None

    def experts(self, width: int, options: MoEOptions) -> nn.Module:
        plain = LocalLayers.experts(self, width, options)
        assert isinstance(plain, Experts)
        if self.shard.expert_size == 1:
            return QuantisedExperts(plain.up, plain.down, plain.activation, plain.up_bias, plain.down_bias, plain.scale_input)
        return QuantisedParallelExperts(plain, options, self.mesh)


@contextmanager
def _all(*contexts: AbstractContextManager[Any]) -> Any:
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        yield
