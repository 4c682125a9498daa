"""Causal attention over context ranks: keys and values travel, queries and outputs stay.

The ring of Liu et al. 2023 (Ring Attention) on packed documents. In step s of P - 1, rank r works on keys and values of
rank r - s. They come straight from their owner instead of through the neighbour, which lets each message hold only the
rows that its receiver's masks can see: (P-1)/P of K and V is the most that arrives, for a causal document in zigzag it
is at most 3/4 of that, and nothing travels between ranks that share no document. Step s + 1 is under way while step s
is computed. The outputs of the steps merge by log-sum-exp. The backward is a second ring; a step's key and value
gradients go straight back to their owner, in float32 or wider.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.attention import Pair, backward_pairs, forward_pairs, merge
from ltrain.model.sequence import Tape
from ltrain.parallel.context.layout import Plan, Segment
from ltrain.parallel.context.messages import Messages, Transit

Rows = list[tuple[int, int]]  # [start, stop) among a rank's tokens


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


def count(rows: Rows) -> int:
    return sum(stop - start for start, stop in rows)


def take(x: Tensor, rows: Rows) -> Tensor:
    """x [T, ...] -> its `rows` end to end."""
    parts = [x[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x[:0]


def _seen(plan: Plan, reader: int, owner: int) -> list[tuple[Segment, list[Segment]]]:
    """For each head of the reader, the tails of the owner that are earlier parts of the same document."""
    tails = [span.tail for span in plan.of(owner) if span.tail is not None]
    heads = [span.head for span in plan.of(reader) if span.head is not None]
    seen = [(head, [t for t in tails if t.document == head.document and t.stop <= head.start]) for head in heads]
    return [(head, earlier) for head, earlier in seen if earlier]


def _reads(plan: Plan, reader: int, owner: int) -> Reads:
    reads = Reads([], [], [])
    place: dict[Segment, int] = {}
    for head, tails in _seen(plan, reader, owner):
        q_start = count(reads.queries)
        reads.queries.append(head.rows)
        for tail in tails:
            if tail not in place:
                place[tail] = count(reads.keys)
                reads.keys.append(tail.rows)
            reads.pairs.append(Pair(q_start, head.length, place[tail], tail.length, False))
    return reads


def ring(plan: Plan) -> Ring:
    """Which rows meet in which step. Every rank makes the same choice for a pair of ranks."""
    rank, size = plan.layout.rank, plan.layout.size
    local = [Pair(s.local, s.length, s.local, s.length, True) for s in plan.segments]
    local += [Pair(head.local, head.length, t.local, t.length, False) for head, tails in _seen(plan, rank, rank) for t in tails]
    steps = []
    for s in range(1, size):
        source, destination = (rank - s) % size, (rank + s) % size
        steps.append(Step(source, destination, _reads(plan, rank, source), _reads(plan, destination, rank).keys))
    return Ring(local, steps if any(step.reads.pairs or step.sent for step in steps) else [])


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


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Ring, messages: Messages, scale: float) -> tuple[Tensor, Tensor]:
    transit = _send_keys(plan.steps[0], k, v, messages)
    out, lse = forward_pairs(q, k, v, plan.local, scale=scale)  # [T, H, Dv], [T, H]
    for i, step in enumerate(plan.steps):
        arrived = transit.wait()
        if i + 1 < len(plan.steps):
            transit = _send_keys(plan.steps[i + 1], k, v, messages)
        if not step.reads.pairs:
            continue
        k_step, v_step = _split(arrived[step.source], count(step.reads.keys), k, v)
        out_step, lse_step = forward_pairs(take(q, step.reads.queries), k_step, v_step, step.reads.pairs, scale=scale)
        done = 0
        for a, b in step.reads.queries:
            part = slice(done, done + b - a)
            out[a:b], lse[a:b] = merge(out[a:b], lse[a:b], out_step[part], lse_step[part])
            done += b - a
    return out.to(v.dtype), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Ring, messages: Messages, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    transit = _send_keys(plan.steps[0], k, v, messages)
    dq, dk, dv = backward_pairs(dout, q, k, v, out, lse, plan.local, scale=scale)
    homing: list[tuple[Step, Transit]] = []
    for i, step in enumerate(plan.steps):
        arrived = transit.wait()
        if i + 1 < len(plan.steps):
            transit = _send_keys(plan.steps[i + 1], k, v, messages)
        sends: dict[int, Tensor] = {}
        if step.reads.pairs:
            k_step, v_step = _split(arrived[step.source], count(step.reads.keys), k, v)
            q_step, dout_step, out_step, lse_step = (take(x, step.reads.queries) for x in (q, dout, out, lse))
            dq_step, dk_step, dv_step = backward_pairs(dout_step, q_step, k_step, v_step, out_step, lse_step, step.reads.pairs, scale=scale)
            done = 0
            for a, b in step.reads.queries:
                dq[a:b] += dq_step[done : done + b - a]
                done += b - a
            sends = {step.source: torch.cat([dk_step.flatten(), dv_step.flatten()])}
        receives = {step.destination: count(step.sent) * (dk[:0].flatten(1).shape[1] + dv[:0].flatten(1).shape[1])} if step.sent else {}
        homing.append((step, messages.post("ring", sends, receives, dtype=dk.dtype, device=dk.device)))
        if i:  # the gradients of the step before travelled while this one was computed
            _add(dk, dv, *homing[i - 1])
    _add(dk, dv, *homing[-1])
    return dq, dk, dv


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
    """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] -> [T, H, Dv]: causal inside documents that may cross the ranks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Ring, messages: Messages, tape: Tape, scale: float) -> Tensor:
        out, lse = tape.keep(lambda: _forward(q, k, v, plan, messages, scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = plan, messages, scale
        return out.detach()  # an own handle: autograd would tie the kept one to this graph

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _backward(dout, q, k, v, out, lse, *ctx.ring)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None
