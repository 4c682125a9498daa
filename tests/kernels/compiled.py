"""Triton programs compiled for a Hopper GPU where there is none: what the interpreter, which runs any Python, does not see."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ltrain import kernels

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes of a program
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


def _source(program: Any, args: tuple[Any, ...], named: dict[str, Any]) -> ASTSource:
    """As a launch with these arguments specialises it: on sizes of 1 and those that 16 divides, where it may."""
    bound = dict(zip(program.arg_names, args, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(program.params):
        value = bound[param.name] if param.name in bound else param.default
        free = not (param.do_not_specialize or param.is_constexpr)
        if param.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if free and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(program, signature, constants, attributes)


def overwritten(ttgir: str) -> list[str]:
    """Tiles in shared memory, one at a time, that a loop loads anew while products may still read them: what Triton 3.6 makes of a tile that is used
    in registers, too, if every product of the loop is added to a sum, which no turn has to wait for."""
    single = set(re.findall(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<1x", ttgir))
    tiles: dict[str, str] = {}  # by views of them
    for view, of in re.findall(r"(%\S+) = ttg\.memdesc_\w+ (%[^\s\[]+)", ttgir):
        if of in single or of in tiles:
            tiles[view] = tiles.get(of, of)
    found: list[str] = []
    loops: list[tuple[int, list[str]]] = []  # around a line, by indentation
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and line.strip() and indent <= loops[-1][0]:
            found += _overwritten_in(loops.pop()[1], tiles)
        for _, lines in loops:
            lines.append(line)
        if " scf.for " in line:
            loops.append((indent, []))
    return found


def _overwritten_in(loop: list[str], tiles: dict[str, str]) -> list[str]:
    found: list[str] = []
    reading: list[set[str]] = []  # by each product that is not waited for
    for line in loop * 2:
        used = {tiles[view] for view in re.findall(r"%[\w#]+", line) if view in tiles}
        if "warp_group_dot_wait" in line:
            left = int(re.search(r"pendings = (\d+)", line)[1])  # type: ignore[index]
            reading = reading[len(reading) - left :] if left else []
        elif "warp_group_dot " in line:
            reading.append(used)
        elif "async_copy_global_to_local" in line:
            found += sorted(used & set().union(*reading))
    return found


MOVES = re.compile(r"U?MOV|R2UR|IMAD\.(MOV\.)?U32|U?IADD3(\.64)?|VIADD")  # and sums


def strayed(sass: str) -> list[str]:
    """Products (HGMMA) whose tile in shared memory is where no address of one was computed, of the instructions as they are written, whatever
    branches there are. ptxas 12.8 takes a wrong register for it where two branches come together that have computed it alike: with 4 warps and 32
    channels of a tile, products read what lies there, or outside of all memory."""
    addresses: dict[str, bool | None] = {}  # whether a register has one that is cut to 14 bits; None: this cannot be told
    found: list[str] = []
    for name, rest in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([\w.]+)\s*([^;]*);", sass):
        to, *args = [x.strip() for x in rest.split(",")]
        if name.startswith("HGMMA") and (named := re.search(r"gdesc\[UR(\d+)\]", rest)):
            # Four registers from the one that is named: the left tile, unless it is in registers, and the right one, two each.
            first = int(named[1])
            tiles = [first + 2] if re.fullmatch(r"R\d+(\.reuse)?", args[0]) else [first, first + 2]
            found += [f"{name} {rest.strip()}" for n in tiles if addresses.get(f"UR{n}") is False]
            continue
        place = re.fullmatch(r"(U?R)(\d+)", to)
        if not place:
            continue
        given = [addresses.get(x.removesuffix(".reuse").lstrip("-~|")) for x in args if re.match(r"[-~|]*U?R\d", x)]
        carried = True if True in given else None if None in given else False
        if (name.endswith("SGXT.U32") and args[-1] == "0xe") or ("LOP3" in name and "0x3fff" in args):
            addresses[to] = True
        elif MOVES.fullmatch(name) or ("LOP3" in name and "0xfc" in args):  # an or
            addresses[to] = carried
        else:
            addresses[to] = False if carried is False and not name.startswith("LDL") else None  # which is a spilled one
        if ".64" in name or "WIDE" in name:
            addresses[f"{place[1]}{int(place[2]) + 1}"] = None if name == "UIADD3.64" else False
    return found


def _sass(program: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(program.asm["cubin"])
        return subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True, check=True).stdout


@contextmanager
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Launches inside compile their program and compute nothing: what they would write is zeros. -> what was compiled, by program and
    specialisation."""
    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(kernels.__path__, "ltrain.kernels."):
        if "triton" in module.name:
            importlib.import_module(module.name)  # before the variable below, by which a program is interpreted for good

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        named = {name: options.pop(name) for name in list(options) if name in self.arg_names}
        source = _source(self, args, named)
        key = f"{self.__name__} {sorted(map(str, source.constants.items()))} {source.signature} {options}"
        if key not in found:
            found[key] = triton.compile(source, target=TARGET, options=options)
            shared = found[key].metadata.shared
            assert shared <= SHARED, f"{key}: {shared} bytes of shared memory"
            assert not (tiles := overwritten(found[key].asm["ttgir"])), f"{key}: {tiles} are overwritten while products read them"
            assert not (products := strayed(_sass(found[key]))), f"{key}: {products} read tiles from elsewhere"

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")  # kernels refuse tensors of a CPU otherwise
        patch.setattr(torch, "empty", torch.zeros)
        patch.setattr(torch, "empty_like", torch.zeros_like)
        patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
        yield found
