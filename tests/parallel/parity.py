"""One model, trained twice: on one device by plain torch, and on a layout by the engine. What the layout tests compare."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.config import Config, ModelConfig, ParallelConfig, TrainConfig
from ltrain.data.order import Cursor
from ltrain.data.packing import MicroBatch, Stream
from ltrain.model.layers import LocalLayers, layout_of, pieces, seed_parameters
from ltrain.model.mtp import ahead
from ltrain.model.options import MoEOptions, MTPOptions, SharedOptions, StreamOptions
from ltrain.model.router import update_biases
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from ltrain.train.schedule import learning_rate

# a vocabulary so large that the embedding lies in several data ranks' parts
VOCAB, TOKENS, MICRO_BATCHES = 1024, 64, 4


Rectangle = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]  # of the whole tensor of a name: its shape, where this part starts, and the part


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    context: int = 1
    expert: int = 1
    pipeline: int = 1
    context_layout: str = "zigzag"
    recompute: str = "none"
    tie: bool = True
    ulysses: int = 1
    inner_ring: int = 1

    def __str__(self) -> str:
        parts = [f"{name[0] if name != 'tensor' else 't'}p{n}" for name, n in
                 (("tensor", self.tensor), ("context", self.context), ("expert", self.expert), ("pipeline", self.pipeline)) if n > 1]  # fmt: skip
        more = [self.context_layout] if self.context > 1 else []
        more += [f"u{self.ulysses}"] if self.ulysses > 1 else []
        more += [f"n{self.inner_ring}"] if self.inner_ring > 1 else []
        return "-".join(parts + more + ([self.recompute] if self.recompute != "none" else []) + ([] if self.tie else ["untied"])) or "data"


def config(layout: Layout, precision: str, model: ModelConfig | None = None, tokens: int = TOKENS) -> Config:
    model = model or ModelConfig(
        hidden=32,
        depth=4,
        pattern=["linear", "linear", "full", "linear"],
        layers={
            "linear": {"mixer": "gated_delta_net", "key_heads": 4, "value_heads": 8, "key_dim": 8, "value_dim": 12},
            "full": {"mixer": "attention", "heads": 8, "kv_heads": 4, "head_dim": 8},
        },
        ffn=MoEOptions(experts=8, top_k=2, inner=16, shared_inner=16, aux_loss=0.05, bias_rate=0.01, scale=1.5),
        init_std=0.05,
        tie_embeddings=layout.tie,
    )
    out = Config(model=model, precision=precision, seed=3)
    out.parallel = ParallelConfig(
        layout.tensor, layout.context, layout.expert, layout.pipeline, layout.context_layout, layout.ulysses, layout.inner_ring
    )
    out.train = TrainConfig(
        steps=10, tokens_per_step=tokens * MICRO_BATCHES, lr=1e-3, min_lr=1e-4, warmup_steps=3, clip=0.5, eps=1e-6, recompute=layout.recompute
    )
    out.data.tokens = tokens
    return out


def config_of_blocks(layout: Layout, precision: str) -> Config:
    """Every form of a block, another kind of norm, all that happens to embeddings and logits, feed-forwards of other kinds, and heads that
    predict further ahead; a shared block where one stage has all layers, two residual streams where it has not."""
    one = layout.pipeline == 1
    shared = SharedOptions(blocks=1, layer="inside", adapter_rank=4, adapt_mixer=True) if one else SharedOptions()
    dense = {"experts": 0, "inner": 32, "activation": "gelu", "bias": True}
    normed = {"form": "normed_residual", "ffn_residual_scale": 1.5}
    grouped = {"groups": 4, "top_groups": 2}
    attention = {"mixer": "attention", "heads": 8, "kv_heads": 4, "head_dim": 8}
    model = ModelConfig(
        hidden=32,
        depth=6,
        pattern=["post", "sandwich", "parallel", "mixes", "feeds", "normed"],
        layers={
            "post": {**attention, "block": {"form": "post"}, "ffn": {"scale_input": True, "limit": 0.02, "clamp": "after", "bias": True}},
            "sandwich": {**attention, "block": {"form": "sandwich", "mixer_scale": 0.5}},
            "parallel": {**attention, "block": {"form": "parallel" if one else "pre"}, "ffn": dense},
            "mixes": {**attention, "ffn": "none", "block": {"shared": shared.blocks > 0}},
            "inside": {**attention, "ffn": {"experts": 0, "inner": 32}},
            "feeds": {"mixer": "none", "ffn": {"activation": "relu2", "gated": False, "latent": 24, "bias": True, "router_bias": True, **grouped}},
            "normed": {**attention, "block": normed if one else {"form": "post"}},
        },
        ffn=MoEOptions(experts=8, top_k=2, inner=16, shared_inner=16, aux_loss=0.05, bias_rate=0.01, scale=1.5),
        norm="layer_bias",
        embed_scale=4.0,
        embed_norm=True,
        logit_scale=0.7,
        logit_softcap=1.0,
        init_std=0.05,
        tie_embeddings=layout.tie,
        shared=shared,
        streams=StreamOptions() if one else StreamOptions(2, iterations=3),
        mtp=MTPOptions(depth=2, weight=0.4, layer="sandwich"),
    )
    return config(layout, precision, model)


def micro_batch(index: int, tokens: int = TOKENS) -> MicroBatch:
    """Documents of 1 token, over several ranks' cuts, and one that continues an earlier stream (positions from 17). tokens: the first ones."""
    lengths = [[37, 1, 2, 24], [64], [15, 1, 33, 15], [1, 16, 47]][index % 4]
    ids = np.random.default_rng(index).integers(0, VOCAB, TOKENS).astype(np.int32)[:tokens]
    starts = np.array([17 if i == 0 else 0 for i in range(len(lengths))], dtype=np.int64)
    cu = np.cumsum([0, *lengths], dtype=np.int32).clip(max=tokens)
    batch = MicroBatch.of(Stream(ids, cu, starts, ["d"] * len(lengths), 0, (Cursor(),)), index)
    # the first of two context ranks has no label: of the second stream in two spans, of the third in zigzag
    unlabelled = {1: [slice(0, 32)], 2: [slice(0, 16), slice(48, 64)]}.get(index, [])
    for part in unlabelled:
        batch.labels[part] = -100
    return batch


def step_batches(step: int, tokens: int = TOKENS) -> list[MicroBatch]:
    return [micro_batch(step * MICRO_BATCHES + i, tokens) for i in range(MICRO_BATCHES)]


@torch.no_grad()
def prepare(stack: Stack) -> None:
    """Decays near 1, so that states really cross the cuts, and balancing biases that move the choice of experts."""
    for name, param in stack.named_parameters():
        if name.endswith("A_log"):
            param.fill_(-3.0)
    for name, router in stack.routers().items():
        layer = int(name.split(".")[1])
        router.bias.copy_(torch.linspace(-0.1, 0.1, len(router.bias)).roll(layer))


class Reference:
    """The model on one device with plain torch: autograd and torch's AdamW, no megatron, no rank."""

    def __init__(self, config: Config):
        self.config = config
        dtype = {"fp32": torch.float32, "fp64": torch.float64}[config.precision]
        self.stack = Stack(
            config.model,
            VOCAB,
            LocalLayers.of(config.model, dtype=dtype),
        )
        seed_parameters(self.stack, config.seed)
        prepare(self.stack)
        params = list(self.stack.parameters())
        train = config.train
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in params if layout_of(p).decay], "weight_decay": train.weight_decay},
                {"params": [p for p in params if not layout_of(p).decay], "weight_decay": 0.0},
            ],
            betas=(train.betas[0], train.betas[1]),
            eps=train.eps,
        )
        self.further = 0.0  # of the last backward: the mean cross entropy of what is predicted further ahead
        self.aux = 0.0  # of the last backward: what balances the routers, mean over its micro-batches
        self.margin = float("inf")  # the narrowest choice of an expert so far
        for router in self.stack.routers().values():
            router.register_forward_hook(lambda r, inputs, _: self._note(r.margin(inputs[0])))

    def _note(self, margin: Tensor) -> None:
        self.margin = min(self.margin, float(margin))

    def backward(self, batches: list[MicroBatch]) -> float:
        self.optimizer.zero_grad()
        labels = sum(int((b.labels >= 0).sum()) for b in batches)
        total = self.further = self.aux = 0.0
        for batch in batches:
            seq = Sequence(batch.cu_seqlens, batch.positions, aux_weight=1 / len(batches))
            hidden = self.stack(batch.tokens, seq)
            logits = self.stack.logits(hidden)
            ce = F.cross_entropy(logits, batch.labels, reduction="sum")
            z = logits[batch.labels >= 0].logsumexp(-1).square().sum()
            loss, mtp = ce + self.config.model.z_loss * z, self.config.model.mtp
            if mtp.depth:
                further = ahead(batch.tokens, batch.labels, batch.cu_seqlens, mtp.depth)
                ahead_loss, _ = self.stack.further_loss(hidden, further, seq)
                loss = loss + mtp.weight * ahead_loss
                self.further += float(ahead_loss.detach()) / labels
            (loss / labels).backward()
            self.aux += float(seq.metrics.get("aux_loss", 0.0)) / len(batches)
            total += float(ce.detach())
        return total / labels

    def gradients(self) -> dict[str, Tensor]:
        found = []
        for name, param in self.stack.named_parameters():
            for piece in pieces(name, param):
                assert param.grad is not None
                found.append((piece.name, piece.shape, piece.start, param.grad[piece.index].clone()))
        return assemble([{"gradients": found}])

    def step(self, step: int) -> float:
        lr = learning_rate(step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.stack.parameters()), self.config.train.clip))
        self.optimizer.step()
        for router in self.stack.routers().values():
            update_biases([router], router.load.unsqueeze(0))
            router.load.zero_()
        return norm


def prepared_engine(config: Config, mesh: Any) -> Any:
    """The engine of the config, whose weights were prepared before it took and cut them."""
    from unittest.mock import patch

    from ltrain.parallel.engines import base, build_engine

    def seed(stack: Stack, seed: int) -> None:
        seed_parameters(stack, seed)
        prepare(stack)

    with patch.object(base, "seed_parameters", seed):
        return build_engine(config, VOCAB, mesh)


def on_ranks(config: Config, steps: int, device: str = "cpu", later: bool = False) -> dict[str, Any]:
    """On every rank of a pool: gradients of step 0 as this rank's pieces, then `steps` steps. Tensors come back on the CPU.

    later: those of the last step too, which depend on what the steps before did to the weights.
    """
    import torch.distributed as dist

    from ltrain.parallel import cpu
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    mesh = Mesh(config.parallel, torch.device(device, dist.get_rank()) if device == "cuda" else torch.device("cpu"))
    try:
        engine = prepared_engine(config, mesh)
        out: dict[str, Any] = {"losses": [], "further": [], "index": [], "aux": [], "norms": [], "held": {}}
        for name, shape in engine.shapes.items():
            out["held"][name] = shape.numel()
        for step in range(max(steps, 1)):
            batches = step_batches(step, config.data.tokens)
            labels = sum(int((b.labels >= 0).sum()) for b in batches)
            mine = batches[mesh.data.rank() :: mesh.data.size()]
            means = engine.forward_backward(mine, labels, MICRO_BATCHES)
            out["losses"].append(means["loss"])
            out["further"].append(means.get("mtp_loss", 0.0))
            out["index"].append(means.get("index_loss", 0.0))
            out["aux"].append(means["aux_loss"])
            if step == 0:
                out["loads"] = {name: router.load.clone() for name, router in engine.stack.routers().items()}
                out["gradients"] = [(e.name, e.shape, e.start, e.tensor.cpu().clone()) for e in engine.gradients()]
            if later and step == steps - 1:
                out["later"] = [(e.name, e.shape, e.start, e.tensor.cpu().clone()) for e in engine.gradients()]
            if steps:
                out["norms"].append(engine.step(learning_rate(step, config.train)))
        out["biases"] = {name: router.bias.cpu().clone() for name, router in engine.stack.routers().items()}
        dist.barrier()
        return out
    finally:
        mesh.close()


def _no_merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    out += part
    lse.copy_(torch.logaddexp(lse, part_lse))


def broken_on_ranks(config: Config, what: str) -> dict[str, Any]:
    """As `on_ranks`, with one exchange replaced by one that forgets what other ranks hold."""
    from unittest.mock import patch

    from ltrain.model import layers
    from ltrain.parallel.context import exchange, ring
    from ltrain.parallel.engines import megatron

    def alone(inputs: Any, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, None]:
        return inputs.run(cu_seqlens)[0], None

    def whole_gradients(param: Any) -> Any:
        return replace(layers.layout_of(param), partial_gradient=False)

    patches = {
        "ring": patch.object(ring, "merge_into", _no_merge),
        "halo": patch.object(exchange.ContextExchange, "_with_halo", lambda self, x, *_: (x, None)),
        "scan": patch.object(exchange, "recurrence_over_ranks", alone),
        "tensor": patch.object(megatron, "layout_of", whole_gradients),
    }
    with patches[what]:
        return on_ranks(config, 0)


def pieces_of(module: nn.Module, mesh: Any, rows: Tensor, of_tokens: dict[str, Tensor], tokens: int) -> list[Rectangle]:
    """Of this rank: rows of what each token has, and its part of every weight's gradient, which tensor and context ranks add up here.

    rows [n]: the stream's tokens that it holds, of so many. of_tokens: [n, width] each. Fails where a weight has no gradient.
    """
    import torch.distributed as dist

    found: list[Rectangle] = []
    runs = torch.arange(len(rows)).tensor_split((rows.diff() != 1).nonzero().flatten() + 1)  # of rows that follow one another
    for name, tensor in of_tokens.items():
        found += [(name, (tokens, tensor.shape[1]), (int(rows[part[0]]), 0), tensor[part].clone()) for part in runs]
    for name, param in module.named_parameters():
        assert param.grad is not None, f"{name} has no gradient"
        if layout_of(param).partial_gradient:
            dist.all_reduce(param.grad, group=mesh.tensor)
        dist.all_reduce(param.grad, group=mesh.context)
        found += [(p.name, p.shape, p.start, param.grad[p.index]) for p in pieces(name, param)]
    return found


def whole(parts: list[Rectangle]) -> dict[str, Tensor]:
    """Whole tensors from the ranks' rectangles; NaN where nobody holds one."""
    found: dict[str, Tensor] = {}
    for name, shape, start, tensor in parts:
        target = found.setdefault(name, torch.full(shape, float("nan"), dtype=tensor.dtype))
        target[tuple(slice(s, s + n) for s, n in zip(start, tensor.shape, strict=True))] = tensor
    return found


def assemble(results: list[dict[str, Any]], which: str = "gradients") -> dict[str, Tensor]:
    """Whole gradients of what `on_ranks` gave; which: gradients | later."""
    return whole([piece for result in results for piece in result[which]])


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error (norm of the difference over norm) and whose it is."""
    assert found.keys() == expected.keys()
    errors = [(float((found[n].double() - g.double()).norm() / g.double().norm().clamp(min=1e-100)), n) for n, g in expected.items()]
    return max(errors, key=lambda e: float("inf") if np.isnan(e[0]) else e[0])
