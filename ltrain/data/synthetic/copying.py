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
FEW = 0.5  # share of the documents whose random tokens are of few kinds: only several tokens together tell where one has been before
OFTEN = 8  # times that each of the few comes in such a document, at most


def document(tokens: int, rng: random.Random, haystack: Haystack) -> Ids:
    """`tokens` - 1 ids, so that there is room for the end-of-document token: runs of log-uniform length, most of them earlier ones again."""
    tokenizer = haystack.tokenizer
    numbers = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    kinds = tokenizer.vocab_size - 1  # every id but the end of a document
    alphabet = np.arange(kinds)
    if rng.random() < FEW and tokens // OFTEN < kinds:
        alphabet = numbers.choice(alphabet, round(math.exp(rng.uniform(math.log(max(SHORTEST, tokens // OFTEN)), math.log(kinds)))), replace=False)
    alphabet = (alphabet + (alphabet >= tokenizer.eos)).astype(np.int32)
    text = haystack.take(rng, tokens)
    read = 0
    runs: list[Ids] = []
    parts: list[Ids] = []
    left = tokens - 1
    while left > 0:
        if runs and rng.random() < AGAIN:
            run = rng.choice(runs)
        else:
            length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
            if rng.random() < 0.5:
                run, read = text[read : read + length], read + length
            else:
                run = numbers.choice(alphabet, length)
            runs.append(run)
        parts.append(run[:left])
        left -= len(run)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
