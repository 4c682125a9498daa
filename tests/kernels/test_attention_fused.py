"""Attention by fused kernels, FlashAttention's and cuDNN's (through torch and through Transformer Engine): which pairs go where, and on a GPU
their results."""

import random
from itertools import pairwise

import pytest
import torch

from ltrain.kernels.attention import Mask, Pair, attention, backward_pairs, blockwise, by_pair, cudnn, forward_pairs, te
from ltrain.kernels.attention.pairs import combined, masked_pairs, seen
from tests.kernels.test_attention import PAIRS, cu, tensors

# loaded before a test runs cuDNN through torch: where the two bring different copies of it, the later one does not load
ENGINE = te.engine() if torch.cuda.is_available() else "runs on CUDA"


def test_squares_with_more_rows():
    """What cuDNN's few lengths need, with the kernels of a CPU: keys and queries behind the last change nothing."""
    q, k, v = (x.detach() for x in tensors(70, 4, 2, 8, 8))
    pairs = [Pair(0, 20, 0, 20, True), Pair(20, 30, 10, 50, True), Pair(50, 20, 3, 7, False), Pair(55, 1, 60, 1, True)]
    given: list[tuple[int, bool]] = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attend(q, k, v, causal):
        given.append((q.shape[2], causal))
        return kernel(q, k, v, 0.0, causal, scale=0.3)

    def differentiate(dout, q, k, v, out, lse, causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse.contiguous(), 0.0, causal, scale=0.3)

    dout = torch.randn(70, 4, 8, dtype=torch.float64)
    found = []
    for lengths in (lambda rows: rows, lambda rows: -(-rows // 16) * 16):
        out, lse = by_pair.forward(q, k, v, pairs, attend, lengths)
        found.append([out, lse, *by_pair.backward(dout, q, k, v, out, lse, pairs, differentiate, lengths)])
    assert given[-5:] == [(32, True), (32, False), (32, True), (32, False), (16, True)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close((found[0][0], found[0][1]), forward_pairs(q, k, v, pairs, scale=0.3, backend="reference"))


def test_few_lengths_have_plans():
    lengths = {n: cudnn.rounded(n) for n in range(1, 9000)}
    assert all(n <= more <= n * 17 / 16 for n, more in lengths.items())
    assert len({lengths[n] for n in range(4097, 8193)}) == 16


def test_cudnn_is_for_streams_whose_scores_are_in_long_documents(monkeypatch):
    monkeypatch.setattr(te, "engine", lambda: "needs Transformer Engine")
    document = [Pair(0, 9000, 0, 9000, True)]
    short = [Pair(9000 + 2000 * n, 2000, 9000 + 2000 * n, 2000, True) for n in range(25)]
    assert cudnn.worthwhile(document + short[:20]) and not cudnn.worthwhile(document + short)
    assert not cudnn.worthwhile([Pair(0, 8191, 0, 8191, True)]) and not cudnn.worthwhile([])


def test_keys_of_rectangles_are_cut_where_there_is_a_plan():
    square, small, rectangle = Pair(0, 9000, 0, 9000, True), Pair(0, 9000, 9000, 8191, False), Pair(0, 9000, 9000, 12700, False)
    assert cudnn._parted((square, small, rectangle)) == (
        [square, rectangle._replace(k_len=12288)],
        [small, rectangle._replace(k_start=9000 + 12288, k_len=12700 - 12288)],
    )
    assert cudnn._parted((Pair(0, 9000, 0, 16384, False),)) == ([Pair(0, 9000, 0, 16384, False)], [])


def test_calls_share_no_rows():
    """Two pairs of a call with the same keys would write the same gradients over each other."""
    draw = random.Random(0)
    for _ in range(50):
        pairs = []
        for _ in range(draw.randint(1, 12)):
            queries, window, causal = draw.randint(1, 40), draw.choice([0, 5]), draw.random() < 0.5
            keys = queries + draw.randint(0, 9)
            pairs.append(Pair(draw.randint(0, 200), queries, draw.randint(0, 200), keys, causal, window, draw.choice([0, 2]) if window else 0))
        calls, rest = te._parted(tuple(pairs))
        squares = [part for pair in pairs for part in ([pair] if pair.window else by_pair.squares([pair]))]
        assert sorted([p for call in calls for p in call.pairs] + rest) == sorted(squares)
        assert all(p.window and (p.gap or not p.causal or p.q_len < p.k_len) for p in rest)
        rows = [sum(pair.q_len for pair in call.pairs) for call in calls]
        assert rows == sorted(rows, reverse=True)  # the first may have all, and the others are merged with it
        for call in calls:
            assert {(p.causal, p.window) for p in call.pairs} == {call.kind}
            for start, length in (("q_start", "q_len"), ("k_start", "k_len")):
                ranges = sorted((getattr(p, start), getattr(p, start) + getattr(p, length)) for p in call.pairs)
                assert all(stop <= begin for (_, stop), (begin, _) in zip(ranges, ranges[1:], strict=False))


def test_where_transformer_engine_is_cudnn_has_very_long_documents_alone(monkeypatch):
    long, short, between = Pair(0, 20480, 0, 20480, True), Pair(20480, 100, 20480, 100, True), Pair(0, 9216, 0, 9216, True)
    for found, expected in (("needs Transformer Engine", [True, True, True]), (object(), [True, False, False])):
        monkeypatch.setattr(te, "engine", lambda found=found: found)
        assert [cudnn.worthwhile(pairs) for pairs in ([long], [long, short], [between])] == expected


def test_documents_of_a_stream_are_one_call():
    pairs = [Pair(a, 2000, a, 2000, True) for a in (0, 2000, 4000)] + [Pair(6000, 100, 6000, 100, True)]
    window = Pair(6100, 60, 0, 60, False, 90, 80)
    assert te._parted((*pairs, window)) == ([te.Call(te.Kind(True, 0), tuple(pairs))], [window])
    assert te.worthwhile([*pairs, window]) and not te.worthwhile(pairs[3:]) and not te.worthwhile([window])


def scores(pairs, rows=80):
    """How many of the pairs hold each score."""
    found = torch.zeros(rows, rows, dtype=torch.int)
    for pair in pairs:
        seen = torch.ones(pair.q_len, pair.k_len, dtype=torch.int)
        behind = torch.arange(pair.q_len)[:, None] + pair.k_len - pair.q_len - torch.arange(pair.k_len)
        seen[(pair.causal & (behind < 0)) | ((behind + pair.gap >= pair.window) & (pair.window > 0))] = 0
        found[pair.q_start :][: pair.q_len, pair.k_start : pair.k_start + pair.k_len] += seen
    return found


def test_pairs_are_put_together_where_they_are_neighbours():
    zigzag = [Pair(0, 9, 0, 9, True), Pair(9, 9, 9, 9, True, 0, 3), Pair(9, 9, 0, 9, False, 0, 20)]
    assert combined(tuple(zigzag)) == (Pair(0, 18, 0, 18, True),)
    assert combined((Pair(0, 4, 0, 7, False), Pair(4, 5, 0, 7, False), Pair(4, 5, 7, 2, False))) == (Pair(0, 4, 0, 7, False), Pair(4, 5, 0, 9, False))
    apart = (Pair(0, 4, 0, 4, True), Pair(4, 4, 4, 4, True), Pair(8, 4, 0, 4, False), Pair(0, 4, 20, 3, False, 5, 3), Pair(0, 4, 4, 3, False))
    assert sorted(combined(apart)) == sorted(apart)
    draw = random.Random(0)
    for _ in range(200):
        cuts = sorted(draw.sample(range(1, 40), 4))
        spans = list(zip([0, *cuts], cuts, strict=False))
        pairs = [Pair(a, b - a, c, d - c, False) for a, b in spans for c, d in spans if d <= a and draw.random() < 0.8]
        pairs += [Pair(a, b - a, a, b - a, True) for a, b in spans if draw.random() < 0.8]
        draw.shuffle(pairs)
        assert torch.equal(scores(combined(tuple(pairs))), scores(pairs))


def test_scores_without_a_mask_are_those_of_causal_squares_both_ways(monkeypatch):
    monkeypatch.setattr(te, "SPLIT", 3)
    draw = random.Random(0)
    for _ in range(100):
        wide = [Pair(draw.randint(0, 20), draw.randint(1, 20), draw.randint(0, 20), draw.randint(1, 20), False) for _ in range(3)]
        below, above = te.triangles((*wide, Pair(50, 20, 50, 25, True)))
        assert all(pair.causal and pair.q_len == pair.k_len for pair in above)
        assert all(pair.causal or min(pair.q_len, pair.k_len) < 3 for pair in below)
        turned = [pair._replace(q_start=80 - pair.q_start - pair.q_len, k_start=80 - pair.k_start - pair.k_len) for pair in above]
        assert torch.equal(scores(below) + scores(turned).flip(0, 1), scores([*wide, Pair(50, 20, 50, 25, True)]))


def test_windows_over_a_cut_are_causal_squares_from_behind():
    """What earlier and later tokens of a document share under a window, however short either of them are, and masks that look ahead."""
    draw = random.Random(0)
    for n in range(300):
        cuts = sorted(draw.sample(range(70), 4))
        pairs = seen((cuts[2], cuts[3]), (cuts[0], cuts[1]), Mask(window=draw.randint(1, 40), causal=n % 3 > 0))
        pairs.append(Pair(0, 30, 0, 30, True, 7))  # a square on the diagonal stays
        kept, corners = te.turned(tuple(pairs))
        assert not any(pair.window for pair in kept[:-1]) and kept[-1] == pairs[-1]
        assert all(pair.causal and pair.q_len == pair.k_len and not pair.window for pair in corners)
        behind = [pair._replace(q_start=80 - pair.q_start - pair.q_len, k_start=80 - pair.k_start - pair.k_len) for pair in corners]
        assert torch.equal(scores(kept) + scores(behind).flip(0, 1), scores(pairs))
    assert te.turned((Pair(0, 4095, 9, 4095, False, 4096, 4095),)) == ([], [Pair(0, 4095, 9, 4095, True)])


class Fused:
    """What Transformer Engine's calls promise, in plain torch: of a call of packed pairs, each by itself, or of a batch of one."""

    class FusedAttnBackend:
        F16_arbitrary_seqlen = None

    calls = 0

    def __init__(self):
        self.forms = set()

    def _pairs(self, q, options):
        alone = options["qkv_layout"] == "bshd_bshd_bshd"
        assert options["o_format"] == options["qkv_layout"][:4].rstrip("_") and q.dim() == 3 + alone
        assert options["attn_mask_type"] in (("causal", "no_mask") if alone else ("padding_causal", "padding"))
        names = ["cu_seqlens_q", "cu_seqlens_kv"]
        names += names if alone else ["cu_seqlens_q_padded", "cu_seqlens_kv_padded"]
        bounds = [options[name].tolist() for name in names]
        causal, (behind, ahead) = "causal" in options["attn_mask_type"], options["window_size"]
        assert ahead == (0 if causal else -1) or not alone and min(behind, ahead) > max(q.shape[0], options["max_seqlen_kv"])
        self.forms.add((alone, causal, ahead > 0))
        for (a, b), (c, d), first, begin in zip(pairwise(bounds[0]), pairwise(bounds[1]), *bounds[2:], strict=False):
            yield Pair(first, b - a, begin, d - c, causal, 0 if ahead > 0 else behind + 1)

    def fused_attn_fwd(self, q, k, v, attn_scale, is_training, rng_gen, **options):
        self.calls += 1
        pairs = list(self._pairs(q, options))
        if batch := q.dim() > 3:
            q, k, v = (x.squeeze(0) for x in (q, k, v))
        out, lse = blockwise.forward_pairs(q, k, v, pairs, attn_scale)
        missing = lse == -torch.inf  # where no pair is, memory holds anything
        out, lse = out.masked_fill(missing.unsqueeze(-1), 1e3).to(q.dtype), lse.masked_fill(missing, 5.0).unsqueeze(-1)
        return (out.unsqueeze(0), (lse.transpose(0, 1).unsqueeze(0),)) if batch else (out, (lse,))

    def fused_attn_bwd(self, q, k, v, o, d_o, aux_ctx_tensors, attn_scale, do_format, dqkv_layout, **options):
        self.calls += 1
        assert options["o_format"] == do_format and options["qkv_layout"] == dqkv_layout
        pairs, lse = list(self._pairs(q, options)), aux_ctx_tensors[0].squeeze(-1)
        if batch := q.dim() > 3:
            q, k, v, o, d_o, lse = (x.squeeze(0) for x in (q, k, v, o, d_o, lse.transpose(1, 2)))
        found = blockwise.backward_pairs(d_o, q, k, v, o, lse, pairs, attn_scale)
        return tuple((x.unsqueeze(0) if batch else x).to(q.dtype) for x in found)


# Of 70 queries and 70 keys: those that have all of one side, beside others or alone, and of windows over a cut, whose first keys none may see
WHOLE = [
    [Pair(0, 70, 0, 70, True)],
    [Pair(0, 70, 0, 70, False, 71, 70)],
    [Pair(0, 30, 0, 30, True, 9), Pair(30, 10, 30, 10, True), Pair(40, 30, 40, 30, True)],  # one token more than the window, and longer
    [Pair(0, 70, 0, 40, False), Pair(10, 50, 45, 20, False)],
    [Pair(0, 40, 0, 70, False), Pair(45, 20, 10, 50, False), Pair(50, 3, 60, 9, False)],
    [Pair(0, 70, 0, 70, True), Pair(10, 20, 30, 20, False, 21, 20)],
    [Pair(0, 10, 0, 40, False, 11, 10)],
    [Pair(0, 25, 0, 70, False, 31, 28)],
    [Pair(0, 50, 20, 50, True), Pair(50, 20, 0, 20, True)],
]


@pytest.fixture
def fused(monkeypatch):
    fused = Fused()
    monkeypatch.setattr(te, "engine", lambda: fused)
    monkeypatch.setattr(te, "_lacks", lambda *form: None)
    monkeypatch.setattr(te, "SPLIT", 6)
    monkeypatch.setattr(te, "ALONE", 10)
    return fused


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("pairs", WHOLE, ids=str)
def test_parts_are_added_up_in_float32(pairs, narrow, fused):
    """One call comes back as it is, in 16 bits; the sums of several are as near to float64 as their parts are."""
    wide = [x.detach() for x in tensors(70, 4, 2, 8, 6 if narrow else 8)]
    q, k, v = (x.bfloat16() for x in wide)
    wide = [x.double() for x in (q, k, v)]
    dout = torch.randn(70, 4, v.shape[2], generator=torch.Generator().manual_seed(1)).bfloat16()
    fused.calls = 0
    out, lse = te.forward_pairs(q, k, v, pairs, 0.3)
    seen = lse > -torch.inf
    expected, expected_lse = blockwise.forward_pairs(*wide, pairs, 0.3)
    assert torch.equal(seen, expected_lse > -torch.inf) and not out[~seen].any()
    assert out.dtype == (torch.bfloat16 if fused.calls == 1 and seen.all() else torch.float32)
    assert (out.double() - expected).norm() < 2**-8 * expected.norm()
    fused.calls = 0
    found = te.backward_pairs(dout, q, k, v, expected.bfloat16(), expected_lse.float(), pairs, 0.3)
    exact = blockwise.backward_pairs(dout.double(), *wide, expected, expected_lse, pairs, 0.3)
    for got, true in zip(found, exact, strict=True):
        assert got.shape == true.shape and (got.dtype == torch.float32 or fused.calls == 1)
        assert (got.double() - true).norm() < 2**-6 * true.norm()


@pytest.mark.parametrize("narrow", [False, True])
def test_calls_put_together_are_attention(narrow, fused):
    """Which calls are made of any pairs, and what becomes of their parts, in float64: all of the back end but the kernels."""
    q, k, v = (x.detach() for x in tensors(70, 4, 2, 8, 6 if narrow else 8))
    dout, draw = torch.randn_like(q[..., : v.shape[2]]), random.Random(0)
    for pairs in WHOLE:
        compared(q, k, v, dout, pairs)
    for n in range(60):
        if n % 2:
            cuts = [0, *sorted(draw.sample(range(1, 70), 3)), 70]
            mask = Mask(window=draw.randint(1, 40), anchors=draw.choice([0, 3])) if n % 3 else Mask()
            pairs = masked_pairs(cuts, mask, [0] * 4) if n % 4 == 1 else seen((cuts[2], 70), (cuts[0], cuts[2]), mask)
        else:
            pairs = [p for p in draw.sample(PAIRS, 4) if p.k_len] + [Pair(40, 30, 5, 30, False, 31, 30)] * (n % 4 == 0)
        compared(q, k, v, dout, [pair for pair in pairs if pair.k_start + pair.k_len <= 70])
    assert fused.calls > 100
    forms = {(alone, causal, False) for alone in (False, True) for causal in (False, True)}
    assert fused.forms == forms | ({(False, False, True)} if narrow else set())


def test_what_there_is_no_kernel_for_goes_in_another_form(fused, monkeypatch):
    q, k, v = (x.detach() for x in tensors(70, 4, 2, 8, 6))
    monkeypatch.setattr(te, "_lacks", lambda form, *sizes: "has none" if form.alone or form.reach[1] > 0 else None)
    compared(q, k, v, torch.randn_like(q[..., :6]), WHOLE[0] + [Pair(0, 5, 0, 5, False)])
    assert fused.forms == {(False, True, False), (False, False, False)}


def compared(q, k, v, dout, pairs):
    out, lse = te.forward_pairs(q, k, v, pairs, 0.3)
    expected, expected_lse = blockwise.forward_pairs(q, k, v, pairs, 0.3)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    found = te.backward_pairs(dout, q, k, v, out, lse, pairs, 0.3)
    torch.testing.assert_close(found, blockwise.backward_pairs(dout, q, k, v, expected, expected_lse, pairs, 0.3), rtol=1e-5, atol=1e-5)


def test_short_documents_go_with_those_that_a_window_cuts():
    pairs = masked_pairs([0, 30, 35, 70], Mask(window=8), [0, 0, 0])
    assert {pair.window for pair in pairs} == {0, 8}
    assert te._parted(tuple(pairs)) == ([te.Call(te.Kind(True, 8), tuple(pair._replace(window=8) for pair in pairs))], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("backend", "heads", "kv_heads", "width", "value_width"),
    [
        *(("flash", *sizes) for sizes in ((4, 4, 64, 64), (8, 2, 128, 128), (4, 1, 20, 12), (4, 4, 192, 128))),
        *(("cudnn", *sizes) for sizes in ((4, 4, 64, 64), (8, 2, 128, 128), (3, 1, 24, 24))),
        *(
            pytest.param("te", *sizes, marks=pytest.mark.skipif(isinstance(ENGINE, str), reason=f"backend='te' {ENGINE}"))
            for sizes in ((4, 4, 64, 64), (8, 2, 128, 128), (3, 1, 24, 24), (4, 4, 192, 128))
        ),
    ],
)
def test_fused_on_cuda(backend, heads, kv_heads, width, value_width, monkeypatch):
    """Packed calls (cuDNN: one for each long pair) against float64 on the same bfloat16 numbers: whole streams, and pairs that overlap."""
    monkeypatch.setattr(cudnn, "LEAST", 6)
    monkeypatch.setattr(te, "SPLIT", 25)
    monkeypatch.setattr(te, "ALONE", 10)
    monkeypatch.setattr(cudnn, "LENGTHS", 2)
    torch.full((1 << 24,), torch.nan, device="cuda")  # what memory holds where a kernel leaves it as it is
    inputs = [x.detach().cuda().requires_grad_() for x in tensors(70, heads, kv_heads, width, value_width, torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    scale = width**-0.5

    def close(got: torch.Tensor, expected: torch.Tensor) -> None:
        # a document of one token has no gradient for its query: there only rounding is left
        assert (got.double() - expected.double()).norm() <= 1e-2 * expected.double().norm() + 1e-4

    for lengths in ([70], [1, 1, 0, 30, 38]):
        got, expected = attention(*inputs, cu(lengths), scale=scale, backend=backend), attention(*wide, cu(lengths), scale=scale, backend="reference")
        close(got, expected)
        weight = torch.randn_like(expected)
        for a, b in zip(torch.autograd.grad(got, inputs, weight.bfloat16()), torch.autograd.grad(expected, wide, weight), strict=True):
            close(a, b)
    q, k, v = (x.detach() for x in inputs)
    k, v = torch.cat([k, k[:30].flip(0)]), torch.cat([v, v[:30].flip(0)])  # [100, Hk, .]
    kept = [p for p in PAIRS if p.k_len]
    some = (kept[-2:-1], kept[-1:]) if backend == "flash" else (kept[:1], kept[1:2], kept[2:3])  # one query is a case of its own for flash
    corners = [Pair(0, 30, 40, 30, False, 31, 30), Pair(30, 20, 0, 35, False, 31, 22), Pair(50, 9, 60, 40, False, 20, 12)]
    if backend == "te":
        some = (*some, corners, [*kept, *corners], [Pair(0, 70, 0, 70, False, 71, 70)])
    for pairs in (kept, *some):
        out, lse = forward_pairs(q, k, v, pairs, scale=scale, backend=backend)
        expected_out, expected_lse = forward_pairs(q.double(), k.double(), v.double(), pairs, scale=scale, backend="reference")
        close(out, expected_out)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)
        dout = torch.randn_like(out)
        got_grads = backward_pairs(dout, q, k, v, out, lse, pairs, scale=scale, backend=backend)[:3]
        exact = backward_pairs(
            dout.double(), q.double(), k.double(), v.double(), expected_out, expected_lse, pairs, scale=scale, backend="reference"
        )[:3]
        for a, b in zip(got_grads, exact, strict=True):
            close(a, b)


@pytest.mark.skipif(isinstance(ENGINE, str), reason=f"backend='te' {ENGINE}")
@pytest.mark.parametrize("mask", [Mask(window=100), Mask(window=700), Mask(window=300, anchors=4), Mask(chunk=512)])
def test_windows_on_cuda(mask):
    """Through Transformer Engine, with sinks, and parts of it through our own kernels: lengths on, before and behind what it takes."""
    lengths = [700, 127, 3, 128, 0, 1500]
    inputs = [x.detach().cuda().requires_grad_() for x in (*tensors(sum(lengths), 8, 2, 64, 64, torch.bfloat16), torch.randn(8))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = []
    for (q, k, v, sinks), backend in ((inputs, "te"), (wide, "reference")):
        out = attention(q, k, v, cu(lengths), scale=0.125, mask=mask, sinks=sinks, backend=backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).cuda()
        found.append([out, *torch.autograd.grad(out, [q, k, v, sinks], weight.to(out))])
    for got, expected in zip(*found, strict=True):
        assert (got.double() - expected).norm() <= 1e-2 * expected.norm()
