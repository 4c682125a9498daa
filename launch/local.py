"""`ltrain launch local`: the ranks of one machine."""

import sys
from collections.abc import Sequence

from ltrain.config import Config, ConfigError, load, validate
from ltrain.launch.ranks import STOPPED, run

REFUSED, INTERRUPTED = 2, 130


def checked(path: str, overrides: Sequence[str], ranks: int, gpus: bool) -> tuple[Config, list[str]]:
    """The config, valid for so many ranks, and the override that puts them where they were asked for."""
    device = "cuda" if gpus else "cpu"
    config = load(path, overrides)
    if config.device not in ("auto", device):
        asked = (
            "GPUs are asked for: leave device out, or ask for ranks"
            if gpus
            else "ranks without GPUs are asked for: leave device out, or ask for GPUs"
        )
        raise ConfigError(f"device={config.device}, but {asked}")
    config.device = device
    validate(config, ranks)
    return config, [f"device={device}"]


def launch(path: str, overrides: Sequence[str], ranks: int, gpus: bool, max_restarts: int = 0) -> int:
    """Train the config on `ranks` ranks, one GPU each or on the CPU, and return the exit code (see ranks.py).

    A run whose ranks fail is taken up from its newest checkpoint, at most `max_restarts` times; one that was refused or stopped is not.
    """
    _, place = checked(path, overrides, ranks, gpus)
    command = [sys.executable, "-m", "ltrain", "train", path, *overrides, *place]
    environment = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    for restarts in range(max_restarts + 1):
        end = run([*command, "run.resume=true"] if restarts else command, ranks, environment=environment)
        if end.signalled or end.code in (0, REFUSED, STOPPED, INTERRUPTED) or restarts == max_restarts:
            break
        print(f"ltrain: the run failed with exit code {end.code}: restart {restarts + 1} of {max_restarts}", file=sys.stderr, flush=True)
    return end.code
