"""Which copy of a shared library a process has, where packages bring or find several."""

from contextlib import suppress
from ctypes import CDLL, RTLD_GLOBAL
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def _loaded_elsewhere(name: str, folders: list[str]) -> bool:
    """Whether the process has a library of that name from outside of these folders."""
    maps = Path("/proc/self/maps")
    loaded = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if f"/{name}" in line} if maps.is_file() else set()
    return any(not path.startswith(tuple(folders)) for path in loaded)


@cache
def load_cudnn() -> None:
    """Loads the cuDNN that torch's wheels bring, whole, before a package loads another.

    torch finds cuDNN's parts beside itself, Transformer Engine those of the system. Whichever came second would mix two versions, of which torch
    says that they are incompatible, and Transformer Engine that a symbol is missing; a part that is there already is taken by both. Nothing
    happens where torch was built for the system's cuDNN. Call it before transformer_engine, or megatron-core, which looks for it, is imported.
    """
    if find_spec("transformer_engine") is None or find_spec("nvidia") is None or (found := find_spec("nvidia.cudnn")) is None:
        return
    if _loaded_elsewhere("libcudnn", [str(Path(place).resolve()) for place in found.submodule_search_locations or []]):
        return  # torch was built for it
    parts = [part for place in found.submodule_search_locations or [] for part in sorted(Path(place, "lib").glob("libcudnn*.so.*"))]
    for part in parts:
        with suppress(OSError):  # no GPU's driver: nothing will ask for it
            CDLL(str(part), mode=RTLD_GLOBAL)
