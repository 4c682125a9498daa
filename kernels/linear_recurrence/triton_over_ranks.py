"""Recurrences over ranks that have parts of their documents, in phases: what needs no message is done while these are under way, and once.

Of the delta rule, forward, a rank prepares the chunks of the segments whose documents go on, makes the maps of these from them, and starts to
send. A segment that begins its document makes its map by the pass of states that it needs anyway; one in the middle of a document goes over its
chunks for M and for E, and again from the state that arrives. Everything of the other segments but what waits for a state, and the outputs of
those that begin their document, comes before the answer. The backward is the same the other way round: the gradients of the states before the
segments that continue a document come first, by the only pass of those that end theirs, and what is made again of the chunks is made while these
are under way.

Where nothing is erased, what each chunk adds to a state is found first, for all chunks at once; maps are sums over it, and so are, when the answer
is there, the states: to be in the middle of a document costs one more pass of sums. Gradients of queries take no gradients of states, and come
before the answer, but where decays are per channel: there one program finds them with those of keys.

Kept between the phases, and from forward to backward, is what `triton_chunked` keeps, with the arrived states and M. Where that is made again, it
is while messages are under way.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.carry import Carry, Map
from ltrain.kernels.linear_recurrence import triton_parts as parts
from ltrain.kernels.linear_recurrence.triton_launches import BLOCK, Chunks, Shapes, chunks_among
from ltrain.kernels.segments import ceil_div

# Groups of segments, in the order in which their chunks lie here, so that those of each step are neighbours: whole documents, those that begin
# a document that goes on, those in the middle of one, and those that end one.
WHOLE, FIRST, MIDDLE, LAST = range(4)


class _Part(NamedTuple):
    """Neighbouring groups"""

    segments: list[int]
    places: slice  # of these among all segments
    chunks: Chunks
    range: slice  # of these among all chunks
    blocks: slice  # of theirs among all blocks


@lru_cache(maxsize=64)  # all layers of a micro-batch share it
def _parts_of(
    cuts: tuple[int, ...], heads: tuple[int, ...], tails: tuple[int, ...], blocks: int, device: torch.device
) -> dict[tuple[int, int], _Part]:
    """By their first and last group. blocks: of a chunk"""
    groups: list[list[int]] = [[], [], [], []]
    continued, going_on = set(heads), set(tails)
    for n in range(len(cuts) - 1):
        groups[(MIDDLE if n in going_on else LAST) if n in continued else FIRST if n in going_on else WHOLE].append(n)
    found, segment, chunk, block = {}, 0, 0, 0
    for first in range(4):
        for last in range(first, 4):
            segments = [n for group in groups[first : last + 1] for n in group]
            chunks = chunks_among(cuts, segments, blocks, device)
            places = slice(segment, segment + len(segments))
            found[first, last] = _Part(segments, places, chunks, slice(chunk, chunk + chunks.chunk_count), slice(block, block + chunks.block_count))
        segment, chunk, block = (x.stop for x in (found[first, first].places, found[first, first].range, found[first, first].blocks))
    return found


class _Inputs:
    """Those of this rank, its groups, and what both kinds make of these. A part is named by its first and last group."""

    made: parts.Prepared

    def __init__(self, laid: parts.Laid, cuts: tuple[int, ...], carry: Carry, scale: float):
        self.laid, self.cuts, self.scale = laid, cuts, scale
        self.shapes = Shapes.of(laid.k, laid.v, laid.decay, laid.beta)
        self.parts = _parts_of(cuts, carry.heads, carry.tails, self.shapes.blocks, laid.v.device)
        self.all = self.parts[WHOLE, LAST]

    def of_segments(self, part: _Part) -> Tensor:
        """[N, H, K, V] float32 to be filled"""
        return parts.ends_of(self.laid.k, part.chunks, self.shapes)

    def stacked(self, states: dict[int, Tensor], part: _Part) -> Tensor | None:
        """[H, K, V] of each segment -> [N, H, K, V] as the programs take them, None: there is no segment"""
        if not part.segments:
            return None
        found = torch.stack([states[n] for n in part.segments])
        return F.pad(found, (0, self.shapes.value - found.shape[3], 0, self.shapes.key - found.shape[2])).float().contiguous()

    def keep(
        self,
        ctx: Any,
        initial: Tensor | None,
        matrices: dict[int, Tensor],
        carry: Carry,
        sizes: tuple[int, int],
        after: Tensor | None,
        states: Tensor | None,
    ) -> Tensor | None:
        """What the backward takes, in ctx; states: before all chunks, None: they are made again. -> the states after all segments, in the order in
        which these lie"""
        kept = self.made[:3] if states is None else (*self.made.saved(self.laid.v), states)
        ctx.save_for_backward(*self.laid, initial if states is None else None, *matrices.values(), *kept)
        ctx.given = self.cuts, self.scale, carry, sizes, list(matrices)
        ctx.set_materialize_grads(False)  # zeros for the final states would be as large as these
        if after is None:
            return None
        after = after[torch.tensor(self.all.segments).argsort().to(after.device, non_blocking=True)]
        ctx.mark_non_differentiable(after)
        return after


class _Phases(_Inputs):
    """Of the delta rule: what is made of the chunks of some groups after the others."""

    def __init__(self, laid: parts.Laid, cuts: tuple[int, ...], carry: Carry, scale: float, kept: Sequence[Any] = ()):
        """kept: of `keep`, from a forward"""
        super().__init__(laid, cuts, carry, scale)
        self.kept, self.solved = len(kept) > 3, bool(kept)
        if self.kept:
            self.made, self.states = parts.Prepared.restored(kept[:-1], laid.v), kept[-1]
        else:
            self.made = parts.room(laid.k, laid.v, self.all.chunks.block_count, self.shapes, tuple(kept) or None)
            self.states = self.of_chunks()

    def of_chunks(self) -> Tensor:
        """[chunks, H, K, V] to be filled"""
        shapes = self.shapes
        return self.laid.k.new_empty(self.all.chunks.chunk_count, shapes.heads, shapes.key, shapes.value)

    def _made(self, part: _Part) -> parts.Prepared:
        """Of its chunks what is kept for each chunk; what is kept for each token is of all."""
        firsts, fade, halves = (None if x is None else x[part.range] for x in (self.made.firsts, self.made.fade, self.made.halves))
        return self.made._replace(firsts=firsts, fade=fade, halves=halves)

    def prepare(self, first: int, last: int) -> None:
        part = self.parts[first, last]
        parts.prepare(*self.laid, part.chunks, self.shapes, self._made(part), self.scale, self.solved)

    def pass_states(self, first: int, last: int, initial: Tensor | None, final: Tensor | None) -> None:
        """The pass that the outputs take: it leaves the states, and U in place of U0."""
        part = self.parts[first, last]
        made = self._made(part)
        parts.pass_states(self.laid.k, made.u, initial, part.chunks, self.shapes, made, self.states[part.range], final)

    def maps(self) -> tuple[Tensor, Tensor]:
        """M [N, H, K, K] and E [N, H, K, V] of the segments in the middle, without a trace."""
        part = self.parts[MIDDLE, MIDDLE]
        made, end = self._made(part), self.of_segments(part)
        matrix = parts.end_of_identity(self.laid.k, part.chunks, self.shapes, made)
        parts.pass_states(self.laid.k, made.u, None, part.chunks, self.shapes, made, None, end)
        return matrix, end

    def read(self, first: int, last: int, z: Tensor, out: Tensor, *, later: bool) -> None:
        """See `triton_parts.read`; later: from each chunk alone."""
        part, (q, k, *_) = self.parts[first, last], self.laid
        states = None if later else self.states[part.range]
        parts.read(q, k, z, states, part.chunks, self.shapes, self._made(part), self.scale, later, out)

    def pass_gradients(
        self, first: int, last: int, do: Tensor, du: Tensor, dfinal: Tensor | None, dstates: Tensor | None, dinitial: Tensor | None
    ) -> None:
        """dstates: of all chunks; None: no trace is left."""
        part = self.parts[first, last]
        through = None if dstates is None else dstates[part.range]
        parts.pass_gradients(self.laid.k, do, du, dfinal, part.chunks, self.shapes, self._made(part), through, dinitial)


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor,
        sizes: tuple[int, int],
        cuts: tuple[int, ...],
        scale: float,
        final: bool,
        carry: Carry,
        recompute: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """sizes: K and V of the states, to which the inputs' may have zeros added."""
        key, value = sizes
        phases = _Phases(parts.Laid(q, k, v, decay, beta), cuts, carry, scale)
        first, middle, rest = (phases.parts[groups] for groups in ((FIRST, FIRST), (MIDDLE, MIDDLE), (MIDDLE, LAST)))
        after = phases.of_segments(phases.all) if final else None
        begun = phases.of_segments(first) if after is None else after[first.places]
        phases.prepare(FIRST, MIDDLE)
        phases.pass_states(FIRST, FIRST, None, begun)

        def maps() -> dict[int, Map]:
            found: dict[int, Map] = {n: (None, e[:, :key, :value]) for n, e in zip(first.segments, begun, strict=True)}
            if middle.segments:
                for n, m, e in zip(middle.segments, *phases.maps(), strict=True):
                    found[n] = m[:, :key, :key], e[:, :key, :value]
            return found

        arriving = carry.states(maps)
        out = torch.empty_like(v)
        phases.prepare(WHOLE, WHOLE)
        phases.prepare(LAST, LAST)
        phases.pass_states(WHOLE, WHOLE, None, None if after is None else after[phases.parts[WHOLE, WHOLE].places])
        phases.read(WHOLE, FIRST, phases.made.u, out, later=False)
        states, matrices = arriving()
        initial = phases.stacked(states, rest)
        phases.pass_states(MIDDLE, LAST, initial, None if after is None else after[rest.places])
        phases.read(MIDDLE, LAST, phases.made.u, out, later=False)
        return out, phases.keep(ctx, initial, matrices, carry, sizes, after, None if recompute else phases.states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> Any:
        q, k, v, decay, beta, initial, *saved = ctx.saved_tensors
        cuts, scale, carry, (key, value), numbers = ctx.given
        do = torch.zeros_like(v) if do is None else do.contiguous()
        matrices, kept = saved[: len(numbers)], saved[len(numbers) :]
        phases = _Phases(parts.Laid(q, k, v, decay, beta), cuts, carry, scale, kept)
        middle, last = phases.parts[MIDDLE, MIDDLE], phases.parts[LAST, LAST]
        du, dstates = torch.empty_like(v), phases.of_chunks()
        if not phases.kept:
            phases.prepare(MIDDLE, LAST)
        phases.read(MIDDLE, LAST, do, du, later=True)
        found = [phases.of_segments(part) for part in (middle, last)]
        phases.pass_gradients(MIDDLE, MIDDLE, do, du, None, None, found[0])
        phases.pass_gradients(LAST, LAST, do, du, None, dstates, found[1])
        own = dict(zip(middle.segments + last.segments, [x[:, :key, :value] for part in found for x in part], strict=True))
        arriving = carry.gradients(own, dict(zip(numbers, matrices, strict=True)))
        if not phases.kept:
            phases.prepare(WHOLE, FIRST)
            phases.pass_states(WHOLE, FIRST, None, None)
            phases.pass_states(MIDDLE, LAST, initial, None)
        phases.read(WHOLE, FIRST, do, du, later=True)
        phases.pass_gradients(WHOLE, WHOLE, do, du, None, dstates, None)
        dfinal = phases.stacked(arriving(), phases.parts[FIRST, MIDDLE])
        phases.pass_gradients(FIRST, MIDDLE, do, du, dfinal, dstates, None)
        made, states, chunks, shapes = phases.made.left, phases.states, phases.all.chunks, phases.shapes
        del phases, saved, kept
        scored = parts.score_gradients(v, do, du, chunks, shapes, made, scale)
        del du
        return *parts.key_gradients(q, k, decay, beta, do, (states, dstates), scored, chunks, shapes, made, scale), *[None] * 6


class _Sums(_Inputs):
    """Where nothing is erased: sums over what each chunk has added, of some groups after the others."""

    def __init__(self, laid: parts.Laid, cuts: tuple[int, ...], carry: Carry, scale: float, kept: Sequence[Any] = ()):
        """kept: of `keep`, from a forward"""
        super().__init__(laid, cuts, carry, scale)
        self.kept = len(kept) > 3
        q, k, v, decay, _ = laid
        if self.kept:
            self.made = parts.Prepared.restored(kept[:-1], v)
        else:
            self.made = parts.prepared(q, k, v, decay, None, self.all.chunks, self.shapes, scale, tuple(kept) or None)

    def add_chunks(self, rows: Tensor, z: Tensor, *, back: bool) -> tuple[Tensor, Tensor | None]:
        """See `triton_parts.add_chunks`, of all chunks."""
        return parts.add_chunks(rows, z, self.all.chunks, self.shapes, self.made, self.scale if back else 1.0, back)

    def accumulate(
        self,
        groups: tuple[int, int],
        states: Tensor,
        left: Tensor | None,
        before: Tensor | None,
        after: Tensor | None,
        *,
        back: bool,
        trace: bool = True,
    ) -> None:
        """states and left: of all chunks; before and after: of these segments."""
        part = self.parts[groups]
        leaves = None if left is None else left[part.range]
        parts.accumulate(states[part.range], leaves, before, after, part.chunks, self.shapes, back, trace)

    def product(self, place: int, left: Tensor | None) -> Tensor:
        """M of a segment in the middle, what is left of each number of a state: [H, K], [H] or, the identity, [0]"""
        if left is None:
            return self.laid.v.new_empty(0, dtype=torch.float32)
        part = self.parts[MIDDLE, MIDDLE]
        chunks = [ceil_div(self.cuts[n + 1] - self.cuts[n], self.shapes.blocks * BLOCK) for n in part.segments[: place + 1]]
        stop = part.range.start + sum(chunks)
        return left[stop - chunks[-1] : stop].prod(0)

    def read(self, groups: tuple[int, int], states: Tensor, out: Tensor) -> None:
        part, (q, k, v, *_) = self.parts[groups], self.laid
        fade = self.made.fade
        if fade is not None:
            fade = fade[part.range if self.shapes.of_heads else part.blocks]
        parts.read(q, k, v, states[part.range], part.chunks, self.shapes, self.made._replace(fade=fade), self.scale, False, out)


class _Additive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        sizes: tuple[int, int],
        cuts: tuple[int, ...],
        scale: float,
        final: bool,
        carry: Carry,
        recompute: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """sizes: K and V of the states, to which the inputs' may have zeros added."""
        key, value = sizes
        sums = _Sums(parts.Laid(q, k, v, decay, None), cuts, carry, scale)
        first, middle, rest = (sums.parts[groups] for groups in ((FIRST, FIRST), (MIDDLE, MIDDLE), (MIDDLE, LAST)))
        states, left = sums.add_chunks(k, v, back=False)
        after = sums.of_segments(sums.all) if final else None
        begun = sums.of_segments(first) if after is None else after[first.places]
        sums.accumulate((FIRST, FIRST), states, left, None, begun, back=False)

        def maps() -> dict[int, Map]:
            found: dict[int, Map] = {n: (None, e[:, :key, :value]) for n, e in zip(first.segments, begun, strict=True)}
            if middle.segments:
                ends = sums.of_segments(middle)
                sums.accumulate((MIDDLE, MIDDLE), states, left, None, ends, back=False, trace=False)
                for place, (n, e) in enumerate(zip(middle.segments, ends, strict=True)):
                    m = sums.product(place, left)
                    found[n] = m[:, :key] if m.dim() == 2 else m, e[:, :key, :value]
            return found

        arriving = carry.states(maps)
        out = torch.empty_like(v)
        sums.accumulate((WHOLE, WHOLE), states, left, None, None if after is None else after[: first.places.start], back=False)
        sums.read((WHOLE, FIRST), states, out)
        before, matrices = arriving()
        initial = sums.stacked(before, rest)
        sums.accumulate((MIDDLE, LAST), states, left, initial, None if after is None else after[rest.places], back=False)
        sums.read((MIDDLE, LAST), states, out)
        return out, sums.keep(ctx, initial, matrices, carry, sizes, after, None if recompute else states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> Any:
        q, k, v, decay, _, initial, *saved = ctx.saved_tensors
        cuts, scale, carry, (key, value), numbers = ctx.given
        do = torch.zeros_like(v) if do is None else do.contiguous()
        matrices, kept = saved[: len(numbers)], saved[len(numbers) :]
        sums = _Sums(parts.Laid(q, k, v, decay, None), cuts, carry, scale, kept)
        rest = sums.parts[MIDDLE, LAST]
        dstates, left = sums.add_chunks(q, do, back=True)
        dinitial = sums.of_segments(rest)
        middles = len(sums.parts[MIDDLE, MIDDLE].segments)
        sums.accumulate((MIDDLE, MIDDLE), dstates, left, None, dinitial[:middles], back=True, trace=False)
        sums.accumulate((LAST, LAST), dstates, left, None, dinitial[middles:], back=True)
        own = dict(zip(rest.segments, dinitial[:, :, :key, :value], strict=True))
        arriving = carry.gradients(own, dict(zip(numbers, matrices, strict=True)))
        if sums.kept:
            states = kept[-1]
        else:
            states, _ = sums.add_chunks(k, v, back=False)
            sums.accumulate((WHOLE, FIRST), states, left, None, None, back=False)
            sums.accumulate((MIDDLE, LAST), states, left, initial, None, back=False)
        sums.accumulate((WHOLE, WHOLE), dstates, left, None, None, back=True)

        def after() -> Tensor:
            dfinal = sums.stacked(arriving(), sums.parts[FIRST, MIDDLE])
            sums.accumulate((FIRST, MIDDLE), dstates, left, dfinal, None, back=True)
            return dstates

        args = states, after, left, sums.all.chunks, sums.shapes, sums.made, scale, ctx.needs_input_grad[3]
        return *parts.token_gradients(q, k, v, decay, do, *args), *[None] * 6


def over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bounds: list[int],
    scale: float,
    carry: Carry,
    final: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor | None]:
    """-> output [T, H, V], final states [N, H, K, V] float32 if final, without gradient"""
    key, value = k.shape[2], v.shape[2]
    laid, given = parts.Laid.of(q, k, v, decay, beta), ((key, value), tuple(bounds), scale, final, carry, recompute)
    out, after = _Additive.apply(*laid[:4], *given) if beta is None else _Delta.apply(*laid, *given)
    return out[..., :value] if out.shape[2] != value else out, None if after is None else after[..., :key, :value]
