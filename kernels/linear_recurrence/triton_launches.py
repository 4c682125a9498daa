"""How the chunked recurrence is cut into chunks, and with which compile-time options the programs of `triton_kernels` are launched."""

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltrain.kernels.segments import ceil_div, power_of_two

BLOCK = 64  # tokens that meet in one product
# Blocks of a chunk where nothing is erased. A state is stored and loaded about 14 times, and each token meets those of half a chunk in 8
# products: with 128 channels, 2 blocks take as long for the states as 4 to 8 for the products. States of half the size are stored twice as often.
BLOCKS = 4
WARPS = 8  # with 4, narrow tiles are in the range that Triton 3.4 to 3.7 gets wrong on Hopper: of 32 channels, prepare read from nowhere
PROGRAMS = 128  # about as many as an H100 has processors


class Launch(NamedTuple):
    """How a program is launched; channels of keys and of values at a time, half as many of float32; programs: at once on a processor, which
    takes a part of its registers for each, and sooner spills some than waits for memory; stages: tiles that a loop loads ahead; least: channels at a
    time of narrower heads, too (see WARPS)."""

    key: int = 128
    value: int = 64
    programs: int = 1
    stages: int = 3
    warps: int = WARPS
    least: int = 16


LAUNCHES = {
    "sum_decays": Launch(key=64, programs=4, stages=1, warps=4, least=64),
    "prepare": Launch(key=64, programs=3, stages=1, warps=4, least=64),
    "add_chunks": Launch(value=128, programs=2),
    "add_chunks of heads": Launch(value=128, programs=2),
    "add_chunks of heads grouped": Launch(warps=4),
    "read": Launch(value=128, programs=2, stages=2),
    "read per channel": Launch(value=128, programs=2, stages=2, warps=4, least=64),
    "pair_gradients per channel": Launch(key=64, programs=2, stages=1, warps=4, least=64),
    "read of heads": Launch(value=128, stages=2, warps=4),
    "read_together": Launch(value=128, stages=4),
    "pair_scores": Launch(value=128, programs=3, stages=3, warps=4),
    "pair_gradients of heads": Launch(value=128, stages=3, warps=4),
    "decay_gradients": Launch(key=64, stages=2),
    "score_gradients": Launch(programs=3, stages=2, warps=4, least=64),
    "key_gradients": Launch(key=64, programs=2, stages=2),
    "key_gradients per channel": Launch(key=32, programs=2, stages=2),
}


class Chunks(NamedTuple):
    """How many blocks, chunks and segments there are, and on the device, int32, of each block: its first and last + 1 token, and the chunk it is in
    [blocks]; of each chunk: its first and last + 1 token and its first block [chunks]; of each segment: its first and last + 1 token, opens and
    closes [N], and its chunks, bounds [N + 1]."""

    block_count: int
    chunk_count: int
    segments: int
    starts: Tensor
    stops: Tensor
    chunks: Tensor
    begins: Tensor
    ends: Tensor
    firsts: Tensor
    opens: Tensor
    closes: Tensor
    bounds: Tensor

    @property
    def spans(self) -> tuple[Tensor, ...]:
        return self.starts, self.stops

    @property
    def places(self) -> tuple[Tensor, ...]:  # for tiles.place_of
        return self.starts, self.chunks, self.begins, self.ends


def _pieces(opens: np.ndarray, closes: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """Each segment in pieces of `length` tokens: first and last + 1 token and segment of each, and those of each segment [N + 1]"""
    counts = -(-(closes - opens) // length)
    bounds = np.append(0, counts.cumsum())
    segment = np.repeat(np.arange(len(counts)), counts)
    starts = opens[segment] + (np.arange(len(segment)) - bounds[segment]) * length
    return starts, np.minimum(starts + length, closes[segment]), segment, bounds


@lru_cache(maxsize=64)  # all layers of a micro-batch share it
def chunks_of(cuts: tuple[int, ...], blocks: int, device: torch.device) -> Chunks:
    """blocks: of a chunk, but for the last of a segment."""
    return chunks_among(cuts, range(len(cuts) - 1), blocks, device)


def chunks_among(cuts: tuple[int, ...], segments: Sequence[int], blocks: int, device: torch.device) -> Chunks:
    """Of these segments alone, in this order."""
    tokens, numbers = np.array(cuts, np.int64), np.array(segments, np.int64)
    opens, closes = tokens[numbers], tokens[numbers + 1]
    starts, stops, segment, first = _pieces(opens, closes, BLOCK)
    begins, ends, _, bounds = _pieces(opens, closes, blocks * BLOCK)
    chunks = bounds[segment] + (np.arange(len(segment)) - first[segment]) // blocks
    firsts = np.searchsorted(chunks, np.arange(len(begins)))
    found = starts, stops, chunks, begins, ends, firsts, opens, closes, bounds
    # one copy to the device; each begins at a multiple of 16 bytes, as tensors of their own would: Triton compiles once for all
    places = [0, *accumulate(ceil_div(len(x), 4) * 4 for x in found)]
    flat = np.zeros(places[-1], np.int32)
    for place, x in zip(places, found, strict=False):
        flat[place : place + len(x)] = x
    on_device = torch.from_numpy(flat).to(device, non_blocking=True)
    parts = (on_device[place : place + len(x)] for place, x in zip(places, found, strict=False))
    return Chunks(len(starts), len(begins), len(segments), *parts)


@cache
def padded(width: int) -> int:
    return max(16, power_of_two(width))


class Shapes(NamedTuple):
    heads: int
    group: int
    key: int
    value: int
    decay: int  # axes that decays have beside the tokens': none, per head or per channel
    delta: bool
    exact: bool  # float32 inputs

    @classmethod
    def of(cls, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> "Shapes":
        heads, width = v.shape[1:]
        axes = 0 if decay is None else decay.ndim - 1
        return cls(heads, heads // k.shape[1], k.shape[2], width, axes, beta is not None, v.dtype == torch.float32)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.heads, self.group, self.key, self.value

    @property
    def of_heads(self) -> bool:
        """Nothing is erased, and decays, if there are any, are of heads: what `triton_kernels.heads` is for."""
        return not self.delta and self.decay < 2

    @property
    def blocks(self) -> int:
        """Blocks of a chunk: with the delta rule one, since the tokens of a chunk are solved for together."""
        return 1 if self.delta else max(BLOCKS // 2, 1) if self.of_heads and self.value <= 64 else BLOCKS

    @property
    def pairs(self) -> tuple[int, ...]:
        """PAIRS of each launch of a program of one value head"""
        return (1, 2) if self.decay == 2 else (0,)

    @cache  # noqa: B019, there are few shapes, and made anew these would take half as long as a launch
    def options(self, program: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Compile-time options, but for those that the program does not have."""
        kinds = [" grouped"] * (self.group > 1) + [" per channel"] * (self.decay == 2)
        launch = next((LAUNCHES[program + kind] for kind in kinds if program + kind in LAUNCHES), LAUNCHES.get(program, Launch()))
        key, value = (block // 2 if self.exact else block for block in launch[:2])
        least = 16 if self.exact else launch.least
        registers = {"maxnreg": 65536 // (32 * launch.warps * launch.programs) // 8 * 8} if launch.programs > 1 and not self.exact else {}
        stages = 1 if self.exact else launch.stages
        pipeline = {"DOT": "ieee" if self.exact else "tf32", "num_warps": WARPS if self.exact else launch.warps, "num_stages": stages}
        sizes = {"C": BLOCK, "BK": min(key, max(least, padded(self.key))), "BV": min(value, max(least, padded(self.value))), "DECAY": self.decay}
        return {name: x for name, x in (sizes | pipeline | registers).items() if name not in without}

    @lru_cache(maxsize=256)  # noqa: B019, likewise
    def narrow(self, segments: int) -> dict[str, Any]:
        """Options of the programs that go chunk by chunk. Each loads all of W, K and Q for its few columns of the state: few, so that there
        are programs for all processors, but no fewer."""
        widest = 16 if self.exact or self.key > 128 else 64  # 32 of 256 keys are a thousand bytes more than a processor has
        columns = next((n for n in (64, 32) if n <= widest and segments * self.heads * ceil_div(self.value, n) >= PROGRAMS), 16)
        # What a stage loads ahead is W, K and Q of a chunk: 48 KiB of 16-bit numbers for K = 128.
        stages = 1 if self.exact else 2 if self.key > 128 else 4 if columns == 16 else 3
        pipeline = {"num_warps": 4 if columns == 16 else WARPS, "num_stages": stages}
        key, value = padded(self.key), min(columns, padded(self.value))
        return self.options("pass") | {"BK": key, "BV": value, "WHOLE": key == self.key and self.value % value == 0} | pipeline
