"""What every engine shares: this rank's stage of the model, the sums of a step, and state as rectangles of whole tensors.

An engine is a subclass that moves gradients and weights. It says with `part` which stretch of each flat parameter's master
weight, moments and gradient this rank holds; loading, saving and comparing follow from that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltrain.checkpoint import Checkpoint, Entry
from ltrain.checkpoint.parameters import entries, fill
from ltrain.config import Config, ConfigError
from ltrain.data.packing import MicroBatch
from ltrain.model.layers import LocalLayers, layout_of, seed_parameters
from ltrain.model.router import update_biases
from ltrain.model.stack import Stack
from ltrain.parallel.context.balance import CAUSAL, Cost
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.fp8 import rows_multiple
from ltrain.parallel.layers import build_layers
from ltrain.parallel.mesh import Mesh
from ltrain.parallel.pipeline import Stage, cut, stage_config

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 1 << 24  # numbers gathered by one sum: small ones would cost a round trip each
SUMS = ("loss", "z_loss", "labels", "aux_loss", "index_loss", "mtp_loss")  # what a forward counts for the log


def build_stage(config: Config, vocab: int, mesh: Mesh) -> Stage:
    """This rank's stage of the model, with weights that are not filled yet. vocab: rows of the embedding."""
    model, dtype = config.model, DTYPES[config.precision]
    layers = build_layers(config, mesh, dtype)
    start, stop = cut(model.depth, mesh.pipeline.size())[mesh.pipeline.rank()]
    stack = Stack(model, vocab, layers, start=start, stop=stop, recompute=config.train.recompute)
    kind, size = config.parallel.context_layout, mesh.context.size()
    cost = document_cost(config, vocab) if kind == "balanced" and size > 1 else CAUSAL
    multiple = mesh.tensor.size() * rows_multiple(config)
    layout = ContextLayout.filled(config.data.tokens, mesh.context.rank(), size, kind, cost, multiple)
    if 0 < model.learned_positions < layout.tail:
        raise ConfigError(
            f"data.tokens={config.data.tokens} is filled up to {layout.tokens} and model.learned_positions={model.learned_positions} are too few for "
            f"what fills it: write data.tokens={layout.tokens}"
        )
    return Stage(stack, layout, mesh, stage_config(model.hidden * model.streams.count, model.depth, mesh, dtype), layers.autocast)


def document_cost(config: Config, vocab: int) -> Cost:
    """What documents cost in the whole model, whichever of its layers this rank has: all ranks must find the same layout."""
    whole = Stack(config.model, vocab, LocalLayers.of(config.model, "meta"))
    return Cost.of(lambda tokens: sum(whole.flops(tokens, tokens).values()), config.data.tokens)


class Engine(ABC):
    """Builds this rank's part of the model, seeds it, and trains it.

    precision fp64 has no optimizer: it serves checks of the gradients.
    """

    def __init__(self, config: Config, vocab: int, mesh: Mesh):
        self.config, self.mesh, self.dtype = config, mesh, DTYPES[config.precision]
        self.stage = build_stage(config, vocab, mesh)
        self.layout = self.stage.layout
        seed_parameters(self.stack, config.seed)
        self.routers = list(self.stack.routers().values())
        self.num_params = self.stack.num_params()
        # asked here, once: a sharded parameter may be empty between its uses
        self.params = {name: param for name, param in self.stack.named_parameters() if param.requires_grad}
        self.shapes = {name: param.shape for name, param in self.params.items()}

    @property
    def stack(self) -> Stack:
        return self.stage.stack

    # What an engine does

    @abstractmethod
    def forward_backward(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> dict[str, float]:
        """Gradients of this rank's micro-batches of one global batch, reduced over the ranks.

        labels and micro_batches count the global batch, over all data ranks. Returns loss (mean cross entropy, nats per
        label), aux_loss and z_loss of the global batch, index_loss, the sum over the layers whose index learns, if there are any, and mtp_loss,
        the mean over the depths, where the model predicts further ahead.
        """

    @abstractmethod
    def evaluate(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> float:
        """Mean cross entropy over the labels of all data ranks' batches, nats."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip, update with AdamW at this learning rate, move the balancing biases once. Returns the gradient norm before clipping.

        Where the norm is not finite nothing is updated.
        """

    @abstractmethod
    def part(self, param: nn.Parameter, kind: str) -> tuple[Tensor | None, slice]:
        """What this rank holds of `kind` (param: the master weight, exp_avg, exp_avg_sq, grad), flat, and its range in the flat
        parameter; the ranks of `replicas` hold the rest. A view, where it can be written to; None: nothing."""

    @abstractmethod
    def set_masters(self, checkpoint: Checkpoint, optimizer_step: int | None) -> None:
        """Weights and moments from a checkpoint, by `read`; optimizer_step None: weights alone, moments as at the start of a run."""

    def close(self) -> None:  # noqa: B027 - most engines need nothing
        """Cut what would keep the model in memory after the last reference to the engine."""

    # Counting

    def add_sums(self, total: Tensor, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's sums to this rank's `total` [len(SUMS)], float64."""
        for i, name in enumerate(SUMS):
            if name in sums:
                total[i] += sums[name]

    def means(self, total: Tensor, labels: int) -> dict[str, float]:
        """What `forward_backward` returns, from every rank's `total`."""
        dist.all_reduce(total)
        sums = dict(zip(SUMS, total.tolist(), strict=True))
        assert sums["labels"] == labels, "the ranks' labels do not add up to the global batch's"
        further = {"mtp_loss": sums["mtp_loss"] / labels} if self.config.model.mtp.depth else {}
        if sums["index_loss"]:  # a cross entropy, above 0 where there is one
            further["index_loss"] = sums["index_loss"]
        return {"loss": sums["loss"] / labels, "z_loss": sums["z_loss"] / labels, "aux_loss": sums["aux_loss"], **further}

    def move_biases(self) -> None:
        """The routers' balancing biases, once for each global batch."""
        if not self.routers:
            return
        loads = torch.stack([router.load for router in self.routers])
        dist.all_reduce(loads, group=self.mesh.stage)
        update_biases(self.routers, loads)
        torch._foreach_zero_([router.load for router in self.routers])

    def bad_gradients(self) -> list[str]:
        """Names of the parameters of whose gradients this rank holds some that are not finite, the last layers first, as the
        backward meets them."""
        held = ((name, self.part(param, "grad")[0]) for name, param in self.params.items())
        return [name for name, grad in held if grad is not None and not grad.isfinite().all()][::-1]

    def layer_norms(self, batches: list[MicroBatch]) -> list[tuple[MicroBatch, dict[str, float]]]:
        """Forward once more, noting the root mean square of each layer's output: where a number stopped being finite."""
        found: dict[str, float] = {}

        def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_: nn.Module, inputs: Any, y: Tensor) -> None:
                counted = inputs[1].counted
                y = y.detach().float()[: None if counted is None else counted.rows]
                found[f"layer {name}"] = float(y.square().sum().div(max(y.numel(), 1)).sqrt())

            return hook

        hooks = [block.register_forward_hook(note(name)) for name, block in self.stack.blocks()]
        rows: list[tuple[MicroBatch, dict[str, float]]] = []
        try:
            for batch in batches:
                labels = torch.tensor(int((batch.labels >= 0).sum()), device=self.mesh.device)
                self.evaluate([batch], int(self.mesh.sum(labels, self.mesh.data)), self.mesh.data.size())
                rows.append((batch, dict(found)))
        finally:
            for hook in hooks:
                hook.remove()
        return rows

    # State, in each parameter's own shape

    def replicas(self, param: nn.Parameter) -> dist.ProcessGroup:
        """The ranks that hold the same part of `param`, over which gradients are summed and optimizer states are cut."""
        group: dist.ProcessGroup = self.mesh.groups.expt_dp if layout_of(param).experts else self.mesh.groups.dp_cp
        return group

    def counts(self, name: str, param: nn.Parameter) -> bool:
        """Whether this rank's copy is the one that counts among those that tensor ranks and tied stages hold alike."""
        if layout_of(param).experts:
            return True
        if name.startswith("embed.") and not self.mesh.first_stage:
            return False
        return layout_of(param).axis is not None or self.mesh.tensor.rank() == 0

    def _buckets(self) -> list[list[str]]:
        """Names of parameters that are gathered by one sum: of the same ranks, up to BUCKET numbers unless one alone has more."""
        buckets: list[list[str]] = []
        last: dict[dist.ProcessGroup, int] = {}  # of each group the bucket that is not full yet
        sizes: list[int] = []
        for name, param in self.params.items():
            group, size = self.replicas(param), self.shapes[name].numel()
            i = last.get(group)
            if i is None or sizes[i] + size > BUCKET:
                i = last[group] = len(buckets)
                buckets.append([])
                sizes.append(0)
            buckets[i].append(name)
            sizes[i] += size
        return buckets

    def _entries(self, kind: str, dtype: torch.dtype) -> Iterator[Entry]:
        buckets = [(names, [self.shapes[name].numel() for name in names]) for names in self._buckets()]

        def prepare() -> dict[str, tuple[Tensor | None, slice]]:
            """What can fail on one rank alone, before the first sum, in which the others would wait for it."""
            torch.empty(max((sum(sizes) for _, sizes in buckets), default=0), dtype=dtype, device=self.mesh.device)
            return {name: self.part(param, kind) for name, param in self.params.items()}

        parts = self.mesh.agree(prepare)
        for names, sizes in buckets:
            bucket = torch.zeros(sum(sizes), dtype=dtype, device=self.mesh.device)
            tensors = dict(zip(names, bucket.split(sizes), strict=True))
            for name, flat in tensors.items():
                part, span = parts[name]
                if part is not None:
                    flat[span] = part.to(flat)
            group = self.replicas(self.params[names[0]])
            # summed as integers, since every other rank adds zero bits: exact for any value, negative zero and NaN included
            dist.all_reduce(bucket.view(torch.int64 if dtype.itemsize == 8 else torch.int32), group=group)
            for name, flat in tensors.items():
                param = self.params[name]
                if self.counts(name, param) and group.rank() == 0:  # exactly one rank writes each piece
                    yield from entries(name, param, kind, flat.view(self.shapes[name]))

    def state(self) -> Iterator[Entry]:
        """This rank's part of the master weights, the moments and the balancing biases, on the device. Every rank must walk through it,
        and what it keeps of a tensor it copies to the host before the next, or the device holds them all."""
        for kind in ("param", *MOMENTS):
            yield from self._entries(kind, torch.float32)
        if self.mesh.stage.rank() == 0:
            for name, buffer in self._persistent_buffers():
                yield Entry(name, "buffer", tuple(buffer.shape), (0,) * buffer.dim(), buffer)

    def gradients(self) -> Iterator[Entry]:
        """This rank's part of the whole model's gradients after `forward_backward`. Every rank must walk through it."""
        yield from self._entries("grad", torch.float64 if self.dtype == torch.float64 else torch.float32)

    def _persistent_buffers(self) -> Iterable[tuple[str, Tensor]]:
        kept = self.stack.state_dict().keys()
        return [(name, buffer) for name, buffer in self.stack.named_buffers() if name in kept]

    def read(self, name: str, param: nn.Parameter, kind: str, checkpoint: Checkpoint) -> Tensor:
        """This rank's part of a saved tensor, in the parameter's local shape, float32 on the CPU."""
        whole = torch.empty(self.shapes[name], dtype=torch.float32)
        fill(name, param, kind, whole, checkpoint)
        return whole

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, optimizer_step: int | None) -> None:
        """Weights, moments and biases from a checkpoint that any engine wrote on any layout.

        optimizer_step: updates behind the moments, for Adam's bias correction; None: the moments stay new.
        """
        self.set_masters(checkpoint, optimizer_step)
        for name, buffer in self._persistent_buffers():
            buffer.copy_(checkpoint.read(name, "buffer", (0,) * buffer.dim(), tuple(buffer.shape)))
