"""Checkpoints: safetensors shards and a JSON index by global names, independent of engine and layout; no pickle anywhere.

    checkpoints/step-00000100/index.json               written last: version, step, meta, files with checksums, tensors with their pieces
    checkpoints/step-00000100/rank-00000.safetensors   one per rank that writes
    checkpoints/step-00000100/config.yaml, ...         what else the run hands over

`ltrain.checkpoint.parameters` connects this with a model's parameters.
"""

from ltrain.checkpoint.collectives import CheckpointError, Collectives, DamagedError, LocalCollectives
from ltrain.checkpoint.folder import clean, last_stage, newest
from ltrain.checkpoint.load import Checkpoint, newest_sized, newest_whole
from ltrain.checkpoint.save import Entry, Plan, plan, save, write
from ltrain.checkpoint.saver import Saved, Saver

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Collectives",
    "DamagedError",
    "Entry",
    "LocalCollectives",
    "Plan",
    "Saved",
    "Saver",
    "clean",
    "last_stage",
    "newest",
    "newest_sized",
    "newest_whole",
    "plan",
    "save",
    "write",
]
