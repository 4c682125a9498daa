"""ltrain: long-context pretraining of hybrid mixture-of-experts language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltrain.families.convert import load_pretrained

__all__ = ["load_pretrained"]


def __getattr__(name: str) -> Any:
    """`ltrain.load_pretrained`, imported when it is asked for: `import ltrain` stays cheap."""
    if name == "load_pretrained":
        from ltrain.families.convert import load_pretrained

        return load_pretrained
    raise AttributeError(f"module 'ltrain' has no attribute {name!r}")
