"""The wheel holds the whole project, and the tree keeps the rules of its design."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("ltrain", "kernels", "parallel", "configs", "launch", "pyproject.toml", "README.md")
ONLY_IN_PARALLEL = ("torch.distributed", "megatron", "deepspeed")

IMPORT_ALL = """
import importlib, pkgutil, sys
from pathlib import Path
import ltrain
from ltrain.config import find, load
target = Path(sys.argv[1]).resolve()
assert Path(ltrain.__file__).is_relative_to(target), ltrain.__file__
names = [m.name for m in pkgutil.walk_packages(ltrain.__path__, "ltrain.", onerror=lambda name: (_ for _ in ()).throw(ImportError(name)))]
for name in names:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":  # an optional package, which one module alone is written with
            continue
        raise
    if module.__file__:
        assert Path(module.__file__).is_relative_to(target), module.__file__
assert find("configs/quickstart.yaml").is_relative_to(target)
load("configs/quickstart.yaml")
print(*names)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder a freshly built wheel is installed in; built from a copy, so that nothing left in the tree gets in."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = wheels.glob("*.whl")
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        install = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", sys.executable, "--target", str(target), str(wheel)]
        subprocess.run(install, check=True, cwd=target)
    else:  # a wheel of pure Python is installed by unpacking it
        zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_installed_wheel_imports_every_module_and_finds_the_quickstart(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, str(installed)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in _sources()}
    expected = {name if name.startswith("ltrain") else f"ltrain.{name}" for name in expected} - {"ltrain"}
    assert expected <= set(done.stdout.split())


def test_the_wheel_carries_every_config(installed: Path) -> None:
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs and all((installed / "ltrain" / path).read_bytes() == (ROOT / path).read_bytes() for path in configs)


def _sources() -> Iterator[Path]:
    for folder in ("ltrain", "kernels", "parallel", "launch"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def _used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, and of `torch.x` used as an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield node.lineno, f"torch.{node.attr}"


def test_ranks_meet_only_in_parallel() -> None:
    wrong = []
    for path in _sources():
        if path.relative_to(ROOT).parts[0] == "parallel":
            continue
        for line, name in _used(ast.parse(path.read_text())):
            if any(name == banned or name.startswith(f"{banned}.") for banned in ONLY_IN_PARALLEL):
                wrong.append(f"{path.relative_to(ROOT)}:{line} uses {name}")
    assert not wrong, "\n".join(wrong)


def test_the_check_above_sees_every_form() -> None:
    forms = ["import torch.distributed as dist", "from torch import distributed", "from megatron.core import x", "torch.distributed.barrier()"]
    for form in forms:
        assert any(name.startswith(ONLY_IN_PARALLEL) for _, name in _used(ast.parse(form))), form


def test_the_dataclasses_of_a_config_are_read_without_torch() -> None:
    code = "import sys, ltrain.config, ltrain.model.options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
