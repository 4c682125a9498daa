import itertools

import pytest
import torch

from ltrain.kernels.linear_recurrence import linear_recurrence, step

LENGTHS = [[], [0], [1], [63], [64], [65], [200], [2, 0, 65, 1, 64, 63, 1]]
DECAYS = ["none", "head", "channel"]
BOTH = list(itertools.product(DECAYS, [True, False]))  # decay, delta rule or additive


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(lengths, heads=2, group=1, width=8, value_width=8, decay="head", delta=True, level: float | None = None, dtype=torch.float64, seed=0):
    """q, k (unit length), v, decay, beta, initial state. Without a level, each decay is near 0, near -5 or near -40, at random."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tokens = sum(lengths)
    q, k, v = draw(tokens, heads, width), draw(tokens, heads, width), draw(tokens, heads * group, value_width)
    k = k / k.norm(dim=-1, keepdim=True)
    shape = (tokens, heads * group, width) if decay == "channel" else (tokens, heads * group)
    noise = torch.rand(*shape, generator=g, dtype=torch.float64)
    levels = torch.tensor([-1e-3] * 18 + [-5.0, -40.0])[torch.randint(20, shape, generator=g)]
    logs = noise * (levels.double() if level is None else level)
    beta = draw(tokens, heads * group).sigmoid()
    state = draw(len(lengths), heads * group, width, value_width)
    chosen = [q, k, v, None if decay == "none" else logs, beta if delta else None, state]
    return [None if x is None else x.to(dtype).requires_grad_() for x in chosen]


def run(x, lengths, backend="chunked", **kwargs):
    q, k, v, decay, beta, state = x
    return linear_recurrence(q, k, v, decay, beta, cu(lengths), scale=0.4, initial_state=state, return_final_state=True, backend=backend, **kwargs)


def gradients(result, x, seed=1, **kwargs):
    """Of a random weighting of output and final states, so that both carry a gradient."""
    g = torch.Generator().manual_seed(seed)
    weigh = lambda t: (t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)).sum()  # noqa: E731
    return torch.autograd.grad(weigh(result.output) + weigh(result.final_state), [t for t in x if t is not None], **kwargs)


def test_reference_against_the_equation():
    q, k, v, decay, beta, state = inputs([3], heads=1, group=2, width=4, value_width=3, decay="channel")
    result = run([q, k, v, decay, beta, state], [3], backend="reference")
    for h in range(2):
        s = state[0, h]
        for t in range(3):
            s = torch.diag(decay[t, h].exp()) @ s
            s = s + beta[t, h] * torch.outer(k[t, 0], v[t, h] - s.T @ k[t, 0])
            torch.testing.assert_close(result.output[t, h], 0.4 * s.T @ q[t, 0])
        torch.testing.assert_close(result.final_state[0, h], s)


@pytest.mark.parametrize(("decay", "delta"), BOTH)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunked_and_every_gradient(lengths, decay, delta):
    x = inputs(lengths, group=2, width=8, value_width=16, decay=decay, delta=delta)
    got, expected = run(x, lengths), run(x, lengths, backend="reference")
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-10, atol=1e-11)
    # A loop over no tokens reaches no tensor; chunked must reach all of them, since a rank without tokens still takes part in the backward.
    exact = gradients(expected, x, allow_unused=not sum(lengths), materialize_grads=not sum(lengths))
    torch.testing.assert_close(gradients(got, x), exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("level", [-1e-6, -5.0, -40.0, -1000.0])
@pytest.mark.parametrize(("width", "value_width", "group"), [(20, 8, 1), (16, 20, 2)])
def test_decay_levels_and_widths(level, width, value_width, group, decay):
    x = inputs([65, 7], heads=1, group=group, width=width, value_width=value_width, decay=decay, level=level)
    got, expected = run(x, [65, 7]), run(x, [65, 7], backend="reference")
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients(got, x), gradients(expected, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("lowest", [-1e13, torch.finfo(torch.float32).min])
def test_after_a_reset_nothing_of_before_is_left(lowest, decay, delta):
    x = inputs([40, 3], level=-0.5, decay=decay, delta=delta)
    for token in (5, 6, 39):
        x[3].data[token] = lowest
    near, exact = (run(x, [40, 3], by) for by in ("chunked", "reference"))
    torch.testing.assert_close(near, exact)
    torch.testing.assert_close(gradients(near, x), gradients(exact, x))


@pytest.mark.parametrize("chunk", [1, 5, 16, 33, 128])
def test_any_chunk_length(chunk):
    x = inputs([50, 3, 70], heads=1, decay="channel")
    torch.testing.assert_close(run(x, [50, 3, 70], chunk=chunk)[:2], run(x, [50, 3, 70], backend="reference")[:2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("level", [-1e-3, -5.0, None])
def test_lower_precision_against_float64(dtype, tolerance, decay, level):
    """Gradients are of the same rounded inputs; decays stay float32, as models keep them."""
    lengths = [100, 30]
    x = inputs(lengths, width=16, value_width=16, decay=decay, level=level, dtype=dtype)
    x[3:] = [None if t is None else t.detach().float().requires_grad_() for t in x[3:]]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in x]
    got, expected = run(x, lengths), run(wide, lengths, backend="reference")
    assert got.output.dtype == dtype and got.final_state.dtype == torch.float32
    assert (got.output.double() - expected.output).norm() < tolerance * expected.output.norm()
    assert (got.final_state.double() - expected.final_state).norm() < tolerance * expected.final_state.norm()
    for a, b in zip(gradients(got, x), gradients(expected, wide), strict=True):
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize(("decay", "delta"), BOTH)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_segment_map(decay, delta, backend):
    lengths = [65, 0, 2, 20]
    x = inputs(lengths, heads=1, group=2, width=8, value_width=5, decay=decay, delta=delta)
    result = run(x, lengths, backend=backend, return_segment_map=True)
    m, e = result.segment_map
    torch.testing.assert_close(m @ x[5] + e, result.final_state)
    torch.testing.assert_close(m[1], torch.eye(8, dtype=torch.float64).expand(2, 8, 8))
    without = linear_recurrence(*x[:5], cu(lengths), scale=1.0, return_segment_map=True, backend=backend)
    torch.testing.assert_close(without.segment_map, (m, e))
    assert without.final_state is None
    loss = lambda maps: maps[0].sin().sum() + maps[1].cos().sum()  # noqa: E731
    leaves = [t for t in x[1:5] if t is not None]
    other = linear_recurrence(*x[:5], cu(lengths), scale=1.0, return_segment_map=True, backend="reference")
    # Of an additive update the map does not depend on q, and M not on k.
    torch.testing.assert_close(torch.autograd.grad(loss((m, e)), leaves), torch.autograd.grad(loss(other.segment_map), leaves))


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("cut", [1, 64, 99])
def test_a_document_in_two_calls_is_one(cut, delta):
    x = inputs([150], decay="head", delta=delta)
    whole = run(x, [150], return_segment_map=True)
    parts = [[None if t is None else t[rows] for t in x[:5]] for rows in (slice(0, cut), slice(cut, 150))]
    first = run([*parts[0], x[5]], [cut], return_segment_map=True)
    second = run([*parts[1], first.final_state], [150 - cut], return_segment_map=True)
    joined = whole._replace(output=torch.cat([first.output, second.output]), final_state=second.final_state)
    torch.testing.assert_close(joined[:2], whole[:2])
    torch.testing.assert_close(gradients(joined, x), gradients(whole, x))
    (m1, e1), (m2, e2) = first.segment_map, second.segment_map
    torch.testing.assert_close((m2 @ m1, m2 @ e1 + e2), whole.segment_map)


@pytest.mark.parametrize(("decay", "delta"), BOTH)
def test_step_by_step_is_the_stream(decay, delta):
    x = inputs([6, 6], group=2, value_width=5, decay=decay, delta=delta)
    result = run(x, [6, 6])
    state = x[5]
    for t in range(6):
        at = [None if tensor is None else tensor[[t, 6 + t]] for tensor in x[:5]]
        output, state = step(*at, state, scale=0.4)
        torch.testing.assert_close(output, result.output[[t, 6 + t]])
    torch.testing.assert_close(state, result.final_state)


@pytest.mark.parametrize(("decay", "delta"), BOTH)
def test_few_tokens_at_a_time_are_the_stream(decay, delta):
    """As a guess of several tokens is verified: those of each sequence are a segment behind its state."""
    x = inputs([7, 7, 7], group=2, value_width=5, decay=decay, delta=delta)
    result, state, begin = run(x, [7, 7, 7]), x[5], 0
    for few in (3, 1, 3):
        rows = [7 * n + t for n in range(3) for t in range(begin, begin + few)]
        got = run([*(None if tensor is None else tensor[rows] for tensor in x[:5]), state], [few] * 3)
        torch.testing.assert_close(got.output, result.output[rows])
        state, begin = got.final_state, begin + few
    torch.testing.assert_close(state, result.final_state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(10, 2, 7)}, "q and k"),
        ({"v": torch.zeros(10, 3, 4)}, "v has 3 heads"),
        ({"decay": torch.zeros(10, 2)}, r"decay must be \[10, 4\]"),
        ({"beta": torch.zeros(10, 4, 1)}, r"beta must be \[10, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "cu_seqlens"),
        ({"initial_state": torch.zeros(2, 4, 8, 4)}, r"initial_state must be \[1, 4, 8, 4\]"),
        ({"backend": "triton"}, "backend='triton' runs on CUDA"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_refusals(change, words):
    args = {"q": torch.zeros(10, 2, 8), "k": torch.zeros(10, 2, 8), "v": torch.zeros(10, 4, 4), "decay": None, "beta": None}
    with pytest.raises(ValueError, match=words):
        linear_recurrence(**{**args, "cu_seqlens": cu([10]), "scale": 1.0, **change})
