"""transformers' own models, tiny, with random weights, on the disk and in memory: what the tests of the families compare with."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.cases import cases


@pytest.fixture(scope="session")
def transformers() -> Iterator[Any]:
    """The package, kept to plain torch: it prefers others where they are installed, even on a CPU."""
    names = ("fla", "causal_conv1d", "mamba_ssm", "kernels")
    saved = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    import transformers

    yield transformers
    for name, module in saved.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


def build(transformers: Any, folder: Path, model_type: str, **changes: Any) -> Any:
    """A random model of transformers, saved in a folder."""
    case = cases(model_type)
    config = getattr(transformers, case.config)(**{**case.base, **changes}, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = (getattr(transformers, case.model) if isinstance(case.model, str) else case.model())(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # what starts at a constant would hide a tensor in the wrong place
        for name, param in model.named_parameters():
            if name.endswith("A_log"):
                param.uniform_(-3, 0, generator=generator)
            elif param.ndim == 1:
                param.add_(torch.empty_like(param).uniform_(-0.4, 0.4, generator=generator))
            elif "conv1d" not in name:
                param.normal_(0, 0.45 * param.shape[-1] ** -0.5, generator=generator)
        for buffer in (b for name, b in model.named_buffers() if name in model.state_dict() and not b.any()):
            buffer.uniform_(-0.3, 0.3, generator=generator)  # balancing biases: selection with them, weighting without
    model.save_pretrained(folder)
    return model


@pytest.fixture
def make(transformers: Any, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """make(model_type, **changes of the config) -> a random model of transformers and the folder it is saved in."""

    def made(model_type: str, **changes: Any) -> tuple[Any, Path]:
        folder = tmp_path / f"hf-{len(list(tmp_path.iterdir()))}"
        return build(transformers, folder, model_type, **changes), folder

    return made


@pytest.fixture(scope="session")
def variant(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, Path]]:
    """variant(model_type, name) -> the model of a case and its folder, made once: leave both as they are."""
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def get(model_type: str, name: str) -> tuple[Any, Path]:
        if (model_type, name) not in made:
            folder = tmp_path_factory.mktemp(f"{model_type}-{name}")
            made[model_type, name] = build(transformers, folder, model_type, **cases(model_type).variants.get(name, {})), folder
        return made[model_type, name]

    return get
