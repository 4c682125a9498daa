"""The contract of a sequence mixer, and the registry that turns a name in a config into one."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ltrain.kernels.attention import FULL, Mask
from ltrain.model.layers import LocalLayers, ParamLayout, layout_of
from ltrain.model.options import MIXERS
from ltrain.model.sequence import Sequence


@dataclass(frozen=True)
class ExchangeNeed:
    """One exchange that a mixer asks for in a forward under context parallelism. `parallel.context.needs` says how many bytes that is."""

    kind: str  # ring | halo | gather: rows of earlier tokens of the document, as they are; scan: maps of states, in float32 or wider
    width: int  # numbers of a row, or of a state
    mask: Mask = FULL  # of a ring: what a token sees
    reach: int = 0  # of a halo: rows before a cut
    units: Callable[[int], int] = int  # of a gather: the rows that the first so many tokens of a document have
    map: int = 0  # of a scan: numbers that say how a state is passed on

    @property
    def everything(self) -> bool:
        """Whether rows of all earlier tokens are asked for."""
        return self.kind in ("ring", "gather") and not self.mask.window and not self.mask.chunk


class Mixer(nn.Module):
    """Mixes tokens along the stream. Built as Mixer(hidden, options, layers)."""

    reads_memory = False  # whether it asks for `Sequence.memory`
    entry: str | None = None  # the linear layer that alone reads x: a norm before the mixer may be fused into it

    def __init__(self, hidden: int, options: Any, layers: LocalLayers):
        super().__init__()
        self.hidden, self.options = hidden, options

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]"""
        raise TypeError(f"{type(self).__name__} has no forward")

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Any]:
        """As forward, and the state after the last token of each document."""
        raise TypeError(f"{type(self).__name__} has no prefill")

    def decode(self, x: Tensor, state: Any, seq: Sequence) -> tuple[Tensor, Any]:
        """One token per document: x [documents, hidden] at seq.positions [documents]."""
        raise TypeError(f"{type(self).__name__} has no decode")

    def flops(self, tokens: int, context: int) -> float:
        """Forward floating-point operations for `tokens` tokens in documents of `context` tokens (whole model, all ranks)."""
        raise TypeError(f"{type(self).__name__} has no flops")

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """K/V cache or recurrent state of one document of `context` tokens."""
        raise TypeError(f"{type(self).__name__} has no state_bytes")

    def read_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Bytes read per decoded token: the mixer's weights and its state."""
        return self.num_params() * bytes_per_value + self.state_bytes(context, bytes_per_value)

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """What it asks of other context ranks in a forward of training, on a stream whose longest document has `context` tokens."""
        raise TypeError(f"{type(self).__name__} has no exchanges")

    def num_params(self) -> int:
        """Parameters of the whole mixer, over all ranks."""
        count = 0
        for layout in self.param_layout().values():
            size = max(layout.experts, 1)
            for n in layout.shape:
                size *= n
            count += size
        return count

    def param_layout(self) -> dict[str, ParamLayout]:
        return {name: layout_of(p) for name, p in self.named_parameters()}


def build_mixer(name: str, hidden: int, options: Any, layers: LocalLayers) -> Mixer:
    module = import_module(f"ltrain.model.mixers.{MIXERS[name][0]}")
    return module.MIXER(hidden, options, layers)
