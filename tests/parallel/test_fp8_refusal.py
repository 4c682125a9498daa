"""FP8 where there is no GPU: what is refused, and that a norm fused into the projection after it changes no name and no number."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltrain.config import Config, ConfigError, FP8Config, validate
from ltrain.model.layers import Linear, LocalLayers, RMSNorm, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from ltrain.parallel import fp8


def model(**changes: Any) -> ModelConfig:
    """Every width that is a side of a product is a multiple of 16."""
    layers = {
        "linear": {"mixer": "gated_delta_net", "key_heads": 4, "value_heads": 8, "key_dim": 16, "value_dim": 16},
        "full": {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": {"experts": 0, "inner": 48}},
    }
    made = ModelConfig(hidden=32, depth=4, pattern=["linear", "full"], layers=layers, ffn=MoEOptions(experts=4, inner=16, shared_inner=32))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def config(**changes: Any) -> Config:
    made = Config(model=model(), precision="bf16", fp8=FP8Config(recipe="current"))
    for key, value in changes.items():
        part: Any = made
        *parents, name = key.split("__")
        for parent in parents:
            part = getattr(part, parent)
        setattr(part, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"precision": "fp32"}, "fp8.recipe=current needs precision=bf16"),
        ({"device": "cpu"}, "fp8.recipe=current needs a GPU, but device=cpu"),
        ({"engine": "deepspeed"}, "write engine=megatron"),
        ({"fp8__recipe": "e4m3"}, "fp8.recipe is 'e4m3', expected one of none, delayed, current, blockwise"),
        ({"fp8__bf16_first": 3, "fp8__bf16_last": 1}, "leave none of 4 layers"),
        ({"fp8__recipe": "none", "fp8__bf16_last": 1}, "fp8.bf16_last=1 has no effect with fp8.recipe=none"),
        ({"fp8__amax_history": 16}, "fp8.amax_history=16 has no effect with fp8.recipe=current"),
    ],
)
def test_a_config_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(config(**changes))


def test_what_fp8_can_have_is_not_refused() -> None:
    validate(config())
    validate(config(fp8__recipe="delayed", fp8__amax_history=16, fp8__bf16_first=1, fp8__bf16_last=2))
    validate(config(data__tokens=1047, train__tokens_per_step=1047, parallel__tensor=2, parallel__context=2))
    fp8.refuse(config(fp8__recipe="none", model=model(hidden=36)), torch.device("cpu"))


def test_a_cpu_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^fp8.recipe=current needs an NVIDIA GPU, and this rank is on a cpu: .* or write fp8.recipe=none$"):
        fp8.refuse(config(), torch.device("cpu"))


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
def test_without_the_package_it_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"needs Transformer Engine, which is not installed: .* or write fp8.recipe=none$"):
        fp8.refuse(config(), torch.device("cuda"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": model(ffn=MoEOptions(experts=4, inner=24, shared_inner=32))}, "layer 0 has one of 32 -> 24"),
        ({"model": model(ffn=MoEOptions(experts=4, inner=16, shared_inner=40))}, "layer 0 has one of 40 -> 32"),
        ({"model": model(hidden=40)}, "layer 0 has one of 40 -> "),
        ({"model": model(), "parallel__tensor": 2}, "layer 0 has one of 32 -> 200"),  # two numbers for each of 4 heads
        ({"model": model(layers=model().layers | {"full": {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 10}})}, "layer 1 .* 120"),
    ],
)
def test_widths_that_fp8_cannot_multiply_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fp8.check_widths(config(**changes))


def test_widths_of_layers_in_bf16_do_not_matter() -> None:
    narrow = model(
        layers=model().layers | {"full": {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 10}}, pattern=["full"] + ["linear"] * 3
    )
    with pytest.raises(ConfigError, match="layer 0"):
        fp8.check_widths(config(model=narrow))
    fp8.check_widths(config(model=narrow, fp8__bf16_first=1))
    fp8.check_widths(config())


class NormLinear(nn.Module):
    def __init__(self, norm: RMSNorm, linear: Linear):
        super().__init__()
        self.weight, self.parts, self._norm = linear.weight, linear.parts, [norm]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return nn.functional.linear(self._norm[0](x), self.weight).split(self.parts, dim=-1)


class FusedLayers(LocalLayers):
    """Fused norm-linears without any kernel that fuses, in all layers but the last."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.fusions = self.checkpoints = 0

    def at(self, layer: int) -> LocalLayers:
        return LocalLayers(std=self.std, dtype=self.dtype) if layer == 3 else self

    def fused(self, norm: nn.Module, linear: nn.Module) -> nn.Module | None:
        assert isinstance(norm, RMSNorm) and isinstance(linear, Linear)
        self.fusions += 1
        return NormLinear(norm, linear)

    def checkpointed(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.checkpoints += 1
        return super().checkpointed(function, *args, **options)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_fused_norm_changes_no_name_and_no_number(recompute: str) -> None:
    plain = Stack(model(), 64, LocalLayers(std=0.2, dtype=torch.float64))
    layers = FusedLayers(std=0.2, dtype=torch.float64)
    fused = Stack(model(), 64, layers, recompute=recompute)
    assert layers.fusions == 4  # the first three mixers, and the one dense feed-forward among their layers
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for stack in (plain, fused):
        seed_parameters(stack, 1)
        seq = Sequence.of([5, 27])
        tokens = torch.arange(32) * 7 % 64
        stack.loss(stack(tokens, seq), tokens.roll(-1)).objective.backward()
    assert layers.checkpoints == (3 if recompute == "full" else 0)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and b.grad.abs().max() > 0, name
        assert torch.equal(a.grad, b.grad), name
    for stack in (plain, fused):
        stack.eval()
    logits = [stack.prefill(tokens, Sequence.of([5, 27]))[0] for stack in (plain, fused)]
    assert torch.equal(*logits)
