"""Text to token ids and back: byte-level BPE trained on the training documents, plain bytes, or a tokenizer.json.

Whatever the kind, decode(encode(text)) == text, and a document's text cannot produce the end-of-document token.
"""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ltrain.config import TokenizerConfig
from ltrain.data.cache import TokenCache
from ltrain.data.sources import Documents, digest, first_line

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"  # GPT-2's name for it
KINDS = ("bpe", "bytes", "file")
SAMPLE_CHARACTERS = 32 << 20  # of text that BPE is trained on: more moves few merges and costs time on every new data set
PIECE_CHARACTERS = 1 << 16  # in which long documents are encoded
THREADS = 4  # for a text of several pieces; `tokenizers` works without Python's lock
PLACE = re.compile(r"\S\n(?=\S)")
PIECES = ("The magic number is", " 1234", ".\n", "x = ", '"ab"')
RECIPE = 2  # counted up when the training below changes, so that no cached tokenizer of an older recipe is taken
KNOWN_ENDS = (END, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
PROBE = "Round trip:\n\tdef f(x):  return {'é': \"中文\", '🙂': [1234567890]}\n\n\n    # UPPER lower_  \n"


class Tokenizer:
    """Token ids of one vocabulary.

    Attributes:
        kind: bpe | bytes | file.
        vocab_size: ids are in range(vocab_size).
        eos: id of the end-of-document token, which `encode` never gives and `decode` leaves out.
        fingerprint: equal for tokenizers that give equal ids.
    """

    def __init__(self, kind: str, eos: int, model: "tokenizers.Tokenizer | None" = None):
        self.kind, self.eos, self._model = kind, eos, model
        if model is None:
            self.vocab_size = 257
            self.fingerprint = digest("bytes", eos)
        else:
            # Text that spells a special token stays text: nothing in a document can end it. Not kept in the JSON, so set here.
            model.encode_special_tokens = True
            model.no_truncation()
            model.no_padding()
            self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
            self.fingerprint = digest(model.to_str(), eos)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without an end-of-document token.

        Raises:
            ValueError: the text holds lone surrogates, which no UTF-8 text does.
        """
        try:
            if self._model is None:
                return list(text.encode("utf-8"))
            return self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids  # without the characters of each token
        except (UnicodeEncodeError, TypeError) as error:  # `tokenizers` says TypeError
            raise ValueError("the text holds a lone surrogate, which is not valid Unicode: remove it") from error

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document, end-of-document token included."""
        return [*self.encode(text), self.eos]

    def document_ids(self, text: str) -> NDArray[np.int32]:
        """`encode_document` as an array. A long text is encoded in pieces, so that it takes little more memory than its ids, and by several threads,
        so that those who wait for the one document do not wait long."""

        def encode(piece: str) -> NDArray[np.int32]:
            return np.array(self.encode(piece), dtype=np.int32)

        end = np.array([self.eos], dtype=np.int32)
        if len(text) <= PIECE_CHARACTERS or not self.piecewise:
            return np.concatenate([encode(text), end])
        with ThreadPoolExecutor(THREADS) as threads:
            return np.concatenate([*threads.map(encode, cut(text)), end])

    @cached_property
    def piecewise(self) -> bool:
        """Whether pieces of a text have the tokens that they have in it, so far as no word is cut."""
        return self.decode(i for piece in PIECES for i in self.encode(piece)) == "".join(PIECES)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (a sample cut inside a character) become U+FFFD, end-of-document nothing."""
        kept = [int(i) for i in ids if int(i) != self.eos]
        if self._model is None:
            return bytes(i for i in kept if i < 256).decode("utf-8", errors="replace")
        return self._model.decode(kept, skip_special_tokens=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` (not for bytes) and `ltrain_tokenizer.json` into an existing folder."""
        if self._model is not None:
            write_atomically(Path(folder, "tokenizer.json"), self._model.to_str())
        write_atomically(Path(folder, "ltrain_tokenizer.json"), json.dumps({"kind": self.kind, "eos": self.eos}) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that `save` wrote.

        Raises:
            ValueError: a file is missing or damaged.
        """
        about = Path(folder, "ltrain_tokenizer.json")
        try:
            values: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
            kind, eos = str(values["kind"]), int(values["eos"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{about} is not a saved tokenizer ({first_line(error)}): name a folder that holds one") from error
        return cls(kind, eos, None if kind == "bytes" else read_model(Path(folder, "tokenizer.json")))


def cut(text: str, characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at least so many characters (but the last), cut only between a line that ends in its newline alone and one without indentation.

    No tokenizer that splits text into words by a pattern (GPT-2's and those after it) has a token across such a place.
    """
    begin = 0
    while (found := PLACE.search(text, begin + characters)) is not None:
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


def read_model(path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json ({first_line(error)}): name a file that `tokenizers` has saved") from error


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sample(texts: Iterable[str], limit: int = SAMPLE_CHARACTERS) -> Iterator[str]:
    """The first texts up to `limit` characters in all; at most a sixteenth of it from one text, so that no file rules the merges."""
    for text in texts:
        if limit <= 0:
            return
        piece = text[: min(limit, SAMPLE_CHARACTERS // 16)]
        limit -= len(piece)
        yield piece


def train_bpe(texts: Iterable[str], vocab: int, digits: str = "split") -> "tokenizers.Tokenizer":
    """Byte-level BPE (Sennrich et al. 2016; bytes and the splitting pattern as in GPT-2, Radford et al. 2019) of at most `vocab` ids.

    digits: split (each is a token, so that a number's tokens do not depend on what the merges have seen) | merge.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab < 257:
        raise ValueError(f"data.tokenizer.vocab={vocab} is too small: write at least 257 (the 256 bytes and the end of a document)")
    model = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if digits == "split" else words
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    model.train_from_iterator(sample(texts), trainer)
    return model


def cached_bpe(config: TokenizerConfig, texts: Iterable[str], fingerprint: str) -> Tokenizer:
    """The BPE of these texts from the cache, or trained and put there.

    Of several processes one trains and the others wait; where the cache's file system has no locks each trains the same.
    """
    folder = Path(config.cache).expanduser()
    path = folder / f"bpe-{config.vocab}-{digest(fingerprint, config.vocab, config.digits, RECIPE)}.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below, which releases it)
        except OSError as error:
            raise ValueError(f"data.tokenizer.cache={config.cache} cannot be written ({first_line(error)}): name a folder that can") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # no locks here
                pass
            if not path.exists():
                write_atomically(path, train_bpe(texts, config.vocab, config.digits).to_str())
    model = read_model(path)
    eos = model.token_to_id(END)
    assert eos is not None, path
    return Tokenizer("bpe", eos, model)


def from_file(path: str) -> Tokenizer:
    """A tokenizer.json; its end-of-document token is the `eos_token` of a tokenizer_config.json beside it, or a usual name."""
    if not path:
        raise ValueError("data.tokenizer.path is empty: write the path of a tokenizer.json, for data.tokenizer.kind=file")
    file = Path(path).expanduser()
    model = read_model(file)
    names: tuple[str, ...] = KNOWN_ENDS
    beside = file.parent / "tokenizer_config.json"
    if beside.exists():
        try:
            name = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{beside} is not a JSON object ({first_line(error)}): repair or remove it") from error
        name = name.get("content") if isinstance(name, dict) else name
        names = (name,) if name else names
    eos = next((i for i in map(model.token_to_id, names) if i is not None), None)
    if eos is None:
        raise ValueError(f"{path} has no end-of-document token ({', '.join(names)}): name it as eos_token in a tokenizer_config.json beside it")
    tokenizer = Tokenizer("file", eos, model)
    back = tokenizer.decode(tokenizer.encode(PROBE))
    if back != PROBE:
        raise ValueError(f"{path} does not give text back as it was ({PROBE!r} became {back!r}): choose one without loss, such as byte-level BPE")
    return tokenizer


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str], fingerprint: str) -> Tokenizer:
    """The tokenizer that `config` names; `texts` (training documents, read only to train one) are known by `fingerprint`.

    Raises:
        ValueError: unknown kind, a vocabulary too small, an unusable file or cache folder.
    """
    if config.kind == "bytes":
        return Tokenizer("bytes", 256)
    if config.kind == "bpe":
        return cached_bpe(config, texts, fingerprint)
    if config.kind == "file":
        return from_file(config.path)
    raise ValueError(f"data.tokenizer.kind={config.kind} is not known: write one of {', '.join(KINDS)}")


def token_cache(folder: str, documents: Documents, tokenizer: Tokenizer) -> TokenCache | None:
    """Where the ids of these documents are kept, below a cache folder; None without one, and for bytes, which cost nothing to make."""
    if not folder or tokenizer.kind == "bytes":
        return None
    key = digest(documents.fingerprint, documents.stamp(), tokenizer.fingerprint)
    return TokenCache(Path(folder).expanduser() / f"tokens-{key}", tokenizer.vocab_size)
