"""The Triton kernels of attention against float64."""

import random

import numpy as np
import pytest
import torch

from ltrain.kernels.attention import Mask, Pair, Score, attention, backward_pairs, forward_pairs, intervals, merge, merging, pair_attention, seen
from tests.kernels.interpreter import DEVICE, INTERPRETED, on_gpu, runs

if DEVICE == "cuda" or INTERPRETED:
    from ltrain.kernels.attention import triton_attention

LENGTHS = [1, 63, 64, 65, 0, 129]


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """Of float32: in the interpreter a tile costs the same whatever its size."""
    if INTERPRETED:
        monkeypatch.setattr(triton_attention, "EXACT", {256: triton_attention.Tiles(64, 64, 8, 1)})


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(queries: int, keys: int, heads: int, kv_heads: int, width: int, value_width: int, dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)]
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    got, finite = got.detach().double().cpu(), expected.isfinite()
    assert torch.equal(got.isfinite(), finite), what
    error = (got - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-9)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def compare(lengths, heads, kv_heads, width, value_width, tolerance, mask, score=None, *, starts=None, sunk=False, dtype=torch.float32):
    """Output and every gradient of `attention` beside the token-by-token reference, relative RMS below `tolerance`, of the same rounded inputs."""
    given, found, score = tensors(sum(lengths), sum(lengths), heads, kv_heads, width, value_width, dtype), [], score or Score()
    weight = torch.randn(len(given[0]), heads, value_width, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    for backend in ("triton", "reference"):
        cast = (lambda x: x.detach()) if backend == "triton" else (lambda x: x.detach().cpu().double())
        leaves = [cast(x).requires_grad_() for x in given]
        sinks = torch.linspace(-1, 3, heads, dtype=leaves[0].dtype, device=leaves[0].device).requires_grad_() if sunk else None
        out = attention(*leaves, cu(lengths), scale=0.3, mask=mask, starts=starts, score=score, sinks=sinks, backend=backend)
        wanted = [*leaves, sinks] if sunk else leaves
        found.append([out, *torch.autograd.grad((out * weight.to(out)).sum(), wanted)])
    for name, got, expected in zip(("out", "dq", "dk", "dv", "dsinks"), *found, strict=False):
        close(got, expected.detach(), tolerance, f"{name} of {mask}")


def slopes(heads: int) -> torch.Tensor:
    return torch.linspace(0.01, 0.4, heads)


@runs
@pytest.mark.parametrize(
    ("mask", "score"),
    [
        (Mask(), Score()),
        (Mask(window=40), Score(softcap=1.5)),  # less than a block
        (Mask(window=100), Score(slopes=slopes(2))),  # more
        (Mask(window=1), Score()),
        (Mask(window=20, anchors=5), Score(0.7, slopes(2))),
        (Mask(window=40, chunk=50), Score()),
        (Mask(causal=False, window=30), Score(slopes=slopes(2))),
        (Mask(causal=False, window=20, globals=3), Score()),
    ],
    ids=str,
)
def test_masks_and_scores(mask, score):
    """With sinks; the second document continued from an earlier stream."""
    compare(LENGTHS, 2, 1, 24, 40, 4e-6, mask, score, starts=[0, 7, 0, 0, 0, 0], sunk=True)


@runs
@pytest.mark.parametrize("mask", [Mask(), Mask(window=40, anchors=3)], ids=str)
def test_grouped_heads(mask):
    compare([1, 64, 0, 15], 6, 2, 24, 40, 4e-6, mask)


@runs
@pytest.mark.parametrize(("width", "value_width"), [(256, 256), (16, 250), (130, 16)])
def test_wide_heads(width, value_width):
    compare([1, 70], 2, 1, width, value_width, 4e-6, Mask(window=9))


@runs
@pytest.mark.parametrize("lengths", [[1] * 9 + [66] + [3] * 30, [0], []], ids=lambda lengths: str(len(lengths)))
def test_documents_far_shorter_than_a_block(lengths):
    compare(lengths, 1, 1, 16, 16, 4e-6, Mask(window=60))


@runs
@pytest.mark.parametrize("mask", [Mask(), Mask(window=70)], ids=str)
def test_half_precision(mask):
    compare([1, 200, 63], 2, 1, 64, 64, 2e-3, mask, dtype=torch.float16)


@runs
@pytest.mark.parametrize(
    ("heads", "width", "part_type", "out_type"),
    [
        (3, 20, torch.bfloat16, torch.float32),
        (2, 64, torch.float32, torch.float32),
        (1, 130, torch.float16, torch.float16),
        (2, 16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_parts_are_merged_in_place(heads, width, part_type, out_type):
    """Rows that either side, both or neither has, of a part whose heads come first; rows that it does not have stay as they are."""
    g = torch.Generator().manual_seed(0)
    out, part = (torch.randn(70, heads, width, generator=g) for _ in range(2))
    lse, part_lse = (torch.randn(70, heads, generator=g) * 9 for _ in range(2))
    lse[:20], part_lse[10:30], out[10:20] = -torch.inf, -torch.inf, 0.0
    part, out = part.to(part_type), out.to(out_type)
    part_lse[50] = torch.nan  # as of keys that are not numbers
    expected = merge(out.double(), lse.double(), part.double(), part_lse.double())
    expected[0][10:30] = out[10:30].double()
    out[:10] = torch.nan  # nothing has been written there yet
    out, lse = out.to(DEVICE), lse.to(DEVICE)
    merging.launch(out, lse, part.transpose(0, 1).contiguous().to(DEVICE).transpose(0, 1), part_lse.T.contiguous().to(DEVICE).T)
    rounding = 1e-5 if out_type == torch.float32 else 2 * torch.finfo(out_type).eps
    torch.testing.assert_close(out.cpu().double(), expected[0], rtol=rounding, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse.cpu().double(), expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)


PAIRS = {
    "keys before the queries": (70, 200, [Pair(0, 70, 0, 200, True)]),
    "and a window": (70, 200, [Pair(0, 70, 5, 195, True, 33)]),
    "keys far before": (70, 60, [Pair(3, 60, 0, 60, False, 90, 50), Pair(63, 7, 10, 20, False, 0, 4)]),
    "queries in two pairs and in none": (90, 150, [Pair(40, 30, 0, 100, True), Pair(0, 60, 100, 40, False), Pair(40, 20, 140, 10, False)]),
    "rows shared unevenly": (130, 130, [Pair(a, 10, b, 13, a % 80 == 0) for a in range(0, 130, 40) for b in range(0, 117, 50)]),
    "none": (5, 6, []),
    "no keys": (5, 0, []),
    "no queries": (0, 5, []),
}


@runs
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("score", [Score(), Score(2.0, slopes(2))], ids=["plain", "capped-slopes"])
def test_pairs(case, score):
    """Output, log-sum-exp and gradients, part of a softmax over keys elsewhere: `lse` and `out` of the backward are those over all."""
    queries, keys, pairs = PAIRS[case]
    given = tensors(queries, keys, 2, 1, 24, 40)
    wide = [x.cpu().double() for x in given]
    got, expected = (forward_pairs(*x, pairs, scale=0.3, score=score, backend=backend) for x, backend in ((given, "triton"), (wide, "blockwise")))
    for name, *both in zip(("out", "lse"), got, expected, strict=True):
        close(*both, 4e-6, name)
    unseen = sorted(set(range(queries)).difference(*(range(p.q_start, p.q_start + p.q_len) for p in pairs)))
    assert not got[0][unseen].any() and (got[1][unseen] == -torch.inf).all()
    g = torch.Generator().manual_seed(1)
    dout, lse = torch.randn(expected[0].shape, generator=g, dtype=torch.float64), expected[1] + 0.5
    grads = []
    for x, backend in ((given, "triton"), (wide, "blockwise")):
        final = [y.to(x[0]) for y in (dout.to(torch.float32), expected[0] * 0.5, lse)]
        grads.append(backward_pairs(final[0], *x, *final[1:], pairs, scale=0.3, score=score, backend=backend)[:3])
    for name, *both in zip(("dq", "dk", "dv"), *grads, strict=True):
        close(*both, 4e-6, name)
    assert not grads[0][0][unseen].any()


@runs
def test_a_ring_of_two_steps_is_one_attention():
    """Each half of the queries over each half of the keys, as a ring calls these, with windows."""
    mask, halves, given = Mask(window=50), ((0, 45), (45, 90)), tensors(90, 90, 2, 1, 16, 16)
    leaves = [x.cpu().double().requires_grad_() for x in given]
    expected = attention(*leaves, cu([90]), scale=0.3, mask=mask, backend="reference")
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(given[0])
    expected_grads = torch.autograd.grad((expected * dout.to(expected)).sum(), leaves)
    steps = [(q, k, [p.moved(-q[0], -k[0]) for p in seen(q, k, mask)]) for q in halves for k in halves if k <= q]
    outs = {}
    for (a, b), (c, d), pairs in steps:
        found = forward_pairs(given[0][a:b], given[1][c:d], given[2][c:d], pairs, scale=0.3, backend="triton")
        outs[a] = merge(*outs[a], *found) if a in outs else found
    out, lse = (torch.cat([outs[a][i] for a, _ in halves]) for i in range(2))
    close(out, expected.detach(), 4e-6, "out")
    grads = [torch.zeros_like(x) for x in given]
    for (a, b), (c, d), pairs in steps:
        final = [x[a:b] for x in (out, lse)]
        parts = backward_pairs(dout[a:b], given[0][a:b], given[1][c:d], given[2][c:d], *final, pairs, scale=0.3, backend="triton")[:3]
        for total, part, rows in zip(grads, parts, ((a, b), (c, d), (c, d)), strict=True):
            total[slice(*rows)] += part
    for got, of in zip(grads, expected_grads, strict=True):
        close(got, of, 4e-6, "gradient")


@runs
def test_heads_whose_numbers_lie_apart_and_a_broadcast_gradient():
    """Views of one projection need no copy; heads whose own numbers do not follow each other are copied."""
    joint = torch.randn(60, 3, 3, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for x in (joint.unbind(1), [x.mT.contiguous().mT for x in joint.unbind(1)]):
        grads = []
        for cast, backend in ((lambda t: t, "triton"), (lambda t: t.cpu().double(), "blockwise")):
            leaves = [cast(t).requires_grad_() for t in x]
            out = pair_attention(*leaves, [Pair(10, 50, 0, 60, True, 20)], scale=0.3, backend=backend)
            grads.append(torch.autograd.grad(out.sum(), leaves))
        for got, expected in zip(*grads, strict=True):
            close(got, expected, 4e-6, "gradient")


@pytest.mark.parametrize("seed", range(40))
def test_intervals_are_the_pairs(seed):
    """From either side, and each row's in one range at most once."""
    r = random.Random(seed)
    queries, keys, block, pairs = r.randint(1, 60), r.randint(1, 60), r.choice([1, 4, 16, 100]), []
    for _ in range(r.randint(0, 6)):
        k_len, q_start, k_start = r.randint(1, keys), r.randint(0, queries - 1), r.randint(0, keys - 1)
        q_len, k_len = r.randint(1, queries - q_start), min(k_len, keys - k_start)
        gap, window = r.randint(0, 9), r.choice([0, r.randint(10, 30), 10**12])
        causal = q_len <= k_len and r.random() < 0.5
        if window and q_len > k_len + gap:
            window = 0
        pairs.append(Pair(q_start, q_len, k_start, k_len, causal, window, gap))
    expected = np.zeros((queries, keys), int)
    for q_start, q_len, k_start, k_len, causal, window, gap in pairs:
        behind = np.arange(q_len)[:, None] + k_len - q_len + gap - np.arange(k_len)
        sees = np.ones_like(behind, bool)
        if causal or window:
            sees &= behind >= (gap if causal else 1 - window)
        if window:
            sees &= behind < window
        expected[q_start : q_start + q_len, k_start : k_start + k_len] += sees
    for keyed in (False, True):
        table, rows = intervals.spans_of(pairs), keys if keyed else queries
        order, bounds, ranges, spans = intervals.arrange(intervals.exchanged(table) if keyed else table, rows, block)
        found = np.zeros_like(expected)
        mine = found.T if keyed else found
        assert sorted(order) == list(range(-(-rows // block)))
        for number in range(len(order)):
            for begin, end, first, last in ranges[bounds[number] : bounds[number + 1]]:
                held: set[int] = set()
                for start, stop, low, high, left, right, _ in spans[first:last]:
                    assert number * block <= start < stop <= (number + 1) * block and held.isdisjoint(range(start, stop))
                    held.update(range(start, stop))
                    for row in range(start, stop):
                        a, b = max(low, row + left), min(high, row + right + 1)
                        assert a >= b or begin <= a and b <= end
                        mine[row, a : max(a, b)] += 1
        assert (found == expected).all()


@runs
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"width": 257}, "up to 256 wide, not 257"),
        ({"score": Score(bias=torch.zeros(2, 8))}, "no relative biases"),
        ({"scale": -1.0}, "above 0, not -1.0"),
    ],
    ids=str,
)
def test_refusals(change, words):
    given = tensors(4, 4, 2, 2, change.get("width", 8), 8, change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=f"backend='triton' .*{words}.*: choose blockwise or auto"):
        attention(*given, cu([4]), scale=change.get("scale", 1.0), score=change.get("score", Score()), backend="triton")


@runs
@pytest.mark.parametrize(
    ("shared", "width", "dtype", "refused"),
    [
        (227 << 10, 256, torch.bfloat16, False),  # H100
        (163 << 10, 256, torch.bfloat16, True),  # A100
        (163 << 10, 129, torch.float16, True),
        (99 << 10, 128, torch.bfloat16, False),
        (99 << 10, 256, torch.float32, False),
    ],
)
def test_wide_heads_need_a_gpu_with_room_for_them(shared, width, dtype, refused, monkeypatch):
    monkeypatch.setattr(triton_attention, "_shared_memory", lambda device: shared)
    there = {"is_cuda": True, "dtype": dtype, "shape": (4, 2, width), "device": torch.device("cuda", 0), "__len__": lambda self: 4}
    x = type("OnGPU", (), there)()
    why = triton_attention.refusal(x, x, x, 1.0, Score())
    assert (why is not None) == refused and (why is None or f"192 KiB of shared memory for heads {width} wide, and cuda:0 has 163" in why)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="needs neither a GPU nor the interpreter")
def test_refused_without_a_gpu():
    with pytest.raises(ValueError, match="backend='triton' runs on CUDA, not on cpu"):
        attention(*tensors(4, 4, 2, 2, 8, 8), cu([4]), scale=1.0, backend="triton")


TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 2e-5}


@on_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "dtype"),
    [
        (4, 4, 64, 64, torch.bfloat16),
        (8, 2, 128, 128, torch.bfloat16),
        (6, 2, 192, 128, torch.bfloat16),
        (2, 1, 256, 256, torch.bfloat16),
        (2, 2, 24, 40, torch.float16),
        (8, 2, 128, 128, torch.float32),
        (2, 1, 16, 250, torch.float32),
    ],
    ids=str,
)
def test_every_shape_on_the_gpu(heads, kv_heads, width, value_width, dtype):
    for mask, score in (
        (Mask(), Score()),
        (Mask(window=300), Score()),
        (Mask(window=40, anchors=4), Score()),
        (Mask(window=100, chunk=200), Score(5.0, slopes(heads))),
        (Mask(window=300, causal=False), Score(3.0, slopes(heads))),
    ):
        for lengths in ([900, 1, 0, 127], [3] * 100 + [500]):
            compare(lengths, heads, kv_heads, width, value_width, TOLERANCE[dtype], mask, score, sunk=True, dtype=dtype)


@on_gpu
def test_the_same_twice_and_auto():
    """Windows on a GPU take these kernels, and their gradients are the same bits."""
    given = [x.requires_grad_() for x in tensors(3000, 3000, 8, 2, 128, 128, torch.bfloat16)]

    def once(backend):
        out = attention(*given, cu([2000, 1000]), scale=0.1, mask=Mask(window=500), backend=backend)
        return [out, *torch.autograd.grad(out.float().square().sum(), given)]

    first = once("triton")
    for backend in ("triton", "auto"):
        assert all(torch.equal(a, b) for a, b in zip(first, once(backend), strict=True))
