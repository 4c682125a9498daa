from tests.families.cases import VOCAB, Cases

CASES = Cases(
    config="GPT2Config",
    model="GPT2LMHeadModel",
    base={
        "vocab_size": VOCAB,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    variants={"untied-odd-heads": {"tie_word_embeddings": False, "n_head": 3, "n_inner": 40}},
)
