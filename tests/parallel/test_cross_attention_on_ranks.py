"""Gated cross-attention over tensor and context ranks in float64: outputs, every gradient and what it decodes, as on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.config import Config, ParallelConfig
from ltrain.model.block import Block
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import Memory, Sequence
from ltrain.pattern import resolve_layers
from tests.model.mixers.test_contract import jitter
from tests.parallel.parity import Rectangle, pieces_of, whole

HIDDEN, WIDTH = 32, 20
LENGTHS, ROWS = [1, 37, 2, 40, 16], [3, 9, 0, 30, 1]  # documents that cross the cuts of 2 ranks and more; one has no memory
MORE = 3  # tokens that are decoded of each of the last four documents, which divide over the tensor ranks
TOKENS = sum(LENGTHS)


def config(parallel: ParallelConfig) -> Config:
    layer = {"mixer": "cross_attention", "heads": 8, "kv_heads": 4, "head_dim": 8, "memory_width": WIDTH, "block": {"gated": True}}
    model = ModelConfig(hidden=HIDDEN, depth=1, pattern=["cross"], layers={"cross": layer}, ffn=MoEOptions(experts=0, inner=32), init_std=0.3)
    return Config(model=model, precision="fp64", parallel=parallel)


def built(layers: LocalLayers) -> Block:
    block = Block(HIDDEN, resolve_layers(config(ParallelConfig()).model)[0], layers.at(0))
    seed_parameters(block, 0)
    jitter(block)
    return block


def drawn(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def memory(states: Tensor) -> Memory:
    return Memory.of(states, ROWS)


def alone() -> tuple[Block, dict[str, Tensor]]:
    block, x, states = (
        built(LocalLayers.of(config(ParallelConfig()).model, dtype=torch.float64)),
        drawn(TOKENS, HIDDEN, 1),
        drawn(sum(ROWS), WIDTH, 2),
    )
    seq = Sequence.of(LENGTHS)
    seq.memory = memory(states.requires_grad_())
    y = block(x.requires_grad_(), seq)
    (y * drawn(TOKENS, HIDDEN, 3)).sum().backward()
    assert x.grad is not None and states.grad is not None
    return block, {"y": y.detach(), "x": x.grad, "memory": states.grad, **{k: p.grad for k, p in block.named_parameters() if p.grad is not None}}


def on_ranks(parallel: ParallelConfig) -> tuple[list[Rectangle], Tensor, dict[str, int]]:
    """On every rank of a pool: outputs and gradients as rectangles of the whole tensors, what this rank decodes [MORE, documents, hidden], and the
    bytes that it sent to other context ranks, by kind."""
    import torch.distributed as dist

    from ltrain.parallel import cpu
    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout
    from ltrain.parallel.layers import build_layers
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    mesh = Mesh(parallel, torch.device("cpu"))
    try:
        block = built(build_layers(config(parallel), mesh, torch.float64))
        layout = ContextLayout(TOKENS, mesh.context.rank(), mesh.context.size(), parallel.context_layout)
        exchange = ContextExchange(layout, mesh.exchange if mesh.context.size() > 1 else None, mesh.tensor_context, mesh.tensor)
        plain, states = Sequence.of(LENGTHS), drawn(sum(ROWS), WIDTH, 2).requires_grad_()
        layout = layout.of(plain.cu_seqlens)
        seq = Sequence(plain.cu_seqlens, layout.take(plain.positions), exchange=exchange, memory=memory(states))

        def mine(x: Tensor) -> Tensor:
            return layout.take(x).chunk(mesh.tensor.size())[mesh.tensor.rank()]

        x = mine(drawn(TOKENS, HIDDEN, 1)).clone().requires_grad_()
        y = block(x, seq)
        (y * mine(drawn(TOKENS, HIDDEN, 3))).sum().backward()
        assert x.grad is not None and states.grad is not None
        dist.all_reduce(states.grad, group=mesh.tensor_context)
        out: list[Rectangle] = [("memory", (sum(ROWS), WIDTH), (0, 0), states.grad)]
        out += pieces_of(block, mesh, mine(torch.arange(TOKENS)), {"y": y.detach(), "x": x.grad}, TOKENS)
        with torch.no_grad():
            _, state = block.prefill(x, seq)
            state.k, state.v, state.behind = state.k[1:], state.v[1:], state.behind[1:]
            decoded = []
            for i in range(MORE):
                step = drawn(4, HIDDEN, 10 + i).chunk(mesh.tensor.size())[mesh.tensor.rank()]
                y, state = block.decode(step, state, Sequence.step(torch.tensor(LENGTHS[1:]) + i, exchange))
                parts = [torch.empty_like(y) for _ in range(mesh.tensor.size())]
                dist.all_gather(parts, y, group=mesh.tensor)
                decoded.append(torch.cat(parts))
        return out, torch.stack(decoded), dict(exchange.bytes)
    finally:
        mesh.close()


@pytest.mark.parametrize(
    ("world", "tensor", "context", "layout"),
    [
        (2, 2, 1, "zigzag"),
        (2, 1, 2, "zigzag"),
        (4, 4, 1, "zigzag"),
        (4, 2, 2, "zigzag"),
        (4, 1, 4, "balanced"),
        (4, 1, 4, "contiguous"),
        (3, 1, 3, "contiguous"),
        (3, 1, 3, "balanced"),
        (8, 1, 8, "zigzag"),
        (8, 2, 4, "balanced"),
    ],
)
def test_on_ranks_as_on_one(pool: Any, world: int, tensor: int, context: int, layout: str) -> None:
    block, expected = alone()
    results = pool(world).run(on_ranks, ParallelConfig(tensor=tensor, context=context, context_layout=layout), timeout=120)
    found = whole([part for result, _, _ in results for part in result])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.abs().max() > 0, key
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-11, msg=f"{key}: {{}}".format)
    with torch.no_grad():
        seq = Sequence.of([MORE] * 4)  # without positions, the tokens of a document may as well be a document of their own
        seq.memory = Memory.of(drawn(sum(ROWS), WIDTH, 2)[ROWS[0] :], ROWS[1:])
        steps = torch.stack([drawn(4, HIDDEN, 10 + i) for i in range(MORE)], dim=1)  # [documents, MORE, hidden]
        decoded = block(steps.flatten(0, 1), seq).unflatten(0, (4, MORE)).transpose(0, 1)
    for _, rows, sent in results:
        torch.testing.assert_close(rows, decoded, rtol=1e-10, atol=1e-11)
        assert not any(sent.values()), sent  # every rank has the whole memory: neither tokens nor memory travel, nor anything that is decoded
