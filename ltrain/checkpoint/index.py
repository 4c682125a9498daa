"""The index of a checkpoint: which rectangle of which logical tensor lies in which file. Written last, so its presence says complete.

A logical tensor is known by its kind (param, exp_avg, exp_avg_sq, buffer...) and its global name (`layers.3.ffn.experts.17.up`),
so that nothing in a checkpoint depends on the layout it was saved from.
"""

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ltrain.checkpoint.collectives import CheckpointError, DamagedError

VERSION = 1
INDEX = "index.json"

# torch dtype -> its name in a safetensors header
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

Shape = tuple[int, ...]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Stored:
    """A rectangle of a logical tensor and where it is stored."""

    start: Shape  # of the rectangle in the logical tensor
    shape: Shape  # of the rectangle
    file: str
    key: str  # in the file


@dataclass(frozen=True)
class Logical:
    """A whole tensor of the model or the optimizer."""

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Stored, ...]


@dataclass(frozen=True)
class FileRecord:
    size: int  # bytes
    crc32: str  # of the whole file, 8 hexadecimal digits


@dataclass(frozen=True)
class Index:
    step: int
    meta: dict[str, Any]
    tensors: dict[str, dict[str, Logical]]  # kind -> name -> tensor
    files: dict[str, FileRecord]

    def encode(self) -> bytes:
        """JSON, with a checksum of its own content."""
        content = {
            "version": VERSION,
            "step": self.step,
            "meta": self.meta,
            "files": {name: {"bytes": record.size, "crc32": record.crc32} for name, record in self.files.items()},
            "tensors": {
                kind: {
                    name: {
                        "shape": list(tensor.shape),
                        "dtype": dtype_name(tensor.dtype),
                        "pieces": [{"file": p.file, "key": p.key, "start": list(p.start), "shape": list(p.shape)} for p in tensor.pieces],
                    }
                    for name, tensor in named.items()
                }
                for kind, named in self.tensors.items()
            },
        }
        return json.dumps({"crc32": _content_crc(content), **content}, allow_nan=False).encode()

    @classmethod
    def decode(cls, text: bytes, where: str) -> "Index":
        """Errors: CheckpointError for another version, DamagedError for anything that is not a whole index."""
        try:
            content = json.loads(text)
            version, crc = content["version"], content.pop("crc32")
            if version != VERSION:
                raise CheckpointError(f"{where} has checkpoint format {version} and this ltrain reads {VERSION}: use the ltrain that wrote it")
            if crc != _content_crc(content):
                raise DamagedError(f"{where} does not match its own checksum: use an older checkpoint")
            index = cls(
                content["step"],
                content["meta"],
                {
                    kind: {
                        name: Logical(
                            tuple(tensor["shape"]),
                            _BY_NAME[tensor["dtype"]],
                            tuple(Stored(tuple(p["start"]), tuple(p["shape"]), p["file"], p["key"]) for p in tensor["pieces"]),
                        )
                        for name, tensor in named.items()
                    }
                    for kind, named in content["tensors"].items()
                },
                {name: FileRecord(record["bytes"], record["crc32"]) for name, record in content["files"].items()},
            )
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DamagedError(f"{where} is not a checkpoint index ({type(error).__name__}: {error}): use an older checkpoint") from error
        for kind, named in index.tensors.items():
            for name, tensor in named.items():
                fault = coverage_fault(tensor.shape, [(p.start, p.shape) for p in tensor.pieces])
                if fault:
                    raise DamagedError(f"{where}: {kind} of {name} {fault}: use an older checkpoint")
        return index


def _content_crc(content: dict[str, Any]) -> str:
    return crc_text(zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()))


def crc_text(crc: int) -> str:
    return f"{crc:08x}"


def check_meta(meta: dict[str, Any]) -> None:
    """Refuse what JSON would drop or change in silence (tuples, integer keys, NaN)."""
    try:
        same = json.loads(json.dumps(meta, allow_nan=False)) == meta
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint meta is not plain JSON ({error}): use dict with str keys, list, str, int, finite float, bool, None"
        ) from error
    if not same:
        raise CheckpointError("checkpoint meta changes when it goes through JSON: use dict with str keys and list, not tuple or integer keys")


def coverage_fault(shape: Sequence[int], rectangles: Iterable[tuple[Shape, Shape]]) -> str | None:
    """What is wrong where (start, shape) rectangles do not fill `shape` exactly once, or None.

    Counts, on the grid that all edges cut the tensor into, how many rectangles cover each cell: linear in the number of rectangles.
    """
    rectangles = list(rectangles)
    whole = (0,) * len(shape)
    for start, extent in rectangles:
        inside = len(start) == len(extent) == len(shape) and all(
            0 <= s and 0 <= n and s + n <= full for s, n, full in zip(start, extent, shape, strict=True)
        )
        if not inside:
            return f"has a piece of shape {list(extent)} at {list(start)}, outside the whole shape {list(shape)}"
    if len(rectangles) == 1 and rectangles[0] == (whole, tuple(shape)):
        return None
    if not rectangles:
        return "has no piece"
    if math.prod(shape) == 0:
        return None
    edges = [sorted({0, full} | {s[a] for s, _ in rectangles} | {s[a] + n[a] for s, n in rectangles}) for a, full in enumerate(shape)]
    cell = [{edge: i for i, edge in enumerate(axis)} for axis in edges]
    count = np.zeros([len(axis) - 1 for axis in edges], dtype=np.int32)
    for start, extent in rectangles:
        count[tuple(slice(c[s], c[s + n]) for c, s, n in zip(cell, start, extent, strict=True))] += 1
    wrong = np.argwhere(count != 1)
    if not len(wrong):
        return None
    at = tuple(int(i) for i in wrong[0])
    first = [edges[a][i] for a, i in enumerate(at)]
    end = [edges[a][i + 1] for a, i in enumerate(at)]
    held = f"{count[at]} different pieces" if count[at] else "no piece"
    return f"of shape {list(shape)} has {held} for the elements from {first} to before {end}"
