"""`ltrain bench context-parallel --simulate`: ranks that are not there send what real ones send, and a network takes the time that it must."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.config import ConfigError, load
from ltrain.kernels.attention import Pair
from ltrain.model.sequence import Sequence
from ltrain.parallel.context import ring
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.trace import FREE, Batch, Event, Network, Trace, replay
from ltrain.plan import simulate
from ltrain.plan.context_parallel import DOCUMENTS, Sizes, as_leaves, both, inputs, lengths, operators
from ltrain.plan.simulate import Cut, Layer, check, expected, extrapolated, layers_of_config, layers_of_operators, record, total, traced_ranks

TOKENS = 96
SIZES = Sizes(heads=4, kv_heads=2, head_dim=8, window=20, latent=12, rope=4, states=4)
SLOW = Network(inside=1e6, across=1e5, per_node=2, latency=1e-5)
CPU = torch.device("cpu")


def layers() -> list[Layer]:
    """Every operator, and two whole blocks."""
    return layers_of_operators(list(operators(SIZES)), SIZES) + layers_of_config(load("configs/quickstart.yaml", []), torch.float32, CPU)


def sent_on_rank(cut: Cut) -> dict[str, Any]:
    """On every rank of a pool: what it sends in a forward and a backward, by layer, stream and kind of exchange."""
    import torch.distributed as dist

    from ltrain.config import ParallelConfig
    from ltrain.parallel import cpu
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    size = dist.get_world_size()
    mesh = Mesh(ParallelConfig(context=size, ulysses=cut.ulysses, inner_ring=cut.inner_ring), CPU)
    try:
        layout = cut.layout(TOKENS, size, mesh.context.rank())
        exchange = ContextExchange(layout, mesh.exchange, ulysses=mesh.ulysses, nodes=mesh.nodes)
        found = {}
        for number, layer in enumerate(layers()):
            for stream in DOCUMENTS:
                whole = Sequence.of(lengths(stream, TOKENS))
                exchange.bytes.clear()
                leaves = as_leaves(inputs(layer.shapes, layer.whole, layout.local_tokens, torch.float32, CPU))
                both(layer.run, leaves, exchange.sequence(whole.cu_seqlens, whole.positions), layer.weights)
                found[f"{number} {stream}"] = {kind: n for kind, n in exchange.bytes.items() if n}
        return found
    finally:
        mesh.close()


@pytest.mark.parametrize(
    ("size", "cut"),
    [
        (2, Cut()),
        (2, Cut("contiguous")),
        (2, Cut("balanced", ulysses=2)),
        (4, Cut()),
        (4, Cut("balanced")),
        (4, Cut("zigzag", ulysses=2)),
        (4, Cut("contiguous", inner_ring=2)),
    ],
)
def test_each_rank_of_a_simulation_sends_what_a_real_one_counts(pool: Any, monkeypatch: pytest.MonkeyPatch, size: int, cut: Cut) -> None:
    monkeypatch.setattr(simulate, "WARM_UP", 0)  # times are not judged, and what is sent is the same each time
    counted = pool(size).run(sent_on_rank, cut, timeout=240)
    for number, layer in enumerate(layers()):
        for stream in DOCUMENTS:
            documents = lengths(stream, TOKENS)
            layout = cut.layout(TOKENS, size).of(Sequence.of(documents).cu_seqlens)
            traces = [record(layer, replace(layout, rank=rank), cut, documents, torch.float32, CPU, 1) for rank in range(size)]
            for trace in traces:
                assert trace.bytes == counted[trace.rank][f"{number} {stream}"], (layer.name, stream, trace.rank)
            # and what one says it sends, the other says it receives
            ways: tuple[Counter[tuple[int, int]], ...] = Counter(), Counter()
            for trace in traces:
                for batch in trace.batches:
                    ways[0].update({(trace.rank, peer): n for peer, n in batch.sent.items()})
                    ways[1].update({(peer, trace.rank): n for peer, n in batch.received.items()})
            assert ways[0] == ways[1] and sum(ways[0].values()) == sum(sum(trace.bytes.values()) for trace in traces)
            assert expected(traces, SLOW)["seconds"] >= expected(traces, FREE)["seconds"] > 0


class PairClock:
    """Stands still but while attention computes: one second for each query that sees a key, forward and again in the backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        for name in ("forward_pairs", "backward_pairs"):
            monkeypatch.setattr(ring, name, self._counting(getattr(ring, name)))

    def _counting(self, compute: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            pairs: list[Pair] = next(x for x in args if isinstance(x, list))
            for p in pairs:
                self.now += p.q_len * (p.k_len - p.q_len) + p.q_len * (p.q_len + 1) / 2 if p.causal else p.q_len * p.k_len
            return compute(*args, **kwargs)

        return counted


@pytest.mark.parametrize("size", [2, 4, 8])
def test_balanced_masks_lose_nothing_but_to_the_network(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    clock = PairClock(monkeypatch)
    (layer,) = layers_of_operators(["attention"], SIZES)
    one = TOKENS * (TOKENS + 1)  # forward and backward

    def efficiency(network: Network, kind: str) -> float:
        layout = ContextLayout(TOKENS, 0, size, kind)
        traces = [record(layer, replace(layout, rank=r), Cut(kind), [TOKENS], torch.float32, CPU, 1, now=lambda: clock.now) for r in range(size)]
        found = expected(traces, network)
        assert found["seconds_of_computing"] + found["seconds_exposed"] == pytest.approx(found["seconds"])
        return float(one / found["seconds"] / size)

    # a rank's step takes some hundred of these seconds: so fast a network hides behind it, a slower one does not
    assert efficiency(FREE, "zigzag") == pytest.approx(1.0)
    assert efficiency(FREE, "contiguous") == pytest.approx((TOKENS + 1) / 2 * TOKENS / size / sum(range(TOKENS - TOKENS // size + 1, TOKENS + 1)))
    rates = [efficiency(Network(rate, rate, size, 1e-3), "zigzag") for rate in (1000.0, 100.0, 10.0)]
    assert 1 > rates[0] > rates[1] > rates[2] > 0, rates
    assert efficiency(Network(1000.0, 10.0, max(size // 2, 1), 1e-3), "zigzag") < rates[0]  # links between nodes are slow


def of(rank: int, *events: tuple[float, int | None, bool], sent: int = 10, received: int = 10, batches: int = 1) -> Trace:
    """Of two ranks that exchange 10 bytes."""
    between = [Batch("all", "ring", n, {1 - rank: sent}, {1 - rank: received}) for n in range(batches)]
    return Trace(rank, between, [Event(*event) for event in events], {"ring": sent * batches})


def test_what_overlaps_is_hidden_and_what_does_not_is_waited_for() -> None:
    network = Network(inside=10.0, across=1.0, per_node=2, latency=0.5)
    hidden = [of(r, (1.0, 0, True), (3.0, 0, False), (1.0, None, False)) for r in range(2)]
    assert replay(hidden, network) == [5.0, 5.0]
    exposed = [of(r, (1.0, 0, True), (1.0, 0, False), (1.0, None, False)) for r in range(2)]
    assert replay(exposed, network) == [1 + 1.5 + 1] * 2
    assert replay(exposed, network._replace(per_node=1)) == [1 + 10.5 + 1] * 2  # they are on two nodes
    late = [exposed[0], of(1, (4.0, 0, True), (1.0, 0, False), (0.0, None, False))]
    assert replay(late, network) == [4 + 1.5 + 1, 4 + 1.5]  # the first rank waits for the second to post
    alone = replay(late[:1], network)  # one that was not traced is as far as this one
    assert alone == [1 + 1.5 + 1]
    two = [of(r, (0.0, 0, True), (0.0, 1, True), (0.0, 0, False), (0.0, 1, False), (0.0, None, False), batches=2) for r in range(2)]
    assert replay(two, network) == [3.0, 3.0]  # one batch behind the other
    uneven = [of(r, (0.0, 0, True), (0.0, 0, False), (0.0, None, False), sent=20 if r else 5, received=5 if r else 20) for r in range(2)]
    assert replay(uneven, network) == [2.5, 2.5]
    assert replay(uneven, FREE) == [0.0, 0.0]


def test_of_many_ranks_those_are_traced_that_may_be_slowest() -> None:
    def traced(kind: str, documents: list[int], size: int) -> list[int]:
        cu_seqlens = Sequence.of(documents).cu_seqlens
        return traced_ranks(ContextLayout(sum(documents), 0, size, kind).of(cu_seqlens), cu_seqlens)

    assert traced("contiguous", [1 << 20], 8) == list(range(8))
    assert traced("contiguous", [1 << 20], 512) == [0, 256, 511]
    assert traced("zigzag", [1 << 19, 1 << 19], 64) == [0, 32, 63]
    assert traced("contiguous", [300, 500, 224], 64) == [0, 32, 49, 63]  # 16 tokens each: the longest document ends on the 50th
    assert traced("contiguous", [600, 424], 64) == [0, 32, 36, 37, 63]  # 37 holds the end of one and the beginning of the next
    assert len(traced("balanced", lengths("long", 1 << 14), 64)) >= 3


def test_longer_streams_cost_what_their_documents_do() -> None:
    grows, flat = layers_of_operators(["attention", "kda"], SIZES)
    quadratic = {n: 3.0 * n + 2.0 * n**2 for n in (100, 400)}
    assert extrapolated(grows, quadratic, [1600, 50]) == pytest.approx(3 * 1650 + 2 * (1600**2 + 50**2))
    assert extrapolated(flat, {100: 5.0, 400: 30.0}, [1000, 600]) == pytest.approx(120.0)
    assert extrapolated(grows, {100: 5.0, 400: 16.0}, [1600]) == pytest.approx(64.0)  # a start-up cost is none of the tokens'
    rows = [
        {"stream": "one", "tokens": 8, "ranks": 4, "layer": layer.name, "layers": n, "seconds_on_one_rank": 8.0, "seconds": 2.0 * n}
        | dict.fromkeys(("seconds_of_computing", "seconds_exposed", "bytes_sent_by_a_rank"), 1)
        for layer, n in ((grows, 1), (flat, 3))
    ]
    assert total(rows)["efficiency"] == pytest.approx((8 + 24) / 4 / (2 + 18)) and total(rows)["layers"] == 4


def simulated(folder: str) -> list[dict[str, Any]]:
    import argparse

    import torch.distributed as dist

    from ltrain.config import ParallelConfig
    from ltrain.parallel import cpu
    from ltrain.parallel.mesh import Mesh
    from ltrain.plan.simulate import main

    cpu.install()
    mesh = Mesh(ParallelConfig(context=dist.get_world_size()), CPU)
    try:
        args = argparse.Namespace(layout="zigzag", ulysses=1, inner_ring=1, inside=300.0, across=50.0, per_node=8, latency=30.0, config=None)
        vars(args).update(operators=["kda", "kda", "attention"], documents=["one"], tokens=[256], ranks=[4, 64], longest=64, steps=1, out=folder)
        main(args, SIZES, torch.float32, mesh)
        return list(json.loads(Path(folder, "simulate-context-parallel.json").read_text())["results"]) if mesh.rank == 0 else []
    finally:
        mesh.close()


def test_two_ranks_are_measured_beside_what_is_said_of_them(pool: Any, tmp_path: Path) -> None:
    rows = pool(2).run(simulated, str(tmp_path), timeout=120)[0]
    assert [(r["layer"], r["tokens"], r["ranks"]) for r in rows] == [
        (layer, tokens, ranks) for tokens, ranks in ((64, 2), (256, 4), (256, 64)) for layer in ("kda", "attention", "all layers")
    ]
    for r in rows:
        assert (r["ranks"] == 2) == ("seconds_measured" in r) and r["efficiency"] > 0
        if "seconds_measured" in r:
            assert r["predicted_over_measured"] == pytest.approx(r["seconds"] / r["seconds_measured"])
    assert rows[0]["seconds_on_one_rank"] < rows[3]["seconds_on_one_rank"]  # of the 64 tokens that are measured, and of all
    assert rows[2]["seconds_measured"] == pytest.approx(2 * rows[0]["seconds_measured"] + rows[1]["seconds_measured"])


def test_the_command_says_what_it_assumes_and_refuses_what_does_not_divide(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ltrain", "bench", "context-parallel", "--simulate", "--out", str(tmp_path), "--steps", "1", "--dtype", "fp32"]
    words += ["--config", "configs/quickstart.yaml", "--tokens", "512", "--longest", "64", "--ranks"]
    done = subprocess.run([*words, "4,16"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "simulate-context-parallel.json").read_text())
    assert written["hybrid"] == {"gated_delta_net": 3, "attention": 1} and written["network"]["inside"] == 300e9
    assert all(f"- {line}" in done.stdout for line in written["assumptions"]) and "50 GB/s across" in done.stdout
    refused = subprocess.run([*words, "3"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.strip().splitlines()[-1].startswith("ltrain: --ranks 3 and --tokens 512: ")
    some = layers_of_operators(["attention"], SIZES)
    with pytest.raises(ConfigError, match="--ulysses 3 does not divide the 4 heads"):
        check(some, Cut(ulysses=3), [3], [18], 64)
    with pytest.raises(ConfigError, match="--ranks 6 do not divide into groups of 4"):
        check(some, Cut(ulysses=2, inner_ring=2), [6], [36], 64)
    with pytest.raises(ConfigError, match="--longest 15 is too short to be timed: write at least 16 tokens"):
        check(some, Cut(), [2], [36], 15, here=8)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--per-node", "4"], "--per-node has no effect without --simulate"),
        (["--config", "configs/quickstart.yaml"], "--config has no effect without --simulate"),
        (["--simulate", "--config", "configs/quickstart.yaml", "--operators", "kda"], "--operators and --config both name the layers"),
    ],
)
def test_options_without_effect_are_refused(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ltrain.cli import main as cli

    with pytest.raises(SystemExit) as ended:
        cli(["bench", "context-parallel", *words])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
