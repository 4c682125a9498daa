"""Where a needle lies: its depth is the share of the haystack's tokens before the question that come before the needle.

Evaluation uses depths within 0.002 of a tenth (0, 0.1, ..., 1) and neither the first line nor the last; training uses all the others and none of
these, so that no evaluated depth was seen. (In short texts a band may have no line, and the nearest one is taken: of 4096 tokens for one or two
needles in a hundred, all at the ends.) The bands are narrow: with 0.01, no needle of training lay in the first 1310 of 131072 tokens, and a model
that found needles everywhere else found none there. And the first line is training's: without a needle there that is ever asked for, what is said
at the beginning goes unheard (0.1 of passkeys at 131072 tokens, 0.40 at 4096, where other depths have 0.8 to 1).
"""

import random

BAND = 0.002  # half the width of a held-out band
STEPS = 10  # bands are at multiples of 1 / STEPS


def is_held_out(depth: float) -> bool:
    return 0 < depth < 1 and abs(depth - round(depth * STEPS) / STEPS) <= BAND


def held_out_depths(count: int) -> list[float]:
    """`count` depths of evaluation, spread evenly over (0, 1), the outermost BAND / 2 from its ends; one alone is the middle.

    Raises:
        ValueError: not from 1 to 11.
    """
    if not 1 <= count <= STEPS + 1:
        raise ValueError(f"{count} depths were asked for and there are {STEPS + 1} that training leaves out: ask for 1 to {STEPS + 1}")
    if count == 1:
        return [0.5]
    return [min(max(round(i * STEPS / (count - 1)) / STEPS, BAND / 2), 1 - BAND / 2) for i in range(count)]


def draw(rng: random.Random) -> float:
    """A depth of evaluation: a tenth, give or take BAND, inside (0, 1)."""
    depth = abs(rng.randint(0, STEPS) / STEPS + rng.uniform(-BAND, BAND))
    return min(depth, 2 - depth)
