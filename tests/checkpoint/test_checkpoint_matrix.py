"""The engine's state from every layout to every other, bit for bit: weights, moments and biases of a hybrid with experts."""

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.checkpoint import Checkpoint, CheckpointError, Entry, LocalCollectives, save
from tests.parallel.parity import VOCAB, Layout, config

WORLDS: list[tuple[int, Layout]] = [
    (1, Layout()),
    (2, Layout()),  # data
    (2, Layout(tensor=2)),
    (2, Layout(tensor=2, expert=2)),
    (2, Layout(context=2)),
    (2, Layout(expert=2)),
    (2, Layout(pipeline=2)),
    (4, Layout()),  # data
    (4, Layout(tensor=4, expert=4)),
    (4, Layout(tensor=2, context=2, expert=4)),
    (4, Layout(tensor=2, pipeline=2, expert=2)),
    (4, Layout(context=4)),
    (4, Layout(context=2, pipeline=2)),
    (4, Layout(context=2, expert=2)),  # and data
    (4, Layout(pipeline=4)),
    (4, Layout(tensor=2, expert=2)),  # and data
    (4, Layout(pipeline=2, expert=2)),  # and data
]
ALL = os.environ.get("LTRAIN_TEST_ALL") == "1"
PRECISIONS = ["fp32", "bf16"]
BF16 = [0, 9, 14]  # layouts in bfloat16 by default


def degrees(world: int, layout: Layout) -> list[tuple[str, int]]:
    data = world // (layout.tensor * layout.context * layout.pipeline)
    return [
        ("ranks", world),
        ("tensor", layout.tensor),
        ("context", layout.context),
        ("expert", layout.expert),
        ("pipeline", layout.pipeline),
        ("data", data),
    ]


def covering() -> list[tuple[int, int]]:
    """Few (saved, loaded) such that every degree that is saved from meets every degree that is loaded into."""
    everything = list(product(range(len(WORLDS)), repeat=2))
    meets = {pair: set(product(degrees(*WORLDS[pair[0]]), degrees(*WORLDS[pair[1]]))) for pair in everything}
    wanted, chosen = set().union(*meets.values()), []
    while wanted:
        used = {i for pair in chosen for i in pair}  # an engine to build is most of the time
        best = max(everything, key=lambda pair: len(meets[pair] & wanted) - 4 * len(set(pair) - used))
        chosen.append(best)
        wanted -= meets[best]
    return chosen


PAIRS = list(product(range(len(WORLDS)), repeat=2)) if ALL else covering()


def engine_of(layout: Layout, precision: str) -> Any:
    """On a rank of a pool: the engine and its mesh, which the caller closes."""
    from ltrain.parallel import cpu
    from ltrain.parallel.engines.megatron import MegatronEngine
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    settings = config(layout, precision)
    mesh = Mesh(settings.parallel, torch.device("cpu"))
    return MegatronEngine(settings, VOCAB, mesh), mesh


def shapes() -> list[tuple[str, str, tuple[int, ...]]]:
    engine, mesh = engine_of(Layout(), "fp32")
    try:
        for group in engine.optimizer.chained_optimizers:
            group.optimizer.state.clear()
        kinds = ("param", "exp_avg", "exp_avg_sq")
        params = [(e.name, tuple(e.shape)) for e in engine._entries("param", torch.float32)]
        biases = [(name, "buffer", tuple(buffer.shape)) for name, buffer in engine._persistent_buffers()]
        return [(name, kind, shape) for kind in kinds for name, shape in params] + biases
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def original(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random numbers, with zeros of both signs, subnormal and very large ones among them."""
    generator = torch.Generator().manual_seed(5)
    entries = []
    for name, kind, shape in pool(1).run(shapes)[0]:
        values = torch.randn(shape, generator=generator)
        flat = values.view(-1)
        flat[:: max(1, len(flat) // 4)] = torch.tensor([-0.0, 1e-42, 3e38, -1e-30]).repeat(len(flat))[: len(flat[:: max(1, len(flat) // 4)])]
        entries.append(Entry(name, kind, shape, (0,) * len(shape), values.abs() if kind == "exp_avg_sq" else values))
    return save(tmp_path_factory.mktemp("original"), 7, entries, {}, LocalCollectives())


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def load_and_save(layout: Layout, precision: str, sources: list[Path], original: Path, folder: Path) -> list[str]:
    """On every rank: loads each source over numbers that are not in it and compares what the rank then has; saves the last."""
    from ltrain.model.layers import pieces

    engine, mesh = engine_of(layout, precision)
    found = []
    try:
        with Checkpoint(original) as expected:
            for source in sources:
                with torch.no_grad():
                    for param in engine.stack.parameters():
                        param.fill_(11.0)
                        if (master := engine.part(param, "param")[0]) is not None:
                            master.fill_(12.0)
                    for _, buffer in engine._persistent_buffers():
                        buffer.fill_(13.0)
                with Checkpoint(source) as checkpoint:
                    engine.load(checkpoint, 7)
                for e in engine.state():
                    if not torch.equal(bits(e.tensor), bits(expected.read(e.name, e.kind, e.start, e.tensor.shape))):
                        found.append(f"{source.parent.name}: {e.kind} of {e.name}")
                for name, param in engine.stack.named_parameters():  # what the forward uses, the copies that no one saves included
                    for piece in pieces(name, param):
                        local = param.detach()[piece.index]
                        if not torch.equal(local, expected.read(piece.name, "param", piece.start, local.shape).to(local.dtype)):
                            found.append(f"{source.parent.name}: the weight {piece.name}")
        save(folder, 7, engine.state(), {}, mesh)
        return found
    finally:
        mesh.close()


def contents(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    with Checkpoint(path, verify=True) as checkpoint:
        return {(kind, name): checkpoint.read(name, kind) for kind in checkpoint.kinds for name in checkpoint.names(kind)}


@pytest.fixture(scope="module")
def saved(pool: Any, original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """(precision, number of the layout) -> what it saved after it loaded the original."""
    folder, paths = tmp_path_factory.mktemp("saved"), {}
    for precision, (i, (world, layout)) in product(PRECISIONS, enumerate(WORLDS)):
        if ALL or (any(i in pair for pair in PAIRS) and (precision == "fp32" or i in BF16)):
            root = folder / f"{precision}-{world}-{layout}"
            wrong = pool(world).run(load_and_save, layout, precision, [original], original, root)
            assert not any(wrong), wrong
            paths[precision, i] = root / "step-00000007"
    return paths


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_every_layout_saves(saved: dict[tuple[str, int], Path], original: Path, precision: str) -> None:
    whole = contents(original)
    for (p, i), path in saved.items():
        if p == precision:
            found = contents(path)
            assert found.keys() == whole.keys()
            assert {kind for kind, _ in found} == {"param", "exp_avg", "exp_avg_sq", "buffer"}
            different = [key for key, tensor in whole.items() if not torch.equal(bits(found[key]), bits(tensor))]
            assert not different, (WORLDS[i], different)


@pytest.mark.parametrize("loaded", range(len(WORLDS)), ids=[f"{world}-{layout}" for world, layout in WORLDS])
def test_every_pair_of_layouts(pool: Any, saved: dict[tuple[str, int], Path], original: Path, tmp_path: Path, loaded: int) -> None:
    world, layout = WORLDS[loaded]
    for precision in PRECISIONS:
        sources = [saved[precision, a] for a, b in PAIRS if b == loaded and (precision, a) in saved]
        if sources and (precision, loaded) in saved:
            wrong = pool(world).run(load_and_save, layout, precision, sources, original, tmp_path / precision, timeout=240)
            assert not any(wrong), wrong


def one_rank_fails(folder: Path) -> str:
    """What a save says on this rank when another one cannot give its state."""
    engine, mesh = engine_of(Layout(tensor=2), "fp32")
    try:
        part = engine.part

        def broken(param: Any, kind: str) -> Any:
            if mesh.rank == 1 and kind == "param":
                raise MemoryError("no memory for the master weights")
            return part(param, kind)

        engine.part = broken
        save(folder, 1, engine.state(), {}, mesh)
    except CheckpointError as error:
        return str(error)
    finally:
        mesh.close()
    return ""


def test_a_rank_that_cannot_give_its_state_stops_all(pool: Any, tmp_path: Path) -> None:
    sentences = pool(4).run(one_rank_fails, tmp_path, timeout=30)
    assert len(set(sentences)) == 1
    assert "no memory for the master weights" in sentences[0]
    assert not list(tmp_path.iterdir())
