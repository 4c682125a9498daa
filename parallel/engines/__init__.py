"""Engines: who reduces gradients, shards the optimizer's states and updates the weights."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltrain.config import Config
    from ltrain.parallel.engines.base import Engine
    from ltrain.parallel.mesh import Mesh


def build_engine(config: "Config", vocab: int, mesh: "Mesh") -> "Engine":
    """The engine that `config.engine` names, with this rank's part of the model, seeded. Only that one is imported.

    vocab: rows of the embedding, a multiple of parallel.tensor.
    """
    if config.engine == "deepspeed":
        from ltrain.parallel.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, vocab, mesh)
    from ltrain.parallel.engines.megatron import MegatronEngine

    return MegatronEngine(config, vocab, mesh)
