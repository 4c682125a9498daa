"""What FP8 asks of a machine and of a model; the layers themselves are in `ltrain.parallel.fp8_layers`."""

import importlib
from importlib.util import find_spec

import torch
from torch import nn

from ltrain.config import Config, ConfigError
from ltrain.kernels.libraries import load_cudnn
from ltrain.model.layers import LocalLayers, Shard
from ltrain.model.options import MoEOptions
from ltrain.model.stack import Stack

SIDE = 16  # what every side of an FP8 matrix product must be a multiple of


def rows_multiple(config: Config) -> int:
    """What each rank's rows of a product must be a multiple of in training."""
    return 1 if config.fp8.recipe == "none" else SIDE


def half_layers(config: Config) -> frozenset[int]:
    """The layers whose matrix products stay in bfloat16."""
    depth = config.model.depth
    return frozenset(range(config.fp8.bf16_first)) | frozenset(range(depth - config.fp8.bf16_last, depth))


def refuse(config: Config, device: torch.device) -> None:
    """ConfigError, in one sentence, where the config asks for FP8 and this machine or this model cannot have it."""
    if config.fp8.recipe == "none":
        return
    why = lacks(config.fp8.recipe, device)
    if why:
        raise ConfigError(f"fp8.recipe={config.fp8.recipe} {why}, or write fp8.recipe=none")
    check_widths(config)


def check_widths(config: Config) -> None:
    """ConfigError for the first matrix product, in the order of the layers, that FP8 does not take. Nothing is allocated."""
    Stack(config.model, config.model.vocab or SIDE, _Widths(config))


def lacks(recipe: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, and this rank is on a {device.type}: run it where there is one"
    if find_spec("transformer_engine") is None:
        return "needs Transformer Engine, which is not installed: install transformer-engine[pytorch]"
    load_cudnn()
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, AssertionError, RuntimeError) as error:
        return f"needs Transformer Engine, which does not load ({str(error).partition('.')[0]}): install one for torch {torch.__version__}"
    available = te.is_fp8_block_scaling_available if recipe == "blockwise" else te.is_fp8_available
    able, why = available(return_reason=True)
    return None if able else f"cannot run on this {torch.cuda.get_device_name(device)} ({why.rstrip('.')}): write another recipe"


class _Widths(LocalLayers):
    """Builds a model on no device, and looks at the sides of its matrix products on one tensor rank."""

    def __init__(self, config: Config):
        super().__init__(device="meta", norm_kind=config.model.norm)
        self.shard = Shard(tensor_size=config.parallel.tensor)
        self.recipe, self.half = config.fp8.recipe, half_layers(config)
        self.layer = 0

    def at(self, layer: int) -> LocalLayers:
        self.layer = layer
        return self

    def _check(self, in_features: int, out_features: int) -> None:
        if self.layer not in self.half and (in_features % SIDE or out_features % SIDE):
            raise ConfigError(
                f"fp8.recipe={self.recipe} takes products whose sides are multiples of {SIDE} on each tensor rank, but layer {self.layer} has one "
                f"of {in_features} -> {out_features}: change its widths, or write fp8.recipe=none"
            )

    def column(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> nn.Module:
        self._check(in_features, sum(self.heads(part, "projection width") for part in parts))
        return super().column(in_features, parts, bias)

    def row(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        self._check(self.heads(in_features, "projection width"), out_features)
        return super().row(in_features, out_features, bias)

    def experts(self, width: int, options: MoEOptions) -> nn.Module:
        self._check(width, options.inner)
        return super().experts(width, options)
