"""The learning rate of each step."""

import math

from ltrain.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Of the update after `step` updates (counting from 0): linear warm-up to `lr`, then what `schedule` says.

    cosine: half a cosine down to `min_lr` at the last step. wsd: `lr` as it is, and over the last `decay_length` steps a decay by
    1 - sqrt of the share that is done (warm-up, stable, decay: Hu et al. 2024; its form: Hägele et al. 2024, eq. 2) to `min_lr`.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    length = decay_length(train)
    done = max(0, step + 1 - (train.steps - length)) / max(1, length)  # share of the decay after this update
    left = 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if train.schedule == "cosine" else 1 - math.sqrt(min(1.0, done))
    return train.min_lr + left * (train.lr - train.min_lr)


def decay_length(train: TrainConfig) -> int:
    """Steps of the decay at the end; at most all after the warm-up, which is a cosine's."""
    after = train.steps - train.warmup_steps
    if train.schedule == "cosine":
        return after
    return min(after, train.decay_steps or math.ceil(train.decay_fraction * train.steps))
