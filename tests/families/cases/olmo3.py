from tests.families.cases import LONG, SMALL, YARN, Cases

CASES = Cases(
    config="Olmo3Config",
    model="Olmo3ForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 4,
        "sliding_window": 20,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": YARN},
    },
    lengths={"plain": LONG},
)
