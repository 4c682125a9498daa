"""What `ltrain doctor` asks in processes of their own, which may crash or hang.

`python -m ltrain.parallel.probe devices`, or `meet BACKEND STORE RANK`, answers in a line of JSON.
"""

import datetime
import json
import sys
from typing import Any

TIMEOUT = 60  # seconds for the ranks to meet


def devices() -> dict[str, Any]:
    """What torch sees, and whether everything that training imports is there."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": [], "nccl": None, "fp8": {}}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            about = torch.cuda.get_device_properties(i)
            found["devices"].append({"name": about.name, "capability": f"{about.major}.{about.minor}", "memory": total, "free": free})
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    import ltrain.train.loop  # noqa: F401 - a missing or broken package shows here
    from ltrain.parallel.fp8 import lacks

    device = torch.device("cuda" if found["devices"] else "cpu")
    found["fp8"] = {recipe: lacks(recipe, device) for recipe in ("delayed", "current", "blockwise")}
    return found


def meet(backend: str, store: str, rank: int) -> dict[str, Any]:
    """An all-reduce of two ranks, which meet in the file `store`."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=TIMEOUT))
    value = torch.full((1 << 20,), float(rank + 1), device=device)
    dist.all_reduce(value)
    correct = bool((value == 3).all())
    dist.destroy_process_group()
    return {"correct": correct}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    answer = devices() if what == "devices" else meet(rest[0], rest[1], int(rest[2]))
    print(json.dumps(answer), flush=True)
