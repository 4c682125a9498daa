"""Causal attention over context ranks: keys and values travel, queries and outputs stay.

The ring of Liu et al. 2023 (Ring Attention) on packed documents. In step s of P - 1, rank r works on keys and values of
rank r - s. They come straight from their owner instead of through the neighbour, which lets each message hold only the
rows that its receiver's masks can see: (P-1)/P of K and V is the most that arrives, for a causal document in zigzag it
is at most 3/4 of that, for a window the rows that it reaches over a cut and the anchors once, for chunks those of a chunk
that is cut, and nothing travels between ranks that share no document. Step s + 1 is under way while step s
is computed. The outputs of the steps merge by log-sum-exp. The backward is a second ring; a step's key and value
gradients go straight back to their owner, in float32 or wider. Keys and values that are made of something smaller
(the latents of multi-head latent attention) may be made on arrival: then that travels, and its gradient.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.attention import Mask, Pair, Score, backward_pairs, forward_pairs, merge, seen, sinks_gradient, with_sinks
from ltrain.model.sequence import Tape
from ltrain.parallel.context.layout import Plan, Segment
from ltrain.parallel.context.messages import Messages, Transit

Rows = list[tuple[int, int]]  # [start, stop) among a rank's tokens
Starts = Mapping[int, int]  # document -> position
NONE = Transit([], [], {})


class Reads(NamedTuple):
    """What one rank's queries see on another rank."""

    queries: Rows  # of the reader
    keys: Rows  # of the owner
    pairs: list[Pair]  # in numbers of the rows above, laid end to end


class Step(NamedTuple):
    """One step of the ring, as this rank sees it."""

    source: int
    destination: int
    reads: Reads  # what this rank works on: keys of `source`
    sent: Rows  # rows of this rank's keys that `destination` works on


class Ring(NamedTuple):
    local: list[Pair]  # inside this rank
    steps: list[Step]  # none, where this rank shares no document; else all, so that two ranks post in the same order
    alone: bool  # no segment of this rank has to do with another one


def count(rows: Rows) -> int:
    return sum(stop - start for start, stop in rows)


def take(x: Tensor, rows: Rows) -> Tensor:
    """x [T, ...] -> its `rows` end to end."""
    parts = [x[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x[:0]


def _between(reader: Segment, owner: Segment, mask: Mask, starts: Starts) -> list[Pair]:
    """What tokens of one segment see of another one of the same document, in rows of their ranks."""
    moved = starts.get(reader.document, 0) - reader.begin  # from places in the stream to positions
    queries, keys = ((s.start + moved, s.stop + moved) for s in (reader, owner))
    return [pair.moved(reader.local - queries[0], owner.local - keys[0]) for pair in seen(queries, keys, mask)]


def _across(plan: Plan, reader: int, owner: int, mask: Mask, starts: Starts) -> list[Pair]:
    """What the reader's heads see of those tails of the owner that are earlier parts of the same documents."""
    tails = [span.tail for span in plan.of(owner) if span.tail is not None]
    heads = [span.head for span in plan.of(reader) if span.head is not None]
    met = [(head, tail) for head in heads for tail in tails if tail.document == head.document and tail.stop <= head.start]
    return [pair for head, tail in met for pair in _between(head, tail, mask, starts)]


def _packed(rows: Rows) -> tuple[Rows, Callable[[int], int]]:
    """The same rows once each, in order, and where one of them lies when these are laid end to end."""
    once: Rows = []
    for start, stop in sorted(rows):
        if once and start <= once[-1][1]:
            once[-1] = once[-1][0], max(once[-1][1], stop)
        else:
            once.append((start, stop))
    places = list(accumulate((stop - start for start, stop in once), initial=0))
    starts = [start for start, _ in once]

    def place(row: int) -> int:
        i = bisect_right(starts, row) - 1
        return places[i] + row - starts[i]

    return once, place


def _reads(plan: Plan, reader: int, owner: int, mask: Mask, starts: Starts) -> Reads:
    pairs = _across(plan, reader, owner, mask, starts)
    queries, place_query = _packed([(p.q_start, p.q_start + p.q_len) for p in pairs])
    keys, place_key = _packed([(p.k_start, p.k_start + p.k_len) for p in pairs])
    return Reads(queries, keys, [p._replace(q_start=place_query(p.q_start), k_start=place_key(p.k_start)) for p in pairs])


def ring(plan: Plan, mask: Mask, starts: Starts) -> Ring:
    """Which rows meet in which step. Every rank makes the same choice for a pair of ranks.

    starts: the position of the first token that the stream has of a document, where that is not 0 and a segment of it is here.
    """
    rank, size = plan.layout.rank, plan.layout.size
    own = [pair for s in plan.segments for pair in _between(s, s, mask, starts)]
    across = _across(plan, rank, rank, mask, starts)
    steps = []
    for s in range(1, size):
        source, destination = (rank - s) % size, (rank + s) % size
        sent = _reads(plan, destination, rank, mask, starts).keys
        steps.append(Step(source, destination, _reads(plan, rank, source, mask, starts), sent))
    shared = any(step.reads.pairs or step.sent for step in steps)
    return Ring(own + across, steps if shared else [], not shared and not across)


Carried = tuple[Tensor, ...]  # what travels, [T, ...] each: K and V, or what they are made of on arrival


def _send(step: Step, carried: Carried, messages: Messages) -> Transit:
    """The rows of this step in one flat message, one tensor after another."""
    sends = {step.destination: torch.cat([take(x, step.sent).flatten() for x in carried])} if step.sent else {}
    receives = {step.source: count(step.reads.keys) * _width(carried)} if step.reads.keys else {}
    return messages.post("ring", sends, receives, dtype=carried[0].dtype, device=carried[0].device)


def _width(carried: Carried) -> int:
    return sum(x.shape[1:].numel() for x in carried)


def _split(flat: Tensor, rows: int, carried: Carried) -> list[Tensor]:
    """A flat message of `rows` rows -> [rows, ...] of each tensor."""
    parts = flat.split([rows * x.shape[1:].numel() for x in carried])
    return [part.view(rows, *x.shape[1:]) for part, x in zip(parts, carried, strict=True)]


class Expansion(NamedTuple):
    """K and V of what travels. weight: None where these travel themselves."""

    weight: Tensor | None
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None

    def __call__(self, arrived: list[Tensor]) -> tuple[Tensor, Tensor]:
        if self.expand is None or self.weight is None:
            return arrived[0], arrived[1]
        return self.expand(arrived[0], self.weight)

    def backward(self, arrived: list[Tensor], gradients: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor | None]:
        """What `gradients` gives for K and V, as gradients of what has arrived and of the weight."""
        if self.expand is None or self.weight is None:
            return list(gradients(arrived[0], arrived[1])), None
        leaves = arrived[0].detach().requires_grad_(), self.weight.detach().requires_grad_()
        with torch.enable_grad():
            k, v = self.expand(*leaves)
        dk, dv = gradients(k.detach(), v.detach())
        drows, dweight = torch.autograd.grad((k, v), leaves, (dk.to(k.dtype), dv.to(v.dtype)))
        return [drows], dweight


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    carried: Carried,
    expansion: Expansion,
    plan: Ring,
    messages: Messages,
    scale: float,
    score: Score,
) -> tuple[Tensor, Tensor]:
    transit = _send(plan.steps[0], carried, messages) if plan.steps else NONE
    out, lse = forward_pairs(q, k, v, plan.local, scale=scale, score=score)  # [T, H, Dv], [T, H]
    for i, step in enumerate(plan.steps):
        arrived = transit.wait()
        if i + 1 < len(plan.steps):
            transit = _send(plan.steps[i + 1], carried, messages)
        if not step.reads.pairs:
            continue
        k_step, v_step = expansion(_split(arrived[step.source], count(step.reads.keys), carried))
        out_step, lse_step = forward_pairs(take(q, step.reads.queries), k_step, v_step, step.reads.pairs, scale=scale, score=score)
        done = 0
        for a, b in step.reads.queries:
            part = slice(done, done + b - a)
            out[a:b], lse[a:b] = merge(out[a:b], lse[a:b], out_step[part], lse_step[part])
            done += b - a
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out.to(v.dtype), lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    carried: Carried,
    expansion: Expansion,
    plan: Ring,
    messages: Messages,
    scale: float,
    score: Score,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Gradients of q, k and v; of what was carried (k and v themselves: among the first), of the weight and of the bias."""
    transit = _send(plan.steps[0], carried, messages) if plan.steps else NONE
    dq, dk, dv, dbias = backward_pairs(dout, q, k, v, out, lse, plan.local, scale=scale, score=score)
    expanded = expansion.weight is not None
    home = [x.new_zeros(x.shape, dtype=dk.dtype) for x in carried] if expanded else [dk, dv]
    dweight = None
    homing: list[tuple[Step, Transit]] = []
    for i, step in enumerate(plan.steps):
        arrived = transit.wait()
        if i + 1 < len(plan.steps):
            transit = _send(plan.steps[i + 1], carried, messages)
        sends: dict[int, Tensor] = {}
        if step.reads.pairs:

            def gradients(k_step: Tensor, v_step: Tensor, step: Step = step) -> tuple[Tensor, Tensor]:
                nonlocal dbias
                q_step, dout_step, out_step, lse_step = (take(x, step.reads.queries) for x in (q, dout, out, lse))
                dq_step, dk_step, dv_step, dbias_step = backward_pairs(
                    dout_step, q_step, k_step, v_step, out_step, lse_step, step.reads.pairs, scale=scale, score=score
                )
                dbias = dbias if dbias_step is None else dbias_step if dbias is None else dbias + dbias_step
                _add([dq], [dq_step], step.reads.queries)
                return dk_step, dv_step

            found, dweight_step = expansion.backward(_split(arrived[step.source], count(step.reads.keys), carried), gradients)
            sends = {step.source: torch.cat([x.flatten() for x in found])}
            if dweight_step is not None:
                dweight = dweight_step if dweight is None else dweight + dweight_step
        receives = {step.destination: count(step.sent) * _width(carried)} if step.sent else {}
        # K and V come home in float32 or wider; what they were made of, as its own products gave it
        travelling = carried[0].dtype if expanded else dk.dtype
        homing.append((step, messages.post("ring", sends, receives, dtype=travelling, device=dk.device)))
        if i:  # the gradients of the step before travelled while this one was computed
            _come_home(home, *homing[i - 1])
    if homing:
        _come_home(home, *homing[-1])
    return [dq, dk, dv], home if expanded else [], dweight, dbias


def _come_home(home: list[Tensor], step: Step, transit: Transit) -> None:
    """The gradients of one step, added in the order of the steps."""
    arrived = transit.wait()
    if step.sent:
        _add(home, _split(arrived[step.destination], count(step.sent), tuple(home)), step.sent)


def _add(into: list[Tensor], parts: list[Tensor], rows: Rows) -> None:
    """To these rows of each tensor, one after another, what lies end to end in its part."""
    for x, part in zip(into, parts, strict=True):
        done = 0
        for a, b in rows:
            x[a:b] += part[done : done + b - a]
            done += b - a


class RingAttention(torch.autograd.Function):
    """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv], sinks [H], bias [H, buckets] -> [T, H, Dv]: causal in documents that may cross the ranks.

    latent [T, C] and weight: what travels instead of k and v, and what `expand` makes these of on arrival; None: they travel themselves. Gradients of
    what other ranks made of it come to latent, those of what this rank made of theirs to weight; k and v get those of this rank's own pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        latent: Tensor | None,
        weight: Tensor | None,
        expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        plan: Ring,
        messages: Messages,
        tape: Tape,
        scale: float,
        score: Score,
    ) -> Tensor:
        carried = (k, v) if latent is None else (latent,)
        expansion = Expansion(weight, expand)
        out, lse = tape.keep(lambda: _forward(q, k, v, sinks, carried, expansion, plan, messages, scale, score._replace(bias=bias)))
        ctx.save_for_backward(q, k, v, sinks, bias, latent, weight, out, lse)
        ctx.ring = expand, plan, messages, scale, score._replace(bias=None)
        return out.detach()  # an own handle: autograd would tie the kept one to this graph

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, bias, latent, weight, out, lse = ctx.saved_tensors
        expand, plan, messages, scale, score = ctx.ring
        carried, expansion = (k, v) if latent is None else (latent,), Expansion(weight, expand)
        own, home, dweight, dbias = _backward(dout, q, k, v, out, lse, carried, expansion, plan, messages, scale, score._replace(bias=bias))
        dsinks = None if sinks is None else sinks_gradient(dout, out, lse, sinks)
        dbias = None if bias is None or dbias is None else dbias.to(bias.dtype)
        dlatent = home[0].to(latent.dtype) if latent is not None else None
        return *(x.to(of.dtype) for x, of in zip(own, (q, k, v), strict=True)), dsinks, dbias, dlatent, dweight, *[None] * 6
