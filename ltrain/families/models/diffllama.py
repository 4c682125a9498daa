"""DiffLlama: Llama with differential attention (Ye et al. 2024)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
QKV = tuple(Theirs(f"self_attn.{name}_proj.{{leaf}}", parts) for name, parts in (("q", (0, 1)), ("k", (2, 3)), ("v", (4, 5))))
FAMILY = Family(
    model_type="diffllama",
    architecture="DiffLlamaForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        tables.BIAS,
        key("intermediate_size", "dense.inner"),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False},
    indifferent=("lambda_std_dev",),
    mixers={
        "attention": Role(
            mixer="attention",
            rope=Rope(),
            fixed={"gate": "none", "qk_norm": "none", "differential": True},
            weights=(Weight("qkv.{leaf}", QKV), tables.attention()[1], *(Weight.same(name, f"self_attn.{name}") for name in LAMBDAS)),
        ),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu())},
    roles=lambda config: [("attention", "dense")] * config["num_hidden_layers"],
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
