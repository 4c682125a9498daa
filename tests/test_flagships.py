"""configs/models of published models, made on the meta device: as many parameters as published, and as transformers' own model has."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.config import load, validate
from ltrain.families import family
from ltrain.families.source import whole_model

MODELS = Path(__file__).parent.parent / "configs" / "models"


@dataclass(frozen=True)
class Published:
    """What the model's report or card says, and the model_type that counts as well."""

    total: float  # 1e9 parameters
    active: float  # 1e9 parameters that a token reaches
    uncounted: int = 0  # of embedding and head, how many are not among these
    model_type: str = ""  # '': transformers has none
    apart: int = 0  # parameters of ours less those of transformers


PUBLISHED = {
    "qwen3-next-80b-a3b": Published(79.7, 3.9, model_type="qwen3_next"),
    "gpt-oss-120b": Published(116.83, 5.13, uncounted=1, model_type="gpt_oss"),
    "gpt-oss-20b": Published(20.91, 3.61, uncounted=1, model_type="gpt_oss"),
    "deepseek-v3": Published(671.0, 37.55, model_type="deepseek_v3"),  # active: 37 in the report
    "kimi-k2": Published(1026.4, 32.86, model_type="deepseek_v3"),  # 1T and 32
    "kimi-linear-48b-a3b": Published(49.12, 3.48, model_type="kimi_linear"),  # 48 and 3 by its name
    "minimax-01": Published(456.1, 45.94, uncounted=2, model_type="minimax"),
    "deepseek-v3.2": Published(671.9, 38.4, model_type="deepseek_v32"),
    "glm-5": Published(743.9, 40.83, uncounted=1, model_type="glm_moe_dsa"),  # 744 and 40
    "nemotron-3-nano-30b-a3b": Published(31.58, 3.58, model_type="nemotron_h"),
    "jamba-1.5-large": Published(398.6, 94.1, model_type="jamba"),
    "recurrentgemma-9b": Published(8.58, 8.58, model_type="recurrent_gemma"),
    "samba-1.3b": Published(1.33, 1.33),  # the sizes of microsoft/Samba; 1.3 by its name
    "llama-4-scout": Published(107.8, 17.2, model_type="llama4_text"),
    "llama-4-maverick": Published(400.7, 17.2, model_type="llama4_text"),
    "gemma-3-27b": Published(27.0, 27.0, model_type="gemma3_text"),
    "ling-2.5-1t": Published(1012.5, 63.0),  # 1T, 1012.5 on the hub, where the scales of FP8 weights count too
    "hymba-1.5b": Published(1.52, 1.52),  # meta tokens among them
    "olmo-3-7b": Published(7.3, 7.3, model_type="olmo3"),
}


def of_transformers(config: dict[str, Any]) -> int:
    """Parameters of its model of a config.json, on the meta device; a tied tensor counts once."""
    sys.modules.setdefault("fla", None)  # type: ignore[arg-type]
    import transformers

    plain = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    about = transformers.AutoConfig.for_model(config["model_type"], **plain)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(about)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    published, file = PUBLISHED[name], MODELS / f"{name}.yaml"
    assert len(file.read_text().splitlines()) < 60
    config = load(file)
    config.data.tokenizer.kind = "bytes"
    validate(config)
    count = whole_model(config.model, config.model.vocab, "meta").num_params()
    assert count.total == pytest.approx(published.total * 1e9, rel=2e-3)
    uncounted = published.uncounted * config.model.vocab * config.model.hidden
    assert count.active - uncounted == pytest.approx(published.active * 1e9, rel=1e-2)
    if published.model_type:
        table = family(published.model_type)
        theirs = of_transformers(table.to_config(config.model, config.model.vocab, 4096))
        assert count.total == theirs + published.apart


def test_every_model_of_more_than_a_billion_is_checked() -> None:
    small = {"dense-25m", "hybrid-25m"}
    assert {file.stem for file in MODELS.glob("*.yaml")} == {*PUBLISHED, *small}
