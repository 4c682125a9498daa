"""The Triton kernels of the lightning indexer's selection against scores in float64."""

from types import SimpleNamespace

import pytest
import torch

from ltrain.kernels import sparse_attention
from ltrain.kernels.segments import Part, parts
from ltrain.kernels.sparse_attention import index_scores, select, triton_select
from tests.kernels.interpreter import DEVICE, on_gpu, runs


def whole(lengths: list[int]) -> list[Part]:
    return parts(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), sum(lengths))


def index(tokens: int, keys: int, heads: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Small whole numbers, of which all products and sums are exact in every type, and many scores are equal."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(-2, 3, shape, generator=g).to(DEVICE, dtype) for shape in ((tokens, heads, width), (keys, width), (tokens, heads))]


def compare(which: list[Part], keys: int, heads: int, width: int, top_k: int, dtype: torch.dtype, fp8: bool = False) -> None:
    """Each row: the first of the highest, and all where there are fewer."""
    tokens = max(part.stop for part in which)
    given = index(tokens, keys, heads, width, dtype)
    if fp8:  # so that a size is a power of two, and all stays exact
        given[0][..., 0], given[1][..., 0] = 0, 0
        given[0][..., 1], given[1][..., 1] = 3.5, -3.5
    found = select(*given, which, top_k, fp8=fp8, backend="triton").cpu()
    q, k, weights = (x.cpu().double() for x in given)
    expected = torch.full((tokens, top_k), -1, dtype=torch.int32)
    for part in which:
        for t in range(part.start, part.stop):
            seen = slice(part.begin, part.first + t - part.start + 1)
            best = index_scores(q[t : t + 1], k[seen], weights[t : t + 1])[0].sort(descending=True, stable=True).indices[:top_k]
            expected[t, : len(best)] = best.sort().values + part.begin
    assert torch.equal(found, expected)


@runs
@pytest.mark.parametrize(("heads", "width", "top_k", "dtype"), [(3, 6, 7, torch.float32), (1, 16, 1, torch.float16), (20, 20, 5, torch.float32)])
def test_packed_documents(heads, width, top_k, dtype, monkeypatch):
    monkeypatch.setattr(sparse_attention, "SCORES", 500)  # several blocks of queries
    monkeypatch.setattr(triton_select, "LEAST", 16)
    monkeypatch.setattr(triton_select, "BLOCK", 16)
    monkeypatch.setattr(triton_select, "TILE", (16, 16))
    monkeypatch.setattr(triton_select, "EXACT_TILE", (16, 32))
    compare(whole([1, 34, 1, top_k, top_k + 1]), 37 + 2 * top_k, heads, width, top_k, dtype)


@runs
def test_in_fp8(monkeypatch):
    monkeypatch.setattr(triton_select, "BLOCK", 16)
    monkeypatch.setattr(triton_select, "TILE", (16, 32))
    compare(whole([1, 34, 1, 7, 8]), 51, 3, 32, 7, torch.float16, fp8=True)
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=g).to(DEVICE) * scale for shape, scale in (((60, 4, 32), 1e-3), ((60, 32), 1e4), ((60, 4), 1.0))]
    chosen = [select(*given, whole([60]), 9, fp8=True, backend=backend).sort(1).values for backend in ("triton", "reference")]
    assert (chosen[0] == chosen[1]).float().mean() > 0.98  # sums in another order may exchange neighbours
    assert (chosen[0] != select(*given, whole([60]), 9, backend="reference").sort(1).values).any()


@runs
@pytest.mark.parametrize(("fp8", "padded"), [(False, 16), (True, 32)])
def test_narrow_heads_fill_a_tile_of_their_type(fp8, padded, monkeypatch):
    """Products of 16 bits take at least 16 numbers, those of 8 bits 32: the interpreter takes any."""
    seen, program = [], triton_select.kernels.index_scores

    class Spied:
        def __getitem__(self, grid):
            return lambda *args, **options: (seen.append(options["BD"]), program[grid](*args, **options))

    monkeypatch.setattr(triton_select.kernels, "index_scores", Spied())
    monkeypatch.setattr(triton_select, "BLOCK", 16)
    compare(whole([5]), 5, 1, 6, 2, torch.float16, fp8=fp8)
    assert set(seen) == {padded}


@runs
@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)])
def test_8_bits_need_a_gpu_that_multiplies_them(capability, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(4, 2, 8), device=torch.device("cuda", 0))
    assert triton_select.refusal(q, q, False) is None
    why = triton_select.refusal(q, q, True)
    assert (why is not None) == refused and (why is None or "from compute capability 8.9 on" in why)


@runs
def test_queries_behind_keys_that_other_ranks_hold(monkeypatch):
    monkeypatch.setattr(triton_select, "BLOCK", 16)
    compare([Part(0, 5, 10, 33), Part(5, 9, 40, 42), Part(9, 15, 40, 56)], 62, 2, 8, 6, torch.float32)


@runs
def test_scores_of_either_sign_and_size(monkeypatch):
    """Subnormals, both zeros and infinities keep their order."""
    monkeypatch.setattr(triton_select, "BLOCK", 16)
    some = [1e-40, -1e-40, 0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000001, 3e38, -3e38, torch.inf, -torch.inf, 2e-38, 300.0, -300.0, 1e-20]
    compare_scores(torch.tensor(some)[torch.randperm(40, generator=torch.Generator().manual_seed(0)) % len(some)], 20)


def compare_scores(wanted: torch.Tensor, top_k: int, first: int = 0) -> None:
    """Of the queries from `first` on. One head of width 1 makes any score: heads of weight 1 and -1 pass on a key's positive and negative part."""
    rows = len(wanted) - first
    q, weights = (torch.tensor([1.0, -1.0]).view(1, 2, *rest).expand(rows, 2, *rest).to(DEVICE) for rest in ((1,), ()))
    found = select(q, wanted.unsqueeze(1).to(DEVICE), weights, [Part(0, rows, 0, first)], top_k, backend="triton").cpu()
    for t in range(rows):
        best = wanted[: first + t + 1].sort(descending=True, stable=True).indices[:top_k].sort().values.tolist()
        assert found[t].tolist() == best + [-1] * (top_k - len(best))


@runs
@pytest.mark.parametrize(
    "kind", ["all differ", "few differ", "the highest come late", "the highest lie between those of the sample", "one alone is above the others"]
)
def test_long_rows_of_which_a_sample_is_taken_first(kind, monkeypatch):
    monkeypatch.setattr(triton_select, "BLOCK", 16)
    monkeypatch.setattr(triton_select, "SAMPLE", 32)
    wanted = torch.randn(160, generator=torch.Generator().manual_seed(0))
    if kind == "few differ":
        wanted = wanted.round()
    if kind == "the highest come late":
        wanted = wanted.sort().values
    if kind == "the highest lie between those of the sample":
        wanted[15:18] += 100  # the sample: eight neighbours of each quarter
    if kind == "one alone is above the others":
        wanted[1] += 100  # in the sample, which so leaves too few
    compare_scores(wanted, 2, 150)


@runs
@pytest.mark.parametrize(
    ("q", "k", "words"),
    [
        (torch.zeros(4, 2, 130), torch.zeros(4, 130), "at most 128"),
        (torch.zeros(4, 2, 8).half(), torch.zeros(4, 8), "one type"),
    ],
)
def test_refusals(q, k, words):
    with pytest.raises(ValueError, match=f"backend='triton' .*{words}"):
        select(q.to(DEVICE), k.to(DEVICE), torch.zeros(4, 2, device=DEVICE), whole([4]), 2, backend="triton")


@on_gpu
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (4, 60), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_shape_on_the_gpu(heads, width, dtype):
    for lengths, top_k in (([1500], 100), ([1, 700, 64, 65, 1], 64), ([300], 2048)):
        compare(whole(lengths), sum(lengths), heads, width, top_k, dtype)
