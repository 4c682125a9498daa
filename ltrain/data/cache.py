"""Token ids of documents on disk, so that no text is tokenised twice by any run.

A folder per documents and tokenizer. Each writing process appends to a pair of files of its own, `NAME.tokens` (ids) and `NAME.index` (one
record per document, written after its ids have reached the file and with their checksum): a process killed at any moment leaves whole records and
perhaps a rest that no record names, and processes that write the same document at once only waste a little space.
"""

import os
import struct
import time
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

RECORD = struct.Struct("<QQQI")  # document, first id in the file, number of ids, CRC-32 of their bytes
LOOK_AGAIN = 1.0  # seconds between looks for what others have written


class _Entry(NamedTuple):
    segment: str
    first: int
    tokens: int
    crc: int


class TokenCache:
    """Ids by the number of a document; used by any number of processes at once.

    Args:
        folder: made where it is absent.
        vocab_size: ids are in range(vocab_size); it settles their width on disk.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self.folder, self.dtype = folder, np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.tokenizer.cache: {folder} cannot be written ({error.strerror}): name a folder that can") from error
        self._entries: dict[int, _Entry] = {}
        self._read: dict[str, int] = {}  # bytes of each index that were read
        self._maps: dict[str, NDArray[np.integer]] = {}
        self._checked: set[int] = set()
        self._writer: tuple[int, str, BinaryIO, BinaryIO] | None = None  # process, name, files
        self._looked = 0.0
        self._look()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, document: int) -> bool:
        return document in self._entries

    def get(self, document: int) -> NDArray[np.integer] | None:
        """The document's ids in a memory map, or None."""
        if document not in self._entries and time.monotonic() - self._looked > LOOK_AGAIN:
            self._look()
        entry = self._entries.get(document)
        if entry is None:
            return None
        ids = self._map(entry)
        if ids is None or (document not in self._checked and zlib.crc32(ids.tobytes()) != entry.crc):
            del self._entries[document]  # the machine died before the ids reached the disk: they are made again
            return None
        self._checked.add(document)
        return ids

    def put(self, document: int, ids: NDArray[np.int32]) -> NDArray[np.integer]:
        """Keep a document's ids, and give them back from the memory map. A full disk only means that they are not kept."""
        data = ids.astype(self.dtype)
        try:
            name, tokens, index = self._open()
            first = tokens.tell() // self.dtype.itemsize
            tokens.write(data.tobytes())
            tokens.flush()
            entry = _Entry(name, first, len(data), zlib.crc32(data.tobytes()))
            index.write(RECORD.pack(document, *entry[1:]))
            index.flush()
        except OSError:
            self._writer = None
            return ids
        self._entries[document] = entry
        self._checked.add(document)
        found = self._map(entry)
        return ids if found is None else found

    def _open(self) -> tuple[str, BinaryIO, BinaryIO]:
        writer = self._writer
        if writer is None or writer[0] != os.getpid():  # a forked process writes files of its own
            name = uuid.uuid4().hex
            tokens, index = (open(self.folder / f"{name}.{kind}", "ab") for kind in ("tokens", "index"))  # noqa: SIM115 (open as long as the cache)
            self._writer = writer = os.getpid(), name, tokens, index
        return writer[1:]

    def _map(self, entry: _Entry) -> NDArray[np.integer] | None:
        if not entry.tokens:
            return np.zeros(0, dtype=self.dtype)
        end = entry.first + entry.tokens
        held = self._maps.get(entry.segment)
        if held is None or len(held) < end:
            try:
                held = np.memmap(self.folder / f"{entry.segment}.tokens", dtype=self.dtype, mode="r")
            except (OSError, ValueError):
                return None
            self._maps[entry.segment] = held
        return held[entry.first : end] if len(held) >= end else None

    def _look(self) -> None:
        """Take in the records that were written since the last look."""
        self._looked = time.monotonic()
        for path in sorted(self.folder.glob("*.index")):
            with open(path, "rb") as file:
                done = self._read.get(path.stem, 0)
                file.seek(done)
                data = file.read()
            whole = len(data) // RECORD.size * RECORD.size
            self._read[path.stem] = done + whole
            for document, *where in RECORD.iter_unpack(data[:whole]):
                self._entries.setdefault(document, _Entry(path.stem, *where))
