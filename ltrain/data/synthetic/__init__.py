"""Recall tasks over long texts, for training (mixed in as a source) and for evaluation (`sample`), without a file to download."""

from ltrain.data.synthetic.depths import held_out_depths
from ltrain.data.synthetic.haystack import HAYSTACKS, Haystack, filler, open_haystack
from ltrain.data.synthetic.recall import TASKS, Sample, document, sample

__all__ = ["HAYSTACKS", "TASKS", "Haystack", "Sample", "document", "filler", "held_out_depths", "open_haystack", "sample"]
