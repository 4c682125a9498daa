"""The Triton kernels of the elementwise recurrences against the float64 reference: on a GPU every case, elsewhere in Triton's interpreter."""

import pytest
import torch

from ltrain.kernels import elementwise_recurrence as kernels
from tests.kernels.interpreter import DEVICE, GPU, on_gpu, runs
from tests.kernels.test_elementwise_recurrence import cu

MIXED = [1, 63, 64, 65, 0, 129] if GPU else [1, 7, 8, 9, 0, 17]  # of chunks of 64 tokens, and of 8


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes the same time for a block of one channel as of many: chunks of few tokens, and two blocks of channels."""
    if not GPU:
        from ltrain.kernels.elementwise_recurrence import triton_scan

        monkeypatch.setattr(triton_scan, "CHUNK", 8)
        for name in ("SCAN", "CARRY", "FORWARD", "BACKWARD"):
            monkeypatch.setattr(triton_scan, name, getattr(triton_scan, name)._replace(BC=4, L=2))


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decays(*shape, strongest=1e4):
    """Logarithms, negated: small ones in even channels, which carry states over many chunks, and in odd ones those that forget at once among them."""
    g = torch.Generator().manual_seed(7)
    strong = torch.tensor([0.0, 1e-3, 0.3, 5.0, 40.0, strongest], dtype=torch.float64)[torch.randint(6, shape, generator=g)]
    weak = torch.tensor([0.0, 1e-3, 0.03, 0.1], dtype=torch.float64)[torch.randint(4, shape, generator=g)]
    odd = torch.arange(shape[-1]) % 2 == 1
    return torch.where(odd, strong, weak) * torch.rand(*shape, generator=g, dtype=torch.float64)


def compare(call, inputs, tolerance):
    """Outputs and every gradient of triton, relative RMS below `tolerance` to float64 of the same rounded inputs."""
    given = {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items() if x is not None}
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    found = []
    # token by token would take minutes on a GPU, where `doubling`, which is held to the reference elsewhere, is exact enough in float64
    for tensors, backend in ((given, "triton"), (wide, "doubling" if GPU else "reference")):
        outputs = call(tensors, backend)
        loss = sum((y * drawn(*y.shape, seed=i).to(y)).sum() for i, y in enumerate(outputs.values()))
        grads = torch.autograd.grad(loss, list(tensors.values()))
        found.append(outputs | {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)})
    for name, got in found[0].items():
        expected = found[1][name]
        assert got.isfinite().all(), name
        error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"
    for name, x in given.items():
        assert found[0][f"d{name}"].dtype == x.dtype
    return found[0]


def compare_scan(lengths, channels, tolerance=1e-6, *, a=None, initial=True, final=True):
    a = torch.exp(-decays(sum(lengths), *channels)) if a is None else a
    inputs = {"a": a.float(), "b": drawn(*a.shape, seed=1).float(), "initial": drawn(len(lengths), *channels, seed=2).float() if initial else None}

    def call(x, backend):
        h, after = kernels.scan(x["a"], x["b"], cu(lengths), initial_state=x.get("initial"), backend=backend)
        assert backend == "triton" or after.shape == (len(lengths), *channels)
        return {"h": h, "final": after} if final else {"h": h}

    return compare(call, inputs, tolerance)


def compare_selective(lengths, channels, states, tolerance=1e-5, *, dtype=torch.float32, initial=True, final=True, steps=None):
    tokens = sum(lengths)
    step = decays(tokens, channels, strongest=40.0) if steps is None else torch.full((tokens, channels), steps)
    inputs = {
        "x": (drawn(tokens, channels, seed=1) / step.clamp(min=1)).to(dtype),  # strong steps are not to hide all others in sums of squares
        "step": step.float(),
        "rate": (0.1 + 2 * drawn(channels, states, seed=3).abs()).float(),
        "B": drawn(tokens, states, seed=4).to(dtype),
        "C": drawn(tokens, states, seed=5).to(dtype),
        "initial": drawn(len(lengths), channels, states, seed=6).float() if initial else None,
    }

    def call(x, backend):
        args = (x[name] for name in ("x", "step", "rate", "B", "C"))
        y, after = kernels.selective_scan(*args, cu(lengths), initial_state=x.get("initial"), return_final_state=final, backend=backend)
        return {"y": y, "final": after} if final else {"y": y}

    return compare(call, inputs, tolerance)


@runs
@pytest.mark.parametrize(("initial", "final"), [(True, True), (False, True), (False, False)])
def test_scan(initial, final):
    compare_scan(MIXED, (3, 2) if initial else (2,), initial=initial, final=final)


@runs
@pytest.mark.parametrize("lengths", [[1], [40], [0, 0, 5, 0], [1] * 150], ids=lambda x: f"{len(x)} of {sum(x)}")
def test_scan_of_lengths(lengths):
    compare_scan(lengths, (5,))


@runs
@pytest.mark.parametrize("decay", [1.0, 4e-18, 0.0])
def test_scan_of_one_decay(decay):
    compare_scan([3, 14], (2,), a=torch.full((17, 2), decay, dtype=torch.float64))


@runs
@pytest.mark.parametrize(("states", "initial", "final"), [(5, True, True), (1, True, False), (16, False, True)])
def test_selective_scan(states, initial, final, monkeypatch):
    from ltrain.kernels.elementwise_recurrence import triton_scan

    monkeypatch.setattr(triton_scan, "SCRATCH", 2 * 4 * 4 * states * 6)  # the backward goes two chunks at a time
    compare_selective(MIXED if GPU or states < 16 else [3, 9], 6, states, initial=initial, final=final)


@runs
@pytest.mark.parametrize("lengths", [[1], [30], [0, 0, 5, 0], [1] * 150], ids=lambda x: f"{len(x)} of {sum(x)}")
def test_selective_scan_of_lengths(lengths):
    compare_selective(lengths, 3, 1)


@runs
@pytest.mark.parametrize("step", [1e-6, 40.0, 1e4])
def test_selective_scan_of_one_step(step):
    compare_selective([3, 14], 2, 2, steps=step)


@runs
def test_the_chunks_of_the_gpu(monkeypatch):
    monkeypatch.undo()
    compare_scan([1, 63, 64, 65, 0, 129], (3,))
    compare_selective([1, 63, 64, 65, 0, 129], 3, 1)


@runs
def test_selective_scan_of_mixed_types():
    compare_selective([10, 3], 6, 3, 0.01, dtype=torch.bfloat16)


@runs
def test_gradients_are_the_same_each_time():
    first, again = (compare_selective([10, 3], 6, 2) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@runs
def test_what_is_refused():
    x = torch.ones(3, 2, device=DEVICE)
    for dtype in (torch.float64, torch.bfloat16):  # of what a state is made of in its own type
        with pytest.raises(ValueError, match=f"backend='triton' takes float32, not {dtype}: choose doubling or auto"):
            kernels.scan(x.to(dtype), x.to(dtype), cu([3]), backend="triton")
    with pytest.raises(ValueError, match="backend='triton' takes bfloat16, float16, float32, not torch.float64: choose doubling or auto"):
        kernels.selective_scan(x, x.double(), x[:2], x, x, cu([3]), backend="triton")
    assert kernels.scan(x.double(), x.double(), cu([3]))[0].dtype == torch.float64
    wide = torch.ones(3, 33, device=DEVICE)
    with pytest.raises(ValueError, match="takes at most 32 states of a channel, not 33"):
        kernels.selective_scan(x, x, torch.ones(2, 33, device=DEVICE), wide, wide, cu([3]), backend="triton")


@on_gpu
@pytest.mark.parametrize("lengths", [[5000], [1] * 300, [64, 63, 65, 1, 0, 4000]], ids=lambda x: f"{len(x)} of {sum(x)}")
def test_on_the_gpu(lengths):
    compare_scan(lengths, (200,))
    for states in (1, 5, 16, 32):
        compare_selective(lengths, 200, states)
        compare_selective(lengths, 200, states, 0.01, dtype=torch.bfloat16, initial=False)
