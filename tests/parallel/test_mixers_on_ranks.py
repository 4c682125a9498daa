"""Every mixer over tensor ranks, and over context ranks where it does not refuse, in float64: outputs and gradients as on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.config import ParallelConfig
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.sequence import Sequence
from tests.model.mixers.cases import CASES, build, config_of, decodes
from tests.model.mixers.test_contract import inputs, jitter
from tests.parallel.mixers import Run, over_ranks, supported, together, wrong

LENGTHS = (1, 37, 2, 40, 16)  # documents that cross the cuts of 2 and of 4 ranks
MORE = 9  # tokens that are decoded of each document
LONGER = [n + MORE for n in LENGTHS]
LAYOUTS = {2: [(2, 1, 1), (1, 2, 1), (1, 2, 2)], 4: [(4, 1, 1), (2, 2, 1), (1, 4, 2)]}  # world size -> (tensor, context, ulysses)


def decoded_on_ranks(names: list[str], parallel: ParallelConfig) -> dict[str, Tensor]:
    """On every context rank of a pool: what each case decodes behind a prefill, [MORE, documents, HIDDEN]."""
    from ltrain.parallel import cpu
    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout
    from ltrain.parallel.layers import build_layers
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    mesh = Mesh(parallel, torch.device("cpu"))
    try:
        found = {}
        for name in names:
            config = config_of(name)
            config.parallel = parallel
            module = build(name, build_layers(config, mesh, torch.float64).at(0))
            seed_parameters(module, 0)
            jitter(module)
            layout = ContextLayout(sum(LENGTHS), mesh.context.rank(), mesh.context.size(), parallel.context_layout)
            exchange = ContextExchange(layout, mesh.exchange, mesh.tensor_context, mesh.tensor, mesh.ulysses)
            plain, x = Sequence.of(list(LENGTHS)), inputs(sum(LENGTHS) + MORE * len(LENGTHS))
            layout = layout.of(plain.cu_seqlens)
            prompts, further = zip(*(document.split([n, MORE]) for document, n in zip(x.split(LONGER), LENGTHS, strict=True)), strict=True)
            with torch.no_grad():
                _, state = module.prefill(
                    layout.take(torch.cat(prompts)), Sequence(plain.cu_seqlens, layout.take(plain.positions), exchange=exchange)
                )
                steps = []
                for i in range(MORE):
                    y, state = module.decode(torch.stack([d[i] for d in further]), state, Sequence.step(torch.tensor(LENGTHS) + i, exchange))
                    steps.append(y)
            found[name] = torch.stack(steps)
        return found
    finally:
        mesh.close()


def test_every_case_goes_over_two_tensor_ranks() -> None:
    assert [name for name in CASES if not supported(name, ParallelConfig(tensor=2))] == []


@pytest.mark.parametrize(("world", "tensor", "context", "ulysses"), [(world, *layout) for world, layouts in LAYOUTS.items() for layout in layouts])
def test_on_ranks_as_on_one(pool: Any, world: int, tensor: int, context: int, ulysses: int) -> None:
    parallel = ParallelConfig(tensor=tensor, context=context, ulysses=ulysses)
    runs = [Run(name, LENGTHS) for name in CASES if supported(name, parallel)]
    assert len(runs) > 10
    off = wrong(runs, pool(world).run(over_ranks, runs, parallel, timeout=240))
    assert not off, "\n".join(off)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
def test_a_document_changes_nothing_outside_it_on_any_rank(pool: Any, kind: str) -> None:
    parallel = ParallelConfig(context=4, context_layout=kind)
    names = [name for name in CASES if supported(name, parallel)]
    changed = 3  # on several ranks, as are those before and behind it
    runs = [Run(name, LENGTHS, changed=document) for name in names for document in (None, changed)]
    results, off = pool(4).run(over_ranks, runs, parallel, timeout=240), []
    for number, name in enumerate(names):
        before, after = together(results, 2 * number), together(results, 2 * number + 1)
        for key in ("y", "x"):
            same = [torch.equal(*pair) for pair in zip(before[key].split(LENGTHS), after[key].split(LENGTHS), strict=True)]
            if same != [document != changed for document in range(len(LENGTHS))]:
                off.append((name, key, same))
    assert not off, off


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "balanced"])
def test_decoding_over_context_ranks_as_on_one(pool: Any, kind: str) -> None:
    parallel = ParallelConfig(context=4, context_layout=kind)
    names = [name for name in CASES if supported(name, parallel) and decodes(name)]
    assert {"attention-moba", "attention-msa", "mla-dsa", "mla-dsa-shared", "nsa"} <= set(names)
    results = pool(4).run(decoded_on_ranks, names, parallel, timeout=240)
    wrong = []
    for name in names:
        module = build(name, LocalLayers(std=0.3, depth=len(CASES[name]), dtype=torch.float64))
        seed_parameters(module, 0)
        jitter(module)
        with torch.no_grad():
            y = module(inputs(sum(LONGER)), Sequence.of(LONGER))
        expected = torch.stack([document[-MORE:] for document in y.split(LONGER)], dim=1)
        for rank, result in enumerate(results):
            error = float((result[name] - expected).norm() / expected.norm())
            if not error < 1e-10:
                wrong.append(f"{name}: rank {rank} is off by {error:.1e}")
    assert not wrong, wrong
