"""docs/context-parallelism.md: its drawings are what the layouts do, and its mixer works over ranks as on one."""

import re
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.sequence import Sequence
from ltrain.parallel.context.layout import KINDS, ContextLayout
from ltrain.parallel.context.needs import sent_bytes

DOCS = Path(__file__).parents[3] / "docs" / "context-parallelism.md"
HIDDEN, LENGTHS = 24, [1, 60, 3, 32]  # one document crosses most cuts, and ten spans of 8 ranks in zigzag
SCALE = 1024  # tokens of a character


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("drawing", blocks("layouts"))
def test_drawings_show_what_layouts_do(drawing: str) -> None:
    rows = dict(re.findall(r"^(\w+) +(.*)$", drawing, re.MULTILINE))
    assert rows.keys() == {"documents", *KINDS}
    cu_seqlens = Sequence.of([SCALE * len(list(run)) for _, run in groupby(rows["documents"])]).cu_seqlens
    tokens = int(cu_seqlens[-1])
    for kind in KINDS:
        drawn, _, work = rows[kind].partition("   work ")
        size = len(work.split())
        layout = ContextLayout(tokens, 0, size, kind).of(cu_seqlens)
        spans = [(span, rank) for rank in range(size) for span in layout.spans(rank)]
        assert drawn == "".join(str(rank) * ((stop - start) // SCALE) for (start, stop), rank in sorted(spans)), kind
        found = layout.work(cu_seqlens)
        assert work == " ".join(f"{size * each / sum(found):.2f}" for each in found)


def mixer() -> Any:
    """Of the documentation, as the module that it would be."""
    (source,) = blocks("python")
    assert source.count("\n") < 80
    module = ModuleType("rotating")
    sys.modules["rotating"] = module  # where dataclasses look for their names
    exec(compile(source, str(DOCS), "exec"), vars(module))
    found = module.RotatingMixer(HIDDEN, module.RotatingOptions(), LocalLayers(std=0.3, dtype=torch.float64))
    seed_parameters(found, 0)
    return found


def drawn(seed: int) -> Tensor:
    return torch.randn(sum(LENGTHS), HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def on_rank(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor], int]:
    """On every rank of a pool: outputs and the inputs' gradients of its tokens, sums of the weights' gradients, and bytes of a forward."""
    import torch.distributed as dist

    from ltrain.parallel.context.exchange import ContextExchange

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group()
    whole, module = Sequence.of(LENGTHS), mixer()
    exchange = ContextExchange(ContextLayout(sum(LENGTHS), rank, size, kind), group, group)
    layout = exchange.layout.of(whole.cu_seqlens)
    x = layout.take(drawn(1)).clone().requires_grad_()
    y = module(x, exchange.sequence(whole.cu_seqlens, whole.positions))
    sent = sum(exchange.bytes.values())
    (y * layout.take(drawn(2))).sum().backward()
    assert x.grad is not None
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad, group=group)
    return y.detach(), x.grad, gradients(module), sent


@pytest.mark.parametrize(("size", "kind"), [(2, "zigzag"), (2, "contiguous"), (8, "zigzag")])
def test_the_mixer_of_the_docs_on_ranks_as_on_one(pool: Any, size: int, kind: str) -> None:
    module, x = mixer(), drawn(1).requires_grad_()
    y = module(x, Sequence.of(LENGTHS))
    (y * drawn(2)).sum().backward()
    assert x.grad is not None
    results = pool(size).run(on_rank, kind, timeout=120)
    cu_seqlens = Sequence.of(LENGTHS).cu_seqlens
    for rank, (out, dx, weights, _) in enumerate(results):
        layout = ContextLayout(sum(LENGTHS), rank, size, kind).of(cu_seqlens)
        torch.testing.assert_close(out, layout.take(y.detach()), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(dx, layout.take(x.grad), rtol=1e-10, atol=1e-11)
        for name, expected in gradients(module).items():
            assert expected.abs().max() > 0
            torch.testing.assert_close(weights[name], expected, rtol=1e-10, atol=1e-11, msg=f"{name}: {{}}".format)
    (need,) = module.exchanges(max(LENGTHS))
    assert sum(sent for *_, sent in results) == sent_bytes(need, ContextLayout(sum(LENGTHS), 0, size, kind), LENGTHS, 8) > 0
