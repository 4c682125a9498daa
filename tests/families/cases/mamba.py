from tests.families.cases import VOCAB, Cases

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "state_size": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = Cases(
    config="MambaConfig",
    model="MambaForCausalLM",
    base=SMALL,
    variants={"biases-untied": {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_rank": 5, "conv_kernel": 3}},
)
