"""Linear recurrences by the kernels of optional packages, in bfloat16 on CUDA: DeltaNet and additive updates with a constant decay by
flash-linear-attention, Gated DeltaNet by FlashQLA.

FlashQLA cuts documents that are too few for a GPU into pieces that run side by side. Left to itself it takes for the state that a piece leaves only
what its last chunks wrote, as many as together fade a state by e^-10, and forgets what was before: at most e^-10 = 4.5e-5 of that, but all that there
is where those chunks write nothing. Here every piece is taken whole (`_whole_pieces`), so that nothing is forgotten.
Source: fla.ops.delta_rule and fla.ops.simple_gla of flash-linear-attention, flash_qla of FlashQLA.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.segments import ceil_div

WIDEST = 256  # of keys and values
ALIGNED = 16  # heads that are no multiple of it had wrong gradients in programs of Triton's on an H200
MEASURED = 128  # of keys and values, of what `FASTER` tells
PIECES = "flash_qla.ops.gated_delta_rule.chunk"  # where FlashQLA looks up the functions that say how far back a piece is taken
HOW_FAR = ("get_warmup_chunks", "get_warmup_chunks_bidi")
NEVER = -1e30  # a sum of log decays that no document has
NUMBERS = 2**31  # of an input, or of all chunks' states, which a 32-bit place does not reach
CHUNK = 64  # tokens of a chunk, which has a state
CAPABILITIES = ((9, 0), (10, 0), (10, 3))  # with FlashQLA's kernels for both directions


class Kind(NamedTuple):
    decay: str  # none | constant (the same row for all tokens) | head | channel
    update: str  # additive | delta

    @classmethod
    def of(cls, decay: Tensor | None, beta: Tensor | None) -> "Kind":
        update = "additive" if beta is None else "delta"
        if decay is None:
            return cls("none", update)
        if decay.ndim == 3:
            return cls("channel", update)
        return cls("constant" if beta is None and decay.stride(0) == 0 else "head", update)


CONSTANT, DELTA, GATED_DELTA = Kind("constant", "additive"), Kind("none", "delta"), Kind("head", "delta")

# Tokens from which `auto` takes it, by the GPU's capability: none yet. Forwards and backwards of one document of 32768 tokens on one H200,
# 16 heads x 128 in bfloat16, flash-linear-attention 0.6.0: DeltaNet in 4.49 ms beside our own kernels' 4.67, a constant decay in 2.44 beside
# 2.80, which is not worth 1.5 and 2.5 times their memory. Gated DeltaNet was measured only as FlashQLA runs it left to itself (2.20 beside
# 5.26), not as here.
FASTER: dict[tuple[int, int], dict[Kind, int]] = {}

_PATCHING = Lock()


@cache
def _fla() -> dict[Kind, Callable[..., Any]] | str:
    """Its functions, or why there are none."""
    if find_spec("fla") is None:
        return "needs flash-linear-attention, which is not installed"
    try:
        found = {DELTA: import_module("fla.ops.delta_rule").chunk_delta_rule, CONSTANT: import_module("fla.ops.simple_gla").chunk_simple_gla}
    except (ImportError, OSError, AttributeError, AssertionError, RuntimeError, ValueError) as error:
        return f"needs flash-linear-attention, which does not load ({str(error).partition('.')[0]})"
    if not all("cu_seqlens_cpu" in inspect.signature(function).parameters for function in found.values()):
        return "needs flash-linear-attention 0.6.0 or newer"
    return found


@cache
def _flash_qla() -> Callable[..., Any] | str:
    """Its function, or why there is none that leaves nothing out."""
    if find_spec("flash_qla") is None:
        return "needs FlashQLA for Gated DeltaNet, which is not installed"
    try:
        found: Callable[..., Any] = import_module("flash_qla").chunk_gated_delta_rule
        pieces = import_module(PIECES)
    except (ImportError, OSError, AttributeError, AssertionError, RuntimeError, ValueError) as error:
        return f"needs FlashQLA for Gated DeltaNet, which does not load ({str(error).partition('.')[0]})"
    functions = [getattr(pieces, name, None) for name in HOW_FAR]
    known = all(callable(function) and "threshold" in inspect.signature(function).parameters for function in functions)
    if not known or not _looks_them_up():
        return "needs FlashQLA 0.1.3 for Gated DeltaNet: of the one that is installed it is not known how to take pieces of documents whole"
    return found


def _looks_them_up() -> bool:
    """Whether FlashQLA's forward looks the functions up in PIECES as it is called. That of 0.1.2 holds on to its own, whatever stands there."""
    try:
        forward = import_module(f"{PIECES}.cp.preprocess").cp_preprocess_fwd
    except (ImportError, AttributeError):
        return False
    return {PIECES, *HOW_FAR} <= set(forward.__code__.co_names)


def _never(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same with a threshold that is not reached, whichever its caller gives."""
    return lambda *args, **given: function(*args, **given | {"threshold": NEVER})


@contextmanager
def _whole_pieces() -> Iterator[None]:
    """In FlashQLA's forward no decay is strong enough for the rest of a piece to be forgotten. Its backward goes by what the forward has kept.

    It has no argument for it. The functions are its own again afterwards: others in this process may call it too.
    """
    pieces = import_module(PIECES)
    with _PATCHING:
        own = {name: getattr(pieces, name) for name in HOW_FAR}
        try:
            for name, function in own.items():
                setattr(pieces, name, _never(function))
            yield
        finally:
            for name, function in own.items():
                setattr(pieces, name, function)


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


class _Places(NamedTuple):
    """Of the segments that have tokens. cuts: their boundaries [n + 1], on the device and on the CPU, (None, None): there is one; kept: which
    they are, None: all; chunks: how many they have."""

    cuts: tuple[Tensor | None, Tensor | None]
    kept: Tensor | None
    chunks: int


@lru_cache(maxsize=64)  # all layers of a micro-batch share it, and what the packages remember by the tensor
def _places(bounds: tuple[int, ...], device: torch.device) -> _Places:
    kept = [i for i, (start, stop) in enumerate(pairwise(bounds)) if stop > start]
    cuts = torch.tensor([0, *(bounds[i + 1] for i in kept)], dtype=torch.int32)
    # FlashQLA counts a segment without tokens as none, and all behind it as the one before
    some = None if len(kept) == len(bounds) - 1 else torch.tensor(kept).to(device, non_blocking=True)
    chunks = sum(ceil_div(bounds[i + 1] - bounds[i], CHUNK) for i in kept)
    return _Places((None, None) if len(kept) == 1 else (cuts.to(device, non_blocking=True), cuts), some, chunks)


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bounds: list[int],
    scale: float,
    initial_state: Tensor | None,
    with_map: bool,
) -> str | None:
    """Why the packages do not take a call of `linear_recurrence`, or None."""
    kind, width, value = Kind.of(decay, beta), k.shape[2], v.shape[2]
    if kind not in (CONSTANT, DELTA, GATED_DELTA):
        return (
            "has the delta rule without a decay or with one per head, and additive updates with one row of decays for all tokens, "
            f"not {kind.update} ones with decay={kind.decay}"
        )
    library = _flash_qla() if kind == GATED_DELTA else _fla()
    if isinstance(library, str):
        return library
    if with_map:
        return "has no map of a segment"
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return f"takes q, k and v in bfloat16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if initial_state is not None and initial_state.dtype != torch.float32:
        return f"takes an initial state in float32, not {initial_state.dtype}"
    if not len(v):
        return "takes at least one token"
    if kind == GATED_DELTA and not width == value == MEASURED:
        return f"takes heads of {MEASURED} for Gated DeltaNet, not {width} and {value}"
    if max(width, value) > WIDEST or width % ALIGNED or value % ALIGNED:
        return f"takes heads of at most {WIDEST} in multiples of {ALIGNED}, not {width} and {value}"
    if kind != GATED_DELTA and k.shape[1] != v.shape[1]:
        return f"takes as many key heads as value heads, not {k.shape[1]} and {v.shape[1]}"
    if kind == CONSTANT and decay is not None and decay.requires_grad and torch.is_grad_enabled():
        return "has no gradient of one row of decays"
    if kind == GATED_DELTA and not scale:
        return "takes a scale other than 0"
    if max(v.numel(), v.shape[1] * len(k) * width, _places(tuple(bounds), v.device).chunks * v.shape[1] * width * value) >= NUMBERS:
        return "takes streams whose heads, and states of chunks, are less than 2^31 numbers"
    if not v.is_cuda:
        return f"runs on CUDA, not on {v.device.type}"
    capability = _capability(v.device)
    if kind == GATED_DELTA and capability not in CAPABILITIES:
        return f"runs Gated DeltaNet on GPUs of capability {', '.join(f'{a}.{b}' for a, b in CAPABILITIES)}, not {capability}"
    return None


def worthwhile(k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> bool:
    """Whether it was measured faster than our own kernels; no promise that gradients are the same twice is known of it."""
    least = FASTER.get(_capability(v.device) or (0, 0), {}).get(Kind.of(decay, beta))
    measured = least is not None and len(v) >= least and k.shape[2] == v.shape[2] == MEASURED
    return measured and not torch.are_deterministic_algorithms_enabled()


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bounds: list[int],
    scale: float,
    initial_state: Tensor | None,
    with_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """-> output [T, H, V], final states [N, H, K, V] float32 if with_final; of what `refusal` lets pass"""
    kind, places = Kind.of(decay, beta), _places(tuple(bounds), v.device)
    kept, (cuts, on_host) = places.kept, places.cuts
    start = initial_state if initial_state is None or kept is None else initial_state.index_select(0, kept)
    given = [x.unsqueeze(0) for x in (q, k, v)]
    options = {"scale": scale, "initial_state": start, "output_final_state": with_final, "cu_seqlens": cuts}
    if kind == GATED_DELTA:
        assert decay is not None and beta is not None
        gated = _flash_qla()
        assert callable(gated)
        with _whole_pieces():
            output, final = gated(*given, decay.float().unsqueeze(0), beta.unsqueeze(0), **options)
    else:
        functions = _fla()
        assert isinstance(functions, dict)
        if kind == DELTA:
            assert beta is not None
            output, final = functions[DELTA](*given, beta.unsqueeze(0), cu_seqlens_cpu=on_host, **options)
        else:
            assert decay is not None
            output, final = functions[CONSTANT](*given, g_gamma=decay[0].float(), cu_seqlens_cpu=on_host, **options)
    if final is not None and kept is not None:
        shape = len(bounds) - 1, v.shape[1], k.shape[2], v.shape[2]
        before = v.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state
        final = before.index_copy(0, kept, final)
    return output[0], final
