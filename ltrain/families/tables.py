"""Keys and rows that many families share; names on the disk are those of most."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ltrain.families.family import Key, Roles, key
from ltrain.families.weights import Theirs, Weight

MODEL = (
    key("vocab_size", "vocab"),
    key("hidden_size", "hidden"),
    key("num_hidden_layers", "depth"),
    key("rms_norm_eps", "norm_eps", default=1e-6),
    key("tie_word_embeddings", "tie_embeddings", default=False),
)

# Of every mixer that has heads, K/V heads and a head's width.
HEADS = (
    key("num_attention_heads", "*.heads"),
    key("num_key_value_heads", "*.kv_heads", default=lambda c: c["num_attention_heads"]),
    key("head_dim", "*.head_dim", default=lambda c: c["hidden_size"] // c["num_attention_heads"]),
)


def shared_experts(name: str, default: int = 1) -> Key:
    """How many experts' width the shared one has."""

    def read(count: int | None, config: dict[str, Any]) -> int:
        return (count or 0) * int(config["moe_intermediate_size"])

    return key(name, "moe.shared_inner", default=default, read=read, write=lambda width, c: width // c["moe_intermediate_size"])


# Experts of one width, the shared one a multiple of it, in the words of DeepSeek.
SHARED_EXPERTS = (
    key("n_routed_experts", "moe.experts"),
    key("num_experts_per_tok", "moe.top_k"),
    key("moe_intermediate_size", "moe.inner"),
    shared_experts("n_shared_experts"),
    key("norm_topk_prob", "moe.renormalise", default=True),
    key("routed_scaling_factor", "moe.scale", default=1.0),
)
# Gated DeltaNet, as in Qwen3-Next.
LINEAR_HEADS = (
    key("linear_num_key_heads", "linear_attention.key_heads", default=16),
    key("linear_num_value_heads", "linear_attention.value_heads", default=32),
    key("linear_key_head_dim", "linear_attention.key_dim", default=128),
    key("linear_value_head_dim", "linear_attention.value_dim", default=128),
    key("linear_conv_kernel_dim", "linear_attention.conv_width", default=4),
)
# Experts in groups, in the words of DeepSeek.
GROUPS = (key("n_group", "moe.groups", default=1), key("topk_group", "moe.top_groups", default=1))
# Multi-head latent attention, in the words of DeepSeek. K/V heads are made of latents: there are as many as heads.
LATENT_HEADS = (
    key("num_attention_heads", "*.heads"),
    key("num_key_value_heads", "*.heads", default=lambda c: c["num_attention_heads"]),
    # a role without it writes null by its role_keys
    key("q_lora_rank", "*.q_rank", default=lambda c: c.get("q_lora_rank", 1536), nullable=True, read=lambda rank, c: rank or 0),
    key("kv_lora_rank", "*.kv_rank", default=512),
    key("qk_nope_head_dim", "*.nope_dim", default=128),
    key("qk_rope_head_dim", "*.rope_dim", default=64),
    key("v_head_dim", "*.value_dim", default=128),
)
# Of models that are Mamba layers alone.
MAMBA_MODEL = (
    key("vocab_size", "vocab"),
    key("hidden_size", "hidden", also=("d_model",)),
    key("num_hidden_layers", "depth", also=("n_layer",)),
    key("layer_norm_epsilon", "norm_eps", default=1e-5),
    key("tie_word_embeddings", "tie_embeddings", default=True),
    key("expand", "*.inner", default=2, read=lambda e, c: int(e * c["hidden_size"]), write=lambda inner, c: inner / c["hidden_size"]),
    key("state_size", "*.states", default=16),
    key(
        "time_step_rank",
        "*.step_rank",
        default="auto",
        read=lambda rank, c: -(-c["hidden_size"] // 16) if rank == "auto" else rank,
    ),
    key("conv_kernel", "*.conv_width", default=4),
    key("use_conv_bias", "*.conv_bias", default=True),
    key("use_bias", "*.bias", default=False),
)
# How transformers initialises and runs them.
MAMBA_INDIFFERENT = (
    *("intermediate_size", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme", "time_step_max"),
    *("time_step_min", "time_step_scale", "use_associative_scan", "use_mambapy", "d_inner", "use_mamba_kernels"),
)
# Mamba-2 beside attention, in the words of Bamba.
MAMBA2_HEADS = (
    key("mamba_n_heads", "mamba2.value_heads", default=128),
    key(
        "mamba_d_head",
        "mamba2.value_dim",
        default="auto",
        read=lambda width, c: c.get("mamba_expand", 2) * c["hidden_size"] // c.get("mamba_n_heads", 128) if width == "auto" else width,
    ),
    key("mamba_n_groups", "mamba2.key_heads", default=1),
    key("mamba_d_state", "mamba2.key_dim", default=256),
    key("mamba_d_conv", "mamba2.conv_width", default=4),
    key("mamba_conv_bias", "mamba2.conv_bias", default=True),
    key("mamba_proj_bias", "mamba2.bias", default=False),
)
BIAS = key("attention_bias", "*.qkv_bias", "*.out_bias", default=False)


def window(role: str, default: int = 0) -> Key:
    """The width of a sliding window, null for none; default: where config.json does not say."""
    return key(
        "sliding_window", f"{role}.window", default=default, nullable=True, read=lambda width, c: width or 0, write=lambda width, c: width or None
    )


def temperature_length(config: dict[str, Any]) -> int:
    """Positions by which queries grow (llama_4_scaling_beta, of Mistral); 8192, the default, where they do not."""
    ropes = config["rope_parameters"]
    return int(ropes["original_max_position_embeddings"]) if ropes.get("llama_4_scaling_beta") else 8192


def attention(of: str = "self_attn.", out: str = "o_proj") -> tuple[Weight, ...]:
    """Queries, keys, values and the output, each apart, with a bias or none."""
    apart = Theirs(f"{of}q_proj.{{leaf}}", (0,)), Theirs(f"{of}k_proj.{{leaf}}", (1,)), Theirs(f"{of}v_proj.{{leaf}}", (2,))
    return Weight("qkv.{leaf}", apart), Weight.same("out.{leaf}", f"{of}{out}.{{leaf}}")


def qk_norm(of: str = "self_attn.", q: str = "q_norm", k: str = "k_norm") -> tuple[Weight, ...]:
    return Weight.same("q_norm.{leaf}", f"{of}{q}.{{leaf}}"), Weight.same("k_norm.{leaf}", f"{of}{k}.{{leaf}}")


def latent_attention(compressed: bool, of: str = "self_attn.", out: str = "o_proj") -> tuple[Weight, ...]:
    """compressed: queries have a latent too."""
    down = (Weight.same("q_down.{leaf}", f"{of}q_a_proj.{{leaf}}"), Weight.same("q_norm.weight", f"{of}q_a_layernorm.weight"))
    return (
        *(down if compressed else ()),
        Weight("q.weight", (Theirs(f"{of}{'q_b_proj' if compressed else 'q_proj'}.weight", (0, 1), groups="heads"),)),
        Weight.same("kv_down.{leaf}", f"{of}kv_a_proj_with_mqa.{{leaf}}"),
        Weight.same("kv_norm.weight", f"{of}kv_a_layernorm.weight"),
        Weight("kv.weight", (Theirs(f"{of}kv_b_proj.weight", (0, 1), groups="heads"),)),
        Weight.same("out.{leaf}", f"{of}{out}.{{leaf}}"),
    )


def selective(of: str, norms: bool = False) -> tuple[Weight, ...]:
    """Mamba's mixer."""
    apart = (("conv_bias", "conv1d.bias"), ("select.weight", "x_proj.weight"), ("step.weight", "dt_proj.weight"))
    inner = (("step_norm.weight", "dt_layernorm.weight"), ("B_norm.weight", "b_layernorm.weight"), ("C_norm.weight", "c_layernorm.weight"))
    plain = (("dt_bias", "dt_proj.bias"), ("A_log", "A_log"), ("D", "D"), ("out.{leaf}", "out_proj.{leaf}"))
    weights = (
        Weight("input.{leaf}", (Theirs(f"{of}in_proj.{{leaf}}", (0, 1)),)),
        *(Weight.same(ours, of + theirs) for ours, theirs in (*apart, *plain, *(inner if norms else ()))),
    )
    return (*weights, Weight.same("conv", f"{of}conv1d.weight", unit_axes=(1,)))


UNLIMITED = 1e38  # of steps, for infinity, which a config of ours does not take


def step_limits(role: str, name: str = "time_step_limit") -> Key:
    """Between which the step of Mamba-2 is kept."""

    def number(limit: Any) -> float:
        return UNLIMITED if limit in ("Infinity", {"__float__": "Infinity"}, float("inf")) else float(limit)

    def read(limits: list[Any] | None, config: dict[str, Any]) -> list[float]:
        found = [number(limit) for limit in limits or (0.0, UNLIMITED)]
        return [] if found == [0.0, UNLIMITED] else found

    return key(name, f"{role}.step_limits", default=None, read=read, write=lambda limits, c: limits or [0.0, float("inf")])


def mamba2(of: str = "mixer.") -> tuple[Weight, ...]:
    """Theirs have z, x, B, C and dt one after another: our gate, values, keys, queries and steps."""
    return (
        Weight("input.{leaf}", (Theirs(f"{of}in_proj.{{leaf}}", (3, 2, 1, 0, 4)),)),
        Weight("conv", (Theirs(f"{of}conv1d.weight", (2, 1, 0), unit_axes=(1,)),)),
        Weight("conv_bias", (Theirs(f"{of}conv1d.bias", (2, 1, 0)),)),
        *(Weight.same(name, f"{of}{name}") for name in ("A_log", "dt_bias", "D", "norm.weight")),
        Weight.same("out.{leaf}", f"{of}out_proj.{{leaf}}"),
    )


def ungated(of: str = "mlp.", ours: str = "", up: str = "up_proj", down: str = "down_proj") -> tuple[Weight, ...]:
    """A feed-forward without a gate."""
    return Weight.same(f"{ours}up.{{leaf}}", f"{of}{up}.{{leaf}}"), Weight.same(f"{ours}down.{{leaf}}", f"{of}{down}.{{leaf}}")


def swiglu(of: str = "mlp.", ours: str = "", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Weight, ...]:
    """A dense feed-forward, or with ours="shared." the shared expert."""
    return (
        Weight(f"{ours}up.{{leaf}}", (Theirs(f"{of}{gate}.{{leaf}}", (0,)), Theirs(f"{of}{up}.{{leaf}}", (1,)))),
        Weight.same(f"{ours}down.{{leaf}}", f"{of}{down}.{{leaf}}"),
    )


def experts(of: str = "mlp.experts.", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Weight, ...]:
    """Routed experts, one after the other on the disk."""
    return (
        Weight("experts.{expert}.up", (Theirs(f"{of}{{expert}}.{gate}.weight", (0,)), Theirs(f"{of}{{expert}}.{up}.weight", (1,))), parts=2),
        Weight.same("experts.{expert}.down", f"{of}{{expert}}.{down}.weight"),
    )


def router(name: str = "mlp.gate.weight", bias: str = "") -> tuple[Weight, ...]:
    """bias: the balancing bias, where the family has one."""
    return Weight.same("router.weight", name), *((Weight.same("router.bias", bias),) if bias else ())


def layer_types(sliding: Callable[[int, dict[str, Any]], bool], ffn: str = "dense") -> Callable[[dict[str, Any]], Roles]:
    """Mixers by config.json's layer_types; where it has none, layer i of a config.json slides if `sliding(i, config)` says so."""

    def roles(config: dict[str, Any]) -> Roles:
        kinds = ("full_attention", "sliding_attention")
        types = config.get("layer_types") or [kinds[sliding(i, config)] for i in range(config["num_hidden_layers"])]
        return [(kind, ffn) for kind in types]

    return roles


def typed(roles: Roles) -> dict[str, Any]:
    """The config.json that `layer_types` reads so."""
    return {"layer_types": [mixer for mixer, _ in roles]}


def norms(mixer: str = "input_layernorm", ffn: str = "post_attention_layernorm") -> tuple[Weight, ...]:
    """Before the mixer and before the feed-forward."""
    return Weight.same("mixer_norm.{leaf}", f"{mixer}.{{leaf}}"), Weight.same("ffn_norm.{leaf}", f"{ffn}.{{leaf}}")


def post_norms(mixer: str = "post_attention_layernorm", ffn: str = "post_feedforward_layernorm") -> tuple[Weight, ...]:
    """After the mixer and after the feed-forward."""
    return Weight.same("mixer_post_norm.{leaf}", f"{mixer}.{{leaf}}"), Weight.same("ffn_post_norm.{leaf}", f"{ffn}.{{leaf}}")


def ends(embed: str = "model.embed_tokens.weight", norm: str = "model.norm", head: str = "lm_head.weight") -> tuple[Weight, ...]:
    """Embedding, final norm and head."""
    return Weight.same("embed.weight", embed), Weight.same("norm.{leaf}", f"{norm}.{{leaf}}"), Weight.same("head.weight", head)


def without(keys: tuple[Key, ...], *theirs: str) -> tuple[Key, ...]:
    """The keys but these."""
    return tuple(k for k in keys if k.theirs not in theirs)


def below(prefix: str, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """Weights of a part of a mixer."""
    return tuple(dataclasses.replace(weight, ours=prefix + weight.ours) for weight in weights)


def rename(keys: tuple[Key, ...], role: str, other: str) -> tuple[Key, ...]:
    """Keys of one role, of another."""
    return tuple(dataclasses.replace(k, ours=tuple(name.replace(f"{role}.", f"{other}.", 1) for name in k.ours)) for k in keys)
