"""Prefill and decoding over context and tensor ranks.

After a prefill every context rank holds the recurrent states of all documents (the rank on which a document ends has its
state; a sum with zeros hands it to the others: H K V numbers per document and layer), the convolutions' last inputs, and the
keys and values of its own spans. Decoded tokens are then the same on every context rank; their keys and values go to one rank
each in turn, and attention is merged from the ranks' (output, log-sum-exp): N H (Dv + 1) numbers from each, never K or V.
Where a decoded token chooses among keys or blocks, each rank scores its own and tells the others the best of them.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.kernels import attention
from ltrain.kernels.attention import Score
from ltrain.kernels.recurrence import Recurrence
from ltrain.kernels.sparse_attention.decoding import best_numbers, candidates
from ltrain.model.sequence import Tape
from ltrain.parallel.context.layout import Plan
from ltrain.parallel.context.messages import Messages, summed
from ltrain.parallel.context.scan import Scan, recurrence_over_ranks, scan


def last_rows(plan: Plan, count: int) -> tuple[Tensor, Tensor]:
    """Which of this rank's rows are among the last `count` of a document, and where they go in [N * count]; both on the host."""
    rows, places = [], []
    for segment in plan.segments:
        end = plan.cuts[segment.document + 1]
        for token in range(max(segment.start, end - count), segment.stop):
            rows.append(segment.local + token - segment.start)
            places.append(segment.document * count + count - (end - token))
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)


def last(x: Tensor, plan: Plan, count: int, messages: Messages) -> Tensor:
    """x [T, C] -> [N, count, C] on every context rank."""
    rows, places = plan.derive(("last", count), lambda: last_rows(plan, count))
    out = x.new_zeros((len(plan.cuts) - 1) * count, x.shape[1])
    out.index_copy_(0, places.to(x.device, non_blocking=True), x[rows.to(x.device, non_blocking=True)])
    return messages.sum("last", out).unflatten(0, (-1, count))


def last_hidden(x: Tensor, plan: Plan, tensor: tuple[int, int], group: dist.ProcessGroup | None) -> Tensor:
    """x [T / tensor, hidden] -> [N / tensor, hidden]; tensor: this rank among the tensor ranks, and their number.

    Raises ValueError where the documents do not divide over the tensor ranks.
    """
    rank, size = tensor
    documents = len(plan.cuts) - 1
    if documents % size:
        raise ValueError(f"{documents} documents do not divide over parallel.tensor={size}: decode a multiple of {size} at a time")
    if any(a == b for a, b in pairwise(plan.cuts)):
        raise ValueError("a document to be continued is empty: give it at least one token")
    rows, places = plan.derive(("last", 1), lambda: last_rows(plan, 1))
    mine = rows // len(x) == rank
    out = x.new_zeros(documents, x.shape[1])
    out.index_copy_(0, places[mine].to(x.device, non_blocking=True), x[(rows[mine] % len(x)).to(x.device, non_blocking=True)])
    if group is not None:
        summed("last hidden", out, group)
    return out.unflatten(0, (size, -1))[rank]


def final_recurrence(inputs: Recurrence, plan: Plan, messages: Messages, tape: Tape) -> tuple[Tensor, Tensor]:
    """The recurrence over this rank's segments: its outputs, and the state after each document [N, ...]."""
    maps: Scan = plan.derive("scan", lambda: scan(plan))
    if maps.needed:
        output, after = recurrence_over_ranks(inputs, plan.cu_seqlens, maps, messages, tape, final=True)
    else:
        output, after = inputs.run(plan.cu_seqlens, final=True)
    assert after is not None
    ends = [(number, segment.document) for number, segment in enumerate(plan.segments) if not segment.outgoing]
    here, documents = torch.tensor(ends, dtype=torch.int64).view(-1, 2).to(after.device, non_blocking=True).unbind(1)
    final = after.new_zeros(len(plan.cuts) - 1, *inputs.state_shape)
    final.index_copy_(0, documents, after[here])
    return output, messages.sum("state", final)


def merged(out: Tensor, lse: Tensor, messages: Messages) -> tuple[Tensor, Tensor]:
    """out [N, H, Dv] and lse [N, H] over each context rank's keys -> over all."""
    parts = messages.all_gather("decode", torch.cat((out, lse.unsqueeze(-1)), dim=-1))
    out, lse = parts[0][..., :-1], parts[0][..., -1]
    for part in parts[1:]:
        out, lse = attention.merge(out, lse, part[..., :-1], part[..., -1])
    return out, lse


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    behind: Tensor,
    messages: Messages,
    *,
    scale: float,
    score: Score,
    sinks: Tensor | None,
    seen: Tensor | None,
) -> Tensor:
    """q [N, H, D] over what is seen of every context rank's k [N, L, Hk, D] and v [N, L, Hk, Dv], and sinks [H] -> [N, H, Dv]."""
    out, lse = merged(*attention.decode_attention(q, k, v, behind, scale=scale, score=score, seen=seen), messages)
    return (out if sinks is None else attention.with_sinks(out, lse, sinks)[0]).to(q.dtype)


def best(scores: Tensor, numbers: Tensor, count: int, messages: Messages) -> Tensor:
    """scores and numbers [..., n] of what each context rank has -> the numbers of the `count` best of all [..., count]: a score and a number of each
    rank's own `count` best travel, however many it has."""
    if not count:
        return numbers[..., :0]
    scores, numbers = candidates(scores, numbers, count)
    integer = torch.int64 if scores.itemsize == 8 else torch.int32
    parts = messages.all_gather("choice", torch.cat((scores, numbers.to(integer).view(scores.dtype)), dim=-1))  # one message for both
    scores = torch.cat([part[..., :count] for part in parts], dim=-1)
    numbers = torch.cat([part[..., count:].view(integer) for part in parts], dim=-1).long()
    return best_numbers(scores, numbers, count)
