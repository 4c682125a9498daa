"""Where the time of a training step goes: kernels of the device, or operators of a CPU, and how long the device waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ltrain.plan.hardware import synchronise

SHOWN = 15  # rows of the table


def profiled(run: Callable[[], None], device: torch.device, trace: Path) -> dict[str, Any]:
    """Call once under torch's profiler; write a trace for chrome://tracing or Perfetto.

    Returns:
        seconds: from the first kernel to the end of the last (of a CPU: the sum over its operators); busy: the share of them in which at
        least one kernel ran; kernels: name, calls and seconds of each, the longest first.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronise(device)
    with profile(activities=activities, acc_events=True) as p:
        run()
        synchronise(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    p.export_chrome_trace(str(trace))
    of_device = [e for e in p.events() or () if (e.device_type != DeviceType.CPU) == cuda and not e.is_user_annotation]
    totals: dict[str, list[float]] = {}
    for event in of_device:
        microseconds = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        known = totals.setdefault(event.name, [0, 0.0])
        known[0] += 1
        known[1] += microseconds / 1e6
    kernels: list[dict[str, Any]] = [{"name": name, "calls": int(calls), "seconds": taken} for name, (calls, taken) in totals.items()]
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    if not cuda:
        return {"seconds": sum(kernel["seconds"] for kernel in kernels), "busy": 1.0, "kernels": kernels}
    spans = sorted((e.time_range.start, e.time_range.end) for e in of_device)
    return {"seconds": (max(end for _, end in spans) - spans[0][0]) / 1e6, "busy": _covered(spans), "kernels": kernels}


def _covered(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end in which at least one of the spans (sorted) runs."""
    begun, reach = spans[0]
    busy = reach - begun
    for start, end in spans[1:]:
        busy += max(end - max(start, reach), 0.0)
        reach = max(reach, end)
    return busy / (reach - begun) if reach > begun else 1.0


def show(found: dict[str, Any], cuda: bool) -> None:
    total = sum(kernel["seconds"] for kernel in found["kernels"])
    waits = f", of which the device waits {1 - found['busy']:.1%}" if cuda else ""
    print(f"a step under the profiler, which slows the host down: {found['seconds'] * 1e3:.1f} ms{waits}")
    print(f"{'ms':>10} {'share':>6} {'calls':>6}  {'kernel' if cuda else 'operator'}")
    for kernel in found["kernels"][:SHOWN]:
        print(f"{kernel['seconds'] * 1e3:10.2f} {kernel['seconds'] / total:6.1%} {kernel['calls']:6}  {kernel['name'][:110]}")
    rest = found["kernels"][SHOWN:]
    if rest:
        taken = sum(kernel["seconds"] for kernel in rest)
        print(f"{taken * 1e3:10.2f} {taken / total:6.1%} {sum(kernel['calls'] for kernel in rest):6}  {len(rest)} others")
