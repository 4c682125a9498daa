"""Blocks whose weights several layers share."""

from dataclasses import dataclass

from ltrain.schema import ConfigError, default_of


@dataclass
class SharedOptions:
    """Blocks of attention and a feed-forward before the mixers of the layers with `block.shared`, which take them in turn (Zamba2,
    Glorioso et al. 2024).

    A block reads the hidden states beside the model's embeddings; what it gives, through a projection of the layer's own, is added to
    what the layer's mixer reads, not to the residual stream.
    """

    blocks: int = 0  # so many of them; 0: none
    layer: str = ""  # the layer kind that says what is in them: attention and a dense feed-forward
    adapter_rank: int = 0  # each layer adds a low-rank product of its own to the first projection of the feed-forward; 0: none
    adapt_mixer: bool = False  # and one each to queries, keys and values

    def check(self, key: str) -> None:
        """Refuse, in one sentence (ConfigError) that names `key`, options without effect."""
        for name in ("layer", "adapter_rank", "adapt_mixer"):
            if not self.blocks and getattr(self, name) != default_of(self, name):
                raise ConfigError(f"{key}.{name}={getattr(self, name)} has no effect with blocks: 0: write blocks: 1 or more, or take it out")
        if self.blocks and not self.layer:
            raise ConfigError(f"{key}.blocks={self.blocks} needs {key}.layer: write the layer kind that says what is in them")
        if self.adapt_mixer and not self.adapter_rank:
            raise ConfigError(f"{key}.adapt_mixer=true has no effect with adapter_rank: 0: write a rank, or take it out")
