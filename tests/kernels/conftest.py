"""What the tests of kernels share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import GPU, INTERPRETED

GARBAGE = 0x5A  # of bytes of integers: indices far outside of everything


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: object, **kwargs: object) -> Tensor:
        x = make(*args, **kwargs)
        if x.dtype != torch.bool:
            x.detach().fill_(float("nan") if x.is_floating_point() else int.from_bytes(bytes([GARBAGE]) * x.element_size()))
        return x

    return made


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where Triton's kernels run, memory that nobody has written holds no numbers: one that a kernel leaves out, or reads too early, is seen."""
    if GPU or INTERPRETED:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))
    yield
