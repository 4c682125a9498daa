"""The learning rate of each step."""

import math

from ltrain.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Of the update after `step` updates (counting from 0): linear warm-up to `lr`, then a cosine down to `min_lr` at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step + 1 - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.min_lr + 0.5 * (train.lr - train.min_lr) * (1 + math.cos(math.pi * min(1.0, done)))
