"""A checkpoint without moments, written one tensor at a time by one process."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.checkpoint import folder
from ltrain.checkpoint.index import INDEX, FileRecord, Index, Logical, Shape, Stored, check_meta
from ltrain.checkpoint.shard import write_file
from ltrain.families import folder as hugging_face
from ltrain.schema import ConfigError

SHARD = 4 << 30  # bytes of a file: several, so that ranks share the reading
Names = dict[tuple[str, str], tuple[torch.dtype, Shape]]  # (kind, logical name) -> what is kept


def refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: name a new folder for the checkpoint")


def write_checkpoint(out: Path, meta: dict[str, Any], names: Names, read: Callable[[str, str], Tensor], files: Mapping[str, bytes]) -> Path:
    """OUT/step-00000000, whose path is returned: all of it, or nothing where `read(kind, name)` fails."""
    check_meta(meta)
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = folder.temporary(out, 0)
    try:
        keys = {f"{kind}/{name}": (kind, name) for kind, name in names}
        kinds: dict[str, dict[str, Logical]] = {}
        records: dict[str, FileRecord] = {}
        for number, shard in enumerate(hugging_face.shards([(key, *names[keys[key]]) for key in keys], SHARD)):
            file = f"part-{number:05d}.safetensors"
            records[file] = hugging_face.stream(path / file, shard, lambda key: read(*keys[key]))
            for key, kept, shape in shard:
                kind, name = keys[key]
                kinds.setdefault(kind, {})[name] = Logical(shape, kept, (Stored((0,) * len(shape), shape, file, key),))
        for name, content in files.items():
            records[name] = write_file(path / name, [content])
        write_file(path / INDEX, [Index(0, meta, kinds, records).encode()])
        return folder.publish(path, out, 0)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        if new:
            with suppress(OSError):
                out.rmdir()
        raise
