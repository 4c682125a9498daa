"""The tests of Triton kernels, where there is no GPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.interpreter import GPU, INTERPRETED


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this session")
@pytest.mark.parametrize("name", sorted(path.name for path in Path(__file__).parent.glob("test_*_triton.py")))
def test_in_the_interpreter(name: str) -> None:
    """In a process of its own: Triton decides on its first import whether kernels are interpreted."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / name)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
