"""Documents that repeat themselves: runs of random tokens and of text, any of which may come again, far from where it was.

What comes the second time can be known only by finding the first, and each of its tokens tells whether that worked: small models learn in-context
recall from this within millions of tokens (Olsson et al. 2022, "In-context Learning and Induction Heads").
"""

import math
import random

import numpy as np

from ltrain.data.synthetic.haystack import Haystack, Ids

# Short runs that come again often: with 8 to 256 tokens, half of them again, a hybrid of 27M parameters had learned nothing from 26M tokens,
# with these it copied after 15M (runs of random tokens alone, documents of 256).
SHORTEST, LONGEST = 4, 32  # tokens of a run
AGAIN = 0.7  # share of the runs that come again, after the first


def document(tokens: int, rng: random.Random, haystack: Haystack) -> Ids:
    """`tokens` - 1 ids, so that there is room for the end-of-document token: runs of log-uniform length, most of them earlier ones again."""
    tokenizer = haystack.tokenizer
    numbers = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    runs: list[Ids] = []
    parts: list[Ids] = []
    left = tokens - 1
    while left > 0:
        if runs and rng.random() < AGAIN:
            run = rng.choice(runs)
        else:
            length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
            if rng.random() < 0.5:
                run = haystack.take(rng, length)
            else:
                run = numbers.integers(0, tokenizer.vocab_size - 1, length, dtype=np.int32)
                run += run >= tokenizer.eos  # every id but the end of a document
            runs.append(run)
        parts.append(run[:left])
        left -= len(run)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
