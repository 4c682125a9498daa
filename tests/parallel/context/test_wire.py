"""Keys, values and latents in FP8 on their way: how far off they are, what they weigh, and that everything else stays as it is."""

from typing import Any

import pytest
import torch

from ltrain.kernels.attention import Mask
from ltrain.parallel.context import wire
from tests.parallel.context.streams import Case, error, over_ranks, whole
from tests.parallel.context.test_context_exchange import MIXERS

KEY = 2 * (8 + 6)  # numbers of one token's key and value heads


@pytest.mark.parametrize("channels", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_rounded_to_three_bits_of_their_own_scale(channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, channels, generator=torch.Generator().manual_seed(0)).to(dtype) * torch.tensor([1e-6, 1e-3, 1, 1e3, 0]).unsqueeze(1).to(dtype)
    packed = wire.pack(x)
    assert packed.shape == (5, wire.width(channels)) and packed.dtype == torch.uint8
    y = wire.unpack(packed, channels, dtype)
    largest = torch.stack([b.abs().amax(1) for b in x.split(wire.BLOCK, dim=1)], 1).repeat_interleave(wire.BLOCK, 1)[:, :channels]
    # half a step of 2^-3, and of the smallest numbers a step of their own, 448 / 2^-10 times below the largest
    assert y.dtype == dtype and bool(((y - x).abs() <= 0.0667 * x.abs() + largest / 448 / 2**10).all())
    assert torch.equal(wire.unpack(packed[1:2], channels, dtype), y[1:2])
    assert bool((y[4] == 0).all()) and wire.pack(x[:0]).shape == (0, wire.width(channels))


@pytest.mark.parametrize("mixer", ["attention", "chunks", "latent", "scores and sinks in a window", "gather", "gather thirds"])
@pytest.mark.parametrize(("size", "inner_ring"), [(2, 1), (4, 1), (4, 2)])
def test_only_what_crosses_is_rounded(pool: Any, size: int, inner_ring: int, mixer: str) -> None:
    options = MIXERS.get(mixer, {"op": mixer})
    case, alone = (Case(lengths=lengths, **options) for lengths in ((5, 24 * size - 9, 4), (12,) * 2 * size))
    ((got, sent), (same, none)) = over_ranks(pool, size, "contiguous", [case, alone], 1, inner_ring, True)
    assert 1e-4 < error(got, whole(case))[0] < 0.2
    assert error(same, whole(alone))[0] < 1e-10 and sum(b.get(k, 0) for b in none for k in ("ring", "gather")) == 0  # documents that no cut meets
    if mixer in MIXERS and mixer != "latent":
        torch.testing.assert_close(got["out"][:5], whole(case)["out"][:5], rtol=0, atol=1e-12)  # of a document on one rank


def test_a_relay_passes_on_what_it_got(pool: Any) -> None:
    case = Case(op="attention", lengths=(48,), mask=Mask(window=31))
    one, two = (over_ranks(pool, 4, "zigzag", [case], 1, inner, True)[0][0] for inner in (1, 2))
    assert error(one, two)[0] < 1e-12


def test_half_the_bytes_go_forward_and_gradients_as_they_are(pool: Any) -> None:
    n = 12
    case = Case(op="attention", lengths=(2 * n,), dtype=torch.bfloat16)
    ((_, sent),) = over_ranks(pool, 2, "contiguous", [case], 1, 1, True)
    assert [b.get("ring forward", 0) for b in sent] == [n * (KEY + 4), 0]
    assert [b["ring"] for b in sent] == [2 * n * (KEY + 4), n * KEY * 2]
