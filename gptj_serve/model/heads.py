"""`HeadCheckpoint`: a task head that lies beside its backbone, in a directory of its own.

The directory holds `head.safetensors` (`score.weight`, or `qa_outputs.weight` and `qa_outputs.bias`) and
`head.json`. A head is worth nothing on another backbone, so head.json keeps a fingerprint of the one that it was
fitted on. Opening one needs no torch, so whoever starts a service can refuse a bad head before any stage exists.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import Checkpoint, TensorInfo

INFO_FILE = "head.json"
WEIGHTS_FILE = "head.safetensors"
FINGERPRINT_BYTES_PER_TENSOR = 1 << 14


class HeadKind(StrEnum):
    CLASSIFIER = "classifier"
    QA = "qa"


class HeadInfo(BaseModel):
    """What head.json says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: HeadKind
    name: Annotated[str, Field(min_length=1)]
    labels: list[Annotated[str, Field(min_length=1)]] = []
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = None
    pooling: Literal["last", "mean"] = "last"  # which hidden state a classifier looks at
    backbone: str  # `fingerprint` of the checkpoint that it was fitted on
    figures: dict[str, Any] = {}  # what fitting it reported: for people

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.kind is HeadKind.CLASSIFIER and (not self.labels or self.problem_type is None):
            raise ValueError("a classifier needs labels and a problem_type")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must differ from each other: {self.labels}")
        return self


@dataclass(frozen=True, slots=True)
class HeadCheckpoint:
    """A head's directory, checked; `weight` [num_labels or 2, n_embd] and, for QA, `bias` [2] are float32."""

    directory: Path
    info: HeadInfo
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None

    @classmethod
    def open(cls, directory: Path, checkpoint: Checkpoint) -> Self:
        """Read and check a head for this backbone. Raises `CheckpointError`, naming the file."""
        info = _read_info(directory / INFO_FILE)
        actual = fingerprint(checkpoint)
        if info.backbone != actual:
            raise CheckpointError(
                f"{directory}: the head {info.name!r} was fitted on another backbone (fingerprint {info.backbone}) "
                f"than {checkpoint.directory} ({actual})"
            )
        tensors = _read_tensors(directory / WEIGHTS_FILE, _shapes(info, checkpoint.config.n_embd))
        if info.kind is HeadKind.CLASSIFIER:
            return cls(directory, info, tensors["score.weight"], None)
        return cls(directory, info, tensors["qa_outputs.weight"], tensors["qa_outputs.bias"])

    @property
    def digest(self) -> str:
        """Of its weights, as a SHA-256 in hex."""
        digest = hashlib.sha256(self.weight.tobytes())
        if self.bias is not None:
            digest.update(self.bias.tobytes())
        return digest.hexdigest()

    def save(self, *, replace: bool = False) -> None:
        """Write the directory as a whole or not at all. Raises `CheckpointError` if it exists and isn't to go."""
        if self.directory.exists() and not replace:
            raise CheckpointError(f"{self.directory}: exists already")
        prefix = "score" if self.info.kind is HeadKind.CLASSIFIER else "qa_outputs"
        tensors = {f"{prefix}.weight": self.weight}
        if self.bias is not None:
            tensors[f"{prefix}.bias"] = self.bias
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.directory.parent, prefix=f".{self.directory.name}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            save_file(tensors, new / WEIGHTS_FILE)
            (new / INFO_FILE).write_text(self.info.model_dump_json(indent=2) + "\n", encoding="utf-8")
            if self.directory.exists():
                shutil.move(self.directory, Path(scratch) / "old")
            new.rename(self.directory)


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits of a hash over what shapes the backbone and the beginnings of tensors of its first and last layer.

    It reads a few kilobytes. Weights stored in another dtype give another fingerprint.
    """
    config = checkpoint.config
    shape = {
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "rotated_dim": config.rotated_dim,
        "inner_dim": config.inner_dim,
        "activation_function": config.activation_function,
        "layer_norm_epsilon": config.layer_norm_epsilon,
    }
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    layer_parts = ("ln_1.weight", "attn.q_proj.weight", "attn.v_proj.weight", "mlp.fc_out.weight", "mlp.fc_out.bias")
    layers = sorted({0, config.n_layer - 1})
    for name in [*(f"h.{layer}.{part}" for layer in layers for part in layer_parts), "ln_f.weight", "ln_f.bias"]:
        digest.update(_beginning_of_tensor(checkpoint.tensors[name]))
    return digest.hexdigest()[:16]


def open_heads(heads: dict[str, Path], checkpoint: Checkpoint) -> dict[str, HeadCheckpoint]:
    """Open the heads of a service, by the names that it gives them. Raises `CheckpointError`, naming the head."""
    opened = {}
    for name, directory in heads.items():
        try:
            opened[name] = HeadCheckpoint.open(directory, checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"heads.{name}: {error}") from None
    return opened


def stored_span(info: TensorInfo) -> tuple[int, int]:
    """Where a tensor's bytes lie in its file, [start, end): NumPy knows no bfloat16."""
    with info.file.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(header_size))[info.stored_name]["data_offsets"]
    return 8 + header_size + start, 8 + header_size + end


def _beginning_of_tensor(info: TensorInfo) -> bytes:
    start, end = stored_span(info)
    with info.file.open("rb") as file:
        file.seek(start)
        return file.read(min(end - start, FINGERPRINT_BYTES_PER_TENSOR))


def _read_info(file: Path) -> HeadInfo:
    try:
        return HeadInfo.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a head's directory has {INFO_FILE} and {WEIGHTS_FILE}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{file}: {'.'.join(map(str, first['loc'])) or 'head'}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not readable: {error}") from error


def _read_tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    try:
        tensors: dict[str, NDArray[Any]] = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file of float32: {error!r}") from error
    if tensors.keys() != shapes.keys():
        raise CheckpointError(f"{file}: has the tensors {sorted(tensors)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(f"{file}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {name!r} must hold finite float32 numbers, not {tensor.dtype}")
    return tensors


def _shapes(info: HeadInfo, width: int) -> dict[str, tuple[int, ...]]:
    if info.kind is HeadKind.CLASSIFIER:
        return {"score.weight": (len(info.labels), width)}
    return {"qa_outputs.weight": (2, width), "qa_outputs.bias": (2,)}
