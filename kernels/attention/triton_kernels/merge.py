"""What was found over some keys, together with what is over others."""

import triton
import triton.language as tl


@triton.jit
def merge(
    out,
    lse,
    part,
    part_lse,
    rows,
    out_token,
    out_head,
    lse_token,
    lse_head,
    part_token,
    part_head,
    part_lse_token,
    part_lse_head,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out [T, H, D] and lse [T, H] become those over the keys of both sides, where part and part_lse have any: other rows are not read. rows: T H."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // H, row % H
    inside = row < rows
    lse += token * lse_token + head * lse_head
    theirs = tl.load(part_lse + token * part_lse_token + head * part_lse_head, mask=inside, other=-float("inf")).to(tl.float32)
    found = theirs != -float("inf")  # what is not a number goes on
    ours = tl.load(lse, mask=found, other=0.0)
    top = tl.maximum(ours, tl.where(found, theirs, 0.0))
    weight, other = tl.exp(ours - top), tl.exp(theirs - top)
    total = weight + other
    columns = tl.arange(0, BD)
    at = found[:, None] & (columns < D)[None, :]
    out += (token * out_token + head * out_head)[:, None] + columns[None, :]
    part += (token * part_token + head * part_head)[:, None] + columns[None, :]
    # where nothing was found before, out is not read either: it may hold anything
    before = tl.load(out, mask=at & (ours != -float("inf"))[:, None], other=0.0).to(tl.float32)
    after = tl.load(part, mask=at, other=0.0).to(tl.float32)
    tl.store(out, before * (weight / total)[:, None] + after * (other / total)[:, None], mask=at)
    tl.store(lse, top + tl.log(total), mask=found)
