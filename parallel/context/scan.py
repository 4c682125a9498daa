"""Recurrent states over context ranks: an associative scan of the spans' affine maps.

A segment turns the state before it into the state after it, S_out = M S_in + E, and maps compose:
(M2, E2) after (M1, E1) is (M2 M1, M2 E1 + E2). A document start cuts the chain, so only segments that leave their span
send anything: E, and M where the same document also came in. Each rank folds what it received into the states its heads
start from, then runs the kernel once over all its tokens.

The backward runs the other way. With dE the gradient of a segment's incoming state when nothing flows into its outgoing
one, dS_in = M^T dS_out + dE. Given S_in and dS_out the local backward is exact, so M needs no gradient of its own (the
scheme of Sun et al. 2024, LASP, and of Yang et al. 2024 for the delta rule). Kernel passes beside the one over all
tokens: forward, one over the tails; backward, a forward and a state-only backward over the heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.recurrence import Recurrence
from ltrain.model.sequence import Tape
from ltrain.parallel.context.layout import Plan, Segment, Span
from ltrain.parallel.context.messages import Messages


class Scan(NamedTuple):
    """Which spans' maps this rank has, sends and folds. Forward: towards later spans; backward: towards earlier ones."""

    segments: int
    heads: list[tuple[int, Segment, list[Span]]]  # segment number, segment, spans before it from the document's first
    tails: list[tuple[int, Segment, list[Span]]]  # segment number, segment, spans after it from the document's last
    own_tails: list[Span]
    own_heads: list[Span]
    forward: tuple[dict[int, list[Span]], dict[int, list[Span]]]  # received from, sent to: rank -> spans
    backward: tuple[dict[int, list[Span]], dict[int, list[Span]]]

    @property
    def needed(self) -> bool:
        return bool(self.heads or self.tails)


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


def _traffic(plan: Plan, step: int) -> tuple[dict[int, list[Span]], dict[int, list[Span]]]:
    rank, others = plan.layout.rank, [r for r in range(plan.layout.size) if r != plan.layout.rank]
    received = {r: spans for r in others if (spans := _wanted(plan, rank, r, step))}
    sent = {r: spans for r in others if (spans := _wanted(plan, r, rank, step))}
    return received, sent


def scan(plan: Plan) -> Scan:
    """Who sends whom which maps, and how each rank folds them."""
    own = plan.of(plan.layout.rank)
    heads = [(plan.index(s.head), s.head, _chain(plan, s, -1)) for s in own if s.head is not None]
    tails = [(plan.index(s.tail), s.tail, _chain(plan, s, +1)) for s in own if s.tail is not None]
    own_tails, own_heads = [s for s in own if s.tail is not None], [s for s in own if s.head is not None]
    return Scan(len(plan.segments), heads, tails, own_tails, own_heads, _traffic(plan, -1), _traffic(plan, +1))


Map = tuple[Tensor | None, Tensor]  # M where a document comes in and leaves, and E (or dE)


def _of(inputs: Recurrence, segment: Segment) -> Recurrence:
    return inputs.rows(*segment.rows)


def _state_gradients(inputs: Recurrence, dy: Tensor, spans: list[Span]) -> dict[int, Tensor]:
    """dE of each span's head: the gradient of its incoming state from its own outputs."""
    gradients = {}
    for span in spans:
        assert span.head is not None
        part = _of(inputs, span.head)
        with torch.enable_grad():
            state = part.values.new_zeros(1, *inputs.state_shape, dtype=inputs.wide).requires_grad_()
            y, _ = part.run(part.alone, state)
        a, b = span.head.rows
        gradients[span.number] = torch.autograd.grad(y, state, dy[a:b])[0][0]
    return gradients


def _share(
    maps: dict[int, Map], traffic: tuple[dict[int, list[Span]], dict[int, list[Span]]], inputs: Recurrence, messages: Messages
) -> dict[int, Map]:
    """This rank's maps and those that it needs of others, by span."""
    received, sent = traffic
    sizes = (torch.Size(inputs.map_shape).numel(), torch.Size(inputs.state_shape).numel())
    sends = {r: torch.cat([x.flatten() for s in spans for x in maps[s.number] if x is not None]) for r, spans in sent.items()}
    receives = {r: sum(sizes[1] + sizes[0] * s.inside for s in spans) for r, spans in received.items()}
    arrived = messages.post("scan", sends, receives, dtype=inputs.wide, device=inputs.values.device).wait()
    maps = dict(maps)
    for r, spans in received.items():
        flat = arrived[r]
        for span in spans:
            m = None
            if span.inside:
                m, flat = flat[: sizes[0]].view(inputs.map_shape), flat[sizes[0] :]
            maps[span.number], flat = (m, flat[: sizes[1]].view(inputs.state_shape)), flat[sizes[1] :]
    return maps


def _fold(inputs: Recurrence, chain: list[Span], maps: dict[int, Map], *, transpose: bool = False) -> Tensor:
    """The state (or its gradient) that the chain of spans, farthest first, hands to the next."""
    _, state = maps[chain[0].number]
    for span in chain[1:]:
        m, e = maps[span.number]
        assert m is not None
        state = inputs.join(m, state, e, transpose=transpose)
    return state


def incoming_states(inputs: Recurrence, plan: Scan, messages: Messages, tape: Tape) -> tuple[Tensor | None, dict[int, Tensor]]:
    """The state before each local segment [N, ...] (None: all are zero), and M of this rank's spans, for the backward.

    No gradient flows here: `StateGradients` returns that of the outgoing states.
    """

    def exchange() -> tuple[list[Tensor], dict[int, Tensor]]:
        own = {span.number: _of(inputs, span.tail).ends(span.inside) for span in plan.own_tails if span.tail is not None}
        maps = _share(own, plan.forward, inputs, messages)
        return [_fold(inputs, chain, maps) for _, _, chain in plan.heads], {i: m for i, (m, _) in own.items() if m is not None}

    with torch.no_grad():
        states, matrices = tape.keep(exchange)
        if not plan.heads:
            return None, matrices
        initial = inputs.values.new_zeros(plan.segments, *inputs.state_shape, dtype=inputs.wide)
        for (number, _, _), state in zip(plan.heads, states, strict=True):
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
        maps = _share(own, plan.backward, inputs, messages)
        dfinal = None
        if plan.tails:
            dfinal = inputs.values.new_zeros(plan.segments, *inputs.state_shape, dtype=inputs.wide)
            for number, _, chain in plan.tails:
                dfinal[number] = _fold(inputs, chain, maps, transpose=True)
        return dy, dfinal, *[None] * (4 + len(names))


def recurrence_over_ranks(inputs: Recurrence, cu_seqlens: Tensor, plan: Scan, messages: Messages, tape: Tape) -> Tensor:
    """The recurrence over this rank's segments, their states carried in from the ranks before: its outputs."""
    initial, matrices = incoming_states(inputs, plan, messages, tape)
    output, final = inputs.run(cu_seqlens, initial, final=bool(plan.tails))
    tensors = inputs.tensors
    kind = inputs.given(dict.fromkeys(tensors)), list(tensors)
    return StateGradients.apply(output, final, kind, matrices, plan, messages, *tensors.values())  # type: ignore[no-any-return, no-untyped-call]
