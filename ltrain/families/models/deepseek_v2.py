"""DeepSeek-V2 and its Lite (DeepSeek-AI 2024)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope

ROPE = Rope(width="rope_dim", pairs=True)
MOE = (*tables.router(), *tables.experts(), *tables.swiglu("mlp.shared_experts.", "shared."))
FIXED = {"score": "softmax", "shared_gate": False, "renormalise": False, "aux_loss": 0.0, "bias_rate": 0.0}


def roles(config: dict[str, Any]) -> Roles:
    dense, mixer = config.get("first_k_dense_replace", 0), "compressed" if config.get("q_lora_rank", 1536) else "plain"
    moe = "groups" if config.get("topk_method") == "group_limited_greedy" else "greedy"
    return [(mixer, "dense" if i < dense else moe) for i in range(config["num_hidden_layers"])]


def role_keys(roles: Roles) -> dict[str, Any]:
    ffns = [ffn for _, ffn in roles]
    plain = {"q_lora_rank": None} if roles[0][0] == "plain" else {}
    return {"first_k_dense_replace": ffns.count("dense"), "topk_method": "group_limited_greedy" if "groups" in ffns else "greedy", **plain}


def of_experts(name: str) -> tuple[str, str]:
    return f"greedy.{name}", f"groups.{name}"


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.LATENT_HEADS,
        key("attention_bias", "*.bias", default=False),
        key("intermediate_size", "dense.inner"),
        key("mlp_bias", "dense.bias", default=False),
        key("n_routed_experts", *of_experts("experts"), default=64),
        key("num_experts_per_tok", *of_experts("top_k")),
        key("moe_intermediate_size", *of_experts("inner"), default=1407),
        key(
            "n_shared_experts",
            *of_experts("shared_inner"),
            default=2,
            read=lambda n, c: n * c["moe_intermediate_size"],
            write=lambda width, c: width // c["moe_intermediate_size"],
        ),
        key("routed_scaling_factor", *of_experts("scale"), default=1.0),
        key("n_group", "groups.groups", default=1),
        key("topk_group", "groups.top_groups", default=1),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    indifferent=("norm_topk_prob", "head_dim", "qk_head_dim", "moe_layer_freq", "ep_size", "scoring_func", "seq_aux", "aux_loss_alpha"),
    mixers={
        # the first that fits is a layer's on export
        "plain": Role(
            mixer="mla", rope=Rope(width="rope_dim", pairs=True), fixed={"q_rank": 0, "gate": "none"}, weights=tables.latent_attention(False)
        ),
        "compressed": Role(mixer="mla", rope=ROPE, fixed={"gate": "none"}, weights=tables.latent_attention(True)),
    },
    ffns={
        "dense": Role(fixed={"experts": 0}, weights=tables.swiglu()),
        "greedy": Role(fixed={**FIXED, "groups": 1}, weights=MOE),
        "groups": Role(fixed={**FIXED, "group_score": "max"}, weights=MOE),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("first_k_dense_replace", "topk_method"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
