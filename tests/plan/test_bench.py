"""`ltrain bench step` for real, on one rank and on two: what it writes, what it prints, and FLOPs against a count by hand."""

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from ltrain import data
from ltrain.config import Config, ParallelConfig, to_yaml
from ltrain.model.options import MoEOptions
from ltrain.plan.profile import SHOWN, _covered
from tests.parallel.pool import fork_server
from tests.train.runs import small

WARMUP, STEPS = 3, 10  # of the verb
TOKENS, TOKENS_PER_STEP, DEPTH = 128, 256, 2
HIDDEN, VOCAB = 16, 384  # bytes and the end of a document, rounded up to a multiple of 128


def _rank(words: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1")
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    from ltrain.cli import main

    main(words)


def bench(config: Config, tmp: Path, ranks: int = 1, *more: str) -> tuple[dict[str, Any], str]:
    """bench-step.json, and all that the ranks print."""
    file, log = tmp / "config.yaml", tmp / "log"
    file.write_text(to_yaml(config))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(fork_server().Process(target=_rank, args=(["bench", "step", str(file), *more], str(log), place if ranks > 1 else {})))
        processes[-1].start()
    for process in processes:
        process.join(90)
        if process.is_alive():
            for each in processes:
                each.kill()
            pytest.fail(f"no end after 90 s:\n{log.read_text()}")
    assert [p.exitcode for p in processes] == [0] * ranks, log.read_text()
    return json.loads((Path(config.run.dir) / "bench-step.json").read_text()), log.read_text()


def tiny(tmp: Path, kind: str, options: dict[str, Any], ffn: MoEOptions) -> Config:
    config = small(tmp)
    config.model.hidden, config.model.depth = HIDDEN, DEPTH
    config.model.pattern, config.model.layers, config.model.ffn = [kind], {kind: options}, ffn
    assert (config.data.tokens, config.train.tokens_per_step) == (TOKENS, TOKENS_PER_STEP)
    return config


def recurrent(tmp: Path) -> tuple[Config, float]:
    """Gated DeltaNet with a dense feed-forward, and the floating-point operations of a training step: the documents do not matter."""
    options = {"mixer": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 6, "conv_width": 4}
    config = tiny(tmp, "linear", options, MoEOptions(experts=0, inner=32))
    q = k = 2 * 8
    v = z = 4 * 6
    beta = decay = 4
    mixer = 2 * HIDDEN * (q + k + v + z + beta + decay) + 2 * v * HIDDEN  # projections in and out
    mixer += 2 * 4 * (q + k + v)  # convolution
    mixer += 3 * 2 * (4 * 8 * 6)  # look up, write and read a K x V state per value head
    ffn = 3 * 2 * HIDDEN * 32
    forward = DEPTH * (mixer + ffn) + 2 * HIDDEN * VOCAB
    return config, 3.0 * TOKENS_PER_STEP * forward


def attending(tmp: Path) -> tuple[Config, float]:
    """Attention with experts, and the floating-point operations of the mean measured step, by the documents' lengths."""
    config = tiny(
        tmp, "full", {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8}, MoEOptions(experts=4, top_k=2, inner=16, shared_inner=8)
    )
    q = gate = 4 * 8
    k = v = 2 * 8
    mixer = 2 * HIDDEN * (q + k + v + gate) + 2 * q * HIDDEN
    ffn = 2 * HIDDEN * 4 + 2 * (3 * 2 * HIDDEN * 16) + 3 * 2 * HIDDEN * 8  # router, two experts, the shared one
    per_token = DEPTH * (mixer + ffn) + 2 * HIDDEN * VOCAB
    share = TOKENS_PER_STEP // TOKENS
    pairs = 0
    with data.build(config.data, config.seed).loader() as loader:
        for number, batch in zip(range((WARMUP + STEPS) * share), loader, strict=False):
            if number >= WARMUP * share:
                pairs += sum(n * (n + 1) // 2 for n in batch.cu_seqlens.diff().tolist())  # a token sees itself and what is before it
    scores_and_values = DEPTH * (2 + 2) * q * pairs / STEPS
    return config, 3.0 * (TOKENS_PER_STEP * per_token + scores_and_values)


def check(result: dict[str, Any], flops: float, ranks: int) -> None:
    numbers = {name: value for name, value in result.items() if isinstance(value, (int, float))}
    for name in ("seconds_per_step", "tokens_per_second", "tflops_per_device", "mfu", "peak_flops", "peak_memory_bytes", "parameters_of_stage"):
        assert name in numbers
    assert all(math.isfinite(value) and value > 0 for value in numbers.values()), numbers
    assert all(0 < loss < 10 for loss in result["first_and_last_loss"])
    fastest, slowest = result["seconds_min_max"]
    assert 0 < fastest <= result["seconds_per_step"] <= slowest < 60
    assert result["ranks"] == ranks
    assert result["tokens_per_second"] == pytest.approx(TOKENS_PER_STEP / result["seconds_per_step"])
    assert result["tflops_per_device"] * 1e12 * result["seconds_per_step"] * ranks == pytest.approx(flops, rel=1e-9)
    assert result["mfu"] == pytest.approx(result["tflops_per_device"] * 1e12 / result["peak_flops"])
    assert result["peak_memory_bytes"] > 50e6  # torch alone is more


def test_one_rank(tmp_path: Path) -> None:
    config, flops = recurrent(tmp_path)
    result, printed = bench(config, tmp_path, 1, "--profile")
    check(result, flops, 1)
    rows = {line[:22].strip(): line[22:].strip() for line in printed.splitlines()}
    assert rows["precision"] == "fp32" and rows["tokens/s"] == f"{result['tokens_per_second']:,.0f}"
    assert f"{TOKENS_PER_STEP} tokens in streams of {TOKENS}" in rows["step"]
    assert {"device", "parameters (active)", "TFLOP/s per device", "MFU", "peak memory"} <= rows.keys()
    assert f"written to {Path(config.run.dir) / 'bench-step.json'}" in printed
    assert not (Path(config.run.dir) / "checkpoints").exists()  # a measurement is no run
    longest = result["profile"]["kernels"]
    assert [kernel["seconds"] for kernel in longest] == sorted((kernel["seconds"] for kernel in longest), reverse=True)
    assert sum(kernel["seconds"] for kernel in longest) == pytest.approx(result["profile"]["seconds"])
    assert {"aten::mm", "aten::_fused_adamw_"} <= {kernel["name"] for kernel in longest}  # forward and backward, and the update
    assert longest[0]["name"] in printed and f"{len(longest) - SHOWN} others" in printed
    trace = json.loads((Path(config.run.dir) / "profile-rank0.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_a_device_waits_where_no_kernel_runs() -> None:
    assert _covered([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (7.0, 8.0), (8.0, 10.0)]) == pytest.approx(0.8)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}], ids=["data", "tensor", "context", "pipeline"])
def test_two_ranks_share_the_same_operations(tmp_path: Path, layout: dict[str, int]) -> None:
    config, flops = attending(tmp_path)
    config.parallel = ParallelConfig(**layout)
    result, printed = bench(config, tmp_path, ranks=2)
    check(result, flops, 2)
    assert printed.count("TFLOP/s per device") == 1  # one rank speaks
