"""From a checkpoint's tensors to a model's parameters: each allocated once, where it shall lie, and filled there."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from gptj_serve.errors import CheckpointError
from gptj_serve.model.block import RotaryTable
from gptj_serve.model.checkpoint import PREFIX, Checkpoint, TensorInfo
from gptj_serve.model.loading_progress import terminal_bar

if TYPE_CHECKING:
    from gptj_serve.modeling.pretrained import GPTJPreTrainedModel

logger = logging.getLogger(__name__)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    """Raises ValueError for what is no dtype of floats."""
    if dtype == "auto":
        name = checkpoint.config.dtype
        return _DTYPES[checkpoint.stored_dtype] if name is None else _dtype_named(name)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else _dtype_named(dtype)


def _dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if found not in _DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: expected 'auto', float32, float16, bfloat16 or float64")
    assert isinstance(found, torch.dtype)
    return found


def resolve_device(device_map: str | int | torch.device | dict[str, Any] | None) -> torch.device:
    """One device. Raises ValueError for a map over several: the service's pipelines split a model, this does not."""
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise ValueError(f"device_map={device_map!r}: a model of this package lies on one device")
        (device_map,) = set(device_map.values())
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        raise ValueError(f"device_map={device_map!r}: expected 'auto' or one device")
    try:
        return torch.device("cpu" if device_map is None else device_map)  # type: ignore[arg-type]  # not a dict
    except RuntimeError as error:
        raise ValueError(f"device_map={device_map!r}: {error}") from None


@torch.no_grad()
def fill_parameters(
    model: "GPTJPreTrainedModel", checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, resize: bool
) -> None:
    """Give a model on the meta device its parameters: the checkpoint's, and a fresh head where it has none.

    Raises `CheckpointError` for a tensor of another shape than the model's (a head's is made anew if `resize`).
    """
    names = dict(model.named_parameters(remove_duplicate=True))
    found: dict[Path, list[tuple[str, TensorInfo]]] = defaultdict(list)
    fresh: list[str] = []
    for name, placeholder in names.items():
        info = checkpoint.tensors.get(name.removeprefix(PREFIX))
        in_head = model.head is not None and name.startswith(f"{model.head}.")
        if info is not None and info.shape == tuple(placeholder.shape):
            found[info.file].append((name, info))
        elif in_head and (info is None or resize):
            fresh.append(name)
        else:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {name!r} has shape {None if info is None else list(info.shape)}, "
                f"the model needs {list(placeholder.shape)}"
                + (" (ignore_mismatched_sizes=True makes a new head)" if in_head else "")
            )
    num_bytes = sum(info.num_bytes for entries in found.values() for _, info in entries)
    num_loaded = 0
    with terminal_bar(f"Loading {checkpoint.directory.name}") as progress:
        for file, entries in found.items():
            for name, info in entries:
                with safe_open(file, framework="pt") as handle:  # closed at once, so that its pages are free again
                    parameter = torch.empty(info.shape, dtype=dtype, device=device)
                    parameter.copy_(handle.get_tensor(info.stored_name))
                _replace(model, name, parameter)
                num_loaded += info.num_bytes
                progress(num_loaded, num_bytes)
    for name in fresh:
        _replace(model, name, torch.empty(names[name].shape, dtype=dtype, device=device))
    if fresh:
        assert model.head is not None
        model.init_weights(model.get_submodule(model.head))
        logger.warning(
            "%s: newly initialized, since %s does not hold them: %s; train the model before you use it",
            type(model).__name__,
            checkpoint.directory,
            ", ".join(fresh),
        )
    model.tie_weights()
    model.base_model.rotary = RotaryTable(model.config, device)


def _replace(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value))
