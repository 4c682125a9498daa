"""Qwen3-Next: three Gated DeltaNet layers to one of gated attention, each with a mixture of experts (Qwen team 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    depth, period = config["num_hidden_layers"], config.get("full_attention_interval") or 4
    mixers = config.get("layer_types") or ["linear_attention" if (i + 1) % period else "full_attention" for i in range(depth)]
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    sparse = [i not in dense and config.get("num_experts", 512) > 0 and (i + 1) % step == 0 for i in range(depth)]
    return [(mixer, "moe" if s else "dense") for mixer, s in zip(mixers, sparse, strict=False)]


def role_keys(roles: Roles) -> dict[str, Any]:
    dense = [i for i, (_, ffn) in enumerate(roles) if ffn == "dense"]
    return {"layer_types": [mixer for mixer, _ in roles], "mlp_only_layers": dense, "decoder_sparse_step": 1}


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    keys=(
        *tables.MODEL,
        key("num_attention_heads", "full_attention.heads", default=16),
        key("num_key_value_heads", "full_attention.kv_heads", default=2),
        key("head_dim", "full_attention.head_dim", default=256),
        tables.BIAS,
        *tables.LINEAR_HEADS,
        key("intermediate_size", "dense.inner", default=5632),
        key("num_experts", "moe.experts", default=512),
        key("num_experts_per_tok", "moe.top_k", default=10),
        key("moe_intermediate_size", "moe.inner", default=512),
        key("shared_expert_intermediate_size", "moe.shared_inner", default=512),
        key("norm_topk_prob", "moe.renormalise", default=True),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    model={"norm": "rms_zero_centred"},
    mixers={
        "linear_attention": Role(
            mixer="gated_delta_net",
            weights=(
                Weight(
                    "input.weight",  # q, k, v, z, b, a; theirs by key head
                    (
                        Theirs("linear_attn.in_proj_qkvz.weight", (0, 1, 2, 3), groups="key_heads"),
                        Theirs("linear_attn.in_proj_ba.weight", (4, 5), groups="key_heads"),
                    ),
                ),
                Weight.same("conv", "linear_attn.conv1d.weight", unit_axes=(1,)),
                Weight.same("A_log", "linear_attn.A_log"),
                Weight.same("dt_bias", "linear_attn.dt_bias"),
                Weight.same("norm.weight", "linear_attn.norm.weight"),
                Weight.same("out.weight", "linear_attn.out_proj.weight"),
            ),
        ),
        "full_attention": Role(
            mixer="attention",
            rope=Rope(fraction=0.25),
            fixed={"gate": "elementwise", "qk_norm": "head"},
            weights=(
                Weight(
                    "qkv.{leaf}",  # q, k, v and the gate, which theirs have behind the query of each head
                    (
                        Theirs("self_attn.q_proj.{leaf}", (0, 3), groups="heads"),
                        Theirs("self_attn.k_proj.{leaf}", (1,)),
                        Theirs("self_attn.v_proj.{leaf}", (2,)),
                    ),
                ),
                *tables.qk_norm(),
                Weight.same("out.{leaf}", "self_attn.o_proj.{leaf}"),
            ),
        ),
    },
    ffns={
        "dense": Role(
            fixed={"experts": 0, "bias": False},
            weights=tables.swiglu(),
        ),
        "moe": Role(
            fixed={"score": "softmax", "scale": 1.0, "shared_gate": True, "bias_rate": 0.0},
            weights=(
                *tables.router(),
                *tables.experts(),
                *tables.swiglu("mlp.shared_expert.", "shared."),
                Weight.same("shared_gate", "mlp.shared_expert_gate.weight"),
            ),
        ),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("layer_types", "full_attention_interval", "mlp_only_layers", "decoder_sparse_step"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=("mtp.*",),  # the multi-token-prediction head, which transformers leaves out too
)
