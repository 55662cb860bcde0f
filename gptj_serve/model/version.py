"""`model_version`: digests that tell versions of a model apart, the same wherever its files are read.

They are made of contents, not of paths or times, so the replicas of one version agree whichever node they run on. Where
a checkpoint has no checksums, samples of each tensor stand for it: training changes nearly all numbers of a tensor, but
a change that lies between two samples is not seen.
"""

import hashlib
import json
from collections.abc import Mapping

from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import Checkpoint, TensorInfo
from gptj_serve.model.heads import HeadCheckpoint, stored_span
from gptj_serve.types import ModelVersion

_TEXT_FILES = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
"""Those that are there: a tokenizer is read from one file, or from the others."""


NUM_SAMPLES = 16
SAMPLE_BYTES = 4096
"""Read of each tensor where there is no checksum, evenly spread from its first byte to its last."""


def model_version(text_digest: str, weights_digest: str, arithmetic: str) -> ModelVersion:
    """`arithmetic` names all that its numbers depend on besides: dtype, kernels. How it is split or placed does not
    count."""
    return ModelVersion(text_digest, hashlib.sha256(f"{weights_digest} {arithmetic}".encode()).hexdigest()[:16])


def text_digest(checkpoint: Checkpoint, heads: Mapping[str, HeadCheckpoint]) -> str:
    """Of what turns texts into tokens and numbers into answers: tokenizer, config, and what the named heads mean."""
    text = hashlib.sha256()
    for name in _TEXT_FILES:
        file = checkpoint.directory / name
        if file.exists():
            text.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    text.update(json.dumps(checkpoint.heads).encode())
    for name, head in sorted(heads.items()):
        described = head.info.model_dump(mode="json", exclude={"figures"})
        text.update(json.dumps([name, described], sort_keys=True).encode())
    return text.hexdigest()[:16]


def weights_digest(checkpoint: Checkpoint, heads: Mapping[str, HeadCheckpoint]) -> str:
    """Of the tensors' checksums (without them, of their shapes and samples) and of the named heads' weights."""
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        content = _samples_digest(info) if info.sha256 is None else info.sha256
        digest.update(json.dumps([name, info.shape, info.dtype, content]).encode())
    for name, head in sorted(heads.items()):
        digest.update(json.dumps(["head", name, head.digest]).encode())
    return digest.hexdigest()[:16]


def require_weights(checkpoint: Checkpoint, heads: Mapping[str, HeadCheckpoint], digest: str) -> None:
    """Raises `CheckpointError` if these are no longer the weights with the digest."""
    if weights_digest(checkpoint, heads) != digest:
        directories = ", ".join(map(str, [checkpoint.directory, *(head.directory for head in heads.values())]))
        raise CheckpointError(
            f"{directories}: the weights are not those that this pipeline started with; put them back, or deploy the "
            "new ones from a directory of their own"
        )


def _samples_digest(info: TensorInfo) -> str:
    """Of all bytes, if the samples would overlap."""
    digest = hashlib.sha256()
    start, end = stored_span(info)
    with info.file.open("rb") as file:
        if end - start <= NUM_SAMPLES * SAMPLE_BYTES:
            file.seek(start)
            digest.update(file.read(end - start))
        else:
            for index in range(NUM_SAMPLES):
                file.seek(start + (end - start - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
