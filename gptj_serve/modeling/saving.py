"""From a model to a checkpoint directory: safetensors, in several files if asked for, that appear all at once."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptj_serve.model.checkpoint import INDEX_FILE, SINGLE_FILE
from gptj_serve.model.checksums import MANIFEST_FILE
from gptj_serve.model.config import CONFIG_FILE
from gptj_serve.modeling.generation_config import GENERATION_CONFIG_FILE, GenerationConfig

if TYPE_CHECKING:
    from gptj_serve.modeling.pretrained import GPTJPreTrainedModel

DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@torch.no_grad()
def save_checkpoint(model: "GPTJPreTrainedModel", directory: Path, max_shard_size: int | str) -> None:
    """Write beside, then move into place: config and index last, so that half a checkpoint is never taken for one."""
    max_bytes = shard_size_bytes(max_shard_size)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=True)}
    shards = _sharded(tensors, max_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.changed(dtype=str(model.dtype), architectures=[type(model).__name__])
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch_name:
        scratch = Path(scratch_name)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({n: tensors[n].contiguous().cpu() for n in names}, scratch / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        files = sorted(set(weight_map.values()))
        if len(shards) > 1:
            total_size = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
            (scratch / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            files.append(INDEX_FILE)
        if isinstance(generation_config := getattr(model, "generation_config", None), GenerationConfig):
            generation_config.save_pretrained(scratch)
            files.append(GENERATION_CONFIG_FILE)
        (scratch / CONFIG_FILE).write_text(config.to_json_string(), encoding="utf-8")
        stale = [path for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name) or path.name == MANIFEST_FILE]
        for old in stale:
            old.unlink()
        for file in [*files, CONFIG_FILE]:
            os.replace(scratch / file, directory / file)


def shard_size_bytes(size: int | str) -> int:
    """5000000, "5MB" or "5GiB" in bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in _UNITS or not (num_bytes := float(match[1]) * _UNITS[match[2].upper()]):
        raise ValueError(f"max_shard_size={size!r}: expected a positive number of bytes, or a text like '5GB'")
    return int(num_bytes)


def _sharded(tensors: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next would exceed `max_bytes`; a larger tensor is alone in its file."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += tensor.nbytes
    return shards
