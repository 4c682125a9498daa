from tests.families.cases import VOCAB, Cases

CASES = Cases(
    config="BloomConfig",
    model="BloomForCausalLM",
    base={"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 6, "pad_token_id": None},
    variants={"untied": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}},
)
