"""megatron-core works without CUDA through stand-ins that nobody else sees."""

from typing import Any

import pytest
import torch


def elsewhere() -> dict[str, Any]:
    """On a rank with the stand-ins installed: what torch itself answers, and what megatron sees."""
    from megatron.core import tensor_parallel
    from megatron.core.optimizer import clip_grads

    from ltrain.parallel import cpu

    cpu.install()
    found: dict[str, Any] = {}
    for name, call in (
        ("device", torch.cuda.current_device),
        ("zeros", lambda: torch.zeros(1, device="cuda")),
        ("cuda", lambda: torch.ones(1).cuda()),
    ):
        try:
            call()
            found[name] = "worked"
        except (RuntimeError, AssertionError):
            found[name] = "refused"
    found["type"] = torch.ones(1).type()
    found["stream"] = torch.cuda.Stream.__module__
    found["mode"] = len(torch.overrides._get_current_function_mode_stack())  # type: ignore[attr-defined]
    found["megatron device"] = str(tensor_parallel.mappings.torch.cuda.current_device())
    constants = clip_grads.clip_grad_by_total_norm_fp32.__code__.co_consts
    found["megatron literals"] = ("torch.FloatTensor" in constants, "cuda" in constants)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins stay away where there is a GPU")
def test_the_stand_ins_reach_megatron_and_nothing_else(pool: Any) -> None:
    for found in pool(2).run(elsewhere):
        assert (found["device"], found["zeros"], found["cuda"]) == ("refused", "refused", "refused")
        assert found["type"] == "torch.FloatTensor"
        assert found["stream"].startswith("torch.cuda")
        assert found["mode"] == 0
        assert found["megatron device"] == "cpu"
        assert found["megatron literals"] == (True, False)
