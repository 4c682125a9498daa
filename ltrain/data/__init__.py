"""Documents to packed micro-batches: `build(config.data, seed)` opens the data, its `.loader` and `.held_out` give micro-batches."""

from typing import TYPE_CHECKING, Any

from ltrain.data.dataset import Dataset, build
from ltrain.data.order import Cursor
from ltrain.data.packing import NO_LABEL, MicroBatch
from ltrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ltrain.data.held_out import unigram_entropy
    from ltrain.data.loader import Loader, merge_states

__all__ = ["NO_LABEL", "Cursor", "Dataset", "Loader", "MicroBatch", "Tokenizer", "build", "merge_states", "unigram_entropy"]


def __getattr__(name: str) -> Any:  # what needs torch is imported when it is first used
    if name in ("Loader", "merge_states"):
        from ltrain.data import loader

        return getattr(loader, name)
    if name == "unigram_entropy":
        from ltrain.data.held_out import unigram_entropy

        return unigram_entropy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
