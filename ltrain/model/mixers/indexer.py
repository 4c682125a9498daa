"""The lightning indexer of DeepSeek Sparse Attention."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltrain.kernels import sparse_attention as kernels
from ltrain.kernels.rope import rotate
from ltrain.kernels.sparse_attention.decoding import among
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.options import MLAOptions
from ltrain.model.position import shared_rotary_tables
from ltrain.model.router import attach_loss
from ltrain.model.sequence import Sequence

Index = tuple[Tensor, Tensor, Tensor]  # queries [T, Hi, Di], keys [T, Di] and weights [T, Hi]
SELECTION = "selection"  # in Sequence.shared: what later layers see too


def attach_index_loss(y: Tensor, loss: Tensor, weight: float, seq: Sequence) -> Tensor:
    """y, which carries an index's loss, the sum over this rank's queries, from now on; its share of the mean over the stream is noted for the log."""
    mean = loss * (weight / seq.tokens)
    seq.note("index_loss", mean)
    return attach_loss(y, mean, seq.aux_weight)


class Indexer(nn.Module):
    """Scores every earlier token for each token: I_ts = sum_h w_th relu(q_th k_s) (DeepSeek-V3.2 report, equation 1).

    Queries come from the attention's query latent, keys and weights from the input; none of them sends a gradient there. It is whole on every
    tensor rank, all of which choose the same tokens.
    """

    gather: Callable[[Tensor], Tensor]

    def __init__(self, hidden: int, options: MLAOptions, layers: LocalLayers):
        super().__init__()
        o = self.options = options
        self.gather = layers.gather
        self.scale = (o.index_heads * o.index_dim) ** -0.5
        self.q = layers.whole(o.q_rank or hidden, o.index_heads * o.index_dim)
        self.k = layers.whole(hidden, o.index_dim)
        self.k_norm = layers.latent_layer_norm(o.index_dim, 1e-6)
        self.weights = layers.whole(hidden, o.index_heads)

    def forward(self, x: Tensor, latent: Tensor, seq: Sequence) -> Index:
        """x [T / tensor, hidden], latent [T / tensor, q_rank] -> the index of all T tokens"""
        x, latent = x.detach(), latent.detach()
        q = self.gather(self.q(latent)).unflatten(-1, (self.options.index_heads, -1))
        k = self.gather(self.k_norm(self.k(x))).unsqueeze(1)
        if self.options.rope is not None:
            cos, sin = shared_rotary_tables(seq, self.options.rope_dim, self.options.rope, torch.promote_types(q.dtype, torch.float32))
            q, k = rotate(q, cos, sin, self.options.index_pairs), rotate(k, cos, sin, self.options.index_pairs)
        return q, k.squeeze(1), self.gather(self.weights(x)) * self.scale

    def select(self, index: Index, seq: Sequence) -> tuple[Tensor | None, Index]:
        """The index of T tokens -> [T, top_k] numbers of the keys that they and the shared layers behind attend to (-1: none; None: all so far),
        and the index with the keys of all tokens that these may see."""
        index = index[0], seq.exchange.gather(index[1], seq), index[2]
        dense = self.options.index_loss == "dense"
        indices = (
            None if dense else seq.tape.keep(lambda: kernels.select(*index, seq.exchange.parts(seq), self.options.top_k, fp8=self.options.index_fp8))
        )
        seq.shared[SELECTION] = indices
        return None if selects_everything(indices, seq) else indices, index

    def with_loss(self, y: Tensor, loss: Callable[[], Tensor], seq: Sequence) -> Tensor:
        """y, which carries the indexer's loss from now on."""
        o = self.options
        if o.index_loss == "none" or not torch.is_grad_enabled():
            return y
        return attach_index_loss(y, loss(), o.index_loss_weight, seq)

    def choose(self, index: Index, keys: KVCache, seq: Sequence) -> None:
        """Decoding: of the index of N tokens and their documents' keys, which have the values' place in the cache, the selection becomes slots [N, K]
        of this rank's best and whether these are among the best of all ranks [N, K]."""
        q, k = index[0], keys.v.squeeze(2)
        if self.options.index_fp8:
            q, k = kernels.rounded_to_fp8(q), kernels.rounded_to_fp8(k)
        scores = kernels.index_scores(q, k, index[2]).masked_fill_(keys.positions < 0, -torch.inf)
        slots = scores.topk(min(self.options.top_k, k.shape[1]), dim=-1).indices
        numbers = keys.positions.gather(1, slots)
        seq.shared[SELECTION] = slots, among(numbers, seq.exchange.best(scores.gather(1, slots), numbers, self.options.top_k))


def selects_everything(indices: Tensor | None, seq: Sequence) -> bool:
    """Whether every key is selected; None: over all."""
    return indices is None or int(seq.cu_seqlens.diff().max()) <= indices.shape[1]
