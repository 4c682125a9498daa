"""The chunked recurrence on a GPU: what one program computes, for every decay and update. `triton_chunked` launches these.

Notation as in `chunked`: a chunk holds blocks of C tokens, g_t is the sum of its log decays up to token t (of a head, or of each channel), S the
state before it and U what its tokens write, so that S' = e^{g_C} S + sum_i (e^{g_C - g_i} k_i) u_i^T, where g_C is the last. Tokens meet in the
scores R_ti = sum_c q_t k_i e^{g_t - g_i}, i <= t, and for the delta rule in A_ti = beta_t sum_c k_t k_i e^{g_t - g_i}, i < t, with which
U = T (beta V - (beta e^g K) S), T = (I + A)^{-1}. With the delta rule a chunk is one block; where nothing is erased it has several, U = V, and
tokens of different blocks meet where they are needed: their scores are stored nowhere. Forward:

    sum_decays      blocks at once, of decays per channel: what they add up to, from the middle of the block on
    prepare         blocks at once: R, T, W = T (beta e^g K), U0 = T (beta V), and queries and keys faded for the others
    pass_states     chunk by chunk: S before each, and U = U0 - W S
    add_chunks      where nothing is erased, chunks at once: what each adds to S, and
    accumulate      chunk by chunk, sums alone: S before each
    read            blocks at once: O = scale ((e^g Q) S + R U)

Where nothing is erased and decays are per head or none, `heads` has programs of its own: sum_decays in place of prepare, read (or
read_together), pair_gradients (with pair_scores) and decay_gradients (with gradients_across). Backward, from what was kept, or after prepare
(from the T and R that are kept in any case) and the states. Where nothing is erased:

    add_chunks, accumulate      dS' after each chunk, from the last one back
    read                        blocks at once, with keys, queries and dO in place of queries, keys and U: dV = (e^{g_C - g} K) dS' + scale R^T dO
    pair_gradients              blocks at once: dQ, then dK, and what each token moves of the decays' gradients
    decay_gradients             chunks at once: their sums

For the delta rule, with D = T^T dU, dA = -D U^T below the diagonal and the gradient of beta e^g K being -D S^T:

    read                blocks at once: the part of dU that comes from O of its own block
    pass_gradients      from the last chunk back: dS' after each, and dU
    score_gradients     blocks at once: D (dV is beta D), dR and dA
    key_gradients       blocks at once: dQ, dK, dbeta and the decays' gradients
    sum_parts           rows at once: dV, dbeta, and the gradients of decays per head
    sum_heads           rows at once: dQ and dK of key heads that several value heads have (of decays per channel where nothing is erased, too)

Only sums of decays are exponentiated, and of positive differences none that 16 bits could not hold: see `tiles.pair_spans` for decays per
channel. A product's result is never transposed for another product: Triton 3.4 to 3.7 computes that wrongly on Hopper. Rows past the end of
a chunk load as zeros: no write, no decay.
"""
