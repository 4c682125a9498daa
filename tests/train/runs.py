"""Small real runs in processes of their own, for tests that kill them."""

import json
import os
import traceback
from pathlib import Path
from typing import Any

from ltrain.config import CheckpointConfig, Config, EvalConfig, ModelConfig, RunConfig, TokenizerConfig, TrackingConfig, TrainConfig
from ltrain.model.options import MoEOptions
from tests.parallel.pool import fork_server


def texts(folder: Path, count: int = 24) -> str:
    """A glob of small text files with some structure to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        lines = [f"item {i} has {j} parts and costs {i * j % 17} coins" for j in range(5 + i % 7)]
        (folder / f"{i:02}.txt").write_text("\n".join(lines))
    return str(folder / "*.txt")


def small(tmp: Path, name: str = "run", steps: int = 12, **changes: Any) -> Config:
    """A hybrid MoE model of a few thousand parameters on text files."""
    model = ModelConfig(
        hidden=16,
        depth=2,
        pattern=["linear", "full"],
        layers={
            "linear": {"mixer": "gated_delta_net", "key_heads": 2, "value_heads": 2, "key_dim": 8, "value_dim": 8},
            "full": {"mixer": "attention", "heads": 2, "kv_heads": 2, "head_dim": 8},
        },
        ffn=MoEOptions(experts=4, top_k=2, inner=16, shared_inner=16),
    )
    config = Config(model=model, run=RunConfig(dir=str(tmp / name), sample_tokens=0))
    config.data.source, config.data.files = "text", [texts(tmp / "texts")]
    config.data.tokens, config.data.shards, config.data.workers = 128, 4, 0
    config.data.tokenizer = TokenizerConfig(kind="bytes")
    config.train = TrainConfig(steps=steps, tokens_per_step=256, warmup_steps=2)
    config.eval = EvalConfig(every=0, tokens=256)
    config.checkpoint = CheckpointConfig(every=2, keep=2)
    config.tracking = TrackingConfig(enabled=False)
    for key, value in changes.items():
        part, _, field = key.partition("__")
        setattr(getattr(config, part) if field else config, field or part, value)
    return config


def _main(config: Config, log: str) -> None:
    os.environ.update(OMP_NUM_THREADS="1")
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    from ltrain.train.loop import train

    try:
        train(config)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def start(config: Config, log: Path) -> Any:
    """The run in a new process of the session's fork server, whose imports are done."""
    process = fork_server().Process(target=_main, args=(config, str(log)))
    process.start()
    return process


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
