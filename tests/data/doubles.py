"""Documents and a tokenizer in memory, for the tests of this folder."""

from ltrain.data.tokenizer import Tokenizer


class CountingTokenizer(Tokenizer):
    """Bytes, counting the documents it encodes."""

    def __init__(self):
        super().__init__("bytes", 256)
        self.encoded: list[str] = []

    def encode(self, text):
        self.encoded.append(text)
        return super().encode(text)
