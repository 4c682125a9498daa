"""`ltrain bench kernels`: what it writes, that what it measures is right, and its floors against counts by hand. Times are not judged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltrain.plan import kernels
from ltrain.plan.kernels import Machine, bench, compared, implementations, main
from ltrain.plan.operators import Sizes, operators
from ltrain.plan.peers import PEERS, Peer
from ltrain.schema import ConfigError

SIZES = Sizes(heads=2, kv_heads=1, head_dim=8, window=20, selected=20, hidden=12, vocab=30, states=4, experts=3, inner=10)
CPU = torch.device("cpu")
FIGURES = ("forward_seconds", "forward_flops", "forward_of_floor", "seconds", "flops", "of_floor", "error")


def test_every_operator_is_measured_and_right(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHECKED", 70)
    results = main([], [9, 70], torch.float32, 1, SIZES, tmp_path)
    ours = [r for r in results if r["implementation"] == "ltrain"]
    assert [(r["operator"], r["tokens"]) for r in ours] == [(name, n) for name in operators(SIZES) for n in (9, 70)]
    for r in ours:
        assert all(math.isfinite(r[figure]) and r[figure] > 0 for figure in FIGURES), r
        assert r["error"] < 1e-5, r
        assert r["peak_bytes"] is None  # a CPU does not tell
    for r in results:
        assert r["implementation"] == "ltrain" or "reason" in r or r["error"] < 1e-5, r
    written = json.loads((tmp_path / "bench-kernels.json").read_text())
    assert written["results"] == results and written["packages"]["torch"].startswith("2.") and written["device"]
    assert written["sizes"]["vocab"] == 30 and written["measured_flops"] > 0 and written["measured_bytes_per_second"] > 0
    assert (tmp_path / "bench-kernels.png").stat().st_size > 10000
    printed = capsys.readouterr().out
    assert all(kernels.line(r) in printed for r in results)
    assert [line.split()[0] for line in kernels.table(ours).splitlines()[1:]] == [r["operator"] for r in ours]


def test_a_peer_that_breaks_says_why_and_one_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(x: dict[str, torch.Tensor], s: Sizes) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand much else")

    peers = [
        Peer("breaks", "torch", "torch", breaks),
        Peer("wrong", "torch", "torch", lambda x, s: x["x"] * x["weight"]),
        Peer("absent", "a_package_that_is_not_there", "absent", breaks),
    ]
    monkeypatch.setitem(PEERS, "norm", peers)
    kept: list[int] = []
    machine = Machine(CPU, 1e9, 1e9)
    results = bench(["norm"], [5], torch.float32, 1, SIZES, machine, log=lambda text: None, keep=lambda found: kept.append(len(found)))
    assert [r["implementation"] for r in results] == ["ltrain", "breaks", "wrong"] and kept == [1, 2, 3]
    assert results[1]["reason"] == "RuntimeError: no kernel for this" and kernels.line(results[1]).endswith(results[1]["reason"])
    assert results[0]["error"] < 1e-5 < 0.01 < results[2]["error"]


def test_an_operator_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = operators(SIZES)["window"]
    one = implementations("window", operators(SIZES._replace(window=21))["window"], SIZES)[0]
    assert compared(operator, one, torch.float32, CPU)["error"] > 1e-3


def test_floors_count_what_cannot_be_avoided() -> None:
    known = operators(SIZES)
    assert known["causal"].flops(50) == sum(4 * 2 * 8 * (t + 1) for t in range(50))
    assert known["window"].flops(50) == sum(4 * 2 * 8 * min(t + 1, 20) for t in range(50))
    assert known["dsa"].flops(50) == sum(2 * 16 * (36 + 32) * min(t + 1, 20) for t in range(50))
    assert known["dsa"].once(50) == sum(2 * 8 * 8 * (t + 1) for t in range(50))
    # NSA: a compressed block of 2 tokens ends at each but the first, blocks of 4 of which all are seen; MoBA: 7 whole blocks of 5 and its own
    assert known["nsa"].flops(50) == sum(4 * 8 * 8 * (max(t, 0) + t + 1) for t in range(50))
    assert known["nsa"].once(70) == sum(2 * 8 * 8 * t for t in range(64, 70))
    assert known["nsa_means"].flops(70) == sum(4 * 8 * 8 * ((t + 1) // 4 + min(t + 1, 60 + t % 4 + 1)) for t in range(70))
    assert known["moba"].flops(70) == sum(4 * 2 * 8 * min(t + 1, 35 + t % 5 + 1) for t in range(70))
    assert known["moba"].once(70) == sum(2 * 2 * 8 * (t // 5) for t in range(40, 70))
    assert known["cross_entropy"].flops(50) == 2 * 50 * 12 * 30
    # KV products: S q and k v^T, with the delta rule S k; of a chunk q k^T and scores v, with it k k^T, and k and v solved for
    assert known["gla"].flops(1) == 2 * (2 * 2 * 64 + 2 * 64 * 16) and known["kda"].flops(1) == 2 * (3 * 2 * 64 + 2 * 64 * 40)
    r = bench(["norm"], [5], torch.float32, 1, SIZES, Machine(CPU, 1e30, 1e9), log=lambda text: None)[0]
    x, weight = 5 * 12 * 4, 12 * 4
    assert r["forward_floor_seconds"] == pytest.approx((x + weight + x) / 1e9)
    assert r["floor_seconds"] == pytest.approx((3 * (x + weight) + 2 * x) / 1e9)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="lstm is neither a family nor an operator: write some of linear_recurrence,"):
        bench(["lstm"], [5], torch.float32, 1, SIZES, Machine(CPU, 1e9, 1e9))


def test_the_verb(tmp_path: Path) -> None:
    words = "bench kernels norm short_conv --tokens 20 --dtype fp32 --heads 2 --head-dim 8 --hidden 16 --steps 1 --out".split()
    done = subprocess.run([sys.executable, "-m", "ltrain", *words, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {r["operator"] for r in json.loads((tmp_path / "bench-kernels.json").read_text())["results"]} == {"norm", "short_conv"}
