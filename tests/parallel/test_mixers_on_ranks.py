"""Every mixer over tensor ranks, and over context ranks where it does not refuse, in float64: outputs and gradients as on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.config import ConfigError, ParallelConfig
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.sequence import Sequence
from ltrain.schema import divides_heads
from tests.model.mixers.cases import CASES, HIDDEN, build, config_of, decodes, specs_of
from tests.model.mixers.test_contract import inputs, jitter
from tests.parallel.parity import Rectangle, pieces_of, whole

LENGTHS = [1, 37, 2, 40, 16]  # documents that cross the cuts of 2 and of 4 ranks
MORE = 9  # tokens that are decoded of each document
LONGER = [n + MORE for n in LENGTHS]
LAYOUTS = {2: [(2, 1, 1), (1, 2, 1), (1, 2, 2)], 4: [(4, 1, 1), (2, 2, 1), (1, 4, 2)]}  # world size -> (tensor, context, ulysses)

Found = dict[str, list[Rectangle]]  # by case


def weight(lengths: list[int]) -> Tensor:
    return torch.randn(sum(lengths), HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


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


def alone(name: str, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    module = build(name, LocalLayers(std=0.3, depth=len(CASES[name]), dtype=torch.float64))
    seed_parameters(module, 0)
    jitter(module)
    x = inputs(sum(lengths)).requires_grad_()
    y = module(x, Sequence.of(lengths))
    (y * weight(lengths)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{key: p.grad for key, p in module.named_parameters() if p.grad is not None}}


def given(lengths: list[int], changed: int | None) -> Tensor:
    """The inputs of documents, one of which may be another one."""
    x = inputs(sum(lengths))
    if changed is not None:
        x.split(lengths)[changed].copy_(inputs(sum(lengths)).flip(0).split(lengths)[changed])
    return x


def on_ranks(names: list[str], parallel: ParallelConfig, lengths: list[int] = LENGTHS, changed: int | None = None) -> Found:
    """On every rank of a pool: each case's outputs and gradients, as rectangles of the whole tensors."""
    from ltrain.parallel import cpu
    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout
    from ltrain.parallel.layers import build_layers
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    mesh = Mesh(parallel, torch.device("cpu"))
    try:
        found: Found = {}
        for name in names:
            config = config_of(name)
            config.parallel = parallel
            module = build(name, build_layers(config, mesh, torch.float64).at(0))
            seed_parameters(module, 0)
            jitter(module)
            layout = ContextLayout(sum(lengths), mesh.context.rank(), mesh.context.size(), parallel.context_layout)
            exchange = ContextExchange(layout, mesh.exchange if mesh.context.size() > 1 else None, mesh.tensor_context, mesh.tensor, mesh.ulysses)
            plain = Sequence.of(lengths)
            layout = layout.of(plain.cu_seqlens)
            seq = Sequence(plain.cu_seqlens, layout.take(plain.positions), exchange=exchange)

            def mine(x: Tensor, layout: Any = layout) -> Tensor:
                return layout.take(x).chunk(mesh.tensor.size())[mesh.tensor.rank()]

            rows = mine(torch.arange(sum(lengths)))
            x = mine(given(lengths, changed)).clone().requires_grad_()
            y = module(x, seq)
            (y * mine(weight(lengths))).sum().backward()
            assert x.grad is not None
            found[name] = pieces_of(module, mesh, rows, {"y": y.detach(), "x": x.grad}, sum(lengths))
        return found
    finally:
        mesh.close()


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
            plain, x = Sequence.of(LENGTHS), inputs(sum(LENGTHS) + MORE * len(LENGTHS))
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


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return {name: alone(name) for name in CASES}


def test_every_case_goes_over_two_tensor_ranks() -> None:
    assert [name for name in CASES if not supported(name, ParallelConfig(tensor=2))] == []


@pytest.mark.parametrize(("world", "tensor", "context", "ulysses"), [(world, *layout) for world, layouts in LAYOUTS.items() for layout in layouts])
def test_on_ranks_as_on_one(pool: Any, expected: dict[str, dict[str, Tensor]], world: int, tensor: int, context: int, ulysses: int) -> None:
    parallel = ParallelConfig(tensor=tensor, context=context, ulysses=ulysses)
    names = [name for name in CASES if supported(name, parallel)]
    assert len(names) > 10
    results = pool(world).run(on_ranks, names, parallel, timeout=240)
    assert not _wrong(results, names, expected)


# Parts too short for any compressed block to end in them, whose rows later ranks want all the same; and documents of one token.
SHORT = {"cut early": [4, 28], "cut late": [28, 4], "tiny": [1] * 15 + [2] + [1] * 15}


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("documents", SHORT)
def test_short_parts_of_documents_on_context_ranks_as_on_one(pool: Any, documents: str, kind: str) -> None:
    parallel, lengths = ParallelConfig(context=4, context_layout=kind), SHORT[documents]
    names = [name for name in CASES if supported(name, parallel)]
    results = pool(4).run(on_ranks, names, parallel, lengths, timeout=240)
    assert not _wrong(results, names, {name: alone(name, lengths) for name in names})


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
def test_a_document_changes_nothing_outside_it_on_any_rank(pool: Any, kind: str) -> None:
    parallel = ParallelConfig(context=4, context_layout=kind)
    names = [name for name in CASES if supported(name, parallel)]

    changed = 3  # on several ranks, as are those before and behind it

    def found(changed: int | None) -> dict[str, dict[str, Tensor]]:
        results = pool(4).run(on_ranks, names, parallel, LENGTHS, changed, timeout=240)
        return {name: whole([part for result in results for part in result[name]]) for name in names}

    before, after, wrong = found(None), found(changed), []
    for name, key in ((name, key) for name in names for key in ("y", "x")):
        same = [torch.equal(*pair) for pair in zip(before[name][key].split(LENGTHS), after[name][key].split(LENGTHS), strict=True)]
        if same != [document != changed for document in range(len(LENGTHS))]:
            wrong.append((name, key, same))
    assert not wrong, wrong


def _wrong(results: list[Found], names: list[str], expected: dict[str, dict[str, Tensor]]) -> list[str]:
    wrong = []
    for name in names:
        found = whole([part for result in results for part in result[name]])
        assert found.keys() == expected[name].keys(), name
        for key, value in expected[name].items():
            error = float((found[key] - value).norm() / value.norm().clamp(min=1e-6))
            if not error < 1e-10:
                wrong.append(f"{name}: {key} is off by {error:.1e}")
    return wrong


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
