"""Reading tensors larger than one would like to hold: piece by piece, from mappings that are closed again.

The pages of a mapped file that were read count as the process's own memory until the file is unmapped. So a file is
opened anew for every piece (or, where opening is dear, for every tensor), and memory is bounded by the piece.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import TensorInfo

PIECE_BYTES = 64 << 20
"""The size of a piece, unless a single row is larger."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By safetensors' names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pieces(info: TensorInfo) -> Iterator[tuple[slice, Tensor]]:
    """The tensor's rows in order, contiguous, each with its place along the first dimension.

    A piece is a view of a mapping: copy from it and let go of it before the next. After the last one the checksum is
    compared, if there is one: `CheckpointError` names the tensor.
    """
    if is_pickle(info.file):
        tensor = read_pickle(info.file)[info.stored_name]
        for rows in _row_ranges(info):
            yield rows, tensor[rows].contiguous()
        return
    digest = hashlib.sha256()
    for rows in _row_ranges(info):
        with safe_open(info.file, framework="pt") as file:
            piece = file.get_slice(info.stored_name)[rows]
            if info.sha256 is not None:
                digest.update(raw_bytes(piece))
            yield rows, piece
    if info.sha256 is not None and digest.hexdigest() != info.sha256:
        raise CheckpointError(
            f"{info.file}: tensor {info.stored_name!r} is damaged: its SHA-256 is not that of checksums.json"
        )


def verify_weights(infos: Iterable[TensorInfo]) -> None:
    """Read all that has a checksum, and compare. Raises `CheckpointError`, naming file and tensor."""
    for info in infos:
        if info.sha256 is not None:
            for _ in pieces(info):
                pass


def raw_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, as they lie in memory."""
    return tensor.flatten().view(torch.uint8).numpy().data


def is_pickle(file: Path) -> bool:
    return file.suffix == ".bin"


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, mapped, not read. No code in it is run.

    Raises `CheckpointError` if it is damaged or holds anything but plain tensors under names.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refers to {found[1]}, which is no tensor" if found else "is no dictionary of tensors"
        raise CheckpointError(f"{file}: {what}; it was not executed") from error
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    except Exception as error:  # torch raises nearly anything for damaged files
        if "_use_new_zipfile_serialization" in str(error):
            raise CheckpointError(
                f"{file}: not a zip file as torch.save writes it: truncated, damaged, or of PyTorch before 1.6 "
                "(then load it there and save it anew)"
            ) from error
        raise CheckpointError(f"{file}: damaged or not a PyTorch file: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: holds a {type(value).__name__} under {name!r}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(f"{file}: tensor {name!r} is sparse, quantized or without data")
    return {name: value.detach() for name, value in content.items()}


def pickle_header(file: Path) -> list[TensorInfo]:
    """What a safetensors header would say."""
    return [
        TensorInfo(file, name, tuple(tensor.shape), _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")))
        for name, tensor in read_pickle(file).items()
    ]


def _row_ranges(info: TensorInfo) -> Iterator[slice]:
    num_rows = info.shape[0]
    step = max(1, PIECE_BYTES * num_rows // max(1, info.num_bytes))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
