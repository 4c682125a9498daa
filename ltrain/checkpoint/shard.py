"""Writing files so that they are on the disk, checksummed on the way, and safetensors files among them."""

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.checkpoint.index import DTYPES, FileRecord, Shape, crc_text

CHUNK = 16 << 20  # bytes per write: large enough for the disk, small enough that the checksum reads it from the cache
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, quota spent, file-size limit of the process


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write the parts one after another and wait until they are on the disk. OSError as the system gives it."""
    size = crc = 0
    with open(path, "xb") as file:
        for data in parts:
            part = memoryview(data)
            for offset in range(0, len(part), CHUNK):
                chunk = part[offset : offset + CHUNK]
                file.write(chunk)
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, crc_text(crc))


def read_crc(path: Path) -> str:
    crc = 0
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(view[:count], crc)
    return crc_text(crc)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, as fsync of a file makes only its content so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def header(tensors: list[tuple[str, torch.dtype, Shape, int]], metadata: dict[str, str] | None = None) -> bytes:
    """The head of a safetensors file whose (key, dtype, shape, bytes) follow in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, dtype, shape, size in tensors:
        entries[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: list[tuple[str, Tensor]]) -> FileRecord:
    """A safetensors file of (key, tensor). One tensor at a time is copied to the host.

    Written here and not by the safetensors package because its writer gives no checksum (a second pass over the data) and
    turns a full disk into a text without errno.
    """
    tensors = sorted(tensors, key=lambda item: -item[1].element_size())  # every tensor is aligned to its element

    def parts() -> Iterator[bytes | memoryview]:
        yield header([(key, t.dtype, tuple(t.shape), t.numel() * t.element_size()) for key, t in tensors])
        for _, tensor in tensors:
            yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    return write_file(path, parts())
