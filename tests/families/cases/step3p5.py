from typing import Any

from tests.families.cases import LONG, SMALL, Cases

ROPE = {"rope_type": "default", "rope_theta": 1e4}


def with_a_head() -> type:
    """Its text model, which transformers has inside a model of more, with the head and the names of the text model's own checkpoints."""
    from torch import nn
    from transformers import conversion_mapping
    from transformers.generation import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.step3p7 import modeling_step3p7 as modeling

    class Step3p5ForCausalLM(modeling.Step3p7PreTrainedModel, GenerationMixin):
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        config_class = modeling.Step3p7TextConfig
        config: modeling.Step3p7TextConfig

        def __init__(self, config: Any):
            super().__init__(config)
            self.model = modeling.Step3p7TextModel(config)
            self.model.embed_tokens.padding_idx = None  # it is a token as others here, and gets its gradient
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, **rest: Any) -> Any:
            rest = {name: value for name, value in rest.items() if name not in ("logits_to_keep", "labels")}
            found = self.model(input_ids=input_ids, **rest)
            return CausalLMOutputWithPast(logits=self.lm_head(found.last_hidden_state), past_key_values=found.past_key_values)

    whole = conversion_mapping.get_checkpoint_conversion_mapping("step3p7")
    names = [step for step in whole if any("moe" in name or "share_expert" in name for name in step.source_patterns)]
    conversion_mapping.register_checkpoint_conversion_mapping("Step3p5ForCausalLM", names, overwrite=True)
    return Step3p5ForCausalLM


CASES = Cases(
    config="Step3p7TextConfig",
    model=with_a_head,
    base={
        **SMALL,
        "num_hidden_layers": 4,
        "num_sliding_attention_heads": 6,
        "head_dim": 12,
        "sliding_window": 20,
        "pad_token_id": 0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "share_expert_dim": 28,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": [0.0, 0.0, 0.05, None],
        "swiglu_limits_shared": [0.1, None, 0.0, 0.2],
        "rope_parameters": {"full_attention": {**ROPE, "rope_theta": 5e6, "partial_rotary_factor": 0.5}, "sliding_attention": ROPE},
    },
    variants={
        "tied-llama3": {
            "tie_word_embeddings": True,
            "num_sliding_attention_heads": None,
            "query_pre_attn_scalar": 20,
            "swiglu_limits": None,
            "swiglu_limits_shared": None,
            "rope_parameters": {
                "full_attention": {
                    **ROPE,
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 64,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 32.0,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": ROPE,
            },
        }
    },
    lengths={"tied-llama3": LONG},
)
