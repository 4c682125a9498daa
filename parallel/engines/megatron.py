"""The default engine: megatron-core's data parallelism, distributed optimizer and pipeline schedules."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride
    from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ltrain.checkpoint import Checkpoint, Entry
from ltrain.checkpoint.parameters import entries, fill
from ltrain.config import Config, ConfigError
from ltrain.data.packing import MicroBatch
from ltrain.model.layers import layout_of, seed_parameters
from ltrain.model.stack import Stack
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.layers import ParallelLayers
from ltrain.parallel.mesh import Mesh
from ltrain.parallel.pipeline import Stage, add_up_tied_embeddings, cut, stage_config

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")


def main_grad(param: nn.Parameter) -> Tensor:
    """The gradient of `param` in megatron's buffer, which data parallelism reduces."""
    grad: Tensor = param.main_grad  # type: ignore[attr-defined]
    return grad


def embedding(stack: Stack) -> nn.Parameter:
    assert stack.embed is not None
    return stack.embed.weight


class MegatronEngine:
    """Builds this rank's part of the model, seeds it, and trains it.

    precision fp64 has no optimizer: it serves checks of the gradients.
    """

    def __init__(self, config: Config, vocab: int, mesh: Mesh):
        self.config, self.mesh, self.dtype = config, mesh, DTYPES[config.precision]
        model = config.model
        layers = ParallelLayers(mesh, std=model.init_std, depth=model.depth, eps=model.norm_eps, dtype=self.dtype)
        start, stop = cut(model.depth, mesh.pipeline.size())[mesh.pipeline.rank()]
        stack = Stack(model, vocab, layers, start=start, stop=stop, recompute=config.train.recompute)
        seed_parameters(stack, config.seed)
        self.tied = model.tie_embeddings and mesh.pipeline.size() > 1
        if self.tied and (mesh.first_stage or mesh.last_stage):
            # a bucket of its own: only so do the data ranks of both stages reduce the same parts of it
            embedding(stack).shared_embedding = True  # type: ignore[attr-defined]
            embedding(stack).shared = mesh.last_stage  # type: ignore[attr-defined]  # the first stage counts it in the gradient norm
        self.layout = ContextLayout(config.data.tokens, mesh.context.rank(), mesh.context.size(), config.parallel.context_layout)
        self.stage = Stage(stack, self.layout, mesh, stage_config(model.hidden, model.depth, mesh, self.dtype))
        distributed_optimizer = config.precision != "fp64"
        logging.getLogger("megatron.core").setLevel(logging.ERROR)
        self.model = DistributedDataParallel(
            self.stage.config,
            DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=self.dtype == torch.bfloat16),
            self.stage,
            pg_collection=mesh.groups,
        )
        self.stage.config.finalize_model_grads_func = self._finish_gradients
        self.stage.config.no_sync_func = self.model.no_sync
        self.optimizer = self._build_optimizer() if distributed_optimizer else None
        self.routers = list(stack.routers().values())
        self._forward_backward = get_forward_backward_func()

    def _build_optimizer(self) -> Any:
        train = self.config.train
        no_decay = ParamKey(predicate=ParamPredicate(name="no_decay", fn=lambda p: not layout_of(p).decay))
        return get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=train.lr,
                min_lr=train.min_lr,
                weight_decay=train.weight_decay,
                adam_beta1=train.betas[0],
                adam_beta2=train.betas[1],
                adam_eps=train.eps,
                clip_grad=train.clip,
                bf16=self.dtype == torch.bfloat16,
                params_dtype=self.dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
            config_overrides={no_decay: ParamGroupOverride(wd_mult=0.0)},
            use_gloo_process_groups=False,
        )

    @property
    def stack(self) -> Stack:
        return self.stage.stack

    # Training

    def forward_backward(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> dict[str, float]:
        """Gradients of this rank's micro-batches of one global batch, reduced over the ranks.

        labels and micro_batches count the global batch, over all data ranks. Returns loss (mean cross entropy, nats per
        label), aux_loss and z_loss of the global batch.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        return self._run(batches, labels, micro_batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> float:
        """Mean cross entropy over the labels of all data ranks' batches, nats."""
        self.model.eval()
        return self._run(batches, labels, micro_batches, forward_only=True)["loss"]

    def _run(self, batches: list[MicroBatch], labels: int, micro_batches: int, *, forward_only: bool) -> dict[str, float]:
        names = ("loss", "z_loss", "labels", "aux_loss")
        total = torch.zeros(len(names), dtype=torch.float64, device=self.mesh.device)

        def forward_step(feed: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(feed)
            output, sums = model(batch, labels, micro_batches)
            for i, name in enumerate(names):
                if name in sums:
                    total[i] += sums[name]
            return output, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=self.mesh.device), {})

        self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.config.data.tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        dist.all_reduce(total)
        sums = dict(zip(names, total.tolist(), strict=True))
        assert sums["labels"] == labels, "the ranks' labels do not add up to the global batch's"
        return {"loss": sums["loss"] / labels, "z_loss": sums["z_loss"] / labels, "aux_loss": sums["aux_loss"]}

    def _finish_gradients(self, model: list[Any], num_tokens: Any, **_: Any) -> None:
        """Sum over data and context ranks; over tensor ranks what they hold in common; over stages what is tied."""
        self.model.finish_grad_sync()
        params = [p for p in self.stage.parameters() if p.requires_grad]
        if self.mesh.tensor.size() > 1:
            shared = [main_grad(p) for p in params if layout_of(p).partial_gradient]
            for dtype in sorted({g.dtype for g in shared}, key=str):
                grads = [g for g in shared if g.dtype == dtype]
                flat = torch.cat([g.flatten() for g in grads])
                dist.all_reduce(flat, group=self.mesh.tensor)
                for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                    grad.copy_(part.view_as(grad))
        if self.tied and (self.mesh.first_stage or self.mesh.last_stage):
            add_up_tied_embeddings(main_grad(embedding(self.stack)), self.mesh)

    def step(self, lr: float) -> float:
        """Clip, update with AdamW at this learning rate, move the balancing biases once. Returns the gradient norm before clipping.

        Where the norm is not finite nothing is updated.
        """
        if self.optimizer is None:
            raise ConfigError("precision=fp64 serves checks of gradients and has no optimizer: write precision=fp32 or bf16 to train")
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = train.weight_decay * group["wd_mult"]  # megatron leaves this to its own scheduler
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            if train.clip:
                clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), train.clip, norm)
            self.optimizer.step_with_ready_grads()
            self._move_biases()
        return norm

    def bad_gradients(self) -> list[str]:
        """Names of this rank's parameters whose gradients are not finite, the last layers first, as the backward meets them."""
        names = [name for name, param in self._named_parameters() if not main_grad(param).isfinite().all()]
        return names[::-1]

    def _move_biases(self) -> None:
        if not self.routers:
            return
        loads = torch.stack([router.load for router in self.routers])
        dist.all_reduce(loads, group=self.mesh.stage)
        for router, load in zip(self.routers, loads, strict=True):
            router.update_bias(load, router.options.bias_rate)
            router.load.zero_()

    def layer_norms(self, batches: list[MicroBatch]) -> list[tuple[MicroBatch, dict[str, float]]]:
        """Forward once more, noting the root mean square of each layer's output: where a number stopped being finite."""
        found: dict[str, float] = {}

        def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _, __, y: found.__setitem__(f"layer {name}", float(y.detach().float().square().mean().sqrt()))

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

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, param in self.stack.named_parameters():
            if param.requires_grad:
                yield name, param

    def _shard_of(self, param: nn.Parameter) -> tuple[DistributedOptimizer, Tensor, slice] | None:
        """Which optimizer holds part of `param` on this rank, its master weight there, and the range in the flat parameter."""
        if param not in self._shards:
            return None
        optimizer, master = self._shards[param]
        span = optimizer._get_model_param_range_map(param)["param"]
        return optimizer, master, slice(span.start, span.end)

    @cached_property
    def _shards(self) -> dict[nn.Parameter, tuple[DistributedOptimizer, Tensor]]:
        """Parameter -> its optimizer and master weight on this rank. Not by megatron's own index, which is wrong in a group
        that mixes bfloat16 and float32 parameters."""
        found: dict[nn.Parameter, tuple[DistributedOptimizer, Tensor]] = {}
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            wide = zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True)
            half = zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True)
            for params, masters in (*wide, *half):
                found |= {param: (optimizer, master) for param, master in zip(params, masters, strict=True)}
        return found

    def _replicas(self, param: nn.Parameter) -> dist.ProcessGroup:
        """The ranks that hold the same part of `param`, over which gradients are summed and optimizer states are cut."""
        group: dist.ProcessGroup = self.mesh.groups.expt_dp if layout_of(param).experts else self.mesh.groups.dp_cp
        return group

    def _whole(self, param: nn.Parameter, dtype: torch.dtype, part: Tensor | None, span: slice) -> Tensor:
        """A tensor of the parameter's local shape from the parts that the data ranks hold, bit by bit."""
        flat = torch.zeros(param.numel(), dtype=dtype, device=param.device)
        if part is not None:
            flat[span] = part
        # summed as integers, since every other rank adds zero bits: exact for any value, negative zero and NaN included
        bits = flat.view(torch.int64 if dtype.itemsize == 8 else torch.int32)
        dist.all_reduce(bits, group=self._replicas(param))
        return flat.view_as(param)

    def _writes(self, name: str, param: nn.Parameter) -> bool:
        """Exactly one rank writes each piece of each parameter."""
        if layout_of(param).experts:
            return self._replicas(param).rank() == 0
        if name.startswith("embed.") and not self.mesh.first_stage:
            return False
        return self._replicas(param).rank() == 0 and (layout_of(param).axis is not None or self.mesh.tensor.rank() == 0)

    def _entries(self, kind: str, value: Callable[[nn.Parameter], tuple[Tensor | None, slice]], dtype: torch.dtype) -> Iterator[Entry]:
        for name, param in self._named_parameters():
            whole = self._whole(param, dtype, *value(param))
            if self._writes(name, param):
                yield from entries(name, param, kind, whole.cpu())  # a save must not need the device's memory again

    def state(self) -> Iterator[Entry]:
        """This rank's part of the master weights, the moments and the balancing biases. Every rank must walk through it."""

        def master(param: nn.Parameter) -> tuple[Tensor | None, slice]:
            shard = self._shard_of(param)
            return (shard[1].detach(), shard[2]) if shard else (None, slice(0))

        yield from self._entries("param", master, torch.float32)
        for moment in MOMENTS:

            def state(param: nn.Parameter, moment: str = moment) -> tuple[Tensor | None, slice]:
                shard = self._shard_of(param)
                return (shard[0].optimizer.state[shard[1]][moment], shard[2]) if shard else (None, slice(0))

            yield from self._entries(moment, state, torch.float32)
        if self.mesh.stage.rank() == 0:
            for name, buffer in self._persistent_buffers():
                yield Entry(name, "buffer", tuple(buffer.shape), (0,) * buffer.dim(), buffer)

    def gradients(self) -> Iterator[Entry]:
        """This rank's part of the whole model's gradients after `forward_backward`. Every rank must walk through it."""

        def grad(param: nn.Parameter) -> tuple[Tensor | None, slice]:
            flat = main_grad(param).flatten()
            if self.optimizer is None:  # all-reduced: every data rank holds all of it
                return (flat, slice(0, flat.numel())) if self._replicas(param).rank() == 0 else (None, slice(0))
            shard = self._shard_of(param)
            return (flat[shard[2]], shard[2]) if shard else (None, slice(0))

        yield from self._entries("grad", grad, torch.float64 if self.dtype == torch.float64 else torch.float32)

    def reload_master_weights(self) -> None:
        """After the model's parameters were changed by hand: the optimizer goes on from them."""
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            optimizer.reload_model_params()

    def _persistent_buffers(self) -> Iterable[tuple[str, Tensor]]:
        kept = self.stack.state_dict().keys()
        return [(name, buffer) for name, buffer in self.stack.named_buffers() if name in kept]

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, optimizer_step: int) -> None:
        """Weights, moments and biases from a checkpoint that any layout wrote."""

        def read(name: str, param: nn.Parameter, kind: str) -> Tensor:
            whole = torch.empty(param.shape, dtype=torch.float32)
            fill(name, param, kind, whole, checkpoint)
            return whole

        for name, param in self._named_parameters():
            whole = read(name, param, "param")
            param.copy_(whole)
            shard = self._shard_of(param)
            if shard is None:
                continue
            optimizer, master, span = shard
            master.copy_(whole.flatten()[span])
            state = {m: read(name, param, m).flatten()[span].to(master.device) for m in MOMENTS}
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(optimizer_step))
            else:  # Transformer Engine's FusedAdam counts steps per group
                for group in optimizer.optimizer.param_groups:
                    group["step"] = optimizer_step
            optimizer.optimizer.state[master] = state
        for name, buffer in self._persistent_buffers():
            buffer.copy_(checkpoint.read(name, "buffer", (0,) * buffer.dim(), tuple(buffer.shape)))
