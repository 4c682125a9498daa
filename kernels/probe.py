"""Whether Triton compiles and runs here, for `ltrain doctor`: `python -m ltrain.kernels.probe` answers in a line of JSON."""

import json

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x, y, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


def compiles() -> bool:
    """A kernel of two lines, compiled for the first GPU, gives what torch gives."""
    x = torch.arange(1000, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    _double[(triton.cdiv(len(x), 256),)](x, y, len(x), block=256)
    return bool(torch.equal(y, 2 * x))


if __name__ == "__main__":
    print(json.dumps({"correct": compiles()}), flush=True)
