"""The Triton kernels of attention over selected latents against float64."""

import pytest
import torch

from ltrain.kernels.sparse_attention import triton_latent
from ltrain.kernels.sparse_attention.latent import latent_attention, latent_index_loss
from tests.kernels.interpreter import DEVICE, on_gpu, runs


def selection(lengths: list[int], slots: int, *, holes: bool, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[T, slots]: for each query some keys of its document up to itself, in no order; with holes, -1s among them, one query
    without any and one whose only key is in its last slot."""
    g, rows, start = torch.Generator().manual_seed(2), [], 0
    for length in lengths:
        for t in range(length):
            keys = torch.randperm(t + 1, generator=g)[: torch.randint(1, slots + 1, (), generator=g) if holes else slots] + start
            row = torch.cat((keys, keys.new_full((slots - len(keys),), -1)))
            rows.append(row[torch.randperm(slots, generator=g)] if holes else row)
        start += length
    found = torch.stack(rows).to(dtype)
    if holes:
        found[len(found) // 2] = -1
        found[3] = torch.tensor([-1] * (slots - 1) + [int(found[3].max())])
    return found


def compare(lengths, heads, width, rest, slots, tolerance, *, holes=False, dtype=torch.float32, index_dtype=torch.int32):
    """Output, log-sum-exp and both gradients, through both, relative RMS below `tolerance`, of the same rounded inputs."""
    g, tokens = torch.Generator().manual_seed(0), sum(lengths)
    given = [torch.randn(shape, generator=g).to(DEVICE, dtype).requires_grad_() for shape in ((tokens, heads, width + rest), (tokens, width + rest))]
    wide = [x.detach().cpu().double().requires_grad_() for x in given]
    indices, found = selection(lengths, slots, holes=holes, dtype=index_dtype), []
    weights = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((tokens, heads, width), (tokens, heads))]
    for (q, latent), backend in ((given, "triton"), (wide, "reference")):
        out, lse = latent_attention(q, latent, indices.to(q.device), width=width, scale=0.3, backend=backend)
        loss = (out * weights[0].to(out)).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * weights[1].to(lse)).sum()
        found.append([out, lse, *torch.autograd.grad(loss, (q, latent))])
    for name, got, expected in zip(("out", "lse", "dq", "dlatent"), *found, strict=True):
        got, finite = got.cpu().double(), expected.isfinite()
        assert torch.equal(got.isfinite(), finite), name
        error = (got - expected)[finite].norm() / expected[finite].norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"
    if holes:
        for x in (found[0][0], found[0][2]):
            assert not x[tokens // 2].any()
        assert (found[0][1][tokens // 2] == -torch.inf).all()


@runs
@pytest.mark.parametrize(
    ("lengths", "heads", "width", "rest", "slots", "holes"),
    [
        ([1, 7, 1, 4], 3, 16, 16, 7, False),  # fewer tokens than slots
        ([24], 1, 20, 6, 21, True),
        ([1, 1, 14], 16, 32, 0, 12, True),  # keys that are values
        ([11], 20, 8, 4, 18, False),
    ],
)
def test_against_the_reference(lengths, heads, width, rest, slots, holes):
    compare(lengths, heads, width, rest, slots, 2e-6, holes=holes)


@runs
def test_a_small_sum_of_exponentials_beside_empty_slots():
    """Scores near -200: e to the negative log-sum-exp, what a score of zero would have for its weight, is no float32."""
    g, found = torch.Generator().manual_seed(0), []
    q, latent = torch.randn(3, 2, 16, generator=g) * 0.1 - 40, torch.randn(3, 16, generator=g) * 0.01 + 1
    indices = torch.tensor([[0, -1, -1], [0, 1, -1], [-1, 2, 0]])
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        x = [t.to(DEVICE, dtype).requires_grad_() for t in (q, latent)]
        out, _ = latent_attention(*x, indices.to(DEVICE), width=12, scale=0.3, backend=backend)
        found.append([out.double(), *(grad.double() for grad in torch.autograd.grad((out * x[0][..., :12].detach()).sum(), x))])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@runs
def test_half_precision_and_several_blocks_of_heads_and_queries(monkeypatch):
    monkeypatch.setattr(triton_latent, "PAIRS", 400)  # some queries at a time
    compare([12], 70, 16, 16, 70, 2e-3, dtype=torch.float16, holes=True, index_dtype=torch.int64)


def compare_loss(lengths, heads, width, index_heads, index_width, slots, tolerance, *, holes=False, dtype=torch.float32):
    """The indexer's loss and its gradients, relative RMS below `tolerance`, of the same rounded inputs."""
    g, tokens = torch.Generator().manual_seed(0), sum(lengths)
    shapes = (tokens, heads, width), (tokens, width), (tokens, index_heads, index_width), (tokens, index_width), (tokens, index_heads)
    q, latent, *given = [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]
    given[2] = given[2].float() * index_width**-0.5
    indices, found = selection(lengths, slots, holes=holes), []
    for change, backend in ((lambda x: x.detach(), "triton"), (lambda x: x.detach().cpu().double(), "reference")):
        index = tuple(change(x).requires_grad_() for x in given)
        at, chosen = (change(q), change(latent)), indices.to(change(q).device)
        _, lse = latent_attention(*at, chosen, width=min(width, 512), scale=0.3, backend=backend)
        loss = latent_index_loss(*at, lse, index, chosen, scale=0.3, heads=heads + 2, backend=backend)
        found.append([loss, *torch.autograd.grad(loss * 1.5, index)])
    for name, got, expected in zip(("loss", "dq", "dk", "dweights"), *found, strict=True):
        error = (got.cpu().double() - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@runs
@pytest.mark.parametrize(
    ("lengths", "heads", "width", "index_heads", "index_width", "slots", "holes"),
    [
        ([1, 7, 1, 4], 3, 20, 20, 8, 7, False),
        ([14], 20, 16, 3, 18, 21, True),
    ],
)
def test_loss_against_the_reference(lengths, heads, width, index_heads, index_width, slots, holes):
    compare_loss(lengths, heads, width, index_heads, index_width, slots, 2e-6, holes=holes)


@runs
def test_loss_in_half_precision_and_several_blocks(monkeypatch):
    monkeypatch.setattr(triton_latent, "INDEX_PAIRS", 400)
    compare_loss([12], 70, 16, 70, 16, 70, 2e-3, dtype=torch.float16, holes=True)


@runs
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": (torch.zeros(4, 2, 130), torch.zeros(4, 130), torch.zeros(4, 2))}, "heads of at most 128, not 130"),
        ({"index": (torch.zeros(4, 2, 8).half(), torch.zeros(4, 8), torch.zeros(4, 2))}, "in the attention's torch.float32"),
        ({"q": torch.zeros(4, 2, 16).half()}, "one type"),
    ],
)
def test_loss_refusals(change, words):
    args = {"q": torch.zeros(4, 2, 16), "latent": torch.zeros(4, 16), "lse": torch.zeros(4, 2), "indices": torch.zeros(4, 1).long(), **change}
    args = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else tuple(x.to(DEVICE) for x in t) for name, t in args.items()}
    args.setdefault("index", tuple(torch.zeros(4, *shape, device=DEVICE) for shape in ((2, 8), (8,), (2,))))
    with pytest.raises(ValueError, match=f"backend='triton' .*{words}"):
        latent_index_loss(**args, scale=1.0, heads=2, backend="triton")


@runs
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 520}, "at most 512 .* not 520 and 10"),
        ({"width": 400}, "at most 512 .* not 400 and 130"),
        ({"latent": torch.zeros(4, 530).half()}, "one type"),
        ({"q": torch.zeros(4, 2, 530).double()}, "one type"),
    ],
)
def test_refusals(change, words):
    args = {"q": torch.zeros(4, 2, 530), "latent": torch.zeros(4, 530), "indices": torch.zeros(4, 1, dtype=torch.int32), "width": 500, **change}
    args = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    with pytest.raises(ValueError, match=f"backend='triton' .*{words}"):
        latent_attention(**args, scale=1.0, backend="triton")


@on_gpu
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_every_shape_on_the_gpu(heads, dtype, tolerance):
    for lengths, (width, rest), slots in (
        ([300], (512, 64), 128),
        ([1, 200, 1, 63], (512, 64), 200),
        ([1] * 70, (128, 32), 64),
        ([129], (96, 0), 33),
    ):
        compare(lengths, heads, width, rest, slots, tolerance, dtype=dtype, holes=slots != 128)


@on_gpu
@pytest.mark.parametrize(("heads", "index_heads"), [(1, 64), (20, 3), (128, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_every_shape_of_the_loss_on_the_gpu(heads, index_heads, dtype, tolerance):
    for lengths, width, index_width, slots in (([300], 576, 128, 128), ([1, 200, 1, 63], 160, 64, 200), ([129], 96, 40, 33)):
        compare_loss(lengths, heads, width, index_heads, index_width, slots, tolerance, dtype=dtype, holes=slots != 128)


@on_gpu
def test_the_same_twice():
    indices, g = selection([2000], 256, holes=False).cuda(), torch.Generator("cuda").manual_seed(0)
    q, latent = (torch.randn(2000, *shape, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in ((16, 576), (576,)))

    def once():
        out, lse = latent_attention(q, latent, indices, width=512, scale=0.05, backend="triton")
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, latent))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
