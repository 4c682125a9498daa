"""Softmax attention over intervals of keys on a GPU: what one program computes. `triton_attention` launches these.

The forward and the gradient of queries go through blocks of queries, the gradients of keys and values through blocks of keys: each number
is summed by one program in one order, without atomic additions. A program reads from a `Plan` which rows of the other side its rows see. Tiles that
all of its rows see whole take no mask; what no row sees is not read.

A product's result is never transposed for another product: Triton 3.4 to 3.7 computes that wrongly on Hopper.
Source: FlashAttention-2 (Dao 2023), its forward and backward recurrences.
"""
