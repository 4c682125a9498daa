"""Cross-attention to an encoder's output: its formula, packed documents, decoding, and transformers' own gated layer of Llama 3.2 Vision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltrain.config import Config, ConfigError, validate
from ltrain.model.block import Block
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mixers.base import Mixer, build_mixer
from ltrain.model.options import CrossAttentionOptions, ModelConfig, MoEOptions
from ltrain.model.sequence import Memory, Sequence
from ltrain.model.stack import Stack
from ltrain.pattern import resolve_layers
from tests.model.mixers.test_contract import jitter

HIDDEN, WIDTH, VOCAB, EPS = 24, 20, 32, 1e-5
LENGTHS, ROWS = [5, 1, 30, 7, 3], [4, 9, 0, 1, 70]  # tokens and memory rows of each document: one has no memory
OPTIONS = CrossAttentionOptions(heads=4, kv_heads=2, head_dim=8, memory_width=WIDTH, memory_length=70)


def mixer(options: CrossAttentionOptions = OPTIONS, dtype: torch.dtype = torch.float64) -> Mixer:
    module = build_mixer("cross_attention", HIDDEN, options, LocalLayers(std=0.3, dtype=dtype))
    seed_parameters(module, 0)
    jitter(module)
    return module


def drawn(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def packed(states: Tensor, lengths: list[int] = LENGTHS, rows: list[int] = ROWS) -> Sequence:
    seq = Sequence.of(lengths)
    seq.memory = Memory.of(states, rows)
    return seq


def gradients(y: Tensor, module: nn.Module, *leaves: Tensor) -> dict[str, Tensor]:
    named = {**{str(i): leaf for i, leaf in enumerate(leaves)}, **dict(module.named_parameters())}
    return dict(zip(named, torch.autograd.grad((y * drawn(*y.shape, 3).detach().to(y.dtype)).sum(), list(named.values())), strict=True))


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_its_formula_token_by_token(qk_norm: str) -> None:
    module = mixer(CrossAttentionOptions(**{**vars(OPTIONS), "qk_norm": qk_norm}))
    w, x, states = dict(module.named_parameters()), drawn(sum(LENGTHS), HIDDEN, 1), drawn(sum(ROWS), WIDTH, 2)

    def normed(t: Tensor, name: str) -> Tensor:
        return t if qk_norm == "none" else t / (t.square().mean() + 1e-6).sqrt() * w[f"{name}_norm.weight"]

    rows = []
    for document, memory in zip(x.split(LENGTHS), states.split(ROWS), strict=True):
        for token in document:
            heads = []
            for h in range(4):
                at, kv_at = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
                if not len(memory):
                    heads.append(torch.zeros(8, dtype=torch.float64))
                    continue
                q = normed(w["q.weight"][at] @ token, "q")
                keys = [normed(w["kv.weight"][:16][kv_at] @ row, "k") for row in memory]
                p = torch.stack([q @ k / 8**0.5 for k in keys]).softmax(0)
                heads.append(sum(a * (w["kv.weight"][16:][kv_at] @ row) for a, row in zip(p, memory, strict=True)))
            rows.append(w["out.weight"] @ torch.cat(heads))
    expected, y = torch.stack(rows), module(x, packed(states))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    assert y[6:36].abs().max() == 0 and y[:6].abs().min() > 0
    other = gradients(expected, module, x, states)
    for name, grad in gradients(y, module, x, states).items():
        torch.testing.assert_close(grad, other[name], rtol=1e-8, atol=1e-10, msg=f"{name}: {{}}".format)
        assert grad.abs().max() > 0, name


def test_no_document_sees_the_memory_of_another() -> None:
    module, x, states = mixer(), drawn(sum(LENGTHS), HIDDEN, 1), drawn(sum(ROWS), WIDTH, 2)
    y = module(x, packed(states))
    documents = zip(LENGTHS, ROWS, x.split(LENGTHS), states.split(ROWS), strict=True)
    alone = torch.cat([module(part, packed(memory, [n], [m])) for n, m, part, memory in documents])
    torch.testing.assert_close(y, alone, rtol=1e-12, atol=1e-13)
    other = gradients(alone, module, x, states)
    for name, grad in gradients(y, module, x, states).items():
        torch.testing.assert_close(grad, other[name], rtol=1e-10, atol=1e-12, msg=f"{name}: {{}}".format)


@torch.no_grad()
def test_decoding_goes_on_with_the_memory_of_the_prefill() -> None:
    module, steps = mixer(), 3
    longer = [n + steps for n in LENGTHS]
    x, states = drawn(sum(longer), HIDDEN, 1), drawn(sum(ROWS), WIDTH, 2)
    expected = module(x, packed(states, longer)).split(longer)
    documents = x.split(longer)
    y, state = module.prefill(torch.cat([d[:n] for d, n in zip(documents, LENGTHS, strict=True)]), packed(states))
    torch.testing.assert_close(y, torch.cat([e[:n] for e, n in zip(expected, LENGTHS, strict=True)]))
    for step in range(steps):
        now = torch.tensor(LENGTHS) + step
        y, state = module.decode(torch.stack([d[n] for d, n in zip(documents, now.tolist(), strict=True)]), state, Sequence.step(now))
        torch.testing.assert_close(y, torch.stack([e[n] for e, n in zip(expected, now.tolist(), strict=True)]))


@torch.no_grad()
def test_documents_of_a_stream_without_memory_get_zeros() -> None:
    module, x = mixer(), drawn(6, HIDDEN, 1)
    y, state = module.prefill(x, Sequence.of([2, 4]))
    assert y.shape == x.shape and not y.any() and not module(x, Sequence.of([6])).any()
    assert not module.decode(x[:2], state, Sequence.step(torch.tensor([2, 4])))[0].any()


@torch.no_grad()
def test_costs() -> None:
    module = mixer()
    _, state = module.prefill(drawn(9, HIDDEN, 1), packed(drawn(70, WIDTH, 2), [9], [70]))
    assert module.state_bytes(9, 8) == 8 * (state.k.numel() + state.v.numel())
    assert module.num_params() == sum(p.numel() for p in module.parameters()) == 2 * HIDDEN * 32 + WIDTH * 32 + 16
    # two documents: queries and outputs, scores and sums of values over 70 rows, and keys and values of twice 70 rows
    assert module.flops(18, 9) == 18 * 2 * (2 * HIDDEN * 32 + 2 * 70 * 32) + 140 * 2 * WIDTH * 32
    assert module.read_bytes(9, 8) == 8 * (2 * HIDDEN * 32 + 16) + module.state_bytes(9, 8)
    assert module.exchanges(9) == []


def test_bfloat16_is_near_float64() -> None:
    half, wide = mixer(dtype=torch.bfloat16), mixer()
    wide.load_state_dict({key: value.double() for key, value in half.state_dict().items()})
    x, states = drawn(sum(LENGTHS), HIDDEN, 1).bfloat16(), drawn(sum(ROWS), WIDTH, 2)
    y, expected = half(x, packed(states)), wide(x.double(), packed(states))
    assert y.dtype == torch.bfloat16 and (y - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [
        ([4, 2], WIDTH, "the memory has 6 rows and boundaries .0, 4, 6. for a stream of 3 documents"),
        ([4, 1, 2], WIDTH, "the memory has 6 rows and boundaries .0, 4, 5, 7."),
        ([4, 0, 2], WIDTH - 1, "rows of the memory are 19 wide and memory_width is 20"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(rows: list[int], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer()(drawn(6, HIDDEN, 1), packed(drawn(6, width, 2), [1, 2, 3], rows))


# Against transformers


def mllama() -> Any:
    """Its cross-attention layer in float32, with weights and gates that are drawn."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    config = MllamaTextConfig(
        hidden_size=HIDDEN, num_attention_heads=3, num_key_value_heads=1, intermediate_size=40, rms_norm_eps=EPS, num_hidden_layers=1,
        cross_attention_layers=[0], hidden_act="silu", attn_implementation="eager",
    )  # fmt: skip
    layer = MllamaCrossAttentionDecoderLayer(config, 0)
    with torch.no_grad():
        for i, param in enumerate(layer.parameters()):
            param.copy_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(i)) + (param.ndim == 1))
    return layer


def ours(theirs: Any) -> Block:
    """The same layer in our words, with its weights."""
    layer = {"mixer": "cross_attention", "heads": 3, "kv_heads": 1, "head_dim": 8, "block": {"gated": True}}
    model = ModelConfig(hidden=HIDDEN, depth=1, pattern=["cross"], layers={"cross": layer}, ffn=MoEOptions(experts=0, inner=40), norm_eps=EPS)
    block = Block(HIDDEN, resolve_layers(model)[0], LocalLayers.of(model, dtype=torch.float32))
    block.load_state_dict(renamed(dict(theirs.named_parameters())))
    return block


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of theirs, or their gradients, under our names."""
    fused = {"mixer.kv": ("cross_attn.k_proj", "cross_attn.v_proj"), "ffn.up": ("mlp.gate_proj", "mlp.up_proj")}
    plain = {
        "mixer.q": "cross_attn.q_proj",
        "mixer.q_norm": "cross_attn.q_norm",
        "mixer.k_norm": "cross_attn.k_norm",
        "mixer.out": "cross_attn.o_proj",
        "mixer_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn.down": "mlp.down_proj",
    }
    found = {f"{mine}.weight": theirs[f"{name}.weight"] for mine, name in plain.items()}
    found |= {f"{mine}.weight": torch.cat([theirs[f"{name}.weight"] for name in names]) for mine, names in fused.items()}
    return found | {"mixer_gate": theirs["cross_attn_attn_gate"], "ffn_gate": theirs["cross_attn_mlp_gate"]}


def test_the_gated_layer_is_that_of_llama_3_2_vision() -> None:
    """Documents packed here, one at a time there; each has a memory, for without one transformers leaves the layer out. Float32."""
    theirs = mllama()
    block, lengths, rows = ours(theirs), [5, 1, 9], [4, 17, 1]
    x, states = (drawn(sum(n), HIDDEN, i).detach().float().requires_grad_() for i, n in enumerate((lengths, rows)))

    def each(call: Any) -> Tensor:
        return torch.cat([call(a[None], b[None])[0] for a, b in zip(x.split(lengths), states.split(rows), strict=True)])

    normed = block.mixer_norm(x)  # type: ignore[misc]
    attended = torch.cat([theirs.cross_attn(a[None], b[None])[0][0] for a, b in zip(normed.split(lengths), states.split(rows), strict=True)])
    torch.testing.assert_close(block.mixer(normed, packed(states, lengths, rows)), attended, rtol=2e-5, atol=2e-6)  # type: ignore[misc]

    y, expected = block(x, packed(states, lengths, rows)), each(lambda a, b: theirs(a, b, None, None, None))
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-6)
    found, other = gradients(y, block, x, states), gradients(expected, theirs, x, states)
    other = {"0": other["0"], "1": other["1"], **renamed(other)}
    assert found.keys() == other.keys()
    for name, grad in other.items():
        assert grad.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=2e-6 * float(grad.abs().max()) + 1e-6, msg=f"{name}: {{}}".format)


# In a model


def model(**kinds: dict[str, Any]) -> ModelConfig:
    cross = {"mixer": "cross_attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "memory_width": WIDTH, "block": {"gated": True}}
    layers = {"text": {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8}, "cross": cross}
    layers |= {name: {**layers[name], **kind} for name, kind in kinds.items()}
    return ModelConfig(hidden=HIDDEN, depth=4, pattern=["text", "cross"], layers=layers, ffn=MoEOptions(experts=0, inner=32))


def stack(made: ModelConfig, recompute: str = "none") -> Stack:
    built = Stack(made, VOCAB, LocalLayers(std=0.3, depth=made.depth, dtype=torch.float64), recompute=recompute)
    seed_parameters(built, 0)
    return built


def test_gated_layers_change_nothing_at_first() -> None:
    gated, tokens = stack(model()), torch.arange(sum(LENGTHS)) * 7 % VOCAB
    names = dict(gated.named_parameters())
    assert {name for name in names if "gate" in name} == {f"layers.{i}.{part}_gate" for i in (1, 3) for part in ("mixer", "ffn")}
    states = drawn(sum(ROWS), WIDTH, 2)
    y = gated(tokens, Sequence.of(LENGTHS), Memory.of(states, ROWS))
    torch.testing.assert_close(y, gated(tokens, Sequence.of(LENGTHS)), rtol=0, atol=0)
    assert all(
        grad.abs().max() > 0 for grad in torch.autograd.grad(y.square().sum() + y.sum(), [names["layers.1.mixer_gate"], names["layers.3.ffn_gate"]])
    )


def test_recomputation_and_the_gradient_of_the_memory() -> None:
    found = []
    for recompute in ("none", "selective", "full"):
        built, tokens, states = stack(model(), recompute), torch.arange(sum(LENGTHS)) * 7 % VOCAB, drawn(sum(ROWS), WIDTH, 2)
        jitter(built)
        built(tokens, Sequence.of(LENGTHS), Memory.of(states, ROWS)).square().sum().backward()
        assert states.grad is not None and states.grad.abs().max() > 0
        found.append({"memory": states.grad, **{name: p.grad for name, p in built.named_parameters() if p.grad is not None}})
    assert "layers.3.mixer.kv.weight" in found[0]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


@torch.no_grad()
def test_a_model_with_memory_decodes() -> None:
    built, tokens, states = stack(model()), torch.arange(12) * 7 % VOCAB, drawn(9, WIDTH, 2)
    jitter(built)
    expected = built(tokens[None], memory=Memory.of(states, [9]))[0]
    assert not torch.allclose(expected, built(tokens[None])[0])
    logits, state = built.prefill(tokens[:10], packed(states, [10], [9]))
    torch.testing.assert_close(logits, expected[9:10])
    for t in (10, 11):
        logits, state = built.decode(tokens[t : t + 1], state, Sequence.step(torch.tensor([t])))
        torch.testing.assert_close(logits, expected[t : t + 1])


def test_a_memory_that_nothing_reads_is_refused() -> None:
    made = model()
    made.pattern = ["text"]
    with pytest.raises(ValueError, match="no layer of this model reads a memory"):
        stack(made)(torch.arange(5), memory=Memory.of(drawn(4, WIDTH, 2), [4]))


def test_what_cannot_be_combined_is_refused() -> None:
    config = Config(model=model())
    validate(config)
    with pytest.raises(ConfigError, match="layers.cross .cross_attention. is not for training .* give it to the model's forward, as its memory, or"):
        validate(config, 1)
    config.parallel.pipeline = 2
    with pytest.raises(ConfigError, match="parallel.pipeline=2 does not work with model.layers.cross .cross_attention."):
        validate(config)
    config = Config(model=model())
    config.parallel.tensor = 4
    with pytest.raises(ConfigError, match="kv_heads=2 is not a multiple of parallel.tensor=4"):
        validate(config)
    with pytest.raises(ConfigError, match="heads=3 is not a multiple of model.layers.cross.kv_heads=2"):
        validate(Config(model=model(cross={"heads": 3})))
    with pytest.raises(ValueError, match="heads=3 is not a multiple of kv_heads=2"):
        mixer(CrossAttentionOptions(heads=3))
