"""engine=deepspeed trains as the reference and as engine=megatron do, shares memory out, and reads and writes the same checkpoints."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.config import Config, ConfigError, DeepSpeedConfig, ModelConfig, ParallelConfig, validate
from ltrain.model.options import MoEOptions
from tests.parallel.parity import MICRO_BATCHES, Layout, Reference, assemble, config, config_of_blocks, on_ranks, prepared_engine, step_batches, worst
from tests.parallel.test_layouts import expected_gradients, expected_run


def zero(layout: Layout, stage: int, offload: str = "none", precision: str = "fp32") -> Config:
    """stage 0: engine=megatron."""
    out = config(layout, precision)
    if stage:
        out.engine, out.deepspeed = "deepspeed", DeepSpeedConfig(stage, offload)
    return out


# Every stage with every kind of parallelism, pairwise.
CASES = [
    (2, 1, Layout(), "none"),
    (2, 2, Layout(), "cpu"),
    (2, 3, Layout(tie=False), "none"),
    (2, 1, Layout(tensor=2), "none"),
    (2, 2, Layout(tensor=2, expert=2), "none"),
    (2, 3, Layout(tensor=2, recompute="full"), "none"),
    (2, 1, Layout(context=2, expert=2), "cpu"),
    (2, 2, Layout(context=2, context_layout="contiguous"), "none"),
    (2, 3, Layout(context=2, expert=2), "none"),
    (4, 1, Layout(expert=2), "none"),
    (4, 2, Layout(tensor=2, context=2, expert=2), "none"),
    (4, 3, Layout(tensor=2, expert=2), "cpu"),
    (4, 3, Layout(context=2, expert=4), "none"),
]


@pytest.mark.parametrize(("world", "stage", "layout", "offload"), CASES, ids=lambda value: str(value))
def test_training_in_float32(pool: Any, world: int, stage: int, layout: Layout, offload: str) -> None:
    gradients, _ = expected_gradients("fp32", layout.tie)
    expected = expected_run(layout.tie)
    results = pool(world).run(on_ranks, zero(layout, stage, offload), 10, timeout=240)
    error, name = worst(assemble(results), gradients)
    assert error < 1e-5, f"{name} is off by {error:.1e}"
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for router, bias in result["biases"].items():
            torch.testing.assert_close(bias, expected["biases"][router], rtol=0, atol=1e-6)


def test_blocks_and_heads_of_other_kinds(pool: Any) -> None:
    """Biases of experts, and an embedding and a head that one forward uses several times, in shares that are gathered for each use."""
    made = replace(config_of_blocks(Layout(expert=2), "fp32"), engine="deepspeed", deepspeed=DeepSpeedConfig(3), seed=7)
    validate(made, 2)
    reference = Reference(made)
    loss = reference.backward(step_batches(0))
    assert reference.margin > 3e-6
    results = pool(2).run(on_ranks, made, 0, timeout=240)
    error, name = worst(assemble(results), reference.gradients())
    assert error < 1e-5, f"{name} is off by {error:.1e}"
    assert results[0]["losses"][0] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(("context", "recompute"), [(1, "none"), (1, "full"), (2, "none")])
def test_weights_used_beside_their_module(pool: Any, context: int, recompute: str) -> None:
    """What expands latents is multiplied into queries where an indexer selects: ZeRO-3 has to gather it for that, too."""
    latent = {"mixer": "mla", "heads": 4, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 6, "q_rank": 10, "top_k": 9}
    model = ModelConfig(
        hidden=32,
        depth=2,
        pattern=["chooses", "shares"],
        layers={
            "chooses": {**latent, "select": "index", "index_heads": 8, "index_dim": 6},
            "shares": {**latent, "select": "shared"},
        },
        ffn=MoEOptions(experts=0, inner=32),
        tie_embeddings=False,
    )
    made = config(Layout(context=context, recompute=recompute, tie=False), "fp32", model)
    made = replace(made, engine="deepspeed", deepspeed=DeepSpeedConfig(3), seed=7)
    validate(made, 2)
    reference = Reference(made)
    loss = reference.backward(step_batches(0))
    results = pool(2).run(on_ranks, made, 0, timeout=240)
    error, name = worst(assemble(results), reference.gradients())
    assert error < 1e-5, f"{name} is off by {error:.1e}"
    assert results[0]["losses"][0] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_as_the_megatron_engine(pool: Any, stage: int) -> None:
    """Masters and sums of gradients in float32, decays per head in float32 throughout. DeepSpeed takes the tied embedding's gradient in
    bfloat16, from autograd; megatron's buffer has the head's part of it in float32."""
    layout = Layout(tensor=2)
    megatron = pool(2).run(on_ranks, zero(layout, 0, precision="bf16"), 4, timeout=240)
    found = pool(2).run(on_ranks, zero(layout, stage, precision="bf16"), 4, timeout=240)
    for result in found:
        assert result["losses"][0] == pytest.approx(megatron[0]["losses"][0], abs=2e-6)
        assert result["losses"] == pytest.approx(megatron[0]["losses"], abs=5e-4)
        assert result["norms"][0] == pytest.approx(megatron[0]["norms"][0], rel=1e-5)
        assert result["norms"] == pytest.approx(megatron[0]["norms"], rel=3e-3)
    gradients, expected = assemble(found), assemble(megatron)
    error, _ = worst({"embed.weight": gradients.pop("embed.weight")}, {"embed.weight": expected.pop("embed.weight")})
    assert error < 4e-3, f"embed.weight is off by {error:.1e}"
    error, name = worst(gradients, expected)
    assert error < 1e-4, f"{name} is off by {error:.1e}"


def _numel(tensors: Any) -> int:
    """Elements of the storages behind float32 tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in tensors if t is not None}.values())


def _mesh(config: Config) -> Any:
    from ltrain.parallel import cpu
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    return Mesh(config.parallel, torch.device("cpu"))


def held_on_ranks(config: Config) -> dict[str, int]:
    """Elements of moments, weights, and gradients between two micro-batches, that this rank holds."""
    mesh = _mesh(config)
    try:
        engine = prepared_engine(config, mesh)
        engine.runtime.set_gradient_accumulation_boundary(False)
        batch = step_batches(0)[mesh.data.rank()]
        engine.runtime.backward(engine.runtime(batch, 200, MICRO_BATCHES)[0])
        params, optimizer = list(engine.params.values()), engine.optimizer
        if config.deepspeed.zero == 3:
            grads, shards = [optimizer.grad_partitions_flat_buffer], [p.ds_tensor for p in params]
        else:
            grads, shards = [g for group in optimizer.all_grad_tensors.values() for g in group or ()], []
        return {
            "model": sum(shape.numel() for shape in engine.shapes.values()),
            "moments": sum(state["exp_avg"].numel() for state in engine.adam.state.values()),
            "gradients": _numel([*grads, *(p.grad for p in params)]),
            "weights": _numel([*(p.data for p in params), *shards]),
        }
    finally:
        mesh.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_is_shared_out(pool: Any, stage: int) -> None:
    """Stage 1 shares the moments out, 2 the gradients too, 3 the weights too; a few elements pad."""
    for held in pool(4).run(held_on_ranks, zero(Layout(), stage), timeout=120):
        share = {kind: count / held["model"] for kind, count in held.items()}
        assert share["moments"] == pytest.approx(1 / 4, rel=0.02)
        # stage 2 keeps whole what lies across the border of its share: here the large embedding on its two ranks
        assert share["gradients"] == pytest.approx(1, rel=0.02) if stage == 1 else 0.2 < share["gradients"] < 0.8
        assert share["weights"] == pytest.approx(1 if stage < 3 else 1 / 4, rel=0.02)


def bits(entries: Any) -> dict[tuple[str, str, tuple[int, ...]], tuple[tuple[int, ...], bytes]]:
    return {(e.kind, e.name, e.start): (tuple(e.tensor.shape), e.tensor.contiguous().view(torch.uint8).numpy().tobytes()) for e in entries}


def saved_on_ranks(config: Config, folder: str) -> dict[str, Any]:
    """Train two steps, save, train one more; the path, this rank's state when it was saved, and the last loss."""
    from ltrain.checkpoint import save

    mesh = _mesh(config)
    try:
        engine = prepared_engine(config, mesh)
        for step in range(2):
            _train(engine, mesh, step)
        state = list(engine.state())
        path = save(Path(folder), 2, state, {}, mesh)
        held = bits(state)
        return {"path": path, "state": held, "next": _train(engine, mesh, 2)}
    finally:
        mesh.close()


def loaded_on_ranks(config: Config, path: Path) -> dict[str, Any]:
    """Load, and train one step: this rank's state as loaded, and the loss and norm of the step and of one more."""
    from ltrain.checkpoint import Checkpoint

    mesh = _mesh(config)
    try:
        engine = prepared_engine(replace(config, seed=5), mesh)
        with Checkpoint(path) as checkpoint:
            engine.load(checkpoint, 2)
        return {"state": bits(engine.state()), "next": _train(engine, mesh, 2)}
    finally:
        mesh.close()


def _train(engine: Any, mesh: Any, step: int) -> list[float]:
    """One step, and the held-out loss after it."""
    batches = step_batches(step)
    labels = sum(int((b.labels >= 0).sum()) for b in batches)
    mine = batches[mesh.data.rank() :: mesh.data.size()]
    loss = engine.forward_backward(mine, labels, MICRO_BATCHES)["loss"]
    norm = engine.step(1e-3)
    return [loss, norm, engine.evaluate(mine, labels, MICRO_BATCHES)]


@pytest.mark.parametrize(
    ("saves", "loads", "precision"),
    [
        ((0, Layout()), (3, Layout()), "fp32"),
        ((3, Layout()), (0, Layout()), "fp32"),
        ((1, Layout()), (2, Layout()), "bf16"),
        ((2, Layout()), (0, Layout()), "bf16"),
        ((0, Layout(tensor=2)), (1, Layout(context=2, expert=2)), "fp32"),
        ((3, Layout(tensor=2, expert=2)), (0, Layout(context=2)), "fp32"),
        ((0, Layout(expert=2)), (3, Layout(tensor=2)), "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}-{value[1]}",
)
def test_checkpoints_cross_engines(pool: Any, tmp_path: Path, saves: tuple[int, Layout], loads: tuple[int, Layout], precision: str) -> None:
    """Stage 0 is the Megatron engine. Masters, moments and biases come back bit by bit, and training goes on the same."""
    first = pool(2).run(saved_on_ranks, zero(saves[1], saves[0], precision=precision), str(tmp_path), timeout=120)
    second = pool(2).run(loaded_on_ranks, zero(loads[1], loads[0], precision=precision), first[0]["path"], timeout=120)
    tolerance = 1e-5 if precision == "fp32" else 1e-3
    for result in second:
        assert result["next"] == pytest.approx(first[0]["next"], rel=tolerance)
    assert whole(second) == whole(first)


def whole(results: list[dict[str, Any]]) -> dict[tuple[str, str], bytes]:
    """Every tensor of the state put together from the ranks' pieces, whatever these are."""
    import numpy as np

    pieces: dict[tuple[str, str], dict[tuple[int, ...], tuple[tuple[int, ...], bytes]]] = {}
    for result in results:
        for (kind, name, start), piece in result["state"].items():
            pieces.setdefault((kind, name), {})[start] = piece
    found = {}
    for key, parts in pieces.items():
        shape = [max(s[a] + p[0][a] for s, p in parts.items()) for a in range(len(next(iter(parts))))]
        full = np.zeros(shape, dtype=np.uint32)
        for start, (size, data) in parts.items():
            full[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = np.frombuffer(data, dtype=np.uint32).reshape(size)
        found[key] = full.tobytes()
    return found


def dropped_on_ranks(config: Config) -> dict[str, Any]:
    """A step whose gradients are not finite, and a backward that no step follows: the next is as if they had not been."""
    mesh = _mesh(config)
    try:
        engine = prepared_engine(config, mesh)
        before = bits(engine.state())
        batches = step_batches(0)
        labels = sum(int((b.labels >= 0).sum()) for b in batches)
        mine = batches[mesh.data.rank() :: mesh.data.size()]
        hook = engine.stack.layers["0"].register_forward_hook(lambda _, __, y: y * float("nan"))
        engine.forward_backward(mine, labels, MICRO_BATCHES)
        norm = engine.step(1e-3)
        named = engine.bad_gradients()
        hook.remove()
        for router in engine.routers:
            router.load.zero_()
        after = bits(engine.state())
        engine.forward_backward(mine, labels, MICRO_BATCHES)
        engine.forward_backward(mine, labels, MICRO_BATCHES)
        gradients = [(e.name, e.shape, e.start, e.tensor.clone()) for e in engine.gradients()]
        return {"norm": norm, "named": named, "same": before == after, "gradients": gradients}
    finally:
        mesh.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_are_not_finite_change_nothing(pool: Any, stage: int) -> None:
    results = pool(2).run(dropped_on_ranks, zero(Layout(), stage, "cpu" if stage == 2 else "none"), timeout=120)
    for result in results:
        assert not result["norm"] < float("inf")
        assert result["same"] and result["named"]
    error, name = worst(assemble(results), expected_gradients("fp32", True)[0])
    assert error < 1e-5, f"{name} is off by {error:.1e}"


def left_on_ranks(config: Config, close: bool) -> float:
    """Tensors that stay in memory after an engine has trained and is gone, as a share of its model."""
    import gc

    def alive() -> int:
        gc.collect()
        return _numel([t for t in gc.get_objects() if isinstance(t, torch.Tensor)])

    mesh = _mesh(config)
    try:
        before = alive()
        engine = prepared_engine(config, mesh)
        model = sum(shape.numel() for shape in engine.shapes.values())
        _train(engine, mesh, 0)
        if close:
            engine.close()
        del engine
        return (alive() - before) / model
    finally:
        mesh.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_closed_engine_leaves_the_memory(pool: Any, stage: int) -> None:
    """A run of several stages builds one engine after the other."""
    for left in pool(2).run(left_on_ranks, zero(Layout(), stage), True, timeout=120):
        assert left < 0.05
    if stage == 3:  # the measure sees what stays
        assert pool(2).run(left_on_ranks, zero(Layout(), stage), False, timeout=120)[0] > 1


def test_refusals() -> None:
    for change, sentence in (
        ({"parallel": ParallelConfig(pipeline=2)}, "parallel.pipeline=2 does not work with engine=deepspeed"),
        ({"precision": "fp64"}, "precision=fp64 does not work with engine=deepspeed"),
        ({"deepspeed": DeepSpeedConfig(zero=4)}, "deepspeed.zero is 4, expected 1, 2 or 3"),
        ({"engine": "megatron", "deepspeed": DeepSpeedConfig(zero=3)}, "deepspeed.zero=3 has no effect with engine=megatron"),
        ({"engine": "fsdp"}, "engine is 'fsdp', expected one of megatron, deepspeed"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            validate(replace(zero(Layout(), 1), **change))


def test_deepspeed_is_imported_for_its_own_engine_only() -> None:
    code = "import sys, ltrain.train.loop, ltrain.parallel.engines.megatron; print('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
