"""The Triton kernels of attention over selected blocks, and of their selection, against float64."""

import pytest
import torch

from ltrain.kernels.segments import Part, documents, parts
from ltrain.kernels.sparse_attention import triton_blocks, triton_choice
from ltrain.kernels.sparse_attention.block_index import selected_block_attention
from ltrain.kernels.sparse_attention.block_means import block_attention
from ltrain.kernels.sparse_attention.native import Shape, native_attention
from tests.kernels.interpreter import DEVICE, on_gpu, runs

SCALE = 0.3
LATE = [Part(0, 5, 0, 9), Part(5, 9, 14, 14), Part(9, 21, 14, 30)]  # of 42 keys: queries that start late in their documents, one twice


TWICE = [Part(0, 7, 0, 23), Part(7, 15, 0, 132)]  # of one document: the second part sees blocks that the first has no numbers for
EMPTY = [Part(0, 0, 0, 0), Part(0, 30, 0, 0), Part(30, 30, 30, 30)]


def whole(lengths: list[int]) -> list[Part]:
    return parts(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), sum(lengths))


def sizes(some: list[Part]) -> tuple[int, int]:
    """Queries and keys"""
    return some[-1].stop, max(documents(some).values())


def selection(some: list[Part], selections: int, block: int, top: int, *, holes: bool) -> torch.Tensor:
    """[T, selections, top]: for each query its own block, the first, and any others up to its own, in no order; with holes -1s among them
    and one query without any."""
    g = torch.Generator().manual_seed(2)
    found = torch.full((sizes(some)[0], selections, top), -1, dtype=torch.int32)
    for part in some:
        for t in range(part.start, part.stop):
            own = (part.first + t - part.start - part.begin) // block
            for s in range(selections):
                chosen = list(dict.fromkeys([own, 0, *torch.randperm(own + 1, generator=g).tolist()]))[:top]
                slots = torch.randperm(top, generator=g)[: len(chosen)] if holes else torch.arange(len(chosen))
                found[t, s, slots] = torch.tensor(chosen, dtype=torch.int32)
    if holes:
        found[len(found) // 2] = -1
    return found


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, some: list[Part], block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All scores at once -> out [T, H, Dv], lse [T, H]"""
    seen = torch.zeros(indices.shape[1], len(q), len(k), dtype=torch.bool)
    for part in some:
        for t in range(part.start, part.stop):
            last = part.first + t - part.start
            for s, row in enumerate(indices[t].tolist()):
                for number in row:
                    if number >= 0:
                        begin = part.begin + number * block
                        seen[s, t, begin : min(begin + block, last + 1)] = True
    seen = seen.repeat_interleave(q.shape[1] // len(seen), 0)
    group = q.shape[1] // k.shape[1]
    scores = (torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * SCALE).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1)), lse.T


def check(names, got, expected, tolerance):
    for name, mine, right in zip(names.split(), got, expected, strict=True):
        mine, finite = mine.detach().cpu().double(), right.isfinite()
        assert torch.equal(mine.isfinite(), finite), name
        error = (mine - right)[finite].norm() / right[finite].norm().clamp(min=1e-9)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def random(shapes, dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def compare(some, heads, kv, selections, width, value, block, top, tolerance, *, holes=False, dtype=torch.float32):
    """Output, log-sum-exp and gradients through both, relative RMS below `tolerance`, of the same rounded inputs."""
    queries, keys = sizes(some)
    given = random(((queries, heads, width), (keys, kv, width), (keys, kv, value)), dtype)
    indices, found, g = selection(some, selections, block, top, holes=holes), [], torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((queries, heads, value), (queries, heads))]
    layout = triton_blocks.cut(tuple(some), queries, block, torch.device(DEVICE))
    for mine in (True, False):
        x = [(t.detach() if mine else t.cpu().double()).requires_grad_() for t in given]
        out, lse = triton_blocks.attend(*x, indices.to(DEVICE), layout, SCALE) if mine else plain(*x, indices, some, block)
        loss = (out * weights[0].to(out)).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * weights[1].to(lse)).sum()
        found.append([out, lse, *torch.autograd.grad(loss, x)])
    check("out lse dq dk dv", *found, tolerance)
    if holes:
        assert not found[0][0][queries // 2].any() and not found[0][2][queries // 2].any() and (found[0][1][queries // 2] == -torch.inf).all()


@runs
@pytest.mark.parametrize(
    ("some", "heads", "kv", "selections", "width", "value", "block", "top", "holes"),
    [
        (whole([1, 3, 30]), 3, 1, 1, 6, 10, 8, 3, True),  # a document shorter than a block, cut blocks, three heads that share a selection
        (LATE, 4, 2, 4, 8, 5, 9, 3, False),  # a selection for each head, two of a K/V head
        (whole([20]), 16, 1, 1, 4, 4, 6, 7, False),  # fewer blocks than slots
        (LATE, 2, 2, 2, 5, 4, 16, 1, False),  # one block each
    ],
)
def test_against_the_plain_path(some, heads, kv, selections, width, value, block, top, holes):
    compare(some, heads, kv, selections, width, value, block, top, 2e-6, holes=holes)


@runs
def test_blocks_of_several_tiles_and_chunks_of_queries_and_long_lists_of_them(monkeypatch):
    tiles = triton_blocks.Tiles(16, 16, 8, 1, 1)
    monkeypatch.setattr(triton_blocks, "EXACT", {True: {128: tiles}, False: {128: tiles}})
    monkeypatch.setattr(triton_blocks, "EXTRA", 1 << 14)
    monkeypatch.setattr(triton_blocks, "PARTS", 40 * 2 * 3 * 6 * 4)  # 40 queries of 72
    compare(whole([72]), 2, 2, 2, 6, 5, 24, 3, 2e-6)


@runs
def test_half_precision():
    compare(whole([25]), 2, 1, 1, 16, 16, 8, 3, 2e-3, dtype=torch.float16)


def compare_operator(run, shapes, tolerance, dtype=torch.float32):
    """Of what selects blocks too: outputs and every gradient of both backends."""
    given, found = random(shapes, dtype), []
    for backend in ("triton", "reference"):
        x = [(t.detach() if backend == "triton" else t.cpu().double()).requires_grad_() for t in given]
        outputs = run(*x, backend=backend)
        g = torch.Generator().manual_seed(1)
        loss = sum((out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(out)).sum() for out in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, x)])
    check(" ".join(str(n) for n in range(len(found[0]))), *found, tolerance)


def compare_nsa(some, heads, kv, width, value, shape, tolerance, dtype=torch.float32):
    (queries, keys), counts = sizes(some), sum(shape.compressed(end - begin) for begin, end in documents(some).items())
    shapes = *[(queries, heads, width)] * 2, (counts, kv, width), (counts, kv, value), (keys, kv, width), (keys, kv, value)
    compare_operator(lambda *x, backend: native_attention(*x, some, scale=SCALE, shape=shape, backend=backend), shapes, tolerance, dtype)


@runs
@pytest.mark.parametrize(
    ("some", "shape"),
    [
        (whole([1, 9, 30]), Shape(4, 4, 4, 4)),
        (LATE, Shape(4, 2, 4, 5)),
        (whole([3, 2]), Shape(4, 4, 4, 3)),  # no compressed block
        (EMPTY, Shape(4, 4, 4, 4)),
    ],
)
def test_nsa(some, shape, monkeypatch):
    tiles = triton_blocks.Tiles(64, 16, 8, 1, 2)
    monkeypatch.setattr(triton_blocks, "EXACT", {True: {128: tiles}, False: {128: tiles}})
    monkeypatch.setattr(triton_choice, "EXACT_IMPORTANCE", (16, 16, 8, 1))  # several tiles of selected blocks and of queries
    compare_nsa(some, 4, 2, 6, 5, shape, 5e-6)


@runs
@pytest.mark.parametrize(("some", "local"), [(whole([1, 5, 25]), 1), (LATE, 2), (TWICE, 1), (EMPTY, 1)])
def test_moba(some, local):
    queries, keys = sizes(some)

    def run(*x, backend):
        return [block_attention(*x, some, scale=SCALE, block=6, top=3, local=local, backend=backend)]

    compare_operator(run, ((queries, 4, 6), (keys, 2, 6), (keys, 2, 5)), 5e-6)


@runs
def test_blocks_of_an_index():
    indices = selection(LATE, 2, 5, 4, holes=False).long()

    def run(*x, backend):
        return [selected_block_attention(*x, indices.to(x[0].device), LATE, scale=SCALE, block=5, backend=backend)]

    compare_operator(run, ((21, 4, 6), (42, 2, 6), (42, 2, 5)), 5e-6)


@runs
def test_scores_that_are_no_numbers_and_equal_ones():
    scores = torch.zeros(1, 1, 16, device=DEVICE)
    scores[..., 2:6] = torch.tensor([torch.nan, 1.0, 2.0, torch.nan])
    found = torch.empty(1, 1, 7, dtype=torch.int32, device=DEVICE)
    triton_choice._best(scores, found, 29, 4, 1, 2)  # block 7 is its own
    assert found.flatten().tolist() == [0, 6, 7, 4, 3, 1, 2]


@runs
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(4, 2, 260), "k": torch.zeros(4, 1, 260)}, "up to 256 wide, not 260"),
        ({"q": torch.zeros(4, 65, 8)}, "at most 64 query heads with one selection, not 65"),
        ({"v": torch.zeros(4, 1, 8).half()}, "one type"),
        ({"scale": -1.0}, "scale above 0"),
        ({"parts": [Part(0, 2, 0, 2), Part(2, 4, 0, 0)]}, "in its order"),
    ],
)
def test_refusals(change, words):
    args = {"q": torch.zeros(4, 2, 8), "k": torch.zeros(4, 1, 8), "v": torch.zeros(4, 1, 8), "parts": whole([4]), "scale": 1.0, **change}
    args = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    with pytest.raises(ValueError, match=f"backend='triton' .*{words}"):
        selected_block_attention(**args, indices=torch.zeros(4, 1, 1, dtype=torch.int32, device=DEVICE), block=2, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' does not exist"):
        block_attention(args["q"], args["k"], args["v"], args["parts"], scale=1.0, block=2, top=1, backend="cuda")


@on_gpu
@pytest.mark.parametrize(("heads", "kv", "selections"), [(16, 1, 1), (6, 2, 2), (4, 4, 4), (8, 2, 8), (64, 1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.012), (torch.float32, 1e-5)])
def test_every_shape_on_the_gpu(heads, kv, selections, dtype, tolerance):
    for some, (width, value), block, top in (
        (whole([700]), (128, 128), 64, 8),
        (whole([1, 200, 63, 300]), (192, 128), 32, 4),
        (whole([600, 70]), (64, 64), 256, 2),
        (LATE, (24, 40), 9, 3),
    ):
        compare(some, heads, kv, selections, width, value, block, top, tolerance, dtype=dtype, holes=block == 32)


@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5)])
def test_selection_on_the_gpu(dtype, tolerance):
    """Of float32, in which the order of importance is nearly that of float64."""
    for lengths in ([1500], [1, 40, 700, 900]):
        compare_nsa(whole(lengths), 16, 1, 64, 32, Shape(32, 16, 64, 5), tolerance, dtype)


@on_gpu
def test_the_same_twice():
    some, g = whole([3000, 1000]), torch.Generator("cuda").manual_seed(0)
    shape, shapes = Shape(32, 16, 64, 16), ((4000, 16, 128), (4000, 16, 128), (247, 1, 128), (247, 1, 128), (4000, 1, 128), (4000, 1, 128))
    x = [torch.randn(*of, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_() for of in shapes]

    def once():
        outputs = native_attention(*x, some, scale=0.1, shape=shape, backend="triton")
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), x)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
