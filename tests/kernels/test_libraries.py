"""Where a library that the process has comes from."""

from pathlib import Path

import torch

from ltrain.kernels.libraries import _loaded_elsewhere


def test_a_library_from_outside_is_seen() -> None:
    own = str(Path(torch.__file__).resolve().parent)
    assert _loaded_elsewhere("libtorch_cpu", ["/nowhere"]) and not _loaded_elsewhere("libtorch_cpu", [own])
    assert not _loaded_elsewhere("libthat_nobody_has", [])
