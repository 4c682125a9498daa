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

from ltrain.kernels.linear_recurrence import linear_recurrence
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


class Inputs(NamedTuple):
    """One layer's recurrence on this rank: q, k [T, Hk, K], v [T, H, V], decay [T, H] or [T, H, K] or None, beta [T, H] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None

    def rows(self, segment: Segment) -> "Inputs":
        a, b = segment.rows
        return Inputs(*(None if x is None else x[a:b] for x in self))  # type: ignore[arg-type]

    @property
    def wide(self) -> torch.dtype:
        """Of the states: float32, or float64 where the inputs are."""
        return torch.promote_types(self.v.dtype, torch.float32)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.v.shape[1], self.k.shape[2], self.v.shape[2]

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Of M: [H, K, K] for the delta rule; without it M is diagonal, [H, K] or [H] as the decay, or the identity, empty."""
        heads, width, _ = self.state_shape
        if self.beta is not None:
            return heads, width, width
        return (0,) if self.decay is None else tuple(self.decay.shape[1:])


Map = tuple[Tensor | None, Tensor]  # M where a document comes in and leaves, and E (or dE) [H, K, V]


def apply(m: Tensor, state: Tensor, *, transpose: bool = False) -> Tensor:
    """M S or M^T S for M as in `Inputs.map_shape`: float64, so that no TF32 product wears a state down over many ranks."""
    if m.numel() == 0:
        return state
    if m.dim() == 3:
        wide = m.double()
        return ((wide.mT if transpose else wide) @ state.double()).to(state.dtype)
    return m.reshape(*m.shape, *([1] * (3 - m.dim()))) * state


def _segment_cu(segment: Segment) -> Tensor:
    return torch.tensor([0, segment.length], dtype=torch.int32)


def _outgoing(inputs: Inputs, spans: list[Span]) -> dict[int, Map]:
    """Each span's map over its tail, from the tail's own tokens."""
    maps: dict[int, Map] = {}
    for span in spans:
        assert span.tail is not None
        part, cu = inputs.rows(span.tail), _segment_cu(span.tail)
        dense = span.inside and inputs.beta is not None
        result = linear_recurrence(
            part.k, part.k, part.v, part.decay, part.beta, cu, scale=1.0, return_final_state=not dense, return_segment_map=dense
        )
        if dense:
            assert result.segment_map is not None
            m, e = result.segment_map
            maps[span.number] = m[0].to(inputs.wide), e[0].to(inputs.wide)
            continue
        assert result.final_state is not None
        diagonal: Tensor | None = None
        if span.inside:
            diagonal = part.v.new_empty(0, dtype=inputs.wide) if part.decay is None else part.decay.sum(0, dtype=inputs.wide).exp()
        maps[span.number] = diagonal, result.final_state[0].to(inputs.wide)
    return maps


def _state_gradients(inputs: Inputs, dy: Tensor, spans: list[Span], scale: float) -> dict[int, Tensor]:
    """dE of each span's head: the gradient of its incoming state [H, K, V] from its own outputs."""
    gradients = {}
    for span in spans:
        assert span.head is not None
        part, cu = inputs.rows(span.head), _segment_cu(span.head)
        with torch.enable_grad():
            state = part.v.new_zeros(1, *inputs.state_shape, dtype=inputs.wide).requires_grad_()
            y = linear_recurrence(part.q, part.k, part.v, part.decay, part.beta, cu, scale=scale, initial_state=state).output
        a, b = span.head.rows
        gradients[span.number] = torch.autograd.grad(y, state, dy[a:b])[0][0]
    return gradients


def _share(maps: dict[int, Map], traffic: tuple[dict[int, list[Span]], dict[int, list[Span]]], inputs: Inputs, messages: Messages) -> dict[int, Map]:
    """This rank's maps and those that it needs of others, by span."""
    received, sent = traffic
    sizes = (torch.Size(inputs.map_shape).numel(), torch.Size(inputs.state_shape).numel())
    sends = {r: torch.cat([x.flatten() for s in spans for x in maps[s.number] if x is not None]) for r, spans in sent.items()}
    receives = {r: sum(sizes[1] + sizes[0] * s.inside for s in spans) for r, spans in received.items()}
    arrived = messages.post("scan", sends, receives, dtype=inputs.wide, device=inputs.v.device).wait()
    maps = dict(maps)
    for r, spans in received.items():
        flat = arrived[r]
        for span in spans:
            m = None
            if span.inside:
                m, flat = flat[: sizes[0]].view(inputs.map_shape), flat[sizes[0] :]
            maps[span.number], flat = (m, flat[: sizes[1]].view(inputs.state_shape)), flat[sizes[1] :]
    return maps


def _fold(chain: list[Span], maps: dict[int, Map], *, transpose: bool = False) -> Tensor:
    """The state (or its gradient) that the chain of spans, farthest first, hands to the next."""
    _, state = maps[chain[0].number]
    for span in chain[1:]:
        m, e = maps[span.number]
        assert m is not None
        state = apply(m, state, transpose=transpose) + e
    return state


def incoming_states(inputs: Inputs, plan: Scan, messages: Messages, tape: Tape) -> tuple[Tensor | None, dict[int, Tensor]]:
    """The state before each local segment [N, H, K, V] (None: all are zero), and M of this rank's spans, for the backward.

    No gradient flows here: `StateGradients` returns that of the outgoing states.
    """

    def exchange() -> tuple[list[Tensor], dict[int, Tensor]]:
        own = _outgoing(inputs, plan.own_tails)
        maps = _share(own, plan.forward, inputs, messages)
        return [_fold(chain, maps) for _, _, chain in plan.heads], {i: m for i, (m, _) in own.items() if m is not None}

    with torch.no_grad():
        states, matrices = tape.keep(exchange)
        if not plan.heads:
            return None, matrices
        initial = inputs.v.new_zeros(plan.segments, *inputs.state_shape, dtype=inputs.wide)
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
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        matrices: dict[int, Tensor],
        plan: Scan,
        messages: Messages,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, decay, beta, *matrices.values())
        ctx.scan = plan, messages, scale, list(matrices)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan, messages, scale, spans = ctx.scan
        q, k, v, decay, beta, *saved = ctx.saved_tensors  # once: checkpointing gives them once
        inputs, matrices = Inputs(q, k, v, decay, beta), dict(zip(spans, saved, strict=True))
        own: dict[int, Map] = {i: (matrices.get(i), de) for i, de in _state_gradients(inputs, dy, plan.own_heads, scale).items()}
        maps = _share(own, plan.backward, inputs, messages)
        dfinal = None
        if plan.tails:
            dfinal = inputs.v.new_zeros(plan.segments, *inputs.state_shape, dtype=inputs.wide)
            for number, _, chain in plan.tails:
                dfinal[number] = _fold(chain, maps, transpose=True)
        return dy, dfinal, *([None] * 9)


def linear_recurrence_over_ranks(inputs: Inputs, cu_seqlens: Tensor, plan: Scan, messages: Messages, tape: Tape, *, scale: float) -> Tensor:
    """The recurrence over this rank's segments, their states carried in from the ranks before -> [T, H, V]."""
    initial, matrices = incoming_states(inputs, plan, messages, tape)
    result = linear_recurrence(*inputs, cu_seqlens, scale=scale, initial_state=initial, return_final_state=bool(plan.tails))
    return StateGradients.apply(result.output, result.final_state, *inputs, matrices, plan, messages, scale)  # type: ignore[no-any-return, no-untyped-call]
