"""`model_version`: digests that tell versions of a model apart, the same wherever its files are read.

They are made of contents, not of paths or times, so the replicas of one version agree whichever node they run on. A few
kilobytes of each tensor are read where a checkpoint has no checksums.
"""

import hashlib
import json

from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadInfo, beginning_of_tensor
from gptj_serve.types import ModelVersion

_TEXT_FILES = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
"""Those that are there: a tokenizer is read from one file, or from the others."""


def model_version(
    checkpoint: Checkpoint, heads: dict[str, HeadInfo], dtype: str, *, deterministic: bool = False
) -> ModelVersion:
    """Of a model with these named heads, in this dtype, with or without bit-equal arithmetic.

    How it is split or placed does not count.
    """
    text = hashlib.sha256()
    for name in _TEXT_FILES:
        file = checkpoint.directory / name
        if file.exists():
            text.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    text.update(json.dumps(checkpoint.heads).encode())
    for head, info in sorted(heads.items()):
        text.update(json.dumps([head, info.model_dump(mode="json", exclude={"figures"})], sort_keys=True).encode())
    numbers = hashlib.sha256(f"{weights_digest(checkpoint)} {dtype} {deterministic}".encode())
    return ModelVersion(text.hexdigest()[:16], numbers.hexdigest()[:16])


def weights_digest(checkpoint: Checkpoint) -> str:
    """Of the tensors' checksums; without them, of their shapes and beginnings."""
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        content = beginning_of_tensor(checkpoint, name).hex() if info.sha256 is None else info.sha256
        digest.update(json.dumps([name, info.shape, info.dtype, content]).encode())
    return digest.hexdigest()[:16]


def require_weights(checkpoint: Checkpoint, digest: str) -> None:
    """Raises `CheckpointError` if these are no longer the weights with the digest."""
    if weights_digest(checkpoint) != digest:
        raise CheckpointError(
            f"{checkpoint.directory}: the weights are not those that this pipeline started with; put them back, or "
            "deploy the new ones from a directory of their own"
        )
