"""Shared fixtures. `tiny_gptj` makes the checkpoints that the package and transformers, its oracle, both load."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton looks at it when it is imported, which transformers does too

settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")  # machines are shared and slow at times; nothing here asserts a time

TINY_GPTJ: dict[str, Any] = {
    "vocab_size": 97,
    "n_positions": 96,
    "n_embd": 32,
    "n_layer": 6,
    "n_head": 4,
    "rotary_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 96,
    "id2label": {0: "greeting", 1: "question", 2: "farewell"},
    "label2id": {"greeting": 0, "question": 1, "farewell": 2},
}

CheckpointFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def one_torch_thread() -> None:
    """These tensors are too small for more: several threads would only get in each other's way."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_gptj(tmp_path_factory: pytest.TempPathFactory, one_torch_thread: None) -> CheckpointFactory:
    """`tiny_gptj(**config)` → a directory with a random GPT-J that has all three heads, made once per config.

    Tests share the directories: copy one before changing it.
    """
    made: dict[str, Path] = {}

    def make(**config: Any) -> Path:
        key = json.dumps(config, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gptj")
            _save_random_gptj({**TINY_GPTJ, **config}, made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def cpu_kernels() -> None:
    """Skips, by name, where our kernels can't be: what fails to compile is no reason."""
    from gptj_serve.environment import compiler
    from gptj_serve.kernels.cpu_library import REQUIRED, cpu_features, cpu_library

    if missing := [feature for feature in REQUIRED if feature not in cpu_features()]:
        pytest.skip(f"our kernels: this CPU has no {', '.join(missing)}")
    if shutil.which(compiler()[0]) is None:
        pytest.skip(f"our kernels: there is no {compiler()[0]} to compile them with")
    cpu_library()


@pytest.fixture(scope="session")
def int8_kernels(cpu_kernels: None) -> None:
    from gptj_serve.kernels.cpu_library import cpu_features

    if "avx512_vnni" not in cpu_features():
        pytest.skip("our int8 kernels: this CPU has no avx512_vnni")


def _save_random_gptj(config: dict[str, Any], directory: Path) -> None:
    """Weights large enough for decisive logits, biases and LayerNorms far from their defaults: each must matter."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPTJConfig, GPTJForCausalLM

    generator = torch.Generator().manual_seed(1)
    model = GPTJForCausalLM(GPTJConfig(**config))
    tensors = model.state_dict()
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    width, num_labels = config["n_embd"], len(config["id2label"])
    tensors |= {"score.weight": torch.empty(num_labels, width), "qa_outputs.weight": torch.empty(2, width)}
    tensors["qa_outputs.bias"] = torch.empty(2)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        scale = 0.6 if name in ("transformer.wte.weight", "lm_head.weight") else 0.2
        tensors[name] = scale * noise + name.endswith(("ln_1.weight", "ln_f.weight"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kuberay-crd", metavar="FILE", help="KubeRay's CRD of RayService, to check manifests with")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests with a marker of these run only when asked for: `pytest -m large`."""
    for marker in ("large", "clients", "faults", "scaling", "cluster", "manifests"):
        if marker not in config.option.markexpr:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"needs -m {marker}"))
