"""What the tests of kernels share."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
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


class _Checked:
    """Triton's interpreter, but that an address outside of a launch's tensors is an error."""

    def __init__(self, inner: Any, tensors: list[tuple[int, int]]):
        self.inner, self.tensors = inner, tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _check(self, what: str, at: np.ndarray, mask: np.ndarray, size: int) -> None:
        at = at[mask.astype(bool)].astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for start, stop in self.tensors:
            inside |= (at >= start) & (at + size <= stop)
        assert inside.all(), f"{what}: {(~inside).sum()} of {inside.size} addresses are outside of all tensors"

    def load(self, at: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        self._check("load", at, mask, np.dtype(dtype).itemsize)
        return self.inner.load(at, mask, other, dtype)

    def store(self, at: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self._check("store", at, mask, value.dtype.itemsize)
        self.inner.store(at, value, mask)


def _extents(given: Any) -> list[tuple[int, int]]:
    """First address and the one behind the last of each tensor, of its own numbers alone: it may be a part of a storage."""
    if isinstance(given, (tuple, list)):
        return [extent for x in given for extent in _extents(x)]
    if not isinstance(given, Tensor) or not given.numel():
        return []
    last = sum((size - 1) * step for size, step in zip(given.shape, given.stride(), strict=True))
    return [(given.data_ptr(), given.data_ptr() + (last + 1) * given.element_size())]


@pytest.fixture(autouse=True)
def no_address_is_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU would stop for, or not: what lies beside a tensor there is most often another."""
    if INTERPRETED:
        from triton.runtime import interpreter

        tensors: list[tuple[int, int]] = []
        given = interpreter.GridExecutor._init_args_hst

        def init(self: Any, args: Any, kwargs: Any) -> Any:
            on_host = given(self, args, kwargs)
            tensors[:] = _extents([*on_host[0], *on_host[1].values()])
            return on_host

        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", init)
        monkeypatch.setattr(interpreter, "_interpreter", _Checked(interpreter._interpreter, tensors))
    yield
