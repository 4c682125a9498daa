"""Where the tests of Triton kernels run: on a GPU, or in Triton's interpreter, in a process started with TRITON_INTERPRET=1."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter")
