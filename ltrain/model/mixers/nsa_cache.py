"""What native sparse attention keeps of decoded documents, on one rank or on each of several.

Keys and values of the selected branch and of the window lie where a prefill leaves them, and decoded ones with the ranks in turn. A
compressed block lives on the rank that has its last token, where the prefill has made it of its tokens and of those that a halo brings.

What a compressed block makes of the importance of those that may be selected adds up, so one rank must have the keys of all compressed blocks
that share tokens with one: the rank of the last token of the last of them, which gets copies of the others' keys from what the prefill
gathers. What further ranks find of it is a part of the sum and lower, and of a block's scores the highest counts. Where its compressed
blocks are not all complete at the end of a prompt, every rank has copies of those that are.

What is made after the prompt goes to the ranks in turn, by the number of the block that may be selected: every rank computes each decoded
token, and with the last ones of the prompt it can make all compressed blocks from there on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltrain.kernels.segments import documents
from ltrain.kernels.sparse_attention.native import Shape
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.sequence import Sequence

Compress = Callable[[Tensor], tuple[Tensor, Tensor]]  # blocks of keys and values beside each other [m, 2 Hk, D, l] -> [m, Hk, D] each


@dataclass
class NSACache:
    tokens: KVCache  # of the selected branch
    window: KVCache
    blocks: KVCache  # compressed, by their numbers
    copies: KVCache  # keys alone of compressed blocks that live elsewhere
    recent: Tensor  # [N, l - 1, 2 Hk, D]: keys and values, not compressed, of the last tokens

    @classmethod
    def of(
        cls, tokens: KVCache, window: KVCache, raw: Tensor, own: tuple[Tensor, Tensor], whole: Tensor, seq: Sequence, shape: Shape, compress: Compress
    ) -> "NSACache":
        """raw [T, 2 Hk, D]: keys and values to be compressed; own: the compressed blocks that end among these tokens; whole: the keys of all those of
        its documents up to this rank's last part of each."""
        ahead = shape.block + 2 * shape.length  # tokens that blocks not complete at the end of a document share
        last = seq.exchange.last(raw.flatten(1), seq, ahead).unflatten(-1, raw.shape[1:])
        blocks = KVCache.of(*own, seq, units=shape.compressed)
        copies = _copies(last, whole, seq, shape, compress)
        return cls(tokens, window, blocks, copies, last[:, ahead - shape.length + 1 :])

    def append(self, kv: list[Tensor], seq: Sequence, shape: Shape, compress: Compress) -> None:
        """kv: keys and values to be compressed, selected and of the window, [N, Hk, D] each."""
        self.tokens.append(kv[2], kv[3], seq)
        self.window.append(kv[4], kv[5], seq)
        together = torch.cat((self.recent, torch.cat(kv[:2], 1).unsqueeze(1)), 1)  # [N, l, 2 Hk, D]
        self.recent = together[:, 1:]
        end = seq.positions + 1 - shape.length
        number = end // shape.stride
        made, begins, ends = (end >= 0) & (end % shape.stride == 0), end.clamp(min=0) // shape.block, seq.positions // shape.block
        k, v = compress(together.permute(0, 2, 3, 1))
        here = made & seq.exchange.takes(ends)
        self.blocks.append_blocks(k, v, number, here, shape.stride)
        self.copies.append_blocks(k, v[..., :0], number, made & ~here & seq.exchange.takes(begins), shape.stride)


def _copies(last: Tensor, whole: Tensor, seq: Sequence, shape: Shape, compress: Compress) -> KVCache:
    """Of NSACache after a prefill. last [N, R, 2 Hk, D]: the last tokens of each document; whole: see there."""
    runs, lengths = seq.exchange.runs(seq), seq.cu_seqlens.diff().tolist()
    begins, at = {}, 0  # where a document's keys begin -> where its compressed blocks do
    for begin, stop in documents(seq.exchange.parts(seq)).items():
        begins[begin], at = at, at + shape.compressed(stop - begin)
    held: list[set[int]] = [set() for _ in lengths]
    for document, first, count in runs:
        held[document].update(range(shape.compressed(first), shape.compressed(first + count)))
    from_whole: list[tuple[int, int, int]] = []  # document, number, row of `whole`
    for (document, first, count), part in zip(runs, seq.exchange.parts(seq), strict=True):
        if shape.weighed(first) < shape.weighed(first + count):
            missing = [n for n in range(shape.first_of(shape.weighed(first)), shape.compressed(first)) if n not in held[document]]
            held[document].update(missing)
            from_whole += [(document, n, begins[part.begin] + n) for n in missing]
    from_last: list[tuple[int, int, int]] = []  # document, number, first of its tokens among the last
    for document, length in enumerate(lengths):
        missing = [n for n in range(shape.first_of(shape.weighed(length)), shape.compressed(length)) if n not in held[document]]
        from_last += [(document, n, last.shape[1] - length + n * shape.stride) for n in missing]
    made = [last[document, start : start + shape.length].permute(1, 2, 0) for document, _, start in from_last]
    k = torch.cat((whole[[row for *_, row in from_whole]], compress(torch.stack(made))[0] if made else whole[:0]))
    found = sorted((document, number, i) for i, (document, number, _) in enumerate(from_whole + from_last))
    counts = [sum(document == n for document, *_ in found) for n in range(len(lengths))]
    longest = max(counts, default=0)
    empty = k.new_zeros(len(lengths), longest, *k.shape[1:])
    cache = KVCache(empty, empty[..., :0], torch.full(empty.shape[:2], -1, device=k.device), torch.tensor(counts).to(k.device), longest)
    slot = [i - sum(counts[:document]) for i, (document, *_) in enumerate(found)]
    if found:
        rows = torch.tensor([document for document, *_ in found], device=k.device), torch.tensor(slot, device=k.device)
        cache.k[rows] = k[torch.tensor([i for *_, i in found], device=k.device)]
        cache.positions[rows] = torch.tensor([number for _, number, _ in found], device=k.device)
    return cache
