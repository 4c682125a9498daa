"""OLMo Hybrid: Gated DeltaNet with negative eigenvalues, normed before, and OLMo's attention, normed after (Olmo team 2026)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    depth = config["num_hidden_layers"]
    types = config.get("layer_types") or ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(depth)]
    rotates = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
    return [("nope" if kind == "full_attention" and not rotates else kind, "dense") for kind in types]


def role_keys(roles: Roles) -> dict[str, Any]:
    types = ["full_attention" if mixer == "nope" else mixer for mixer, _ in roles]
    return {"layer_types": types, **({"rope_parameters": None} if "nope" in dict(roles) else {})}


def parts(ours: str, names: tuple[str, ...], unit_axes: tuple[int, ...] = ()) -> Weight:
    return Weight(ours, tuple(Theirs(f"linear_attn.{name}.weight", (part,), unit_axes=unit_axes) for part, name in enumerate(names)))


# transformers renames the norms of its linear layers when it saves, and this one of the attention layers with them
POST = tables.post_norms("feedforward_layer_norm")
FIXED = {"gate": "none", "qk_norm": "full", "block": {"form": "post"}}
WEIGHTS = (*tables.attention(), *tables.qk_norm())
FAMILY = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    keys=(
        *tables.MODEL,
        key("num_attention_heads", "full_attention.heads", "nope.heads"),
        key("num_key_value_heads", "full_attention.kv_heads", "nope.kv_heads", default=lambda c: c["num_attention_heads"]),
        key("head_dim", "full_attention.head_dim", "nope.head_dim", default=lambda c: c["hidden_size"] // c["num_attention_heads"]),
        key("attention_bias", "full_attention.qkv_bias", "full_attention.out_bias", "nope.qkv_bias", "nope.out_bias", default=False),
        *tables.LINEAR_HEADS,
        key(
            "linear_allow_neg_eigval",
            "linear_attention.beta_scale",
            default=True,
            read=lambda negative, c: 2.0 if negative else 1.0,
            write=lambda scale, c: scale == 2,
        ),
        key("intermediate_size", "dense.inner"),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    indifferent=("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"),
    mixers={
        "linear_attention": Role(
            mixer="gated_delta_net",
            fixed={"norm_eps": 1e-5, "block": {"form": "pre"}},
            weights=(
                parts("input.weight", ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")),
                parts("conv", ("q_conv1d", "k_conv1d", "v_conv1d"), (1,)),
                Weight.same("A_log", "linear_attn.A_log"),
                Weight.same("dt_bias", "linear_attn.dt_bias"),
                Weight.same("norm.weight", "linear_attn.o_norm.weight"),
                Weight.same("out.weight", "linear_attn.o_proj.weight"),
            ),
            layer_weights=tables.norms("attention_layer_norm", "feedforward_layer_norm"),
        ),
        "nope": Role(mixer="attention", fixed={**FIXED, "rope": None}, weights=WEIGHTS, layer_weights=POST),
        "full_attention": Role(mixer="attention", rope=Rope(base=5e5), fixed=FIXED, weights=WEIGHTS, layer_weights=POST),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu())},
    roles=roles,
    role_keys=role_keys,
    role_names=("layer_types",),
    weights=tables.ends(),
    renames=(("post_attention_layernorm", "feedforward_layer_norm"), ("input_layernorm", "attention_layer_norm")),
)
