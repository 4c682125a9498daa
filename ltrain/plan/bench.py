"""`ltrain bench step`: how long a training step of a config takes on this machine, and what it needs."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ltrain.config import Config, to_dict
from ltrain.data.packing import MicroBatch
from ltrain.parallel.engines import build_engine
from ltrain.parallel.engines.base import DTYPES, Engine
from ltrain.plan.hardware import device_name, peak_flops, peak_memory, synchronise
from ltrain.plan.profile import profiled
from ltrain.plan.profile import show as show_profile
from ltrain.train.feed import Feed, joined


def training_flops(engine: Engine, batches: list[MicroBatch]) -> float:
    """Of these micro-batches in this rank's pipeline stage, forward and backward (3 x forward), recomputation not counted."""
    total = 0.0
    for batch in batches:
        for length in batch.cu_seqlens.diff().tolist():
            total += 3 * sum(engine.stack.flops(length, length).values())
    return total


def step(config: Config, steps: int = 10, profile: bool = False) -> dict[str, Any]:
    """Time `steps` training steps on the config's own data after at most 3 others; print a table and write run.dir/bench-step.json.

    profile: one more step under torch's profiler: where its time goes on rank 0, and run.dir/profile-rankN.json of each rank, a trace to look at.

    The time is of forward, backward and update on the slowest rank; loading the data is not in it. MFU is against the peak
    matrix rate of all devices.
    """
    warmup = min(3, steps)
    with joined(config) as mesh:
        feed = Feed(config, mesh)
        engine = build_engine(config, feed.vocab, mesh)
        device = mesh.device
        times, flops, losses = [], 0.0, []

        def train() -> None:
            losses.append(engine.forward_backward(batches, labels, feed.micro_batches)["loss"])
            engine.step(config.train.lr)

        for i in range(warmup + steps):
            batches, labels, _ = feed.step()
            synchronise(device)
            mesh.barrier()
            began = time.perf_counter()
            train()
            synchronise(device)
            if i >= warmup:
                times.append(max(mesh.all_gather_object(time.perf_counter() - began)))
                # each replica's FLOPs once per pipeline stage
                first = mesh.tensor_context.rank() == 0
                flops += float(mesh.sum(torch.tensor(training_flops(engine, batches) if first else 0.0, dtype=torch.float64, device=device)))
        found, memory, folder = None, max(mesh.all_gather_object(peak_memory(device))), Path(config.run.dir)
        first_and_last = [losses[0], losses[-1]]
        if profile:
            batches, labels, _ = feed.step()
            mesh.barrier()
            found = profiled(train, device, folder / f"profile-rank{mesh.rank}.json")
        feed.close()
        seconds = statistics.median(times)
        peak, source = peak_flops(device, DTYPES[config.precision])
        params, active = engine.num_params
        result = {
            "device": device_name(device),
            "ranks": mesh.size,
            "torch": torch.__version__,
            "precision": config.precision,
            "parallel": to_dict(config)["parallel"],
            "parameters_of_stage": params,
            "active_parameters_of_stage": active,
            "tokens_per_step": config.train.tokens_per_step,
            "stream_tokens": config.data.tokens,
            "steps": steps,
            "seconds_per_step": seconds,
            "seconds_min_max": [min(times), max(times)],
            "tokens_per_second": config.train.tokens_per_step / seconds,
            "tflops_per_device": flops / steps / seconds / mesh.size / 1e12,
            "mfu": flops / steps / seconds / mesh.size / peak,
            "peak_flops": peak,
            "peak_flops_source": source,
            "peak_memory_bytes": memory,
            "first_and_last_loss": first_and_last,
        }
        if found is not None:
            result["profile"] = found
        if mesh.rank == 0:
            show(result)
            if found is not None:
                show_profile(found, device.type == "cuda")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "bench-step.json").write_text(json.dumps(result, indent=2) + "\n")
            print(f"written to {folder / 'bench-step.json'}")
        return result


def show(result: dict[str, Any]) -> None:
    rows = {
        "device": f"{result['ranks']} x {result['device']}",
        "parameters (active)": f"{result['parameters_of_stage'] / 1e6:.1f}M ({result['active_parameters_of_stage'] / 1e6:.1f}M)",
        "precision": result["precision"],
        "step": f"{result['seconds_per_step'] * 1e3:.1f} ms for {result['tokens_per_step']} tokens in streams of {result['stream_tokens']}",
        "tokens/s": f"{result['tokens_per_second']:,.0f}",
        "TFLOP/s per device": f"{result['tflops_per_device']:.2f}",
        "MFU": f"{result['mfu']:.1%} of {result['peak_flops'] / 1e12:.1f} TFLOP/s ({result['peak_flops_source']})",
        "peak memory": f"{result['peak_memory_bytes'] / 2**30:.2f} GiB per rank",
    }
    for name, value in rows.items():
        print(f"{name:22} {value}")
