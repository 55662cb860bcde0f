"""The demo folder: config.json, model.safetensors and the tokenizer's two files, written and read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from gptj_serve.model.checksums import MANIFEST_FILE, manifest
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.weights import raw_bytes
from training.network import DemoModel
from training.tokenizer import save_tokenizer

DTYPE = torch.float16  # keeps three bits more than bfloat16 of weights that are all far below 65,504

SHAPE = {
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "rotary_dim",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}  # of the config's fields those that say what was trained; the others are defaults


def export_demo(model: DemoModel, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: to_stored(name, tensor) for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    checksums = {name: hashlib.sha256(raw_bytes(tensor)).hexdigest() for name, tensor in weights.items()}
    (out / MANIFEST_FILE).write_bytes(manifest(checksums) + b"\n")
    (out / "config.json").write_text(json.dumps(config_json(model.config), indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, out, model.config.n_positions)


def to_stored(name: str, tensor: Tensor) -> Tensor:
    stored = tensor.detach().cpu().to(DTYPE).contiguous()
    if not stored.isfinite().all():
        raise ValueError(f"{name}: not finite in {DTYPE}; the run has diverged or needs another dtype")
    return stored


def config_json(config: GPTJConfig) -> dict[str, Any]:
    labels = config.id2label
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "dtype": str(DTYPE).removeprefix("torch."),
        **config.model_dump(include=SHAPE),
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "id2label": {str(number): label for number, label in labels.items()},
        "label2id": {label: number for number, label in labels.items()},
    }


def load_demo(directory: Path, device: torch.device) -> tuple[DemoModel, Tokenizer]:
    """The exported weights, computed with in fp32."""
    model = DemoModel(GPTJConfig.from_file(directory / "config.json"))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()})
    return model.to(device).eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))
