"""One cuDNN for torch and Transformer Engine, whatever other copy the system has."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]
BOTH = """
import torch, transformer_engine.pytorch, transformer_engine_torch
torch.nn.functional.conv1d(torch.randn(1, 8, 64, device="cuda"), torch.randn(8, 8, 3, device="cuda"))
assert torch.backends.cudnn.version() == transformer_engine_torch.get_cudnn_version()
"""


@pytest.mark.parametrize("first", ["import ltrain.parallel.layers", "from ltrain.kernels.attention import te; te.engine()"])
def test_torch_and_transformer_engine_share_a_cudnn(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{first}\n{BOTH}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
