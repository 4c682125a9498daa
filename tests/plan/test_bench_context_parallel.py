"""`ltrain bench context-parallel`: what it says must travel is what travels."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ltrain.kernels.attention import Mask
from ltrain.model.mixers.base import ExchangeNeed
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.needs import sent_bytes
from ltrain.parallel.context.peers import rounded
from ltrain.plan.context_parallel import lengths, table

TOKENS = 96


def on_rank(size: int, kind: str, folder: str) -> list[dict[str, Any]]:
    import torch

    from ltrain.config import ParallelConfig
    from ltrain.parallel import cpu
    from ltrain.parallel.mesh import Mesh
    from ltrain.plan.context_parallel import DOCUMENTS, Sizes, bench, operators

    cpu.install()
    mesh = Mesh(ParallelConfig(context=size), torch.device("cpu"))
    try:
        sizes = Sizes(heads=4, kv_heads=2, head_dim=8, window=20, latent=12, rope=4, states=4)
        return bench(list(operators(sizes)), list(DOCUMENTS), [TOKENS], kind, torch.float32, 1, sizes, mesh, Path(folder))
    finally:
        mesh.close()


@pytest.mark.parametrize(("size", "kind"), [(2, "zigzag"), (3, "contiguous"), (4, "balanced"), (8, "zigzag")])
def test_every_operator_sends_what_its_reach_asks_for(pool: Any, tmp_path: Path, size: int, kind: str) -> None:
    results = pool(size).run(on_rank, size, kind, str(tmp_path), timeout=120)
    assert results[0] == results[-1]  # all ranks tell the same
    for r in results[0]:
        assert r["forward_bytes"] == r["forward_bytes_expected"], r
        assert r["stream"] != "one" or r["forward_bytes"] > 0, r
        assert r["seconds"] > 0 and r["efficiency"] > 0 and r["peers"] == []  # these are for GPUs
    elsewhere = {r["operator"]: r["forward_bytes_elsewhere"] for r in results[0] if r["stream"] == "one"}
    assert elsewhere["attention"] == elsewhere["window"] == TOKENS * (size - 1) * 2 * 2 * 8 * 4
    assert elsewhere["mla"] == TOKENS * (size - 1) * 4 * (8 + 4 + 8) * 4  # keys with their rotated part and values of every head
    assert elsewhere["kda"] == TOKENS * (size - 1) * (5 * 4 * 8 + 4) * 4 // size  # q, k, v, decay, the output, and beta
    assert elsewhere["short_conv"] is elsewhere["dsa"] is None
    written = json.loads((tmp_path / "bench-context-parallel.json").read_text())
    assert written["results"] == results[0] and written["sizes"]["heads"] == 4
    assert (tmp_path / "bench-context-parallel.png").stat().st_size > 1000


def divided(size: int, ulysses: int, kind: str, half: bool) -> list[dict[str, Any]]:
    import torch

    from ltrain.config import ParallelConfig
    from ltrain.parallel import cpu
    from ltrain.parallel.mesh import Mesh
    from ltrain.plan.context_parallel import DOCUMENTS, Sizes, bench

    cpu.install()
    mesh = Mesh(ParallelConfig(context=size, ulysses=ulysses), torch.device("cpu"))
    try:
        sizes = Sizes(heads=4, kv_heads=2, head_dim=8, window=20, latent=12, rope=4, states=4)
        dtype = torch.bfloat16 if half else torch.float32
        return bench(["attention", "window", "mla", "delta_net"][: 3 if half else 4], list(DOCUMENTS), [TOKENS], kind, dtype, 1, sizes, mesh)
    finally:
        mesh.close()


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    ("size", "ulysses", "kind"), [(3, 1, "zigzag"), (2, 2, "zigzag"), (4, 2, "zigzag"), (4, 4, "contiguous"), (4, 2, "balanced")]
)
def test_divided_heads_send_what_the_formula_says(pool: Any, size: int, ulysses: int, kind: str, half: bool) -> None:
    results = pool(size).run(divided, size, ulysses, kind, half, timeout=120)
    for r in results[0]:
        assert r["forward_bytes"] == r["forward_bytes_expected"], r
        assert r["operator"] == "delta_net" or (r["ulysses"] == ulysses and r["backward_bytes"] == r["backward_bytes_expected"]), r


def test_the_formula_knows_where_documents_end() -> None:
    def rows(documents: list[int], reach: int = 0) -> int:
        return sent_bytes(ExchangeNeed("ring", 1, Mask(window=reach)), ContextLayout(40, 0, 2, "contiguous"), documents, 1)

    assert rows([40]) == 20 and rows([20, 20]) == 0 and rows([15, 25]) == 5 and rows([40], reach=4) == 3 and rows([19, 21], reach=4) == 1
    states = [
        sent_bytes(ExchangeNeed("scan", 7, map=5), ContextLayout(40, 0, 4, "contiguous"), documents, 4) for documents in ([40], [10] * 4, [15, 25])
    ]
    # To each later rank what an earlier one ends with, and where the document came in there, how that is passed on.
    assert states == [4 * (3 * 7 + 2 * 12 + 12), 0, 4 * (7 + 2 * 7 + 12)]


def test_streams_have_the_documents_that_their_names_promise() -> None:
    assert lengths("one", 131072) == [131072]
    long, short = lengths("long", 131072), lengths("short", 131072)
    assert len(long) == 10 and sum(long) == sum(short) == 131072 and max(long) <= 0.46 * 131072
    assert 40 < len(short) < 70 and max(short) <= 8192 and min(short[:-1]) >= 256


def test_what_does_not_exist_is_refused_in_one_sentence(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ltrain", "bench", "context-parallel", "--out", str(tmp_path), "--operators", "attention,lstm"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("ltrain: --operators lstm is not known: write some of attention,window,mla,")


def test_peers_stand_below_what_they_are_beside() -> None:
    ours = dict.fromkeys(("seconds_on_one_rank", "seconds", "seconds_of_computing", "seconds_exposed", "efficiency"), 0.5)
    bytes_ = {"forward_bytes": 1, "forward_bytes_expected": 1, "forward_bytes_elsewhere": None}
    timed = {"implementation": "fla", "version": "0.6.0", "seconds_on_one_rank": 0.5, "seconds": 0.25, "efficiency": 0.999}
    refused = {"implementation": "Transformer Engine", "version": "2.20", "error": "ValueError: no such mask"}
    lines = table([{"operator": "kda", "tokens": 96, "documents": 1, **ours, **bytes_, "peers": [timed, refused]}]).splitlines()
    assert lines[2].split() == ["fla", "0.6.0", "500.00", "250.00", "99.9%"] and lines[3].endswith("2.20: ValueError: no such mask")
    assert rounded([100, 7, 8, 0, 31], 4) == [96, 8, 24]
