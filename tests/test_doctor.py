"""`ltrain doctor` on this machine as it is, and with things taken away."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Python reads it first: modules named in HIDDEN are not found on the path.
HIDE = """
import os
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name in os.environ["HIDDEN"].split(",") else find(name, *where)
"""


def doctor(*words: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "ltrain", "doctor", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=200)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_this_machine_trains_and_gloo_was_tried(tmp_path: Path) -> None:
    code, text = doctor("--json", "--dir", str(tmp_path / "runs" / "new"))
    said = json.loads(text)
    found: dict[str, Any] = {finding["name"]: finding for finding in said["findings"]}
    assert (code, said["trains"]) == (0, True), text
    assert found["gloo"]["value"] == "two ranks have met, their all-reduce is right"
    assert found["training's imports"]["value"] == "work" and found["megatron-core"]["value"]
    assert int(found["CPU cores"]["value"]) == len(os.sched_getaffinity(0))
    assert str(tmp_path) in found["run.dir"]["value"] and not list(tmp_path.iterdir())
    assert all(finding["value"] or finding["cost"] for finding in said["findings"])
    if "GPU 0" not in found:
        assert "training runs on the CPU" in found["GPU"]["cost"]
        assert "fp8.recipe=delayed and current and blockwise needs an NVIDIA GPU" in found["FP8"]["cost"]


def test_what_is_taken_away_is_missed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    hidden = "mlflow,deepspeed,transformer_engine,fla,flash_qla,megatron.core"
    code, text = doctor("--dir", "/dev/null/runs", PYTHONPATH=str(tmp_path), HIDDEN=hidden)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert code == 1 and lines[-1] == "Training cannot run here.", text
    for line in (
        "no mlflow: nothing goes to MLflow; metrics.jsonl is written as it is",
        "no deepspeed: engine=deepspeed fails; engine=megatron runs",
        "no transformer-engine: fp8.recipe is refused; bf16 runs as it is",
        "no flash-linear-attention: backend=fla of linear recurrences is refused; our own kernels run as they do with it",
        "no flash-qla: backend=fla of Gated DeltaNet is refused; our own kernels run as they do with it",
        "no megatron-core: training cannot start: install ltrain again",
        "no training's imports: training cannot start: ModuleNotFoundError: No module named 'megatron.core'",
    ):
        assert line in lines, text
    assert any(line.startswith("no run.dir: /dev/null/runs cannot be written") for line in lines), text
    assert not any(line.startswith("no gloo") for line in lines), text
