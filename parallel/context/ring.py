"""Causal attention over context ranks: keys and values travel, queries and outputs stay.

The ring of Liu et al. 2023 (Ring Attention) on packed documents. In step s of P - 1, rank r works on keys and values of
rank r - s. They come straight from their owner instead of through the neighbour, which lets each message hold only the
rows that its receiver's masks can see: (P-1)/P of K and V is the most that arrives, for a causal document in zigzag it
is at most 3/4 of that, for a window the rows that it reaches over a cut and the anchors once, for chunks those of a chunk
that is cut, and nothing travels between ranks that share no document. Step s + 1 is under way while step s
is computed. The outputs of the steps merge by log-sum-exp. The backward is a second ring; a step's key and value
gradients go straight back to their owner, in float32 or wider.
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


def _send_keys(step: Step, k: Tensor, v: Tensor, messages: Messages) -> Transit:
    """K and V rows of this step, K before V in one flat message."""
    width = k[:0].flatten(1).shape[1] + v[:0].flatten(1).shape[1]
    sends = {step.destination: torch.cat([take(k, step.sent).flatten(), take(v, step.sent).flatten()])} if step.sent else {}
    receives = {step.source: count(step.reads.keys) * width} if step.reads.keys else {}
    return messages.post("ring", sends, receives, dtype=k.dtype, device=k.device)


def _split(flat: Tensor, rows: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A flat message of `rows` rows -> [rows, Hk, D] and [rows, Hk, Dv]."""
    cut = rows * k.shape[1] * k.shape[2]
    return flat[:cut].view(rows, *k.shape[1:]), flat[cut:].view(rows, *v.shape[1:])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Ring, messages: Messages, scale: float, score: Score
) -> tuple[Tensor, Tensor]:
    transit = _send_keys(plan.steps[0], k, v, messages) if plan.steps else NONE
    out, lse = forward_pairs(q, k, v, plan.local, scale=scale, score=score)  # [T, H, Dv], [T, H]
    for i, step in enumerate(plan.steps):
        arrived = transit.wait()
        if i + 1 < len(plan.steps):
            transit = _send_keys(plan.steps[i + 1], k, v, messages)
        if not step.reads.pairs:
            continue
        k_step, v_step = _split(arrived[step.source], count(step.reads.keys), k, v)
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
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Ring, messages: Messages, scale: float, score: Score
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    transit = _send_keys(plan.steps[0], k, v, messages) if plan.steps else NONE
    dq, dk, dv, dbias = backward_pairs(dout, q, k, v, out, lse, plan.local, scale=scale, score=score)
    homing: list[tuple[Step, Transit]] = []
    for i, step in enumerate(plan.steps):
        arrived = transit.wait()
        if i + 1 < len(plan.steps):
            transit = _send_keys(plan.steps[i + 1], k, v, messages)
        sends: dict[int, Tensor] = {}
        if step.reads.pairs:
            k_step, v_step = _split(arrived[step.source], count(step.reads.keys), k, v)
            q_step, dout_step, out_step, lse_step = (take(x, step.reads.queries) for x in (q, dout, out, lse))
            dq_step, dk_step, dv_step, dbias_step = backward_pairs(
                dout_step, q_step, k_step, v_step, out_step, lse_step, step.reads.pairs, scale=scale, score=score
            )
            dbias = dbias if dbias_step is None else dbias_step if dbias is None else dbias + dbias_step
            done = 0
            for a, b in step.reads.queries:
                dq[a:b] += dq_step[done : done + b - a]
                done += b - a
            sends = {step.source: torch.cat([dk_step.flatten(), dv_step.flatten()])}
        receives = {step.destination: count(step.sent) * (dk[:0].flatten(1).shape[1] + dv[:0].flatten(1).shape[1])} if step.sent else {}
        homing.append((step, messages.post("ring", sends, receives, dtype=dk.dtype, device=dk.device)))
        if i:  # the gradients of the step before travelled while this one was computed
            _add(dk, dv, *homing[i - 1])
    if homing:
        _add(dk, dv, *homing[-1])
    return dq, dk, dv, dbias


def _add(dk: Tensor, dv: Tensor, step: Step, transit: Transit) -> None:
    """Gradients that came home from one step, added in the order of the steps."""
    arrived = transit.wait()
    if not step.sent:
        return
    dk_step, dv_step = _split(arrived[step.destination], count(step.sent), dk, dv)
    done = 0
    for a, b in step.sent:
        dk[a:b] += dk_step[done : done + b - a]
        dv[a:b] += dv_step[done : done + b - a]
        done += b - a


class RingAttention(torch.autograd.Function):
    """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv], sinks [H], bias [H, buckets] -> [T, H, Dv]: causal in documents that may cross the ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        plan: Ring,
        messages: Messages,
        tape: Tape,
        scale: float,
        score: Score,
    ) -> Tensor:
        out, lse = tape.keep(lambda: _forward(q, k, v, sinks, plan, messages, scale, score._replace(bias=bias)))
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse)
        ctx.ring = plan, messages, scale, score._replace(bias=None)
        return out.detach()  # an own handle: autograd would tie the kept one to this graph

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, bias, out, lse = ctx.saved_tensors
        plan, messages, scale, score = ctx.ring
        dq, dk, dv, dbias = _backward(dout, q, k, v, out, lse, plan, messages, scale, score._replace(bias=bias))
        dsinks = None if sinks is None else sinks_gradient(dout, out, lse, sinks)
        dbias = None if bias is None or dbias is None else dbias.to(bias.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, dbias, None, None, None, None, None
