from tests.families.cases import VOCAB, Cases

# all heads together as wide as a multiple of 64, to which transformers rounds its states
CASES = Cases(
    config="xLSTMConfig",
    model="xLSTMForCausalLM",
    base={
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_heads": 4,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        "autocast_kernel_dtype": "float32",
    },
    variants={"other-widths": {"num_heads": 8, "qk_dim_factor": 1.0, "ffn_round_up_to_multiple_of": 8, "gate_soft_cap": 5.0}},
)
