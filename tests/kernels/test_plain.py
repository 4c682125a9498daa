"""LTRAIN_KERNELS=reference: plain torch wherever nobody names a backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ltrain.kernels import attention, experts
from ltrain.kernels.attention import blockwise, flash
from ltrain.kernels.segments import plain_only


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what runs from now on."""
    seen: list[str] = []
    for label, module, name in (("flash", flash, "forward_pairs"), ("blockwise", blockwise, "forward_pairs"), ("grouped", experts, "_aligned")):

        def spied(*args: Any, found: Callable[..., Any] = getattr(module, name), label: str = label) -> Any:  # noqa: B008
            seen.append(label)
            return found(*args)

        monkeypatch.setattr(module, name, spied)
    # torch's grouped product needs a GPU; what is asked here is who would be called
    monkeypatch.setattr(experts, "_refusal", lambda x, weight: None)
    monkeypatch.setattr(experts._GroupedLinear, "apply", lambda x, weight, counts: experts.grouped_linear(x, weight, counts, backend="reference"))
    return seen


def run(backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, 8, generator=g) for _ in range(3))
    y = attention.attention(q, k, v, torch.tensor([0, 4, 9], dtype=torch.int32), scale=0.3, backend="flash" if backend == "named" else "auto")
    counts = torch.tensor([4, 5])
    x, weight = torch.randn(9, 16, generator=g).bfloat16(), torch.randn(2, 8, 16, generator=g).bfloat16()
    return y, experts.grouped_linear(x, weight, counts, backend="grouped" if backend == "named" else "auto")


def test_auto_takes_plain_torch_and_names_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    expected = run()
    assert seen == ["flash", "grouped", "grouped"]
    seen.clear()
    monkeypatch.setenv("LTRAIN_KERNELS", "reference")
    plain = run()
    assert seen == ["blockwise"]
    torch.testing.assert_close(plain, expected, rtol=1e-2, atol=1e-3)
    seen.clear()
    run("named")
    assert seen == ["flash", "grouped", "grouped"]


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTRAIN_KERNELS", "slow")
    with pytest.raises(ValueError, match="LTRAIN_KERNELS=slow is not known: write LTRAIN_KERNELS=reference"):
        plain_only()
