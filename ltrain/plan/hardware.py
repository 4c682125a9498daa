"""What the devices of this machine are called and how fast they can multiply."""

import platform
import time
from collections.abc import Callable

import torch

# Dense matrix rates by the vendors' data sheets, FLOP/s, of bf16 and of fp32 (without TF32).
PEAK_FLOPS: dict[str, dict[torch.dtype, float]] = {
    "NVIDIA H200": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "NVIDIA H100": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "NVIDIA A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12},
    "NVIDIA B200": {torch.bfloat16: 2250e12, torch.float32: 80e12},
}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Matrix rate of one device in FLOP/s, and where the number comes from."""
    name = device_name(device)
    for known, rates in PEAK_FLOPS.items():
        if name.startswith(known) and dtype in rates:
            return rates[dtype], "data sheet, dense"
    return measured_flops(device, dtype), "a measured matrix product"


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a square matrix product, the fastest of six, in FLOP/s."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _fastest(lambda: a @ b, device)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy inside the device's memory, read and written together, the fastest of six."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run of six."""
    best = float("inf")
    for _ in range(6):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the worst moment so far: allocated on the GPU, or resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
