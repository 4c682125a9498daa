import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ltrain
from ltrain.checkpoint import Entry, LocalCollectives, save
from ltrain.checkpoint.parameters import entries
from ltrain.config import Config, to_yaml
from ltrain.data.tokenizer import Tokenizer
from ltrain.evals.generate import find, generate, load, main
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from ltrain.train.start import locate

VOCAB = 300


def model_config() -> ModelConfig:
    recurrence = {"mixer": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 16}
    attention = {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8}
    return ModelConfig(
        hidden=32,
        depth=3,
        pattern=["recurrence", "attention"],
        layers={"recurrence": recurrence, "attention": attention},
        ffn=MoEOptions(experts=4, top_k=2, inner=16, shared_inner=16),
    )


def build(dtype: torch.dtype = torch.float64) -> Stack:
    model = Stack(model_config(), VOCAB, LocalLayers(std=0.4, depth=3, dtype=dtype))
    seed_parameters(model, 3)
    for router in model.routers().values():
        router.bias.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(0))
    return model


PROMPTS = [[5, 9, 2, 250, 7], [17], list(range(40, 112)), [3, 3]]


def test_greedy_decoding_is_the_argmax_of_the_full_forward() -> None:
    model = build()
    new = generate(model, PROMPTS, 40)  # past the cache's first capacity of the longest prompt, and of the shortest
    for prompt, continuation in zip(PROMPTS, new, strict=True):
        assert len(continuation) == 40
        whole = torch.tensor(prompt + continuation)
        with torch.no_grad():
            logits = model.logits(model(whole, Sequence.of([len(whole)])))
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == continuation


def test_decoded_logits_are_those_of_the_full_forward() -> None:
    model = build().eval()
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([1, 30, 4])
    full = [torch.randint(0, VOCAB, (int(n) + 20,), generator=generator) for n in lengths]
    logits, state = model.prefill(torch.cat([t[:n] for t, n in zip(full, lengths, strict=True)]), Sequence.of(lengths.tolist()))
    steps = [logits]
    for i in range(20):
        logits, state = model.decode(torch.stack([t[n + i] for t, n in zip(full, lengths, strict=True)]), state, Sequence.step(lengths + i))
        steps.append(logits)
    for row, (tokens, n) in enumerate(zip(full, lengths, strict=True)):
        with torch.no_grad():
            expected = model.logits(model(tokens, Sequence.of([len(tokens)])))[n - 1 :]
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), expected, rtol=1e-9, atol=1e-9)


def test_all_logits_of_a_prefill_are_those_of_the_forward() -> None:
    model = build().eval()
    tokens, seq = torch.arange(50), Sequence.of([20, 1, 29])
    logits, _ = model.prefill(tokens, seq, all_logits=True)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.logits(model(tokens, seq)), rtol=1e-10, atol=1e-10)


def test_sampling_follows_seed_and_temperature() -> None:
    model = build()
    first = generate(model, PROMPTS, 12, temperature=1.0, seed=1)
    assert first == generate(model, PROMPTS, 12, temperature=1.0, seed=1)
    assert first != generate(model, PROMPTS, 12, temperature=1.0, seed=2)
    assert generate(model, PROMPTS, 12, temperature=1e-4, seed=5) == generate(model, PROMPTS, 12)


def test_padding_ids_are_not_chosen_and_the_end_ends() -> None:
    model = build()
    assert max(max(row) for row in generate(model, PROMPTS, 30, temperature=3.0, vocab=20)) < 20
    greedy = generate(model, PROMPTS, 30)
    end = greedy[1][4]
    for row, free in zip(generate(model, PROMPTS, 30, eos=end), greedy, strict=True):
        assert row == (free[: free.index(end)] if end in free else free)


def test_training_mode_is_left_as_it_was() -> None:
    model = build().train()
    generate(model, PROMPTS, 2)
    assert model.training
    assert all(int(router.load.sum()) == 0 for router in model.routers().values())


@pytest.mark.parametrize(("prompts", "message"), [([[1], []], "prompt 1 is empty"), ([[VOCAB]], "outside 0..299")])
def test_impossible_prompts_are_refused(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, 3)
    assert generate(build(), [], 3) == [] and generate(build(), [[1]], 0) == [[]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint of `build` in float32."""
    model = build(torch.float32)
    tensors = [e for name, param in model.named_parameters() for e in entries(name, param, "param", param.detach())]
    for name, router in model.routers().items():
        tensors.append(Entry(f"{name}.bias", "buffer", tuple(router.bias.shape), (0,), router.bias))
    tokenizer = Tokenizer("bytes", 256)
    files: dict[str, Any] = {"config.yaml": to_yaml(Config(model=model_config())).encode()}
    tokenizer.save(tmp_path)
    files["ltrain_tokenizer.json"] = (tmp_path / "ltrain_tokenizer.json").read_bytes()
    save(tmp_path / "checkpoints", 7, tensors, {"step": 7}, LocalCollectives(), files, keep=2)
    return tmp_path


def test_a_checkpoint_gives_its_model_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, config = load(run)
    assert config.model == model_config()
    saved = build(torch.float32)
    for (name, a), (other, b) in zip(saved.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b.cpu()), name

    main(str(find(run)), "hello", 8, 0.0, 0)
    (new,) = generate(saved, [list(b"hello")], 8, vocab=257, eos=256)
    assert capsys.readouterr().out == tokenizer.decode([*b"hello", *new]) + "\n"


def test_a_damaged_checkpoint_is_not_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = find(run)
    newer = shutil.copytree(older, older.with_name("step-00000009"))
    weights = newer / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert find(run) == newer  # as long as nothing is read
    assert find(run, LocalCollectives()) == older
    warning = capsys.readouterr().err
    assert "step-00000009 is damaged" in warning and "taking step-00000007" in warning and len(warning.splitlines()) == 1
    for read in (load, ltrain.load_pretrained):
        with pytest.raises(ValueError, match="does not match its checksum"):
            read(newer)
        read(run)
        assert "step-00000009 is damaged" in capsys.readouterr().err


def test_a_run_with_stages_is_its_last_one(run: Path, tmp_path: Path) -> None:
    for name in ("01-short", "02-long", "03-begun/checkpoints"):
        (tmp_path / "staged" / name).mkdir(parents=True)
    first, second = (shutil.copytree(run / "checkpoints", tmp_path / "staged" / name / "checkpoints") for name in ("01-short", "02-long"))
    assert find(tmp_path / "staged") == find(second) != find(first)
    assert locate(tmp_path / "staged", tmp_path / "init") == second.parent


def test_folders_without_a_checkpoint_are_refused(run: Path, tmp_path: Path) -> None:
    assert find(run) == find(run / "checkpoints") == find(find(run))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="neither a checkpoint"):
            load(path)
    with pytest.raises(ValueError, match="--prompt is empty"):
        main(str(run), "", 3, 0.0, 0)
