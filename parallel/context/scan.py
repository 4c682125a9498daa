"""Recurrent states over context ranks: the spans' affine maps, gathered where these are few and scanned where they are many.

A segment turns the state before it into the state after it, S_out = M S_in + E, and maps compose:
(M2, E2) after (M1, E1) is (M2 M1, M2 E1 + E2). A document start cuts the chain, so only segments that leave their span
send anything: E, and M where the same document also came in. Each rank folds what it received into the states its heads
start from, and runs the kernel over its tokens.

The backward runs the other way. With dE the gradient of a segment's incoming state when nothing flows into its outgoing
one, dS_in = M^T dS_out + dE. Given S_in and dS_out the local backward is exact, so M needs no gradient of its own (the
scheme of Sun et al. 2024, LASP, and of Yang et al. 2024 for the delta rule). Where a recurrence has kernels that share what maps and outputs are
made of, and do what needs no message while these are under way, it runs them (`Recurrence.over_ranks`); else, beside the kernels over all tokens,
there are passes of states: forward, those of the tails and of their M; backward, that of the heads' gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.carry import Map
from ltrain.kernels.recurrence import Recurrence
from ltrain.model.sequence import Tape
from ltrain.parallel.context.layout import Plan, Span
from ltrain.parallel.context.messages import Messages

LONGEST = 8  # spans of a document before one, up to which all maps come at once; beyond, rounds of waiting cost less than so many maps


class Scan(NamedTuple):
    """Which maps this rank has, and how they become states. Forward: towards later spans; backward: towards earlier ones."""

    segments: int
    heads: list[tuple[int, int]]  # segment number, and its span's, of those that continue
    tails: list[tuple[int, int]]  # of those that go on
    rows: dict[int, tuple[int, int]]  # of these segments among this rank's tokens
    forward: "Gathered | Composed"
    backward: "Gathered | Composed"

    @property
    def needed(self) -> bool:
        return bool(self.heads or self.tails)


By = dict[int, Tensor]  # by number of the span


class Gathered(NamedTuple):
    """Each map goes to every rank that folds it."""

    received: dict[int, list[Span]]  # rank -> its spans
    sent: dict[int, list[Span]]  # rank -> this rank's spans
    chains: dict[int, list[Span]]  # span of this rank -> those that its document crosses on that side, farthest first

    def carry(self, own: dict[int, Map], over: "Swap", *, transpose: bool) -> Callable[[], By]:
        """Starts to send; gives what waits for the state (or its gradient) that each chain hands to its span."""
        sends = {r: [own[s.number] for s in spans] for r, spans in self.sent.items()}
        receives = {r: [(s.number, s.stop - s.start if s.inside else 0) for s in spans] for r, spans in self.received.items()}
        arriving = over.swap(sends, receives)

        def states() -> By:
            maps, found = own | arriving(), {}
            for number, (first, *rest) in self.chains.items():
                _, found[number] = maps[first.number]
                for span in rest:
                    m, e = maps[span.number]
                    assert m is not None
                    found[number] = over.kind.join(m, found[number], e, transpose=transpose)
            return found

        return states


Meeting = tuple[int, int, int]  # a span, the farther one whose map it gets, and the tokens that its M is of, 0: it has none


class Round(NamedTuple):
    local: list[Meeting]
    received: dict[int, list[Meeting]]  # rank -> in the order of the stream
    sent: dict[int, list[Meeting]]

    def farther(self, maps: dict[int, Map], over: "Swap") -> Callable[[], dict[int, Map]]:
        """Starts to send; gives what waits for the maps, by the span that gets them."""

        def of(number: int, tokens: int) -> Map:
            m, e = maps[number]
            return m if tokens else None, e

        sends = {r: [of(there, tokens) for _, there, tokens in met] for r, met in self.sent.items()}
        receives = {r: [(here, tokens) for here, _, tokens in met] for r, met in self.received.items()}
        own, arriving = {here: of(there, tokens) for here, there, tokens in self.local}, over.swap(sends, receives)
        return lambda: own | arriving()


class Composed(NamedTuple):
    """Maps of neighbours become those of twice as many spans, round after round (Hillis and Steele 1986): where a document crosses n spans, one sends
    log2 n maps and not n. Then each span gets the state of the one next to it.
    """

    rounds: list[Round]
    last: Round

    def carry(self, own: dict[int, Map], over: "Swap", *, transpose: bool) -> Callable[[], By]:
        maps, (first, *rest) = dict(own), [*self.rounds, self.last]
        arriving = first.farther(maps, over)

        def states() -> By:
            far = arriving()
            for met in rest:
                maps.update({here: self._after(over.kind, maps[here], found, transpose) for here, found in far.items()})
                far = met.farther(maps, over)()
            return {here: state for here, (_, state) in far.items()}

        return states

    @staticmethod
    def _after(inputs: Recurrence, near: Map, far: Map, transpose: bool) -> Map:
        m, e = near
        assert m is not None
        return None if far[0] is None else inputs.compose(m, far[0], transpose=transpose), inputs.join(m, far[1], e, transpose=transpose)


def _chain(plan: Plan, span: Span, step: int) -> list[Span]:
    """The spans before (step -1) or after (+1) this one that its document crosses, farthest first."""
    chain: list[Span] = []
    if (span.head if step < 0 else span.tail) is None:
        return chain
    while True:
        span = plan.spans[span.number + step]
        chain.append(span)
        if not span.inside:
            return chain[::-1]


def _wanted(plan: Plan, reader: int, owner: int, step: int) -> list[Span]:
    """The owner's spans whose maps the reader folds."""
    return sorted({other for span in plan.of(reader) for other in _chain(plan, span, step) if other.rank == owner})


def _lengths(plan: Plan, step: int) -> list[int]:
    """How many spans each one's chain has, by number."""
    found = [0] * len(plan.spans)
    for span in plan.spans if step < 0 else reversed(plan.spans):
        if (span.head if step < 0 else span.tail) is not None:
            near = plan.spans[span.number + step]
            found[span.number] = 1 + (found[near.number] if near.inside else 0)
    return found


def _round(plan: Plan, met: list[Meeting]) -> Round:
    """Of all ranks' meetings those of this one."""
    rank = plan.layout.rank
    found = Round([], {}, {})
    for meeting in met:
        here, there = plan.spans[meeting[0]].rank, plan.spans[meeting[1]].rank
        if here == there == rank:
            found.local.append(meeting)
        elif here == rank:
            found.received.setdefault(there, []).append(meeting)
        elif there == rank:
            found.sent.setdefault(here, []).append(meeting)
    return found


def _traffic(plan: Plan, step: int) -> Gathered | Composed:
    rank, own = plan.layout.rank, plan.of(plan.layout.rank)
    lengths = _lengths(plan, step)
    if max(lengths, default=0) <= LONGEST:
        others = [r for r in range(plan.layout.size) if r != rank]
        received = {r: spans for r in others if (spans := _wanted(plan, rank, r, step))}
        sent = {r: spans for r in others if (spans := _wanted(plan, r, rank, step))}
        return Gathered(received, sent, {s.number: chain for s in own if (chain := _chain(plan, s, step))})
    # as many spans as the map of a span has still to meet; one at the document's end has met all
    left = [length if span.inside else 0 for span, length in zip(plan.spans, lengths, strict=True)]
    rounds = []
    reach = 1
    while reach <= max(left):
        meet = [(s.number, s.number + step * reach) for s in plan.spans if left[s.number] >= reach]
        rounds.append(_round(plan, [(here, there, _tokens(plan, there, step * reach) if left[there] >= reach else 0) for here, there in meet]))
        reach *= 2
    return Composed(rounds, _round(plan, [(s.number, s.number + step, 0) for s in plan.spans if lengths[s.number]]))


def _tokens(plan: Plan, first: int, count: int) -> int:
    """Of |count| spans from one on, towards later ones or, below 0, towards earlier ones."""
    last = first + count - (1 if count > 0 else -1)
    return max(plan.spans[first].stop, plan.spans[last].stop) - min(plan.spans[first].start, plan.spans[last].start)


def scan(plan: Plan) -> Scan:
    """Who sends whom which maps, and what each rank makes of them."""
    own = plan.of(plan.layout.rank)
    heads = [(plan.index(s.head), s.number) for s in own if s.head is not None]
    tails = [(plan.index(s.tail), s.number) for s in own if s.tail is not None]
    rows = {plan.index(segment): segment.rows for s in own for segment in (s.head, s.tail) if segment is not None}
    return Scan(len(plan.segments), heads, tails, rows, _traffic(plan, -1), _traffic(plan, +1))


class Swap(NamedTuple):
    """Maps to other ranks and from them."""

    kind: Recurrence  # whose these are; of its tensors of tokens the shapes alone
    messages: Messages
    device: torch.device

    @classmethod
    def of(cls, inputs: Recurrence, messages: Messages) -> "Swap":
        kind = inputs.given({name: x.detach() if name in inputs.WHOLE else x.detach().to("meta") for name, x in inputs.tensors.items()})
        return cls(kind, messages, inputs.values.device)

    def swap(self, sends: dict[int, list[Map]], receives: dict[int, list[tuple[int, int]]]) -> Callable[[], dict[int, Map]]:
        """Starts to send; gives what waits for the others' maps under the numbers given here, each with an M of so many tokens, 0: without. An M that
        follows from these does not travel."""
        kind, steady = self.kind, self.kind.steady
        sizes = (0 if steady else torch.Size(kind.map_shape).numel(), torch.Size(kind.state_shape).numel())
        flat = {r: torch.cat([x.flatten() for m in maps for x in m[steady:] if x is not None]) for r, maps in sends.items()}
        rows = {r: sum(sizes[1] + sizes[0] * (tokens > 0) for _, tokens in expected) for r, expected in receives.items()}
        transit = self.messages.post("scan", flat, rows, dtype=kind.wide, device=self.device)

        def arrived() -> dict[int, Map]:
            found, maps = transit.wait(), {}
            for r, expected in receives.items():
                left = found[r]
                for number, tokens in expected:
                    m = kind.power(tokens) if tokens and steady else None
                    if tokens and not steady:
                        m, left = left[: sizes[0]].view(kind.map_shape), left[sizes[0] :]
                    maps[number], left = (m, left[: sizes[1]].view(kind.state_shape)), left[sizes[1] :]
            return maps

        return arrived


class ScanCarry(NamedTuple):
    """The `Carry` of one recurrence of this rank. No gradient flows through it: that of states is what `gradients` gives."""

    plan: Scan
    over: Swap
    tape: Tape

    @classmethod
    def of(cls, inputs: Recurrence, plan: Scan, messages: Messages, tape: Tape) -> "ScanCarry":
        return cls(plan, Swap.of(inputs, messages), tape)

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(segment for segment, _ in self.plan.heads)

    @property
    def tails(self) -> tuple[int, ...]:
        return tuple(segment for segment, _ in self.plan.tails)

    @torch.no_grad()
    def states(self, ends: Callable[[], dict[int, Map]]) -> Callable[[], tuple[By, By]]:
        if self.tape.replays:
            return lambda: self.tape.keep(None)
        own = ends()
        arriving = self.plan.forward.carry({span: own[segment] for segment, span in self.plan.tails}, self.over, transpose=False)

        @torch.no_grad()
        def arrived() -> tuple[By, By]:
            states = arriving()
            return {segment: states[span] for segment, span in self.plan.heads}, {n: m for n, (m, _) in own.items() if m is not None}

        return lambda: self.tape.keep(arrived)

    def gradients(self, own: By, matrices: By) -> Callable[[], By]:
        maps: dict[int, Map] = {span: (matrices.get(segment), own[segment]) for segment, span in self.plan.heads}
        arriving = self.plan.backward.carry(maps, self.over, transpose=True)

        def arrived() -> By:
            states = arriving()
            return {segment: states[span] for segment, span in self.plan.tails}

        return arrived

    def stacked(self, states: By, inputs: Recurrence) -> Tensor | None:
        """[N, ...] of all segments, zeros for those that are not there; None: none is"""
        if not states:
            return None
        found = inputs.values.new_zeros(self.plan.segments, *inputs.state_shape, dtype=inputs.wide)
        for segment, state in states.items():
            found[segment] = state
        return found


class _StateGradients(torch.autograd.Function):
    """Passes the outputs through; in the backward gives each outgoing state the gradient that later spans have for it."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, final: Tensor | None, kind: tuple[Recurrence, list[str]], matrices: By, carry: ScanCarry, *tensors: Tensor
    ) -> Tensor:
        """kind: the recurrence without its tensors, and the names of these."""
        ctx.save_for_backward(*matrices.values(), *tensors)
        ctx.scan = kind, list(matrices), carry
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (kind, names), numbers, carry = ctx.scan
        saved = [x.detach() for x in ctx.saved_tensors]  # once: checkpointing gives them once
        matrices = dict(zip(numbers, saved, strict=False))
        inputs = kind.given(dict(zip(names, saved[len(numbers) :], strict=True)))
        heads = {n: slice(*rows) for n, rows in carry.plan.rows.items()}
        own = {n: inputs.rows(rows.start, rows.stop).state_gradient(dy[rows]) for n, rows in heads.items() if n in carry.heads}
        return dy, carry.stacked(carry.gradients(own, matrices)(), inputs), *[None] * (3 + len(names))


def recurrence_over_ranks(
    inputs: Recurrence, cu_seqlens: Tensor, plan: Scan, messages: Messages, tape: Tape, *, final: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over this rank's segments, their states carried in from the ranks before: its outputs, and where asked for the state after
    each segment [N, ...], whose gradient does not go to other ranks."""
    carry = ScanCarry.of(inputs, plan, messages, tape)
    if (found := inputs.over_ranks(cu_seqlens, carry, final=final)) is not None:
        return found
    states, matrices = carry.states(lambda: {n: inputs.rows(*plan.rows[n]).ends(n in carry.heads) for n in carry.tails})()
    output, after = inputs.run(cu_seqlens, carry.stacked(states, inputs), final=final or bool(plan.tails))
    tensors = inputs.tensors
    kind = inputs.given(dict.fromkeys(tensors)), list(tensors)
    return _StateGradients.apply(output, after if plan.tails else None, kind, matrices, carry, *tensors.values()), after  # type: ignore[no-untyped-call]
