"""What megatron-core needs where there is no CUDA: stand-ins inside megatron's own modules, and nowhere else.

megatron-core asks `torch.cuda` for streams and devices and writes "cuda" and `torch.cuda.FloatTensor` as literals. Where CUDA
is absent, `install()` gives each loaded megatron module a view of torch whose `cuda` namespace answers for the CPU, and
rewrites those literals in megatron's compiled functions. torch itself is not touched: DeepSpeed, transformers and
user code in the same process see the real one.
"""

import contextlib
import functools
import sys
import types
from typing import Any

import torch

CPU = torch.device("cpu")


class _Stream:
    """Work on a CPU is done when the call returns, so every stream is the same one and never behind."""

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


_STREAM = _Stream()


class _Event:
    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Namespace:
    """`real`, except for the names given."""

    def __init__(self, real: Any, **names: Any):
        self.__dict__["_real"] = real
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


_cuda = _Namespace(
    torch.cuda,
    current_device=lambda: CPU,
    current_stream=lambda device=None: _STREAM,
    default_stream=lambda device=None: _STREAM,
    stream=lambda stream: contextlib.nullcontext(),
    Stream=lambda *args, **options: _STREAM,
    Event=_Event,
    synchronize=lambda device=None: None,
    empty_cache=lambda: None,
    # megatron keys its random states by CUDA generator; on a CPU there is one generator
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    manual_seed=lambda seed: torch.manual_seed(seed),
    is_current_stream_capturing=lambda: False,
)
_torch = _Namespace(torch, cuda=_cuda)


_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def _constant(value: Any) -> Any:
    if isinstance(value, str):
        return _LITERALS.get(value, value)
    if isinstance(value, tuple):
        return tuple(_constant(v) for v in value)
    if isinstance(value, types.CodeType):
        return _code(value)
    return value


def _code(code: types.CodeType) -> types.CodeType:
    constants = tuple(_constant(c) for c in code.co_consts)
    return code if all(new is old for new, old in zip(constants, code.co_consts, strict=True)) else code.replace(co_consts=constants)


def _rewrite(value: Any, module: str, done: set[int]) -> None:
    """Rewrite the literals of a function, or of a class's methods, defined in `module`."""
    if id(value) in done:
        return
    done.add(id(value))
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        for part in (value.fget, value.fset):
            _rewrite(part, module, done)
        return
    while hasattr(value, "__wrapped__"):  # decorated
        _rewrite(value.__wrapped__, module, done)
        break
    if isinstance(value, types.FunctionType):
        if value.__module__ == module:
            value.__code__ = _code(value.__code__)
    elif isinstance(value, type) and value.__module__ == module:
        for member in vars(value).values():
            _rewrite(member, module, done)


class _Counts(list):  # type: ignore[type-arg]
    """A list of split sizes that also answers as the numpy array megatron expects from a device copy."""

    def tolist(self) -> list[int]:
        return list(self)

    def sum(self) -> int:
        return sum(self)


def _split_lists(move: Any) -> Any:
    """megatron turns split sizes into host lists only when they come from a GPU; all_to_all needs them as lists."""

    @functools.wraps(move)
    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and as_numpy and tensor.dim() == 1:
            return _Counts(tensor.tolist())
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    return moved


_installed = False


def install() -> None:
    """Make the loaded megatron modules work without CUDA. Nothing happens where CUDA is present, or the second time."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    done: set[int] = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module is not None:
            if vars(module).get("torch") is torch:
                module.torch = _torch  # type: ignore[attr-defined]
            for value in list(vars(module).values()):
                _rewrite(value, name, done)
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _split_lists(moe_utils.maybe_move_tensor_to_cpu)
