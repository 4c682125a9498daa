"""Recurrent states over context ranks: the spans' affine maps, gathered where these are few and scanned where they are many.

A segment turns the state before it into the state after it, S_out = M S_in + E, and maps compose:
(M2, E2) after (M1, E1) is (M2 M1, M2 E1 + E2). A document start cuts the chain, so only segments that leave their span
send anything: E, and M where the same document also came in. Each rank folds what it received into the states its heads
start from, then runs the kernel once over all its tokens.

The backward runs the other way. With dE the gradient of a segment's incoming state when nothing flows into its outgoing
one, dS_in = M^T dS_out + dE. Given S_in and dS_out the local backward is exact, so M needs no gradient of its own (the
scheme of Sun et al. 2024, LASP, and of Yang et al. 2024 for the delta rule). Beside the kernels over all tokens there
are only passes of states: forward, those of the tails and of their M; backward, that of the heads' gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.recurrence import Recurrence
from ltrain.model.sequence import Tape
from ltrain.parallel.context.layout import Plan, Segment, Span
from ltrain.parallel.context.messages import Messages

LONGEST = 8  # spans of a document before one, up to which all maps come at once; beyond, rounds of waiting cost less than so many maps


class Scan(NamedTuple):
    """Which maps this rank has, and how they become states. Forward: towards later spans; backward: towards earlier ones."""

    segments: int
    heads: list[tuple[int, int]]  # segment number, and its span's, of those that continue
    tails: list[tuple[int, int]]  # of those that go on
    own_tails: list[Span]
    own_heads: list[Span]
    forward: "Gathered | Composed"
    backward: "Gathered | Composed"

    @property
    def needed(self) -> bool:
        return bool(self.heads or self.tails)


Map = tuple[Tensor | None, Tensor]  # M where a document comes in and leaves, and E (or dE)
By = dict[int, Tensor]  # by number of the span


class Gathered(NamedTuple):
    """Each map goes to every rank that folds it."""

    received: dict[int, list[Span]]  # rank -> its spans
    sent: dict[int, list[Span]]  # rank -> this rank's spans
    chains: dict[int, list[Span]]  # span of this rank -> those that its document crosses on that side, farthest first

    def carry(self, own: dict[int, Map], inputs: Recurrence, messages: Messages, *, transpose: bool) -> By:
        """The state (or its gradient) that each chain hands to its span."""
        sends = {r: [own[s.number] for s in spans] for r, spans in self.sent.items()}
        receives = {r: [(s.number, s.stop - s.start if s.inside else 0) for s in spans] for r, spans in self.received.items()}
        maps = own | _swapped(sends, receives, inputs, messages)
        states = {}
        for number, (first, *rest) in self.chains.items():
            _, states[number] = maps[first.number]
            for span in rest:
                m, e = maps[span.number]
                assert m is not None
                states[number] = inputs.join(m, states[number], e, transpose=transpose)
        return states


Meeting = tuple[int, int, int]  # a span, the farther one whose map it gets, and the tokens that its M is of, 0: it has none


class Round(NamedTuple):
    local: list[Meeting]
    received: dict[int, list[Meeting]]  # rank -> in the order of the stream
    sent: dict[int, list[Meeting]]

    def farther(self, maps: dict[int, Map], inputs: Recurrence, messages: Messages) -> dict[int, Map]:
        """By the span that gets it."""

        def of(number: int, tokens: int) -> Map:
            m, e = maps[number]
            return m if tokens else None, e

        sends = {r: [of(there, tokens) for _, there, tokens in met] for r, met in self.sent.items()}
        receives = {r: [(here, tokens) for here, _, tokens in met] for r, met in self.received.items()}
        return {here: of(there, tokens) for here, there, tokens in self.local} | _swapped(sends, receives, inputs, messages)


class Composed(NamedTuple):
    """Maps of neighbours become those of twice as many spans, round after round (Hillis and Steele 1986): where a document crosses n spans, one sends
    log2 n maps and not n. Then each span gets the state of the one next to it.
    """

    rounds: list[Round]
    last: Round

    def carry(self, own: dict[int, Map], inputs: Recurrence, messages: Messages, *, transpose: bool) -> By:
        maps = dict(own)
        for met in self.rounds:
            maps |= {here: self._after(inputs, maps[here], far, transpose) for here, far in met.farther(maps, inputs, messages).items()}
        return {here: state for here, (_, state) in self.last.farther(maps, inputs, messages).items()}

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
    own_tails, own_heads = [s for s in own if s.tail is not None], [s for s in own if s.head is not None]
    return Scan(len(plan.segments), heads, tails, own_tails, own_heads, _traffic(plan, -1), _traffic(plan, +1))


def _of(inputs: Recurrence, segment: Segment) -> Recurrence:
    return inputs.rows(*segment.rows)


def _state_gradients(inputs: Recurrence, dy: Tensor, spans: list[Span]) -> dict[int, Tensor]:
    """dE of each span's head: the gradient of its incoming state from its own outputs."""
    heads = {span.number: span.head for span in spans if span.head is not None}
    return {number: _of(inputs, head).state_gradient(dy[slice(*head.rows)]) for number, head in heads.items()}


def _swapped(sends: dict[int, list[Map]], receives: dict[int, list[tuple[int, int]]], inputs: Recurrence, messages: Messages) -> dict[int, Map]:
    """Maps to other ranks, and theirs under the numbers given here, each with an M of so many tokens, 0: without. An M that follows from these
    does not travel."""
    steady = inputs.steady
    sizes = (0 if steady else torch.Size(inputs.map_shape).numel(), torch.Size(inputs.state_shape).numel())
    flat = {r: torch.cat([x.flatten() for m in maps for x in m[steady:] if x is not None]) for r, maps in sends.items()}
    rows = {r: sum(sizes[1] + sizes[0] * (tokens > 0) for _, tokens in expected) for r, expected in receives.items()}
    arrived = messages.post("scan", flat, rows, dtype=inputs.wide, device=inputs.values.device).wait()
    maps: dict[int, Map] = {}
    for r, expected in receives.items():
        left = arrived[r]
        for number, tokens in expected:
            m = inputs.power(tokens) if tokens and steady else None
            if tokens and not steady:
                m, left = left[: sizes[0]].view(inputs.map_shape), left[sizes[0] :]
            maps[number], left = (m, left[: sizes[1]].view(inputs.state_shape)), left[sizes[1] :]
    return maps


def incoming_states(inputs: Recurrence, plan: Scan, messages: Messages, tape: Tape) -> tuple[Tensor | None, dict[int, Tensor]]:
    """The state before each local segment [N, ...] (None: all are zero), and M of this rank's spans, for the backward.

    No gradient flows here: `StateGradients` returns that of the outgoing states.
    """

    def exchange() -> tuple[list[Tensor], dict[int, Tensor]]:
        own = {span.number: _of(inputs, span.tail).ends(span.inside) for span in plan.own_tails if span.tail is not None}
        states = plan.forward.carry(own, inputs, messages, transpose=False)
        return [states[span] for _, span in plan.heads], {i: m for i, (m, _) in own.items() if m is not None}

    with torch.no_grad():
        states, matrices = tape.keep(exchange)
        if not plan.heads:
            return None, matrices
        initial = inputs.values.new_zeros(plan.segments, *inputs.state_shape, dtype=inputs.wide)
        for (number, _), state in zip(plan.heads, states, strict=True):
            initial[number] = state
        return initial, matrices


class StateGradients(torch.autograd.Function):
    """Passes the outputs through; in the backward gives each outgoing state the gradient that later spans have for it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        final: Tensor | None,
        kind: tuple[Recurrence, list[str]],
        matrices: dict[int, Tensor],
        plan: Scan,
        messages: Messages,
        *tensors: Tensor,
    ) -> Tensor:
        """kind: the recurrence without its tensors, and the names of these."""
        ctx.save_for_backward(*matrices.values(), *tensors)
        ctx.scan = kind, list(matrices), plan, messages
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (kind, names), spans, plan, messages = ctx.scan
        saved = [x.detach() for x in ctx.saved_tensors]  # once: checkpointing gives them once
        matrices = dict(zip(spans, saved, strict=False))
        inputs = kind.given(dict(zip(names, saved[len(spans) :], strict=True)))
        own: dict[int, Map] = {i: (matrices.get(i), de) for i, de in _state_gradients(inputs, dy, plan.own_heads).items()}
        states = plan.backward.carry(own, inputs, messages, transpose=True)
        dfinal = None
        if plan.tails:
            dfinal = inputs.values.new_zeros(plan.segments, *inputs.state_shape, dtype=inputs.wide)
            for number, span in plan.tails:
                dfinal[number] = states[span]
        return dy, dfinal, *[None] * (4 + len(names))


def recurrence_over_ranks(inputs: Recurrence, cu_seqlens: Tensor, plan: Scan, messages: Messages, tape: Tape) -> Tensor:
    """The recurrence over this rank's segments, their states carried in from the ranks before: its outputs."""
    initial, matrices = incoming_states(inputs, plan, messages, tape)
    output, final = inputs.run(cu_seqlens, initial, final=bool(plan.tails))
    tensors = inputs.tensors
    kind = inputs.given(dict.fromkeys(tensors)), list(tensors)
    return StateGradients.apply(output, final, kind, matrices, plan, messages, *tensors.values())  # type: ignore[no-any-return, no-untyped-call]
