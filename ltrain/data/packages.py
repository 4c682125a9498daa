"""Long documents that every machine has: whole Python packages, their files one after the other in the order of their imports."""

import ast
import glob
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ltrain.data.sources import digest, first_line, stamp

INSTALLED = ("site-packages", "dist-packages")
# Statements are found by their first word and then parsed one by one: parsing whole files would take many times as long.
IMPORT = re.compile(r"^[ \t]*((?:from[ \t]+[.\w]+[ \t]+import[ \t]*(?:\([^)]*\)|[^\n;#]*))|(?:import[ \t]+[^\n;#]+))", re.MULTILINE)


class Packages:
    """One document for each top-level folder of Python files under some folders.

    Every file has a comment with its path before it; files that are not UTF-8 are left out. Files are read when their document is.

    Args:
        roots: globs of folders such as site-packages; empty: those of the running Python. Its standard library is a source of its own, so that what
            one of the two holds out is not trained on by way of the other.

    Raises:
        ValueError: no folder, or no package in them.
    """

    by_name = True  # held out by name: see `order.split`

    def __init__(self, roots: Sequence[str]):
        folders = list(_matching(roots)) if roots else _installed()
        self.packages: list[tuple[str, list[tuple[str, int]]]] = []  # folder, its files by path with their bytes
        seen: set[str] = set()
        for root in folders:
            for name in sorted(os.listdir(root)):
                folder = os.path.join(root, name)
                if name in seen or name in ("__pycache__", *INSTALLED) or not name.isidentifier() or not os.path.isdir(folder):
                    continue
                if files := list(_python_files(folder)):
                    seen.add(name)  # another of the name comes later on the path and is never imported
                    self.packages.append((folder, files))
        if not self.packages:
            raise ValueError(
                f"data.source=packages: there is no Python package in {', '.join(folders) or 'sys.path'}: name their folders in data.roots"
            )
        self.fingerprint = digest("packages", [[self.name(i), size] for i, size in enumerate(self.sizes())])

    def __len__(self) -> int:
        return len(self.packages)

    def name(self, index: int) -> str:
        return os.path.basename(self.packages[index][0])

    def sizes(self) -> Sequence[int]:
        return [sum(size for _, size in files) for _, files in self.packages]

    def stamp(self) -> str:
        return stamp([path for _, files in self.packages for path, _ in files])

    def text(self, index: int) -> str | None:
        folder, files = self.packages[index]
        texts: dict[str, str] = {}
        for path, _ in files:
            try:
                texts[path] = Path(path).read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({first_line(error)}): restore it, or take its folder out of data.roots") from error
        if not any(texts.values()):
            return None
        root = os.path.dirname(folder)
        sources = {os.path.relpath(path, root).replace(os.sep, "/"): text for path, text in texts.items()}
        return "\n".join(f"# {path}\n{sources[path]}" for path in import_order(sources))


def _installed() -> list[str]:
    found = [p for p in sys.path if os.path.basename(p.rstrip("/")) in INSTALLED and os.path.isdir(p)]
    return list(dict.fromkeys(os.path.realpath(p) for p in found))


def _matching(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        found = sorted(os.path.abspath(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isdir(p))
        if not found:
            raise ValueError(f"data.roots: no folder matches {pattern} (looked in {os.getcwd()}): write a glob of folders that hold packages")
        yield from found


def _python_files(folder: str) -> Iterator[tuple[str, int]]:
    """(path, bytes) of the .py files below a folder, by path; empty ones are no text."""
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in ("__pycache__", *INSTALLED))
        for name in sorted(names):
            path = os.path.join(at, name)
            if name.endswith(".py") and os.path.isfile(path) and (size := os.stat(path).st_size):
                yield path, size


def import_order(sources: Mapping[str, str]) -> list[str]:
    """The paths (`package/module.py`) so that a file comes after those it imports.

    Files are visited by path, each after its imports; an import that closes a circle is passed over.
    """
    modules = {_module(path): path for path in sorted(sources)}
    order: dict[str, None] = {}
    begun: set[str] = set()
    for path in sorted(sources):
        waiting = [(path, iter([path]))]
        while waiting:  # depth first, without recursion: packages are deeper than Python's stack
            at, imports = waiting[-1]
            following = next((p for p in imports if p not in begun), None)
            if following is None:
                waiting.pop()
                if at in begun:
                    order.setdefault(at)
            else:
                begun.add(following)
                waiting.append((following, iter(sorted(_imported(following, sources[following], modules)))))
    return list(order)


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported(path: str, source: str, modules: Mapping[str, str]) -> set[str]:
    """Paths of the files of the package that one of them imports."""
    package = _module(path).split(".") if path.endswith("/__init__.py") else _module(path).split(".")[:-1]
    found: set[str] = set()
    for match in IMPORT.finditer(source):
        try:
            statement = ast.parse(match[1].replace("\\", " ").strip()).body[0]
        except (SyntaxError, ValueError, IndexError):  # words of a comment or a text
            continue
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) - statement.level + 1] if statement.level else []
            base = ".".join([*above, *([statement.module] if statement.module else [])])
            names = [f"{base}.{alias.name}" for alias in statement.names]
        else:
            continue
        for name in names:
            while name and name not in modules:  # a name out of a module: the module
                name = name.rpartition(".")[0]
            if name and modules[name] != path:
                found.add(modules[name])
    return found
