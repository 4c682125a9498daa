"""A mixer of the cases run on ranks and on one: outputs, the loss and every gradient."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.config import ConfigError, ParallelConfig
from ltrain.kernels.segments import accumulator
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mixers.base import Mixer
from ltrain.model.sequence import Sequence
from ltrain.schema import divides_heads
from tests.model.mixers.cases import CASES, HIDDEN, build, config_of, specs_of
from tests.model.mixers.test_contract import inputs, jitter
from tests.parallel.parity import Rectangle, pieces_of, whole

Values = dict[str, Tensor]  # y, loss, and gradients: x, and parameters by name


class Run(NamedTuple):
    """One forward and backward of a case over a packed stream."""

    name: str
    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    unlabelled: tuple[tuple[int, int], ...] = ()  # [start, stop) of tokens whose outputs count in no loss
    changed: int | None = None  # a document whose inputs are other ones
    recompute: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def inputs(self) -> Tensor:
        x = inputs(self.tokens)
        if self.changed is not None:
            x.split(self.lengths)[self.changed].copy_(inputs(self.tokens).flip(0).split(self.lengths)[self.changed])
        return x.to(self.dtype)

    def weight(self) -> Tensor:
        """What each output counts in the loss."""
        weight = torch.randn(self.tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for start, stop in self.unlabelled:
            weight[start:stop] = 0
        return weight.to(self.dtype)

    def mixer(self, layers: LocalLayers) -> Mixer:
        """With weights that hide nothing: no ones in norms, no zeros in biases."""
        module = build(self.name, layers)
        seed_parameters(module, 0)
        jitter(module)
        return module

    def on(self, module: Mixer, x: Tensor, weight: Tensor, seq: Sequence) -> Values:
        """y, loss and the gradient of x; those of parameters are left in them."""
        x = x.clone().requires_grad_()
        if self.recompute:
            y = checkpoint(module, x, seq, use_reentrant=False, preserve_rng_state=False, context_fn=seq.tape.contexts)
        else:
            y = module(x, seq)
        loss = (y.to(accumulator(y.dtype)) * weight).sum()
        loss.backward()
        assert x.grad is not None
        return {"y": y.detach(), "x": x.grad, "loss": loss.detach()}


def supported(name: str, parallel: ParallelConfig) -> bool:
    every = [spec.options for spec in specs_of(name)]
    try:
        for options in every:
            options.check(name, parallel)
    except ConfigError:
        return False
    heads = [(n // parallel.tensor for n in counts) for options in every for counts in options.softmax_heads().values()]
    if parallel.ulysses > 1 and not (heads and all(divides_heads(*counts, parallel.ulysses) for counts in heads)):
        return False
    return not any(getattr(parallel, refused, 1) > 1 for options in every for refused in options.refuses())


@cache
def alone(run: Run, exact: bool = False) -> Values:
    """On one rank. exact: in float64 with the weights and inputs of the run's type."""
    module = run.mixer(LocalLayers(std=0.3, depth=len(CASES[run.name]), dtype=run.dtype))
    dtype = torch.float64 if exact else run.dtype
    values = run.on(module.to(dtype), run.inputs().to(dtype), run.weight().to(dtype), Sequence.of(list(run.lengths)))
    return values | {key: p.grad for key, p in module.named_parameters() if p.grad is not None}


def over_ranks(runs: list[Run], parallel: ParallelConfig) -> list[list[Rectangle]]:
    """On every rank of a pool: of each run this rank's rectangles of the whole tensors, and its part of the loss."""
    import torch.distributed as dist

    from ltrain.parallel import cpu
    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout
    from ltrain.parallel.layers import build_layers
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    mesh = Mesh(parallel, torch.device("cpu"))
    rank, size = mesh.context.rank(), mesh.context.size()
    group = mesh.exchange if size > 1 else None
    exchange = ContextExchange(
        ContextLayout(0, rank, size, parallel.context_layout), group, mesh.tensor_context, mesh.tensor, mesh.ulysses, mesh.nodes
    )
    try:
        found = []
        for run in runs:
            config = config_of(run.name)
            config.parallel = parallel
            module = run.mixer(build_layers(config, mesh, run.dtype).at(0))
            plain = Sequence.of(list(run.lengths))
            local = exchange.resized(run.tokens)
            layout = local.layout.of(plain.cu_seqlens)

            def mine(x: Tensor, layout: Any = layout) -> Tensor:
                return layout.take(x).chunk(mesh.tensor.size())[mesh.tensor.rank()]

            values = run.on(module, mine(run.inputs()), mine(run.weight()), local.sequence(plain.cu_seqlens, plain.positions))
            loss = values.pop("loss")
            dist.all_reduce(loss, group=mesh.tensor_context)
            for parameter in module.parameters():  # as the engine has them, so that sums over ranks round nothing away
                assert parameter.grad is not None
                wide = accumulator(run.dtype)
                parameter.data, parameter.grad = parameter.data.to(wide), parameter.grad.to(wide)
            found.append([("loss", (), (), loss), *pieces_of(module, mesh, mine(torch.arange(run.tokens)), values, run.tokens)])
        return found
    finally:
        mesh.close()


def together(results: list[list[list[Rectangle]]], number: int) -> Values:
    """Of what `over_ranks` gave by rank, one run."""
    return whole([part for result in results for part in result[number]])


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, of root mean squares."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6))


TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}
FEW = 64  # numbers of a tensor, of which one rank's bfloat16 may happen to be very near: such tensors are measured together


def errors(run: Run, found: Values, exact: Values) -> dict[str, float]:
    """Relative, of each tensor; that of the loss, whose terms may add up to nearly 0, by their size."""
    off = {key: distance(found[key], expected) for key, expected in exact.items() if key != "loss"}
    terms = (exact["y"].double() * run.weight().double()).norm().clamp(min=1e-6)
    off["loss"] = float((found["loss"].double() - exact["loss"].double()).abs() / terms)
    if run.dtype == torch.bfloat16:
        del off["loss"]  # one number, which one rank may happen to have: its terms are compared
        few = [key for key in off if exact[key].numel() < FEW]
        if few:
            off["tensors of few numbers"] = (sum(off.pop(key) ** 2 for key in few) / len(few)) ** 0.5
    return off


def wrong(runs: list[Run], results: list[list[list[Rectangle]]]) -> list[str]:
    """What is farther from one rank than rounding explains: in bfloat16 more than twice as far from float64 as one rank is."""
    off = []
    for number, run in enumerate(runs):
        found, one = together(results, number), alone(run)
        assert found.keys() == one.keys(), run
        half = run.dtype == torch.bfloat16
        exact = alone(run, exact=True) if half else one
        bounds = {key: 2 * error for key, error in errors(run, one, exact).items()} if half else {}
        for key, error in errors(run, found, exact).items():
            if not error <= bounds.get(key, TIGHT.get(run.dtype, 0.0)):
                off.append(f"{run}: {key} is off by {error:.1e}, more than {bounds.get(key) or TIGHT[run.dtype]:.1e}")
    return off
