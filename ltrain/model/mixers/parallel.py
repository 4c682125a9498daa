"""Several mixers that read the same tokens side by side."""

from typing import Any

import torch
from torch import Tensor, nn

from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed, Mixer, build_mixer
from ltrain.model.options import ParallelOptions
from ltrain.model.options.parallel import heads_width
from ltrain.model.sequence import Sequence


class _WithoutOutput:
    """A factory of layers for mixers that give what their output projection would read."""

    def __init__(self, layers: LocalLayers):
        self._layers = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers, name)

    def output(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        return nn.Identity()


class Parallel(Mixer):
    """The sum over branches of out_scale x mixer(in_scale x x) (Falcon-H1), or W mean(norm(heads of each)) (Hymba).

    The state is a dict of the branches' own.
    """

    options: ParallelOptions

    def __init__(self, hidden: int, options: ParallelOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        inner: Any = _WithoutOutput(layers) if options.fuse else layers
        self.branches = nn.ModuleDict({name: build_mixer(b.mixer, hidden, b.options, inner) for name, b in options.resolved()})
        if options.fuse:
            self.width = next(heads_width(branch.options) for _, branch in options.resolved())
            self.norms = nn.ModuleDict({name: layers.full_output_norm(self.width, 1) for name in self.branches})
            self.out = layers.row(self.width, hidden)

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        scale: float = self.options.branches[name].in_scale
        return x if scale == 1 else x * scale

    def _joined(self, outputs: dict[str, Tensor]) -> Tensor:
        if self.options.fuse:
            y: Tensor = self.out(torch.stack([self.norms[name](y) for name, y in outputs.items()]).mean(0))
            return y
        scaled = [y * self.options.branches[name].out_scale for name, y in outputs.items()]
        return torch.stack(scaled).sum(0)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self._joined({name: mixer(self._scaled(name, x), seq) for name, mixer in self.branches.items()})

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, dict[str, Any]]:
        found = {name: mixer.prefill(self._scaled(name, x), seq) for name, mixer in self._mixers().items()}
        return self._joined({name: y for name, (y, _) in found.items()}), {name: state for name, (_, state) in found.items()}

    def decode(self, x: Tensor, state: dict[str, Any], seq: Sequence) -> tuple[Tensor, dict[str, Any]]:
        found = {name: mixer.decode(self._scaled(name, x), state[name], seq) for name, mixer in self._mixers().items()}
        return self._joined({name: y for name, (y, _) in found.items()}), {name: state for name, (_, state) in found.items()}

    def _mixers(self) -> dict[str, Mixer]:
        return {name: mixer for name, mixer in self.branches.items() if isinstance(mixer, Mixer)}

    def flops(self, tokens: int, context: int) -> float:
        """The branches', of which `fuse` leaves one output projection."""
        spared = (len(self.branches) - 1) * 2 * tokens * self.width * self.hidden if self.options.fuse else 0
        return sum(mixer.flops(tokens, context) for mixer in self._mixers().values()) - spared

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        return sum(mixer.state_bytes(context, bytes_per_value) for mixer in self._mixers().values())

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        return [need for mixer in self._mixers().values() for need in mixer.exchanges(context)]


MIXER = Parallel
