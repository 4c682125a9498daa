"""Greedy decoding of attention that chooses among keys of all context ranks, against one rank; and what travels for a token."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.config import Config, ModelConfig
from ltrain.model.options import MoEOptions
from ltrain.model.sequence import Sequence
from tests.parallel.parity import VOCAB, Layout, Reference, config

STEPS = 40
PROMPTS = [301, 97, 2, 48]  # fill every layout, so that no document is added to them; cut inside blocks, and within reach of blocks that are cut
SHORT = [101, 37, 2, 20]
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 8}
# many index heads: few would often give two keys the score 0, of which either may be chosen
LATENT = {"mixer": "mla", "heads": 4, "q_rank": 10, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 6, "top_k": 24}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "dsa": [{**LATENT, "select": "index", "index_heads": 16, "index_dim": 6}, {**LATENT, "select": "shared"}],
    "moba": [{"mixer": "attention", **HEADS, "block_size": 12, "top_blocks": 4}] * 2,
    "msa": [{"mixer": "attention", **HEADS, "block_size": 12, "top_blocks": 4, "local_blocks": 2, "block_score": "index", "index_dim": 8}] * 2,
    "nsa": [{"mixer": "nsa", **HEADS, "compressed": 8, "stride": 4, "block_size": 16, "top_blocks": 5, "window": 20}] * 2,
}
# numbers of a document that each rank sends for a decoded token of both layers: outputs with a log-sum-exp for each head, and scores with their keys
# or blocks; of all heads, which tensor ranks divide, and in DSA of the indexer that each of them has whole
MERGED = {"dsa": 2 * 4 * (12 + 1), "moba": 2 * 4 * (8 + 1), "msa": 2 * 4 * (8 + 1), "nsa": 2 * 3 * 4 * (8 + 1)}
CHOSEN = {"dsa": 24 * 2, "moba": 2 * 4 * 3 * 2, "msa": 2 * 2 * 2 * 2, "nsa": 2 * 2 * 2 * 2}


def settings(name: str, layout: Layout) -> Config:
    layers = {f"layer_{i}": layer for i, layer in enumerate(LAYERS[name])}
    model = ModelConfig(
        hidden=32, depth=2, pattern=list(layers), layers=layers, ffn=MoEOptions(experts=0, inner=32), init_std=0.3, tie_embeddings=False
    )
    return config(layout, "fp64", model)


def documents(prompts: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in prompts]


@cache
def greedy(name: str) -> tuple[Tensor, Tensor]:
    """On one rank, by a forward of what has been decoded: logits [STEPS + 1, N, vocab] and what they choose [STEPS + 1, N]."""
    stack = Reference(settings(name, Layout())).stack.eval()
    flat = torch.tensor([token for ids in documents(PROMPTS) for token in ids])
    with torch.no_grad():
        logits, state = stack.prefill(flat, Sequence.of(PROMPTS))
        steps = [logits]
        for i in range(STEPS):
            logits, state = stack.decode(steps[-1].argmax(-1), state, Sequence.step(torch.tensor(PROMPTS) + i))
            steps.append(logits)
        decoded = torch.stack(steps)
        tokens = decoded.argmax(-1)
        for n, ids in enumerate(documents(PROMPTS)):
            whole = torch.tensor([*ids, *tokens[:-1, n].tolist()])
            found = stack.logits(stack(whole, Sequence.of([len(whole)])))[-STEPS - 1 :]
            torch.testing.assert_close(decoded[:, n], found, rtol=1e-9, atol=1e-9)
    return decoded, tokens


def on_rank(layout: Layout, runs: list[tuple[str, list[int], int]]) -> list[tuple[Tensor, Tensor, dict[str, int]]]:
    """On this rank of a pool, for each model, prompts and number of steps: logits, tokens, and the bytes that decoding sent."""
    from ltrain.parallel import cpu
    from ltrain.parallel.engines.megatron import MegatronEngine
    from ltrain.parallel.inference import Inference
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    mesh = Mesh(settings("dsa", layout).parallel, torch.device("cpu"))
    found = []
    try:
        models: dict[str, Any] = {}
        for name, prompts, steps in runs:
            if name not in models:
                models[name] = MegatronEngine(settings(name, layout), VOCAB, mesh)
                models[name].stage.eval()
            inference, sent = Inference(models[name].stage, VOCAB), models[name].stage.exchange.bytes
            logits, decoding = inference.prefill(documents(prompts), steps // 2)  # caches grow once
            sent.clear()
            all_logits = [logits]
            for _ in range(steps):
                all_logits.append(decoding.step(inference.likeliest(all_logits[-1])))
            decoded = torch.stack(all_logits)
            found.append((decoded, inference.likeliest(decoded), dict(sent)))
        return found
    finally:
        mesh.close()


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, Layout(context=2, context_layout="contiguous")), (4, Layout(context=4)), (4, Layout(tensor=2, context=2, context_layout="balanced"))],
    ids=str,
)
def test_greedy_decoding_chooses_among_the_keys_of_all_ranks(pool: Any, world: int, layout: Layout) -> None:
    runs = [(name, PROMPTS, STEPS) for name in LAYERS] + [(name, SHORT, 2) for name in LAYERS]
    results = pool(world).run(on_rank, layout, runs, timeout=240)
    for i, name in enumerate(LAYERS):
        logits, tokens = greedy(name)
        numbers = {"decode": MERGED[name] // layout.tensor, "choice": CHOSEN[name] // (1 if name == "dsa" else layout.tensor)}
        for result in results:
            assert torch.equal(result[i][1], tokens), name
            error = float((result[i][0] - logits).square().mean().sqrt() / logits.square().mean().sqrt())
            assert error < 1e-9, (name, error)
            for number, steps in ((i, STEPS), (i + len(LAYERS), 2)):  # of long documents and of short ones alike
                assert result[number][2] == {kind: 8 * n * len(PROMPTS) * steps for kind, n in numbers.items()}, (name, steps)
