"""The default engine: megatron-core's data parallelism, distributed optimizer and pipeline schedules."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ltrain.checkpoint import Checkpoint
from ltrain.config import Config, ConfigError
from ltrain.data.packing import MicroBatch
from ltrain.model.layers import layout_of
from ltrain.model.stack import Stack
from ltrain.parallel.engines.base import MOMENTS, SUMS, Engine
from ltrain.parallel.engines.update import Update, chained, main_grad, masters
from ltrain.parallel.mesh import Mesh
from ltrain.parallel.pipeline import add_up_tied_embeddings


def embedding(stack: Stack) -> nn.Parameter:
    assert stack.embed is not None
    return stack.embed.weight


class MegatronEngine(Engine):
    """megatron-core's data parallelism, which shards the optimizer's states over data and context ranks."""

    def __init__(self, config: Config, vocab: int, mesh: Mesh):
        super().__init__(config, vocab, mesh)
        self.tied = config.model.embeds_last and mesh.pipeline.size() > 1
        if self.tied and (mesh.first_stage or mesh.last_stage):
            # a bucket of its own: only so do the data ranks of both stages reduce the same parts of it
            embedding(self.stack).shared_embedding = True  # type: ignore[attr-defined]
            embedding(self.stack).shared = mesh.last_stage  # type: ignore[attr-defined]  # the first stage counts it in the gradient norm
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
        self.update = Update(self.optimizer, mesh.device) if distributed_optimizer else None
        self._forward_backward = get_forward_backward_func()
        # Delayed scales start at 1, where most gradients round to 0 in FP8. The first step is gone through three times: the first pass finds the
        # scales of the forward and of the gradients after each layer, the second those before, which the first had rounded away.
        self.trial_passes = 2 if config.fp8.recipe == "delayed" else 0

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

    def forward_backward(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> dict[str, float]:
        self.model.train()
        while self.trial_passes:
            self.trial_passes -= 1
            self._gradients(batches, labels, micro_batches)
            for router in self.routers:
                router.load.zero_()
        return self._gradients(batches, labels, micro_batches)

    def _gradients(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> dict[str, float]:
        self.model.zero_grad_buffer()  # and with it the gradients of the master weights, which are views of it
        return self._run(batches, labels, micro_batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> float:
        self.model.eval()
        return self._run(batches, labels, micro_batches, forward_only=True)["loss"]

    def _run(self, batches: list[MicroBatch], labels: int, micro_batches: int, *, forward_only: bool) -> dict[str, float]:
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self.mesh.device)

        def forward_step(feed: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(feed)
            output, sums = model(batch, labels, micro_batches)
            self.add_sums(total, sums)
            return output, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=self.mesh.device), {})

        self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.layout.tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return self.means(total, labels)

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
        if self.update is None:
            raise ConfigError("precision=fp64 serves checks of gradients and has no optimizer: write precision=fp32 or bf16 to train")
        train = self.config.train
        norm = self.update.norm()
        if math.isfinite(norm):
            if train.clip:
                self.update.clip(train.clip, norm)
            self.update.step(lr, train.weight_decay)
            self.move_biases()
        return norm

    def bad_gradients(self) -> list[str]:
        names = [name for name, param in self.params.items() if not main_grad(param).isfinite().all()]
        return names[::-1]

    # State

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
        for optimizer in chained(self.optimizer):
            found |= {param: (optimizer, master) for param, master in masters(optimizer)}
        return found

    def part(self, param: nn.Parameter, kind: str) -> tuple[Tensor | None, slice]:
        if kind == "grad" and self.optimizer is None:  # all-reduced: every data rank holds all of it
            flat = main_grad(param).flatten()
            return (flat, slice(0, flat.numel())) if self.replicas(param).rank() == 0 else (None, slice(0))
        shard = self._shard_of(param)
        if shard is None:
            return None, slice(0)
        optimizer, master, span = shard
        if kind == "grad":
            return main_grad(param).view(-1)[span], span
        return (master.detach() if kind == "param" else optimizer.optimizer.state[master][kind]), span

    def close(self) -> None:
        # autograd's nodes hold megatron's hooks, which hold the model, which holds the nodes: a circle that Python cannot see
        for node in self.model.grad_accs:
            hooks = node.register_hook(lambda *_: None).hooks_dict_ref()  # all of the node's, megatron's among them
            hooks.clear()
        self.model.grad_accs.clear()

    def set_masters(self, checkpoint: Checkpoint, optimizer_step: int | None) -> None:
        for name, param in self.params.items():
            whole = self.read(name, param, "param", checkpoint)
            param.copy_(whole)
            shard = self._shard_of(param)
            if shard is None:
                continue
            optimizer, master, span = shard
            master.copy_(whole.flatten()[span])
            if optimizer_step is None:
                continue
            state: dict[str, Any] = {m: self.read(name, param, m, checkpoint).flatten()[span].to(master.device) for m in MOMENTS}
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(optimizer_step), device=master.device)
            else:  # Transformer Engine's FusedAdam counts steps per group
                for group in optimizer.optimizer.param_groups:
                    group["step"] = optimizer_step
            optimizer.optimizer.state[master] = state
