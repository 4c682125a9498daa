"""What a piece of attention covers, and how pieces over the same queries are put together."""

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which keys of its own segment a query may see. 0: the rule is absent."""

    window: int = 0  # the last so many tokens, itself included (Beltagy et al. 2020); not causal: those less than so many away on either side
    chunk: int = 0  # tokens whose position divided by it gives the same whole number (Llama 4)
    anchors: int = 0  # the first so many tokens of the document, beside the window (attention sinks: Xiao et al. 2023)
    causal: bool = True  # none behind the query; otherwise the later ones too (encoders: Devlin et al. 2018)
    # the first so many tokens of the document see all and all see them, beside the window (Longformer, Beltagy et al. 2020); not causal, for
    globals: int = 0  # a causal mask leaves of it what anchors are

    @property
    def placed(self) -> bool:
        """Whether it asks where in the document a token stands."""
        return bool(self.chunk or self.anchors or self.globals)


class Score(NamedTuple):
    """What becomes of scaled scores before the softmax."""

    softcap: float = 0.0  # softcap x tanh(score / softcap) (Gemma 2); 0: as it is
    slopes: Tensor | None = None  # [H]: minus slope x distance is added (ALiBi, Press et al. 2021), to either side; rows count the distance
    bias: Tensor | None = None  # [H, buckets]: that of the distance's bucket is added (T5, Raffel et al. 2020)
    farthest: int = 128  # the distance from which on all share the last bucket
    ahead: bool = False  # whether the second half of the buckets is for keys that come after their queries

    @property
    def plain(self) -> bool:
        return not self.softcap and self.slopes is None and self.bias is None

    def added(self, behind: Tensor, heads: int) -> Tensor | None:
        """What keys so far behind their queries [...], negative where they are ahead, add to the scores of each head: [H, ...], or None."""
        found = None
        if self.slopes is not None:
            found = -self.slopes.view(heads, *[1] * behind.ndim) * behind.abs()
        if self.bias is not None:
            of_buckets = self.bias[:, self.buckets(behind)]
            found = of_buckets if found is None else found + of_buckets
        return found

    def buckets(self, behind: Tensor) -> Tensor:
        """Half of the buckets of a side are of one distance each, from 0; the others of ever wider ranges, evenly in the logarithm."""
        assert self.bias is not None
        count = self.bias.shape[1] // (2 if self.ahead else 1)
        apart = behind.abs() if self.ahead else behind.clamp(min=0)
        exact = count // 2
        wider = exact + (torch.log(apart.clamp(min=1) / exact) / math.log(self.farthest / exact) * (count - exact)).long()
        found = torch.where(apart < exact, apart, wider.clamp(max=count - 1))
        return torch.where(behind < 0, found + count, found) if self.ahead else found


FULL, PLAIN = Mask(), Score()


class Pair(NamedTuple):
    """Query rows [q_start, q_start + q_len) see key rows [k_start, k_start + k_len).

    `causal` aligns the two ranges at their ends: query i of the pair sees its keys 0 .. k_len - q_len + i. In the document it stands `gap`
    further on, at key k_len - q_len + i + gap; with a `window` it sees only keys less than so many away from there.
    """

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    causal: bool
    window: int = 0
    gap: int = 0

    @property
    def apart(self) -> int:
        """What a query's row less a key's has to be raised by to be how far the key is behind the query."""
        return self.k_start - self.q_start + self.k_len - self.q_len + self.gap

    def moved(self, queries: int, keys: int) -> "Pair":
        """The same with its rows so many further on."""
        return self._replace(q_start=self.q_start + queries, k_start=self.k_start + keys)


def causal_pairs(bounds: list[int]) -> list[Pair]:
    """Every segment sees itself, causally."""
    return [Pair(a, b - a, a, b - a, True) for a, b in pairwise(bounds) if b > a]


def seen(queries: tuple[int, int], keys: tuple[int, int], mask: Mask) -> list[Pair]:
    """What a mask leaves between queries at positions [first, last) of a document and keys at others or the same ones.

    keys: their positions are the queries', or none of them is among these; of a causal mask none comes after a query's. Rows of the pairs are
    positions. Every query of a pair sees a key of it, and every key is seen.
    """
    if mask.chunk:
        cuts = range(queries[0] // mask.chunk * mask.chunk, queries[1], mask.chunk)
        inside = ([(max(a, cut), min(b, cut + mask.chunk)) for a, b in (queries, keys)] for cut in cuts)
        return [pair for q, k in inside for pair in seen(q, k, mask._replace(chunk=0))]
    (first, last), (begin, end) = queries, keys
    if first >= last or begin >= end:
        return []
    if not mask.causal:
        return _both_ways(queries, keys, mask)
    pairs: list[Pair] = []
    window = mask.window or last  # which hides nothing
    nearest, stop = max(begin, first - window + 1), min(last, end - 1 + window)  # the first key that is seen, and the first query that sees none
    if nearest < end and first < stop:
        cut = stop - window > nearest  # the last query does not see all of them
        pairs.append(Pair(first, stop - first, nearest, end - nearest, end > first, window if cut else 0, stop - end))
    anchored = min(end, mask.anchors)
    if anchored > begin:
        # the queries that the window leaves one anchor after the other, and those that it leaves all of them
        some, every = (max(first, begin + window), min(last, anchored - 1 + window)), max(first, anchored - 1 + window)
        if some[0] < some[1]:
            pairs.append(Pair(some[0], some[1] - some[0], begin, some[1] - window - begin, True, 0, window))
        if every < last:
            pairs.append(Pair(every, last - every, begin, anchored - begin, False, 0, last - anchored))
    return pairs


def _both_ways(queries: tuple[int, int], keys: tuple[int, int], mask: Mask) -> list[Pair]:
    """Of a mask that is not causal, without chunks: as `seen`; neither side is empty."""

    def pair(first: int, last: int, begin: int, end: int, window: int = 0) -> list[Pair]:
        # after as many keys as queries the last query would stand at the last key
        return [Pair(first, last - first, begin, end - begin, False, window, last - end)] if first < last and begin < end else []

    (first, last), (begin, end) = queries, keys
    # tokens that see all and that all see; the others meet under the window
    wide, seen_by_all = (min(max(start, mask.globals), stop) for start, stop in (queries, keys))
    if not mask.window or max(last - 1 - seen_by_all, end - 1 - wide) < mask.window:
        return pair(first, last, begin, end)
    near = max(wide, seen_by_all - mask.window + 1), min(last, end - 1 + mask.window)
    nearest = max(seen_by_all, wide - mask.window + 1), min(end, last - 1 + mask.window)
    inner = max(near[1] - 1 - nearest[0], nearest[1] - 1 - near[0]) >= mask.window  # hides some of these from each other
    rest = pair(*near, *nearest, mask.window if inner else 0) if wide < last and seen_by_all < end else []
    return pair(first, wide, begin, end) + pair(wide, last, begin, seen_by_all) + rest


def masked_pairs(bounds: list[int], mask: Mask, starts: list[int]) -> list[Pair]:
    """Every segment sees what the mask leaves of itself; starts: the position of each segment's first token in its document."""
    pairs: list[Pair] = []
    for (a, b), start in zip(pairwise(bounds), starts, strict=True):
        own = start, start + b - a
        pairs += [pair.moved(a - start, a - start) for pair in seen(own, own, mask)]
    return pairs


@lru_cache(maxsize=256)  # all layers of a micro-batch with the same mask have the same
def combined(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """The same scores in fewer pairs, for scores that do not ask for distances: neighbouring keys of the same queries are put together, then
    neighbouring queries of the same keys. So what a rank's spans of one document, end to end, see of themselves is one causal square."""
    kept = [pair for pair in pairs if pair.window]
    beside: list[Pair] = []
    for pair in sorted(pair._replace(gap=0) for pair in pairs if not pair.window):
        last = beside[-1] if beside else None
        same = last is not None and last[:2] == pair[:2] and not last.causal and last.k_start + last.k_len == pair.k_start
        if last is not None and same:  # a mask is aligned at the end, where `pair` is
            beside[-1] = last._replace(k_len=last.k_len + pair.k_len, causal=pair.causal)
        else:
            beside.append(pair)
    below: list[Pair] = []
    for pair in sorted(beside, key=lambda pair: (pair.k_start, pair.causal, pair.q_start)):
        last = below[-1] if below else None
        if (
            last is not None
            and last[2:] == pair._replace(k_len=pair.k_len - pair.q_len * pair.causal)[2:]
            and last.q_start + last.q_len == pair.q_start
        ):
            below[-1] = last._replace(q_len=last.q_len + pair.q_len, k_len=pair.k_len)
        else:
            below.append(pair)
    return *below, *kept


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of two disjoint key sets.

    out [T, H, Dv] and lse [T, H] (log of the sum of exponentials of the scaled scores); a side that saw no key has lse -inf.
    Computed in float32 or wider. Source: the online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
    """
    dtype = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf - -inf is not a number: where neither side saw a key both weights are exp(-inf) = 0.
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = (lse_a - shift).exp().unsqueeze(-1), (lse_b - shift).exp().unsqueeze(-1)  # [T, H, 1]
    return out_a.to(dtype) * weight_a + out_b.to(dtype) * weight_b, lse
