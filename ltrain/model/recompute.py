"""Selective recomputation: in the backward, what is large and cheap is made again from what is expensive and was kept.

Model code says in place what is cheap: `cheap(function, *inputs)` is function(*inputs). Inside a block that recomputes selectively, what
the call saves for its own backward, and its outputs where others save them for theirs (the matrix product after a norm, the attention
kernel after the rotation of its queries), are replaced by the recipe. The first of them that the backward asks for runs the function
once more, for all of them. Kernels of recurrences make states again by themselves (`selecting`). Every other kernel and matrix product runs
once (the selection of Korthikanti et al. 2022, carried on to the outputs), and the graph is that of a plain forward, so that gradients are
the same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ltrain.model.sequence import Sequence, Tape

_active: ContextVar["_Selection | None"] = ContextVar("selection", default=None)


def cheap[T](function: Callable[..., T], *inputs: Any) -> T:
    """function(*inputs), which a selectively recomputing block forgets and makes again.

    function: gives a tensor or a tuple of tensors and None, the same each time. inputs: all activations that it works on (parameters it
    may know by itself), and the Sequence where it needs one: what it exchanges through that is not exchanged again.
    """
    selection = _active.get()
    return function(*inputs) if selection is None else selection.run(function, inputs)


def selecting() -> bool:
    """Whether a block recomputes selectively: what kernels can make again by themselves is cheap, too."""
    return _active.get() is not None


@contextmanager
def selective() -> Iterator[None]:
    """Around the forward of one block: `cheap` calls in it are recomputed."""
    selection = _Selection()
    token = _active.set(selection)
    try:
        with saved_tensors_hooks(selection.pack, _unpack):
            yield
    finally:
        _active.reset(token)
        selection.made.clear()  # the graph holds on to the hooks


def _address(x: Tensor) -> int:
    """Of the memory that a tensor shares with its views."""
    return x.untyped_storage().data_ptr()


class _View(NamedTuple):
    """Stands for a tensor in the memory of a call's output."""

    call: "_Call"
    number: int  # among such views of the call
    output: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Any) -> Tensor:
    return saved.call.view(saved) if isinstance(saved, _View) else saved


class _Call:
    """One call of a cheap function: enough to repeat it, and what was made again and is not yet used."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...], pack: Callable[[Tensor], Any]):
        self._function = function
        # exchanges are played back from a tape of this call's own
        inputs = tuple(x.with_tape() if isinstance(x, Sequence) else x for x in inputs)
        self._tape: Tape | None = next((x.tape for x in inputs if isinstance(x, Sequence)), None)
        self._inputs = [(pack(x.detach()), x.requires_grad) if isinstance(x, Tensor) else (x, False) for x in inputs]
        self._count = 0  # tensors saved inside
        self._views = 0
        self._saved: dict[int, Tensor] = {}
        self._outputs: tuple[Any, ...] = ()
        self._views_left: set[int] = set()
        with saved_tensors_hooks(self._forget, self._remember), self._taped(0):
            self.result = function(*inputs)

    def _taped(self, mode: int) -> Any:
        return nullcontext() if self._tape is None else self._tape.contexts()[mode]

    def _forget(self, _: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def _remember(self, number: int) -> Tensor:
        if number not in self._saved:
            self._repeat()
        return self._saved.pop(number)

    def new_view(self, output: int, x: Tensor) -> _View:
        self._views += 1
        return _View(self, self._views - 1, output, x.shape, x.stride(), int(x.storage_offset()))

    def view(self, view: _View) -> Tensor:
        if view.number not in self._views_left:
            self._repeat()
        x: Tensor = self._outputs[view.output].as_strided(view.size, view.stride, view.offset)
        self._views_left.discard(view.number)
        if not self._views_left:
            self._outputs = ()
        return x

    def _repeat(self) -> None:
        inputs = [_unpack(x).detach().requires_grad_(True) if gradient else _unpack(x) for x, gradient in self._inputs]
        made: list[Tensor] = []

        def save(x: Tensor) -> int:
            made.append(x.detach())
            return len(made) - 1

        with torch.enable_grad(), saved_tensors_hooks(save, made.__getitem__), self._taped(1):
            outputs = self._function(*inputs)
        assert len(made) == self._count, "a cheap function that did not do the same again"
        self._saved = dict(enumerate(made))
        if self._views:
            self._outputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in _as_tuple(outputs))
            self._views_left = set(range(self._views))


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _Selection:
    """The cheap calls in one forward of a block, while it lasts."""

    def __init__(self) -> None:
        # address -> who makes what lies there; the output is held, so that nothing else comes to lie there
        self.made: dict[int, tuple[_Call, int, Tensor]] = {}

    def run(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        token = _active.set(None)  # one inside another is part of it
        try:
            call = _Call(function, inputs, self.pack)
        finally:
            _active.reset(token)
        result, call.result = call.result, None
        given = {_address(x) for x in inputs if isinstance(x, Tensor)} | {0}
        for i, output in enumerate(_as_tuple(result)):
            if isinstance(output, Tensor) and _address(output) not in given:
                self.made[_address(output)] = (call, i, output)
        return result

    def pack(self, x: Tensor) -> Any:
        made = self.made.get(_address(x))
        if made is None or made[2].dtype != x.dtype:
            return x
        return made[0].new_view(made[1], x)
