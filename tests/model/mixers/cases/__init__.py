"""Every mixer in the forms that the contract is checked in: one module of cases for each module of ltrain.model.mixers.

A module's CASES maps the name of a case to a mixer of MIXERS and its options as in a config, or to several that read one another's
output, where earlier ones leave something to later ones. Heads and widths are chosen such that two tensor ranks divide them.
"""

import pkgutil
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ltrain.config import Config
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed, Mixer, build_mixer
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import Sequence
from ltrain.pattern import LayerSpec, resolve_layers

HIDDEN = 32

Layer = tuple[str, dict[str, Any]]
CASES: dict[str, list[Layer]] = {
    name: case if isinstance(case, list) else [case]
    for module in pkgutil.iter_modules(__path__)
    for name, case in import_module(f"{__name__}.{module.name}").CASES.items()
}


def config_of(name: str) -> Config:
    """The layers of the case."""
    layers = {f"layer_{i}": {"mixer": mixer, **options} for i, (mixer, options) in enumerate(CASES[name])}
    model = ModelConfig(hidden=HIDDEN, depth=len(layers), pattern=list(layers), layers=layers, init_std=0.3)
    model.ffn = MoEOptions(experts=0, inner=32)
    return Config(model=model, precision="fp64")


def specs_of(name: str) -> list[LayerSpec]:
    return resolve_layers(config_of(name).model)


def spec_of(name: str) -> LayerSpec:
    (spec,) = specs_of(name)
    return spec


def decodes(name: str) -> bool:
    return not any("decode" in spec.options.refuses() for spec in specs_of(name))


def build(name: str, layers: LocalLayers) -> Mixer:
    """The mixer of a case, or the sum of those that read one another's output: each has a share in it."""
    mixers = [build_mixer(spec.mixer, HIDDEN, spec.options, layers) for spec in specs_of(name)]
    return mixers[0] if len(mixers) == 1 else Chain(mixers)


class Chain(Mixer):
    """Mixers that read one another's output, as one whose output is the sum of theirs."""

    def __init__(self, mixers: list[Mixer]):
        nn.Module.__init__(self)
        self.mixers = nn.ModuleList(mixers)

    def _each(self, x: Tensor, call: Any) -> tuple[Tensor, list[Any]]:
        total, states = 0 * x, []
        for i, mixer in enumerate(self.mixers):
            x, state = call(i, mixer, x)
            total, states = total + x, [*states, state]
        return total, states

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self._each(x, lambda i, mixer, x: (mixer(x, seq), None))[0]

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Any]:
        return self._each(x, lambda i, mixer, x: mixer.prefill(x, seq))

    def decode(self, x: Tensor, state: Any, seq: Sequence) -> tuple[Tensor, Any]:
        return self._each(x, lambda i, mixer, x: mixer.decode(x, state[i], seq))

    def flops(self, tokens: int, context: int) -> float:
        return sum(m.flops(tokens, context) for m in self.mixers)  # type: ignore[operator, misc]

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        return sum(m.state_bytes(context, bytes_per_value) for m in self.mixers)  # type: ignore[operator, misc]

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        return [need for m in self.mixers for need in m.exchanges(context)]  # type: ignore[operator, union-attr]
