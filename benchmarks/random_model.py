"""Checkpoints of random weights: any shape, seeded, written tensor by tensor."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from gptj_serve.model.checkpoint import INDEX_FILE
from gptj_serve.model.config import GPTJConfig
from gptj_serve.planner import Model

SHAPE_FIELDS = ("n_layer", "n_embd", "n_head", "rotary_dim", "vocab_size", "n_positions")
STD = 0.02

M405 = GPTJConfig(n_layer=24, n_embd=1024, n_head=16, rotary_dim=32, vocab_size=50400, n_positions=2048)
"""405 M parameters."""


def make_checkpoint(config: GPTJConfig, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """One shard per layer, and one for the embedding and the head each; LayerNorms are near the identity."""
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in Model(config).shapes(range(config.n_layer)).items():
        part = ".".join(name.split(".")[: 2 if name.startswith("h.") else 1])
        shards.setdefault(part, {})[name if name.startswith("lm_head") else f"transformer.{name}"] = shape
    weight_map = {}
    for part, shapes in shards.items():
        file = f"model-{part}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = torch.empty(shape, dtype=dtype).normal_(std=STD, generator=generator)
            if name.endswith(".weight") and ".ln_" in name:
                tensors[name] += 1
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # ids outside a small vocabulary would be refused by some
    special = {} if config.vocab_size > 50256 else dict.fromkeys(("bos_token_id", "eos_token_id"))
    shape_values = {name: getattr(config, name) for name in SHAPE_FIELDS}
    name = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps({"model_type": "gptj", "dtype": name, **shape_values, **special}))
