"""`ltrain doctor` where there are GPUs: it sees them, compiles a kernel, and lets two of them meet."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_gpus_triton_and_nccl_are_tried() -> None:
    done = subprocess.run([sys.executable, "-m", "ltrain", "doctor", "--json"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    for i in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(i) in found[f"GPU {i}"]["value"]
    assert found["Triton's compiler"]["value"] == "works"
    assert ("two ranks have met" if torch.cuda.device_count() > 1 else "not tried: one GPU") in found["NCCL"]["value"]
    assert found["FP8"]["value"] or found["FP8"]["cost"]
