"""Routed experts of one device."""

from torch import Tensor, nn

from ltrain.kernels import experts as kernels
from ltrain.kernels import routing
from ltrain.model.activation import Activation
from ltrain.model.recompute import cheap


class Experts(nn.Module):
    """Experts, all on this rank. Tokens are sorted by expert, multiplied in groups, weighted and summed back.

    scale_input: the weights multiply what goes into the experts, not what comes out (Llama 4).
    """

    def __init__(
        self,
        up: nn.Parameter,
        down: nn.Parameter,
        activation: Activation,
        up_bias: nn.Parameter | None = None,
        down_bias: nn.Parameter | None = None,
        scale_input: bool = False,
    ):
        super().__init__()
        self.up, self.down = (up, down)  # [E, parts * inner, hidden] (the gate above up), [E, hidden, inner]
        self.up_bias, self.down_bias = up_bias, down_bias  # [E, parts * inner], [E, hidden]
        self.activation, self.scale_input = activation, scale_input

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [n, hidden] sorted by local expert, counts [E] -> [n, hidden]"""
        inner = self._biased(kernels.grouped_linear(x, self.up, counts), self.up_bias, counts)
        y = kernels.grouped_linear(cheap(self.activation.fused, inner), self.down, counts)
        return self._biased(y, self.down_bias, counts)

    def _biased(self, y: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
        return y if bias is None else kernels.grouped_bias(y, bias, counts)

    def weighted(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """As `grouped`, with the weights [n] of the rows."""
        weights = weights.to(x.dtype).unsqueeze(-1)
        return self.grouped(x * weights, counts) if self.scale_input else self.grouped(x, counts) * weights

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x [T, hidden], weights and indices [T, k] (global expert ids) -> [T, hidden]"""
        p = routing.permutation(indices, self.up.shape[0])
        rows = cheap(lambda x: routing.spread(x, p), x)  # [T * k, hidden] by expert
        if self.scale_input:
            of_rows = routing.spread(weights.flatten().unsqueeze(-1), p._replace(choices=1)).squeeze(-1)
            return routing.combine(self.weighted(rows, of_rows, p.counts), p)
        return routing.combine(self.grouped(rows, p.counts), p, weights)
