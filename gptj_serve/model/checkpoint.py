"""`Checkpoint`: a Hugging Face GPT-J directory, checked as a whole from its headers, read tensor by tensor.

Opening one reads no weights and needs no torch, so whoever starts a service can refuse a bad directory before any
stage exists. Tensor names are canonical: those of transformers without the `transformer.` prefix.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open

from gptj_serve.errors import CheckpointError
from gptj_serve.model.checksums import MANIFEST_FILE, read_checksums
from gptj_serve.model.config import GPTJConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "transformer."
HEADS: dict[str, tuple[str, ...]] = {
    "lm_head": ("lm_head.weight", "lm_head.bias"),
    "score": ("score.weight",),
    "qa_outputs": ("qa_outputs.weight", "qa_outputs.bias"),
}
"""The heads a checkpoint may bring, each whole or not at all."""

_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old checkpoints saved
_FLOAT_DTYPES = {"F32", "BF16", "F16", "F64"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, F16, F64
    sha256: str | None = None  # of its bytes, if the directory has a manifest

    @property
    def num_bytes(self) -> int:
        num_elements = 1
        for size in self.shape:
            num_elements *= size
        return num_elements * {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}[self.dtype]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a directory holds: its config, and for each canonical tensor name where it lies."""

    directory: Path
    config: GPTJConfig
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Check config.json and every header. Raises `CheckpointError` or `ConfigError`, naming file and tensor."""
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint directory")
        config = GPTJConfig.from_file(directory / "config.json")
        files = weight_files(directory, SINGLE_FILE, INDEX_FILE)
        if not files:
            raise CheckpointError(_no_weights(directory))
        found = [info for file in files for info in _read_header(file)]
        return cls.checked(directory, config, found)._with_checksums({info.stored_name for info in found})

    @classmethod
    def checked(cls, directory: Path, config: GPTJConfig, found: Iterable[TensorInfo]) -> Self:
        """What was found, without the mask buffers of old checkpoints, if it is a whole GPT-J and nothing else."""
        tensors: dict[str, TensorInfo] = {}
        for info in found:
            name = info.stored_name.removeprefix(PREFIX)
            if _MASK_BUFFER.fullmatch(name):
                continue
            if name in tensors:
                raise CheckpointError(f"{info.file}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = info
        checkpoint = cls(directory, config, tensors)
        checkpoint._check_tensors()
        return checkpoint

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head for head, names in HEADS.items() if any(name in self.tensors for name in names))

    @property
    def stored_dtype(self) -> str:
        return self.tensors["wte.weight"].dtype

    def _with_checksums(self, names: set[str]) -> Self:
        """With those of the directory's manifest, if it has one, for all tensors found under these names."""
        checksums = read_checksums(self.directory)
        if checksums is None:
            return self
        for name in sorted(names ^ checksums.keys()):
            what = "has no checksum of" if name in names else "is about other weights: it has"
            raise CheckpointError(f"{self.directory / MANIFEST_FILE}: {what} tensor {name!r}")
        tensors = {name: replace(info, sha256=checksums[info.stored_name]) for name, info in self.tensors.items()}
        return replace(self, tensors=tensors)

    def _check_tensors(self) -> None:
        expected = backbone_shapes(self.config)
        for head in self.heads:
            expected |= head_shapes(self.config, head)
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(f"{self.directory}: tensor {name!r} is missing")
            if info.shape != shape:
                raise CheckpointError(
                    f"{info.file}: tensor {info.stored_name!r} has shape {list(info.shape)}, "
                    f"expected {list(shape)} by config.json"
                )
            if info.dtype not in _FLOAT_DTYPES:
                raise CheckpointError(f"{info.file}: tensor {info.stored_name!r} has dtype {info.dtype}, not a float")
        for name, info in self.tensors.items():
            if name not in expected and not (name == "lm_head.weight" and self.config.tie_word_embeddings):
                raise CheckpointError(
                    f"{info.file}: unexpected tensor {info.stored_name!r}; it is no part of a GPT-J with "
                    f"n_layer={self.config.n_layer}"
                )


def backbone_shapes(config: GPTJConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every tensor of the bare model."""
    width, inner = config.n_embd, config.inner_dim
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, width)}
    for layer in range(config.n_layer):
        shapes |= {
            f"h.{layer}.ln_1.weight": (width,),
            f"h.{layer}.ln_1.bias": (width,),
            f"h.{layer}.attn.q_proj.weight": (width, width),
            f"h.{layer}.attn.k_proj.weight": (width, width),
            f"h.{layer}.attn.v_proj.weight": (width, width),
            f"h.{layer}.attn.out_proj.weight": (width, width),
            f"h.{layer}.mlp.fc_in.weight": (inner, width),
            f"h.{layer}.mlp.fc_in.bias": (inner,),
            f"h.{layer}.mlp.fc_out.weight": (width, inner),
            f"h.{layer}.mlp.fc_out.bias": (width,),
        }
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def head_shapes(config: GPTJConfig, head: str) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of the tensors that `head` needs. A tied LM head brings only its bias."""
    width = config.n_embd
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "lm_head": {"lm_head.weight": (config.vocab_size, width), "lm_head.bias": (config.vocab_size,)},
        "score": {"score.weight": (config.num_labels, width)},
        "qa_outputs": {"qa_outputs.weight": (2, width), "qa_outputs.bias": (2,)},
    }
    if head == "lm_head" and config.tie_word_embeddings:
        return {"lm_head.bias": (config.vocab_size,)}
    return shapes[head]


def weight_files(directory: Path, single_file: str, index_file: str) -> list[Path]:
    """The single file, or else those that the index names, or none. Raises `CheckpointError` for a bad index."""
    index, single = directory / index_file, directory / single_file
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{index}: names the file {name!r}, which is not in {directory}")
    return [directory / name for name in names]


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        return (
            f"{directory / pickles[0]}: is a pickle, which can run code when it is read; make a checkpoint of it that "
            f"can't: gptj-serve convert {directory} NEW_DIRECTORY"
        )
    return f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}"


def _read_header(file: Path) -> list[TensorInfo]:
    try:
        with safe_open(file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return [TensorInfo(file, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file: {error}") from error
