"""Sparse attention against the equations of its papers in float64."""

import pytest
import torch

from ltrain.kernels import sparse_attention as kernels
from ltrain.kernels.segments import Part, parts
from ltrain.kernels.sparse_attention import block_index
from ltrain.kernels.sparse_attention import latent as latents
from ltrain.kernels.sparse_attention.block_means import block_attention
from ltrain.kernels.sparse_attention.decoding import among, best_numbers, candidates, seen_blocks
from ltrain.kernels.sparse_attention.native import Shape, native_attention

LENGTHS = [1, 40, 2, 57]
TOP, SCALE = 7, 0.3


def whole() -> list[Part]:
    return parts(torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32), sum(LENGTHS))


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=g).requires_grad_() for shape in shapes]


def visible() -> torch.Tensor:
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return (document[:, None] == document).tril()


def best(scores: torch.Tensor) -> torch.Tensor:
    """[T, T], whether a key is among the TOP best visible ones of a query: the scores' order, token by token."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for t, seen in enumerate(visible()):
        keys = sorted(seen.nonzero().flatten().tolist(), key=lambda s: -float(scores[t, s].detach()))
        chosen[t, keys[:TOP]] = True
    return chosen


def indexed(iq: torch.Tensor, ik: torch.Tensor, iw: torch.Tensor) -> torch.Tensor:
    """[T, T]: equation 1 of the report."""
    return torch.einsum("th,ths->ts", iw, torch.einsum("thd,sd->ths", iq, ik).relu())


def divergence(p: torch.Tensor, index: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 3 and 4: KL(t || softmax(I)), t the heads' sum of p [H, T, T] made to sum to 1 -> it and the entropy of t."""
    target = (p.sum(0) / len(p)).detach()
    logs = target.clamp(min=1e-300).log()
    return (target * (logs - index.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0))).sum(), -(target * logs).sum()


@pytest.mark.parametrize("block", [64, 1 << 24])
def test_the_loss_over_all_keys(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCORES", block)
    tokens = sum(LENGTHS)
    q, k, *index = tensors((tokens, 4, 6), (tokens, 2, 6), (tokens, 8, 3), (tokens, 3), (tokens, 8))
    p = (torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * SCALE).masked_fill(~visible(), -torch.inf).softmax(-1)
    loss, entropy = divergence(p, indexed(*index), visible())
    mine = kernels.index_loss(q.detach(), k.detach(), index, whole(), scale=SCALE, heads=4)
    torch.testing.assert_close(mine - entropy, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(mine, index), torch.autograd.grad(loss, index), rtol=1e-8, atol=1e-10)
    # the halves of the heads add up to the whole
    halves = [kernels.index_loss(q[:, h : h + 2], k[:, h // 2 : h // 2 + 1], index, whole(), scale=SCALE, heads=4) for h in (0, 2)]
    torch.testing.assert_close(halves[0] + halves[1], mine, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [300, 1 << 24])
def test_selection_and_attention_over_latents_and_its_loss(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent is one key for all heads, with its first numbers for the value. Slots may be in any order."""
    monkeypatch.setattr(kernels, "SCORES", block)
    tokens = sum(LENGTHS)
    q, latent, *index = tensors((tokens, 4, 6), (tokens, 6), (tokens, 8, 3), (tokens, 3), (tokens, 8))
    seen = best(indexed(*index))
    indices = kernels.select(*(x.detach() for x in index), whole(), TOP)
    assert [set(row.tolist()) - {-1} for row in indices] == [set(row.nonzero().flatten().tolist()) for row in seen]
    scores = (torch.einsum("qhd,kd->hqk", q, latent) * SCALE).masked_fill(~seen, -torch.inf)
    p = scores.softmax(-1)
    expected = torch.einsum("hqk,kd->qhd", p, latent[:, :5])
    y, lse = latents.latent_attention(q, latent, indices.flip(1), width=5, scale=SCALE)
    torch.testing.assert_close((y, lse), (expected, scores.logsumexp(-1).T), rtol=1e-11, atol=1e-12)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), (q, latent)) for out in (y, expected)), rtol=1e-9, atol=1e-11)
    loss, entropy = divergence(p, indexed(*index), seen)
    mine = latents.latent_index_loss(q, latent, lse, index, indices.flip(1), scale=SCALE, heads=4)
    torch.testing.assert_close(mine - entropy, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(mine, index), torch.autograd.grad(loss, index), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent": torch.zeros(3, 5)}, r"\[T, H, D\]"),
        ({"indices": torch.zeros(2, 2).long()}, r"indices must be \[3, K\]"),
        ({"indices": torch.zeros(3, 2)}, "int32 or int64"),
        ({"width": 7}, "width=7"),
        ({"backend": "fast"}, "backend='fast'"),
        ({"lse": torch.zeros(3, 1)}, r"lse must be \[3, 2\]"),
        ({"index": (torch.zeros(3, 2, 4), torch.zeros(3, 3), torch.zeros(3, 2))}, "the indexer's q"),
    ],
)
def test_latents_that_do_not_fit(change: dict[str, object], words: str) -> None:
    args = {"q": torch.zeros(3, 2, 6), "latent": torch.zeros(3, 6), "indices": torch.zeros(3, 2).long(), "scale": 1.0, "backend": "auto"}
    loss = {"lse": torch.zeros(3, 2), "index": (torch.zeros(3, 2, 4), torch.zeros(3, 4), torch.zeros(3, 2)), "heads": 2}
    with pytest.raises(ValueError, match=words):
        if "lse" in change or "index" in change:
            latents.latent_index_loss(**{**args, **loss, **change})
        else:
            latents.latent_attention(**{"width": 5, **args, **change})


@pytest.mark.parametrize("scores", [64, 1 << 24])
@pytest.mark.parametrize(("block", "top", "local"), [(8, 3, 1), (5, 4, 2), (16, 9, 0)])
def test_block_index_query_by_query(block: int, top: int, local: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniMax Sparse Attention (arXiv 2606.13392): each K/V head sees the last blocks and those whose best key has the largest index product."""
    monkeypatch.setattr(kernels, "SCORES", scores)
    tokens = sum(LENGTHS)
    q, k, v, iq, ik = tensors((tokens, 4, 6), (tokens, 2, 6), (tokens, 2, 5), (tokens, 2, 3), (tokens, 3))
    rows, losses, start = [], [], 0
    for length in LENGTHS:
        for t in range(length):
            for g in range(2):
                products = ik[start : start + t + 1] @ iq[start + t, g]
                own = t // block
                last = [i for i in range(own + 1) if own - i < local]
                before = [i for i in range(own + 1) if own - i >= local]
                best = sorted(before, key=lambda i: -float(products[i * block : (i + 1) * block].detach().max()))[: top - len(last)]  # noqa: B023 - used at once
                seen = [s for s in range(t + 1) if s // block in (*best, *last)]
                keys, values = k[start : start + length, g][seen], v[start : start + length, g][seen]
                p = [(keys @ q[start + t, h] * SCALE).softmax(0) for h in (2 * g, 2 * g + 1)]
                rows += [weights @ values for weights in p]
                losses.append(-((p[0] + p[1]).detach() / 2 * (products[seen] * 3**-0.5).log_softmax(0)).sum() / 2)
        start += length
    expected, loss = torch.stack(rows).unflatten(0, (-1, 4)), torch.stack(losses).sum()
    index, leaves = (iq, ik), (q, k, v)
    indices = block_index.select_blocks(index, whole(), block=block, top=top, local=local)
    y = block_index.selected_block_attention(q, k, v, indices, whole(), scale=SCALE, block=block)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), leaves) for out in (y, expected)), rtol=1e-9, atol=1e-11)
    mine = block_index.index_loss(q.detach(), k.detach(), index, indices, whole(), scale=SCALE, block=block, kv_heads=2)
    torch.testing.assert_close(mine, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(mine, index), torch.autograd.grad(loss, index), rtol=1e-8, atol=1e-10)
    everything = block_index.select_blocks(index, whole(), block=block, top=max(LENGTHS), local=local)
    warm_up, same = (
        block_index.index_loss(q.detach(), k.detach(), index, seen, whole(), scale=SCALE, block=block, kv_heads=2) for seen in (None, everything)
    )
    torch.testing.assert_close(warm_up, same, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [64, 1 << 24])
@pytest.mark.parametrize(("block", "top", "local"), [(8, 3, 1), (5, 1, 1), (16, 9, 1), (5, 4, 2)])
def test_moba_query_by_query(block: int, top: int, local: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MoBA (arXiv 2502.13189), equations 2 to 6: a query sees its own block, causally, and its best earlier ones by <q, mean of K>. With local
    the last ones before its own, too."""
    monkeypatch.setattr(kernels, "SCORES", scores)
    q, k, v = tensors((sum(LENGTHS), 4, 6), (sum(LENGTHS), 2, 6), (sum(LENGTHS), 2, 5))
    rows, start = [], 0
    for length in LENGTHS:
        for t in range(length):
            for h in range(4):
                keys, values = k[start : start + length, h // 2], v[start : start + length, h // 2]
                own = t // block
                affinity = [float(q[start + t, h] @ keys[i * block : (i + 1) * block].mean(0)) for i in range(own)]
                last = [i for i in range(own + 1) if own - i < local]
                best = sorted({*range(own)} - {*last}, key=lambda i: -affinity[i])[: top - len(last)]  # noqa: B023 - used at once
                seen = [s for s in range(t + 1) if s // block in (*best, *last)]
                rows.append((keys[seen] @ q[start + t, h] * SCALE).softmax(0) @ values[seen])
        start += length
    expected = torch.stack(rows).unflatten(0, (-1, 4))
    y = block_attention(q, k, v, whole(), scale=SCALE, block=block, top=top, local=local)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (y, expected)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scores", [64, 1 << 24])
@pytest.mark.parametrize("shape", [Shape(4, 4, 4, 3), Shape(8, 4, 8, 4), Shape(4, 2, 8, 3)], ids=str)
def test_nsa_query_by_query(shape: Shape, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NSA (arXiv 2502.11089), equations 7 to 12, for given compressed keys and values."""
    monkeypatch.setattr(kernels, "SCORES", scores)
    tokens, counts = sum(LENGTHS), [max((n - shape.length) // shape.stride + 1, 0) for n in LENGTHS]
    q, turned, kc, vc, k, v = tensors((tokens, 4, 6), (tokens, 4, 6), (sum(counts), 2, 6), (sum(counts), 2, 5), (tokens, 2, 6), (tokens, 2, 5))
    compressed, selected, start, first = [], [], 0, 0
    for length, count in zip(LENGTHS, counts, strict=True):
        for t in range(length):
            ended = [i for i in range(count) if i * shape.stride + shape.length - 1 <= t]
            importance = {}
            for h in range(4):
                g, rows = h // 2, [first + i for i in ended]
                p = (kc[rows, g] @ q[start + t, h] * SCALE).softmax(0)
                compressed.append(p @ vc[rows, g] if ended else torch.zeros(5, dtype=torch.float64))
                for j in range(t // shape.block + 1):
                    # strides that the blocks share, of each compressed block
                    inside = {*range(j * shape.block // shape.stride, (j + 1) * shape.block // shape.stride)}
                    units = [len({*range(i, i + shape.length // shape.stride)} & inside) for i in ended]
                    importance[g, j] = importance.get((g, j), 0.0) + sum(float(a) * u for a, u in zip(p, units, strict=True))
            for h in range(4):
                own = t // shape.block
                always = {0, own, max(own - 1, 0)}
                others = sorted(set(range(own + 1)) - always, key=lambda j: -importance[h // 2, j])  # noqa: B023 - used at once
                chosen = always | set(others[: shape.top - len(always)])
                rows = [start + s for s in range(t + 1) if s // shape.block in chosen]
                selected.append((k[rows, h // 2] @ turned[start + t, h] * SCALE).softmax(0) @ v[rows, h // 2])
        start, first = start + length, first + count
    expected = tuple(torch.stack(rows).unflatten(0, (-1, 4)) for rows in (compressed, selected))
    got = native_attention(q, turned, kc, vc, k, v, whole(), scale=SCALE, shape=shape)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    leaves = (q, turned, kc, vc, k, v)
    weight = torch.randn(tokens, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((torch.cat(ys, -1) * weight).sum(), leaves) for ys in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_best_of_the_ranks_best_are_the_best_of_all(count: int) -> None:
    """Keys that each have one rank; blocks whose score is the largest of parts that several have; and equal scores."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(0, 12, (2, 3, 30), generator=generator).double()
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.2, -torch.inf)
    numbers = torch.randperm(30, generator=generator).expand(scores.shape)
    distinct = scores + numbers / 100
    rank = torch.randint(0, 4, scores.shape, generator=generator)
    lower = distinct - torch.rand(scores.shape, generator=generator)  # what else a rank may have of the same block
    parts = []
    for r in range(4):
        parts.append(candidates(distinct.where(rank == r, lower.where((rank + r) % 3 == 0, -torch.inf)), numbers, count))
        assert parts[-1][0].shape == (2, 3, count)  # as many numbers travel, however many a rank has
    found = best_numbers(*(torch.cat(side, -1) for side in zip(*parts, strict=True)), count)
    order = distinct.sort(dim=-1, descending=True)
    expected = numbers.gather(-1, order.indices).masked_fill(order.values == -torch.inf, -1)
    expected = torch.nn.functional.pad(expected, (0, max(count - 30, 0)), value=-1)[..., :count]
    assert torch.equal(found, expected)
    equal = best_numbers(torch.zeros_like(scores), numbers, count)
    assert equal.tolist() == torch.tensor([*range(min(count, 30)), *[-1] * (count - 30)]).expand(2, 3, -1).tolist()


def test_seen_blocks_are_those_chosen_and_the_last_ones() -> None:
    assert among(torch.tensor([[3, -1, 7, 0]]), torch.tensor([[7, -1, 3]])).tolist() == [[True, False, True, False]]
    blocks, own = torch.tensor([[0, 1, 2, 3, 4, -1]]), torch.tensor([4])
    for chosen, local, seen in (([1, -1], 2, [0, 1, 0, 1, 1, 0]), ([0, 4], 1, [1, 0, 0, 0, 1, 0]), ([], 1, [0, 0, 0, 0, 1, 0]), ([-1], 0, [0] * 6)):
        found = seen_blocks(torch.tensor(chosen, dtype=torch.int64).view(1, 1, -1), blocks, own, local)
        assert found.tolist() == [[[bool(x) for x in seen]]]
