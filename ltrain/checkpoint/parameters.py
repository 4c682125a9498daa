"""A rank's parameters, and optimizer states of the same shape, as rectangles of logical tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ltrain.checkpoint.collectives import CheckpointError
from ltrain.checkpoint.load import Checkpoint
from ltrain.checkpoint.save import Entry
from ltrain.model.layers import pieces


def entries(name: str, param: nn.Parameter, kind: str, values: Tensor) -> Iterator[Entry]:
    """What a rank saves of a parameter: `values` has the parameter's local shape (its master weight, a moment)."""
    for piece in pieces(name, param):
        yield Entry(piece.name, kind, piece.shape, piece.start, values[piece.index])


@torch.no_grad()
def fill(name: str, param: nn.Parameter, kind: str, values: Tensor, checkpoint: Checkpoint) -> None:
    """Copy this rank's part of a saved parameter into `values`, which has the parameter's local shape.

    Errors: CheckpointError where the checkpoint has no such tensor or another whole shape.
    """
    for piece in pieces(name, param):
        saved = checkpoint.shape(piece.name, kind)
        if saved != piece.shape:
            raise CheckpointError(
                f"{kind} of {piece.name} has shape {list(saved)} in {checkpoint.path} and {list(piece.shape)} in this model: "
                "give the config that it was saved with"
            )
        local = values[piece.index]
        local.copy_(checkpoint.read(piece.name, kind, piece.start, local.shape))
