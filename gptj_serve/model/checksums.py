"""`checksums.json`: the SHA-256 of each tensor's bytes, beside the weights.

`convert` writes it, and whoever loads a tensor compares: a stage reads its own tensors only, so a file's hash would
not do. A checkpoint without it is taken as it is.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from gptj_serve.errors import CheckpointError

MANIFEST_FILE = "checksums.json"


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    sha256: dict[str, str]  # by the name under which the tensor is stored


def read_checksums(directory: Path) -> Mapping[str, str] | None:
    """By stored name; None if there is no manifest. Raises `CheckpointError` for one that can't be read."""
    file = directory / MANIFEST_FILE
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest).sha256
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error


def manifest(checksums: Mapping[str, str]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(Manifest(dict(checksums))), indent=2)
