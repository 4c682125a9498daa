"""gpt-oss: sinks, every second layer of sliding attention, experts with biases (OpenAI 2025)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight

FIXED = {"sinks": True, "gate": "none", "qk_norm": "none"}
WEIGHTS = (*tables.attention(), Weight.same("sinks", "self_attn.sinks"))
FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        key("attention_bias", "*.qkv_bias", "*.out_bias", default=True),
        tables.window("sliding_attention", 128),
        key("intermediate_size", "moe.inner"),
        key("num_local_experts", "moe.experts", also=("num_experts",), default=128),
        key("num_experts_per_tok", "moe.top_k", also=("experts_per_token",), default=4),
        key("swiglu_alpha", "moe.alpha", default=1.702),
        key("swiglu_limit", "moe.limit", default=7.0),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    indifferent=("initial_context_length",),
    mixers={
        "full_attention": Role(mixer="attention", rope=Rope(base=150000.0), fixed={**FIXED, "window": 0}, weights=WEIGHTS),
        "sliding_attention": Role(mixer="attention", rope=Rope(base=150000.0), fixed=FIXED, weights=WEIGHTS),
    },
    ffns={
        "moe": Role(
            fixed={
                "score": "softmax",
                "renormalise": True,
                "scale": 1.0,
                "router_bias": True,
                "router_dtype": "model",
                "bias_rate": 0.0,
                "bias": True,
                "up_offset": 1.0,
                "shared_inner": 0,
            },
            weights=(
                Weight.same("router.weight", "mlp.router.weight"),
                Weight.same("router.logit_bias", "mlp.router.bias"),
                Weight("experts.{expert}.up", (Theirs("mlp.experts.gate_up_proj", (0, 1), groups="inner", transposed=True),), parts=2),
                Weight("experts.{expert}.up_bias", (Theirs("mlp.experts.gate_up_proj_bias", (0, 1), groups="inner"),), parts=2),
                Weight.same("experts.{expert}.down", "mlp.experts.down_proj", transposed=True),
                Weight.same("experts.{expert}.down_bias", "mlp.experts.down_proj_bias"),
            ),
        ),
    },
    roles=tables.layer_types(lambda i, config: i % 2 == 0, "moe"),
    role_keys=tables.typed,
    role_names=("layer_types",),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
