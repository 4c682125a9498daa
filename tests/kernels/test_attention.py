import math
import random
from itertools import pairwise

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention, T5Config

from ltrain.kernels.attention import (
    Mask,
    Pair,
    Score,
    attention,
    backward_pairs,
    blockwise,
    decode_attention,
    flash,
    forward_pairs,
    intervals,
    merge,
    pair_attention,
    seen,
)

FAST = ["blockwise", "flash"]
LENGTHS = [[0], [], [1], [1, 0, 2, 63, 64, 65], [200], [7, 130, 1, 1, 61]]


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(tokens: int, heads: int, kv_heads: int, width: int, value_width: int, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, value_width)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small and uneven enough for these streams to cross many of them."""
    monkeypatch.setattr(blockwise, "ROWS", 24)
    monkeypatch.setattr(blockwise, "COLUMNS", 40)


def test_reference_is_softmax_over_the_document_so_far():
    q, k, v = tensors(9, 4, 2, 8, 6)
    out = attention(q, k, v, cu([4, 5]), scale=0.3, backend="reference")
    for begin, end in ((0, 4), (4, 9)):
        for t in range(begin, end):
            for h in range(4):
                p = (k[begin : t + 1, h // 2] @ q[t, h] * 0.3).softmax(0)
                torch.testing.assert_close(out[t, h], p @ v[begin : t + 1, h // 2])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "value_width"), [(2, 2, 8), (4, 2, 8), (3, 1, 5), (2, 1, 12)])
def test_attention_and_its_gradients(backend, lengths, heads, kv_heads, value_width):
    inputs = tensors(sum(lengths), heads, kv_heads, 8, value_width)
    weight = torch.randn(sum(lengths), heads, value_width, dtype=torch.float64)
    expected = attention(*inputs, cu(lengths), scale=0.4, backend="reference")
    got = attention(*inputs, cu(lengths), scale=0.4, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if sum(lengths):
        grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


MASKS = [Mask(), Mask(window=1), Mask(window=7), Mask(window=40, chunk=50), Mask(chunk=16), Mask(window=5, anchors=1), Mask(window=20, anchors=9)]
MASKS += [Mask(causal=False), Mask(window=1, causal=False), Mask(window=7, causal=False), Mask(window=40, chunk=50, causal=False)]
MASKS += [Mask(chunk=16, causal=False), Mask(window=55, causal=False)]
MASKS += [Mask(window=w, causal=False, globals=g) for w, g in ((1, 1), (7, 9), (20, 3), (55, 8), (9, 70))]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("more", [False, True], ids=["", "slopes-sinks-bias"])
def test_masks_scores_and_sinks(mask, softcap, more, monkeypatch):
    """In several blocks of queries and keys, the first document continued from an earlier stream."""
    monkeypatch.setattr(blockwise, "ROWS", 16)
    monkeypatch.setattr(blockwise, "COLUMNS", 24)
    lengths, starts = [60, 1, 0, 2, 130], [7, 0, 0, 0, 0]
    inputs = tensors(sum(lengths), 4, 2, 8, 6)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True) if more else None
    bias = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_() if more else None
    score = Score(softcap, torch.tensor([0.5, 0.25, 0.1, 0.0]) if more else None, bias, 50, ahead=not mask.causal)
    outs = [attention(*inputs, cu(lengths), scale=0.4, mask=mask, starts=starts, score=score, sinks=sinks, backend=b) for b in ("auto", "reference")]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    weight = torch.randn(outs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [*inputs, *(leaf for leaf in (sinks, bias) if leaf is not None)]
    torch.testing.assert_close(*([torch.autograd.grad((out * weight).sum(), leaves) for out in outs]), rtol=1e-11, atol=1e-12)


T5_BUCKETS = pytest.mark.parametrize(
    ("buckets", "farthest", "causal"), [(32, 128, True), (8, 20, True), (7, 100, True), (32, 128, False), (8, 20, False)]
)


def bucket_of(behind: int, buckets: int, farthest: int, causal: bool) -> int:
    """Raffel et al. 2020, section 2.1: each side's buckets, half of them of one distance and half logarithmic up to the farthest."""
    side = buckets if causal else buckets // 2
    far, exact = abs(behind), side // 2
    if far >= exact:
        far = min(exact + math.floor(math.log(far / exact) / math.log(farthest / exact) * (side - exact)), side - 1)
    return far if behind >= 0 else side + far


@T5_BUCKETS
def test_biases_are_those_of_t5(buckets, farthest, causal):
    theirs = T5Attention(
        T5Config(d_model=8, d_kv=4, num_heads=2, relative_attention_num_buckets=buckets, relative_attention_max_distance=farthest, is_decoder=causal),
        has_relative_attention_bias=True,
    )
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    score = Score(bias=theirs.relative_attention_bias.weight.T, farthest=farthest, ahead=not causal)
    behind = torch.arange(300)[:, None] - torch.arange(300)
    ours, expected = score.added(behind, 2), theirs.compute_bias(300, 300)[0]
    assert ours is not None and ours.shape == expected.shape == (2, 300, 300)
    assert torch.equal(ours.tril() if causal else ours, expected.tril() if causal else expected)


@T5_BUCKETS
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_t5_attention_by_the_paper(buckets, farthest, causal, backend):
    """softmax(q k + b) v in float64, a score after the other; T5 does not scale."""
    q, k, v = tensors(70, 2, 2, 4, 3)
    bias = torch.randn(2, buckets, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    documents, expected = [(0, 45), (45, 70)], []
    for start, stop in documents:
        for t in range(start, stop):
            seen = range(start, t + 1 if causal else stop)
            added = torch.stack([bias[:, bucket_of(t - s, buckets, farthest, causal)] for s in seen], 1)  # [H, keys]
            scores = torch.stack([(q[t] * k[s]).sum(-1) for s in seen], 1) + added
            expected.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen.start : seen.stop]))
    score, mask = Score(bias=bias, farthest=farthest, ahead=not causal), Mask(causal=causal)
    out = attention(q, k, v, cu([45, 25]), scale=1.0, mask=mask, score=score, backend=backend)
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((y * weight).sum(), [q, k, v, bias]) for y in (out, torch.stack(expected))]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_slopes_go_by_the_distance_to_either_side():
    added = Score(slopes=torch.tensor([0.5, 0.25])).added(torch.tensor([-2, 0, 3]), 2)
    assert added is not None and added.tolist() == [[-1.0, 0.0, -1.5], [-0.5, 0.0, -0.75]]


def test_the_reference_sees_what_the_mask_says():
    """Which keys have a weight, of a document that begins at position 3, told row by row."""
    q, k, v = torch.zeros(8, 1, 4), torch.zeros(8, 1, 4), torch.eye(8).unsqueeze(1)

    def seen(mask, start=3):
        return attention(q, k, v, cu([8]), scale=1.0, mask=mask, starts=[start], backend="reference")[:, 0].gt(0).int().tolist()

    assert seen(Mask(window=2))[5] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert seen(Mask(chunk=4))[0] == [1, 0, 0, 0, 0, 0, 0, 0] and seen(Mask(chunk=4))[4] == [0, 1, 1, 1, 1, 0, 0, 0]
    assert seen(Mask(causal=False)) == [[1] * 8] * 8 and seen(Mask(chunk=4, causal=False))[2] == [0, 1, 1, 1, 1, 0, 0, 0]
    assert seen(Mask(window=2, causal=False))[0] == [1, 1, 0, 0, 0, 0, 0, 0] and seen(Mask(window=2, causal=False))[5] == [0, 0, 0, 0, 1, 1, 1, 0]
    longformer = seen(Mask(window=2, causal=False, globals=2), 0)
    assert longformer[0] == longformer[1] == [1] * 8 and longformer[4] == [1, 1, 0, 1, 1, 1, 0, 0]
    assert seen(Mask(window=2, causal=False, globals=4))[0] == [1] * 8 and seen(Mask(window=2, causal=False, globals=4))[1] == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    ]
    # what a causal mask leaves of global tokens are anchors
    assert seen(Mask(window=2, anchors=2), 0) == torch.tensor(longformer).tril().tolist()
    assert seen(Mask(window=2, anchors=4))[5] == [1, 0, 0, 0, 1, 1, 0, 0] and seen(Mask(window=2, anchors=2), 0)[5] == [1, 1, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("backend", FAST)
def test_a_broadcast_gradient(backend):
    inputs = tensors(70, 4, 2, 8, 8)
    grads = [torch.autograd.grad(attention(*inputs, cu([30, 40]), scale=0.4, backend=b).sum(), inputs) for b in (backend, "reference")]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_heads_whose_numbers_do_not_follow_each_other(backend):
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors(70, 4, 2, 8, 8)]
    weight = torch.randn(70, 4, 8, dtype=torch.float64).mT.contiguous().mT
    outs = [attention(*strided, cu([30, 40]), scale=0.4, backend=b) for b in (backend, "reference")]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out, strided, weight) for out in outs))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision(backend, dtype, tolerance):
    inputs = tensors(150, 4, 2, 16, 16, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = attention(*wide, cu([30, 120]), scale=0.25, backend="reference")
    got = attention(*inputs, cu([30, 120]), scale=0.25, backend=backend)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), wide)
    for got_grad, expected_grad in zip(*grads, strict=True):
        assert got_grad.dtype == dtype
        assert (got_grad.double() - expected_grad).norm() < tolerance * expected_grad.norm()


PAIRS = [
    Pair(0, 20, 0, 20, True),
    Pair(20, 30, 10, 50, True),  # more keys than queries, aligned at the end
    Pair(20, 10, 60, 7, False),
    Pair(29, 2, 0, 4, False),  # shares one query with the pair before
    Pair(50, 3, 0, 0, False),
    Pair(0, 5, 67, 3, False),
    Pair(22, 30, 70, 30, True),  # overlaps pairs before it, and reaches past them
    Pair(60, 1, 5, 1, True),
    Pair(61, 1, 5, 40, False),
]
WINDOWED = [Pair(0, 30, 40, 60, False, 7), Pair(10, 60, 0, 60, False, 50), Pair(30, 20, 10, 50, True, 5), Pair(3, 1, 5, 30, False, 4)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("heads", "kv_heads", "value_width"), [(2, 2, 8), (4, 2, 5)])
def test_pairs_in_any_order_and_overlap(backend, heads, kv_heads, value_width):
    q, _, _ = (x.detach() for x in tensors(70, heads, kv_heads, 8, value_width))
    _, k, v = (x.detach() for x in tensors(100, heads, kv_heads, 8, value_width, seed=1))
    pairs = random.Random(0).sample(PAIRS, len(PAIRS))
    expected, expected_lse = forward_pairs(q, k, v, pairs, scale=0.3, backend="reference")
    out, lse = forward_pairs(q, k, v, pairs, scale=0.3, backend=backend)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    assert out[65:].eq(0).all() and lse[65:].eq(-torch.inf).all()
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        backward_pairs(dout, q, k, v, out, lse, pairs, scale=0.3, backend=backend)[:3],
        backward_pairs(dout, q, k, v, out, lse, pairs, scale=0.3, backend="reference")[:3],
    )


@pytest.mark.parametrize("backend", FAST)
def test_pairs_with_gradients(backend):
    """Queries of one range over keys of another, each range of its own length, and queries that see nothing."""
    q, _, _ = tensors(50, 4, 2, 8, 5)
    _, k, v = tensors(90, 4, 2, 8, 5, seed=1)
    pairs = [Pair(0, 30, 50, 40, False), Pair(30, 2, 0, 0, False), Pair(32, 10, 10, 1, False), Pair(42, 0, 0, 9, False)]
    seen = torch.zeros(50, 90, dtype=torch.bool)
    seen[:30, 50:], seen[32:42, 10:11] = True, True
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.3
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(2, 1))
    got = pair_attention(q, k, v, pairs, scale=0.3, backend=backend)
    torch.testing.assert_close(got, expected)
    assert got[30:32].eq(0).all() and got[42:].eq(0).all()
    dense = torch.einsum("hqk,khd->qhd", scores[:, seen.any(1)].masked_fill(~seen[seen.any(1)], -torch.inf).softmax(-1), v.repeat_interleave(2, 1))
    weight = torch.randn(got.shape, dtype=torch.float64)
    grads = [torch.autograd.grad(y, (q, k, v)) for y in ((got * weight).sum(), (dense * weight[seen.any(1)]).sum())]
    torch.testing.assert_close(*grads)
    empty = [t[:0] for t in (k, v)]
    assert torch.autograd.grad(pair_attention(q, *empty, [], scale=0.3, backend=backend).sum(), q)[0].eq(0).all()
    with pytest.raises(ValueError, match="backend='reference' has no gradients of pairs"):
        pair_attention(q, k, v, pairs, scale=0.3, backend="reference")


def test_pairs_with_windows():
    q, _, _ = (x.detach() for x in tensors(70, 4, 2, 8, 5))
    _, k, v = (x.detach() for x in tensors(100, 4, 2, 8, 5, seed=1))
    out, lse = forward_pairs(q, k, v, WINDOWED, scale=0.3)
    torch.testing.assert_close((out, lse), forward_pairs(q, k, v, WINDOWED, scale=0.3, backend="reference"))
    dout = torch.randn_like(out)
    grads = [backward_pairs(dout, q, k, v, out, lse, WINDOWED, scale=0.3, backend=b)[:3] for b in ("auto", "reference")]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_ring_of_two_steps_is_one_attention(backend):
    """The keys come in two halves, as from another rank; out and lse merge, and each half's gradients add up."""
    inputs = tensors(60, 4, 2, 8, 8)
    expected = attention(*inputs, cu([60]), scale=0.3, backend="reference")
    dout = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, dout)
    q, k, v = (x.detach() for x in inputs)
    steps = [(slice(0, 30), [Pair(0, 30, 0, 30, True), Pair(30, 30, 0, 30, False)]), (slice(30, 60), [Pair(30, 30, 0, 30, True)])]
    parts = [forward_pairs(q, k[keys], v[keys], pairs, scale=0.3, backend=backend) for keys, pairs in steps]
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, expected)
    grads = [backward_pairs(dout, q, k[keys], v[keys], out, lse, pairs, scale=0.3, backend=backend) for keys, pairs in steps]
    dq, dk, dv = grads[0][0] + grads[1][0], torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads])
    torch.testing.assert_close((dq, dk, dv), expected_grads)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(
    "mask",
    [
        *(Mask(), Mask(window=7), Mask(window=1), Mask(window=50), Mask(window=9, anchors=3), Mask(window=3, anchors=14), Mask(chunk=16)),
        *(Mask(causal=False), Mask(window=1, causal=False), Mask(window=9, causal=False, globals=3), Mask(window=3, causal=False, globals=14)),
        *(Mask(window=50, causal=False, globals=40), Mask(chunk=16, causal=False)),
    ],
    ids=str,
)
def test_a_document_in_pieces_is_one_attention(mask, start):
    """What each piece sees of itself and of the others, before it or all: the same outputs and gradients, and no key twice."""
    inputs = tensors(60, 4, 2, 8, 6)
    expected = attention(*inputs, cu([60]), scale=0.3, mask=mask, starts=[start], backend="reference")
    dout = torch.randn_like(expected)
    q, k, v = (x.detach() for x in inputs)
    cuts = [0, 1, 13, 32, 33, 60]
    pieces = [(start + a, start + b) for a, b in pairwise(cuts)]
    met = [(mine, other) for i, mine in enumerate(pieces) for other in (pieces[: i + 1] if mask.causal else pieces)]
    pairs = [pair.moved(-start, -start) for mine, other in met for pair in seen(mine, other, mask)]
    for backend in ("auto", "reference"):
        out, lse = forward_pairs(q, k, v, pairs, scale=0.3, backend=backend)
        torch.testing.assert_close(out, expected)
        grads = backward_pairs(dout, q, k, v, out, lse, pairs, scale=0.3, backend=backend)
        torch.testing.assert_close(grads[:3], torch.autograd.grad(expected, inputs, dout, retain_graph=True))


def test_pairs_both_ways_are_what_the_mask_leaves_and_no_row_more():
    """Of every two ranges apart and of each with itself; as intervals, which kernels on a GPU go by, too."""
    ranges = [(0, 3), (3, 4), (4, 11), (11, 19), (22, 23)]
    masks = [Mask(causal=False), Mask(chunk=5, causal=False)]
    masks += [Mask(window=w, causal=False, globals=g) for w in (1, 2, 4, 9, 40) for g in (0, 1, 5, 30)]
    position = torch.arange(23)
    apart = (position[:, None] - position).abs()
    for mask in masks:
        for queries in ranges:
            for keys in ranges:
                met = torch.zeros(23, 23, dtype=torch.int64)
                met[slice(*queries), slice(*keys)] = 1
                if mask.window:
                    wide = position < mask.globals
                    met *= (apart < mask.window) | wide | wide[:, None]
                if mask.chunk:
                    met *= position[:, None] // mask.chunk == position // mask.chunk
                found, pairs = torch.zeros_like(met), seen(queries, keys, mask)
                for start, stop, first, last, left, right, _ in intervals.spans_of(pairs).tolist():
                    one = torch.zeros_like(met)
                    for row in range(start, stop):
                        one[row, max(first, row + left) : max(min(last, row + right + 1), 0)] = 1
                    assert one[start:stop].any(1).all() and one[:, first:last].any(0).all(), (mask, queries, keys)
                    found += one
                assert torch.equal(found, met), (mask, queries, keys, pairs)


def test_distances_in_pieces_are_those_of_the_document():
    inputs, bias = tensors(60, 4, 2, 8, 6), torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    score = Score(softcap=3.0, slopes=torch.rand(4, dtype=torch.float64), bias=bias, farthest=40)
    expected = attention(*inputs, cu([60]), scale=0.3, score=score, backend="reference")
    dout = torch.randn_like(expected)
    pieces = list(pairwise([0, 1, 13, 32, 33, 60]))
    pairs = [pair for i, mine in enumerate(pieces) for other in pieces[: i + 1] for pair in seen(mine, other, Mask())]
    q, k, v = (x.detach() for x in inputs)
    score = score._replace(bias=bias.detach())
    out, lse = forward_pairs(q, k, v, pairs, scale=0.3, score=score)
    torch.testing.assert_close(out, expected)
    grads = backward_pairs(dout, q, k, v, out, lse, pairs, scale=0.3, score=score)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (*inputs, bias), dout))
    with pytest.raises(ValueError, match="plain scores in pairs"):
        forward_pairs(q, k, v, pairs, scale=0.3, score=score, backend="reference")


def test_merge_where_a_side_saw_nothing():
    out_a, out_b = torch.randn(4, 1, 3), torch.randn(4, 1, 3)
    none = -torch.inf
    lse_a, lse_b = torch.tensor([[0.5], [none], [1.0], [none]]), torch.tensor([[0.5], [2.0], [none], [none]])
    out_a[1] = out_a[3] = out_b[2] = out_b[3] = 0
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out[0], (out_a[0] + out_b[0]) / 2)
    torch.testing.assert_close((out[1], out[2]), (out_b[1], out_a[2]))
    assert out[3].eq(0).all() and lse[3].eq(none).all() and lse[1].eq(2).all()
    assert merge(out_a.bfloat16(), lse_a, out_b.bfloat16(), lse_b)[0].dtype == torch.float32


def test_packed_calls_cover_every_pair_once_and_no_query_twice():
    kept = [p for p in PAIRS if p.k_len]
    calls = flash.packed_calls(kept)
    seen = []
    for queries, keys, causal in calls:
        q_rows, k_rows = torch.arange(70), torch.arange(100)
        q_taken, k_taken = queries.take(q_rows), keys.take(k_rows)
        assert len(q_taken.unique()) == len(q_taken)
        for (a, b), (c, d) in zip(pairwise(queries.bounds), pairwise(keys.bounds), strict=True):
            seen.append(Pair(int(q_taken[a]), b - a, int(k_taken[c]), d - c, causal))
            assert b - a <= queries.longest and d - c <= keys.longest
        total = torch.zeros(70, dtype=torch.int64)
        queries.add(total, q_taken)
        assert total.equal(torch.where(torch.isin(q_rows, q_taken), q_rows, 0))
    assert sorted(seen) == sorted(kept)
    whole = flash.packed_calls([Pair(0, 5, 0, 5, True), Pair(5, 1, 5, 1, True)])
    assert len(whole) == 1 and whole[0][0].span == slice(0, 6)


def test_decode_is_the_last_row_of_attention():
    lengths = [5, 1, 9, 0]
    q, k, v = torch.randn(4, 6, 8), torch.randn(4, 9, 2, 8), torch.randn(4, 9, 2, 5)
    behind = torch.tensor(lengths).unsqueeze(1) - 1 - torch.arange(9)
    out, lse = decode_attention(q, k, v, behind, scale=0.3)
    shuffled = torch.stack([torch.randperm(9) for _ in lengths])
    there = shuffled[..., None, None]
    other = decode_attention(q, k.gather(1, there.expand_as(k)), v.gather(1, there.expand_as(v)), behind.gather(1, shuffled), scale=0.3)
    torch.testing.assert_close((out, lse), other)
    for n, length in enumerate(lengths[:3]):
        queries = torch.cat([torch.zeros(length - 1, 6, 8), q[n : n + 1]])
        whole = attention(queries, k[n, :length], v[n, :length], cu([length]), scale=0.3, backend="reference")
        torch.testing.assert_close(out[n], whole[-1])
        scores = torch.einsum("hd,lhd->hl", q[n], k[n, :length].repeat_interleave(3, 1)) * 0.3
        torch.testing.assert_close(lse[n], scores.logsumexp(-1))
    assert out[3].eq(0).all() and lse[3].eq(-torch.inf).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens.*10 tokens"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens.*int64"),
        ({"cu_seqlens": torch.tensor([0, 8, 6, 10], dtype=torch.int32)}, "cu_seqlens.*falling"),
        ({"k": torch.zeros(10, 3, 8)}, "k has"),
        ({"q": torch.zeros(10, 5, 8)}, "q has 5 heads"),
        ({"q": torch.zeros(10, 4, 9)}, "8 wide"),
        ({"q": torch.zeros(10, 4, 8).half()}, "one floating type"),
        ({"backend": "fash"}, "backend='fash'.*flash"),
        ({"mask": Mask(anchors=2)}, "with a window only"),
        ({"mask": Mask(window=4, anchors=2, causal=False)}, "causal mask"),
        ({"mask": Mask(window=4, globals=2)}, "write anchors"),
        ({"mask": Mask(globals=2, causal=False)}, "go with a window"),
        ({"mask": Mask(window=4, causal=False), "backend": "flash"}, "backend='flash' has no windows"),
        ({"backend": "cudnn"}, "backend='cudnn' runs on CUDA"),
    ],
)
def test_refusals(change, words):
    args = {"q": torch.zeros(10, 4, 8), "k": torch.zeros(10, 2, 8), "v": torch.zeros(10, 2, 8), "cu_seqlens": cu([10]), "scale": 1.0, **change}
    with pytest.raises(ValueError, match=words):
        attention(**args)


def test_pairs_are_refused_by_name():
    q = torch.zeros(10, 2, 8)
    with pytest.raises(ValueError, match="pairs.*leaves"):
        forward_pairs(q, q, q, [Pair(5, 6, 0, 3, False)], scale=1.0)
    with pytest.raises(ValueError, match="pairs.*more queries than keys"):
        forward_pairs(q, q, q, [Pair(0, 6, 0, 3, True)], scale=1.0)
    with pytest.raises(ValueError, match="pairs.*has a window with more queries than keys"):
        forward_pairs(q, q, q, [Pair(0, 6, 0, 3, False, 2)], scale=1.0)
