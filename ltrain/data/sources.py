"""Where documents come from: sources with random access (files, memory-mapped tables) and streams of the hub.

Nothing here reads a document before it is asked for: a source opens with paths, sizes and row counts.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ltrain.config import SourceConfig

if TYPE_CHECKING:
    import datasets

SOURCES = ("stdlib", "text", "jsonl", "parquet", "hub", "packages")


class Documents(Protocol):
    """Documents with random access."""

    fingerprint: str  # the same wherever the same documents lie

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an error message calls document `index`."""
        ...

    def text(self, index: int) -> str | None:
        """The document, or None where the source leaves it out."""
        ...

    def sizes(self) -> Sequence[int]:
        """Bytes of each document, without reading them."""
        ...

    def stamp(self) -> str:
        """Changes when the documents are written again: what was derived from them is then made anew."""
        ...


def digest(*parts: object) -> str:
    """A hexadecimal fingerprint of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for one sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def stamp(paths: Sequence[str]) -> str:
    return digest([os.stat(path).st_mtime_ns for path in paths])


class Files:
    """UTF-8 text files, one document each.

    Args:
        paths: the files, in the order of their documents.
        root: folder that the fingerprint's paths are relative to, so that it does not depend on where the data lies.
        leave_out: a file that is not UTF-8 is left out instead of refused.
    """

    def __init__(self, paths: Sequence[str], root: str, *, leave_out: bool = False):
        self.paths, self.leave_out = paths, leave_out
        sizes = [os.stat(path).st_size for path in paths]
        if not any(sizes):
            raise ValueError(f"data: the {len(paths)} files under {root} are all empty: name files that hold text")
        self.fingerprint = digest("files", [[os.path.relpath(path, root), size] for path, size in zip(paths, sizes, strict=True)])

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def sizes(self) -> Sequence[int]:
        return [os.stat(path).st_size for path in self.paths]

    def stamp(self) -> str:
        return stamp(self.paths)

    def text(self, index: int) -> str | None:
        path = self.paths[index]
        try:
            return Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            if self.leave_out:
                return None
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it, or leave it out of data.files") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({first_line(error)}): restore it, or leave it out of data.files") from error


class Table:
    """One column of a memory-mapped table, a document per row."""

    def __init__(self, table: "datasets.Dataset", field: str, files: Sequence[str]):
        if not len(table):
            raise ValueError(f"data.files: {files[0]}{' and the others' if len(files) > 1 else ''} hold no rows: name files with documents")
        check_column(field, list(table.column_names), files[0])
        self.rows, self.field = table.select_columns([field]), field
        root = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(files)
        sizes = [[os.path.relpath(path, root), os.stat(path).st_size] for path in files]
        self.fingerprint = digest("table", field, len(table), sizes)
        self.files = files

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.files[0] if len(self.files) == 1 else f'the {len(self.files)} files of data.files'}"

    def sizes(self) -> Sequence[int]:
        import pyarrow.compute

        lengths: list[int | None] = pyarrow.compute.binary_length(self.rows.data.column(self.field)).to_pylist()
        return [n or 0 for n in lengths]

    def stamp(self) -> str:
        return stamp(self.files)

    def text(self, index: int) -> str | None:
        return as_text(self.rows[index][self.field], self.field, self.name(index))


class HubStream:
    """A data set of the hub (or of a local folder), read in its own order without a download of the whole."""

    def __init__(self, config: SourceConfig):
        if not config.name:
            raise ValueError("data.name is empty: write the hub name of a data set, or choose another data.source")
        self.config = config
        self.fingerprint = digest("hub", config.name, config.subset, config.split, config.field)

    def open(self, skip: int) -> Iterator[tuple[str, str]]:
        """(name, text) of the documents from number `skip` on."""
        import datasets

        c = self.config
        try:
            stream = datasets.load_dataset(c.name, c.subset or None, split=c.split, streaming=True)
            columns = stream.column_names or list(next(stream.iter(batch_size=1), {}))  # some formats know only after a first row
        except Exception as error:  # whatever the hub, the network or a file's format raises
            raise ValueError(f"data.name={c.name} (subset '{c.subset}', split '{c.split}') cannot be opened: {first_line(error)}") from error
        if not columns:
            raise ValueError(f"data.name={c.name} (subset '{c.subset}', split '{c.split}') holds no rows: choose another split")
        check_column(c.field, columns, c.name)
        # Batches, not rows: iterated by rows in a DataLoader worker, the library would give each worker only some of the files.
        batches = stream.select_columns([c.field]).skip(skip).iter(batch_size=32)
        number = skip
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise ValueError(f"data.name={c.name}: reading stopped after document {number}: {first_line(error)}") from error
            if batch is None:
                return
            for value in batch[c.field]:
                name = f"document {number} of {c.name}"
                yield name, as_text(value, c.field, name)
                number += 1


def as_text(value: Any, field: str, name: str) -> str:
    if value is None:  # a null in the column: an empty document
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{name}: column '{field}' holds {kind}, not text: name a text column in data.field")  # noqa: TRY004 (the user's data)
    return value


def check_column(field: str, columns: list[str], where: str) -> None:
    if field not in columns:
        raise ValueError(f"data.field: {where} has no column '{field}': write one of {', '.join(columns)}")


def stdlib() -> Files:
    """The .py files of the running Python's standard library, by relative path."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in ("site-packages", "dist-packages", "__pycache__")]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise ValueError(f"data.source=stdlib: {root} holds no .py files: choose data.source=text and name files in data.files")
    # A few tests of the library are in other encodings on purpose.
    return Files(sorted(found, key=lambda path: Path(path).relative_to(root).as_posix()), root, leave_out=True)


def matching_files(patterns: Sequence[str], source: str) -> list[str]:
    """The files of all globs (`**` and `~` allowed), sorted, each once."""
    if not patterns:
        raise ValueError(f"data.files is empty: write at least one glob, for data.source={source}")
    paths: set[str] = set()
    for pattern in patterns:
        found = {os.path.abspath(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)}
        if not found:
            raise ValueError(f"data.files: no file matches {pattern} (looked in {os.getcwd()}): write a glob that matches")
        paths |= found
    return sorted(paths)


def unreadable(path: str, source: str) -> str | None:
    """What is wrong with one jsonl or parquet file, or None."""
    if source == "parquet":
        import pyarrow.parquet

        try:
            for _ in pyarrow.parquet.ParquetFile(path).iter_batches():
                pass
        except Exception as error:  # noqa: BLE001 (whatever the library raises is what is wrong)
            return first_line(error)
        return None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    return f"line {number}: {first_line(error)}"
                if not isinstance(row, dict):
                    return f"line {number} is not an object"
    return None


def table(files: list[str], source: str, field: str) -> Table:
    """Rows of jsonl or parquet files, converted once into the memory-mapped cache of `datasets`."""
    import datasets

    files = [f for f in files if os.stat(f).st_size] or files
    if not os.stat(files[0]).st_size:
        raise ValueError(f"data.files: {files[0]}{' and the others' if len(files) > 1 else ''} are empty: name files with documents")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # every rank would draw one
    try:
        rows = datasets.load_dataset("json" if source == "jsonl" else source, data_files=files, split="train")
    except Exception as error:
        for path in files:
            if problem := unreadable(path, source):
                raise ValueError(f"data.files: {path} is not readable as {source} ({problem}): repair it or leave it out") from error
        why = first_line(error.__cause__ or error)
        raise ValueError(f"data.files: {len(files)} files cannot be read as one {source} table ({why}): give all the same columns") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    return Table(rows, field, files)


def open_source(config: SourceConfig) -> Documents | HubStream:
    """The documents that `config` names.

    Raises:
        ValueError: no such source, no file or no text in it, a missing column, an unreadable file.
    """
    if config.source == "stdlib":
        return stdlib()
    if config.source == "hub":
        return HubStream(config)
    if config.source == "packages":
        from ltrain.data.packages import Packages

        return Packages(config.roots)
    if config.source not in SOURCES:
        raise ValueError(f"data.source={config.source} is not known: write one of {', '.join(SOURCES)}")
    files = matching_files(config.files, config.source)
    if config.source == "text":
        return Files(files, os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(files))
    return table(files, config.source, config.field)
