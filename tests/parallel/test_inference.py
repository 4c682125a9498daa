"""Prefill, decoding and scores on every layout against a full forward on one device."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.model.sequence import Sequence
from tests.parallel.parity import VOCAB, Layout, Reference, config, prepare

ROOM = 9
PROMPTS = [37, 1, 70, 2, 5]  # tokens: over the cuts of every layout, shorter than the convolution, and no multiple of anything
CASES = [
    (1, Layout()),
    (2, Layout(tensor=2)),
    (2, Layout(context=2)),
    (4, Layout(context=4)),
    (4, Layout(context=4, context_layout="contiguous", expert=2)),
    (4, Layout(tensor=2, context=2)),
    (4, Layout(tensor=2, context=2, expert=4)),
]
PIPELINES = [(2, Layout(pipeline=2)), (4, Layout(pipeline=2, tensor=2)), (4, Layout(pipeline=2, context=2, tie=False))]
IDS = [f"{world}-{layout}" for world, layout in CASES]


def documents(prompts: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCAB, (n + ROOM,), generator=generator).tolist() for n in prompts]


def on_rank(layout: Layout, prompts: list[int], precision: str = "fp64", device: str = "cpu") -> dict[str, Any]:
    """Forced decoding and scores on this rank of a pool, and the bytes that it sent."""
    import torch.distributed as dist

    from ltrain.parallel import cpu
    from ltrain.parallel.engines.megatron import MegatronEngine
    from ltrain.parallel.inference import Inference
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    settings = config(layout, precision)
    mesh = Mesh(settings.parallel, torch.device(device, dist.get_rank()) if device == "cuda" else torch.device("cpu"))
    try:
        engine = MegatronEngine(settings, VOCAB, mesh)
        prepare(engine.stack)
        engine.stage.eval()
        inference = Inference(engine.stage, VOCAB - 24)
        whole, out = documents(prompts), {}
        sent = engine.stage.exchange.bytes
        if inference.decodes:
            logits, decoding = inference.prefill([ids[:-ROOM] for ids in whole], ROOM)
            assert len(logits) == len(prompts)  # what filled the stream up is gone
            out["prefill"] = dict(sent)
            sent.clear()
            steps = [logits]
            for i in range(ROOM):
                steps.append(decoding.step(torch.tensor([ids[len(ids) - ROOM + i] for ids in whole], device=mesh.device)))
            out["logits"], out["decode"] = torch.stack(steps).cpu(), dict(sent)
        scores = inference.score(whole)
        out["loss"], out["right"] = [s.loss for s in scores], [s.right for s in scores]
        out["last"] = [s.loss for s in inference.score(whole, last=[ROOM] * len(whole))]
        return out
    finally:
        mesh.close()


@cache
def expected(tie: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Of each document: logits after every token, and the loss of every token but the first."""
    stack = Reference(config(Layout(tie=tie), "fp64")).stack.eval()
    logits, losses = [], []
    with torch.no_grad():
        for ids in documents(PROMPTS):
            tokens = torch.tensor(ids)
            logits.append(stack.logits(stack(tokens, Sequence.of([len(ids)]))))
            losses.append(torch.nn.functional.cross_entropy(logits[-1][:-1], tokens[1:], reduction="none"))
    return logits, losses


def check_scores(result: dict[str, Any], tie: bool) -> None:
    logits, losses = expected(tie)
    for found, right, last, want, whole, ids in zip(result["loss"], result["right"], result["last"], losses, logits, documents(PROMPTS), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(last[-ROOM:], want[-ROOM:], rtol=1e-10, atol=1e-10)
        assert last[:-ROOM].eq(0).all()
        assert right.tolist() == (whole[:-1, : VOCAB - 24].argmax(-1) == torch.tensor(ids[1:])).tolist()


@pytest.mark.parametrize(("world", "layout"), CASES, ids=IDS)
def test_decoding_is_the_full_forward(pool: Any, world: int, layout: Layout) -> None:
    logits, _ = expected()
    for result in pool(world).run(on_rank, layout, PROMPTS):
        for row, whole in enumerate(logits):
            torch.testing.assert_close(result["logits"][:, row], whole[-ROOM - 1 :], rtol=1e-10, atol=1e-10)
        check_scores(result, True)


@pytest.mark.parametrize(("world", "layout"), PIPELINES, ids=str)
def test_scores_of_pipelines_are_those_of_the_full_forward(pool: Any, world: int, layout: Layout) -> None:
    for result in pool(world).run(on_rank, layout, PROMPTS):
        assert "logits" not in result
        check_scores(result, layout.tie)


def test_decoding_over_context_ranks_moves_outputs_and_no_keys(pool: Any) -> None:
    """float64: 8 bytes. One attention layer of 8 heads of 8, three recurrent ones of 8 heads of 8 x 12 after a convolution of width 4."""
    for result in pool(4).run(on_rank, Layout(context=4), [1000]):
        assert result["decode"] == {"decode": ROOM * 8 * 1 * 8 * (8 + 1)}
        assert result["prefill"]["state"] == 3 * 8 * 8 * 8 * 12
        assert result["prefill"]["last"] == 3 * 8 * 3 * (4 * 8 * 2 + 8 * 12)
        # what the forward moves, and no more: each rank's K and V once to each other rank at most
        assert set(result["prefill"]) == {"ring", "halo", "scan", "state", "last"}
        assert result["prefill"]["ring"] <= 3 * (1008 // 4) * 4 * 8 * 2 * 8
