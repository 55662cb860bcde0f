"""`Conversion`: any GPT-J checkpoint → sharded safetensors in a chosen dtype, in little memory, whole or not at all.

All is written in `DESTINATION.unfinished`, which becomes `DESTINATION` in one rename at the end. A journal there says
which shards are done, with their hashes, so that a conversion that was cut off goes on at the next shard. Shards are
streamed: memory holds one piece of a tensor, plus the pages of at most one mapped tensor (`model/weights.py`).
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from torch import Tensor

from gptj_serve.errors import CheckpointError, ConversionError
from gptj_serve.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, TensorInfo, weight_files
from gptj_serve.model.checksums import MANIFEST_FILE, manifest
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.weights import DTYPES, pickle_header, pieces, raw_bytes

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
JOURNAL_FILE = "conversion.json"
DEFAULT_SHARD_BYTES = 1_000_000_000
COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""Taken over as they are, where they exist."""

_READ_BYTES = 1 << 22
_TORCH_NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor to be written."""

    source: TensorInfo
    dtype: str  # safetensors' name

    @property
    def num_bytes(self) -> int:
        return prod(self.source.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class _Shard:
    file_name: str
    targets: tuple[_Target, ...]

    @property
    def header(self) -> bytes:
        """A safetensors header: its length, then JSON, padded so that the data is aligned to 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for target in self.targets:
            offsets = [start, start + target.num_bytes]
            entries[target.source.stored_name] = {
                "dtype": target.dtype,
                "shape": target.source.shape,
                "data_offsets": offsets,
            }
            start = offsets[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(target.num_bytes for target in self.targets)


class _Journal(msgspec.Struct):
    """What is converted, by which a later run knows its own, and what is done.

    `finished` has each shard file's SHA-256, `checksums` that of each tensor in them.
    """

    source: list[tuple[str, int, int]]  # (file name, size, modification time in ns)
    dtype: str | None
    max_shard_bytes: int
    finished: dict[str, str] = {}
    checksums: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checked source, and what is to be written; `prepare` it, then `run` it."""

    source: Checkpoint
    destination: Path
    dtype: str | None
    max_shard_bytes: int
    shards: tuple[_Shard, ...]

    @classmethod
    def prepare(
        cls, source: Path, destination: Path, dtype: str | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> Self:
        """Check everything that can be known before a byte is written. `dtype` None keeps each tensor's own.

        Raises `ConfigError` or `CheckpointError` for the source, `ConversionError` for the rest.
        """
        if source.resolve() == destination.resolve():
            raise ConversionError(f"{destination}: is the source itself; choose another directory")
        if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
            raise ConversionError(f"{destination}: exists already; choose another directory or delete it")
        checkpoint = open_any(source)
        shards = _shards(_targets(checkpoint, dtype), max_shard_bytes)
        return cls(checkpoint, destination, dtype, max_shard_bytes, shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def unfinished(self) -> Path:
        return self.destination.with_name(f"{self.destination.name}.unfinished")

    def run(self, progress: Callable[[int], object] = lambda num_bytes: None) -> None:
        """Write, or go on writing. `progress` is told of bytes done, those of an earlier run too.

        Raises `ConversionError`; what is finished by then is kept for the next run, unless none can succeed.
        """
        try:
            self.unfinished.mkdir(parents=True, exist_ok=True)
            with _locked(self.unfinished):
                self._run(progress)
        except _RangeError:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            raise
        except OSError as error:
            raise ConversionError(
                f"{error.filename or self.unfinished}: could not be written: {error.strerror or error}. The conversion "
                f"needs {self.num_bytes:,} bytes; finished shards are kept, and the same command goes on from there"
            ) from error

    def _run(self, progress: Callable[[int], object]) -> None:
        journal = self._open_journal()
        todo = []
        for shard in self.shards:
            file = self.unfinished / shard.file_name
            has_checksums = journal.checksums.keys() >= {target.source.stored_name for target in shard.targets}
            if has_checksums and _is_intact(file, shard.num_bytes, journal.finished.get(shard.file_name)):
                progress(shard.num_bytes)
            else:
                journal.finished.pop(shard.file_name, None)
                todo.append(shard)
        self._check_room(todo)
        for shard in todo:
            file = self.unfinished / shard.file_name
            journal.finished[shard.file_name] = _write_shard(shard, file, journal.checksums, progress)
            self._save(JOURNAL_FILE, msgspec.json.encode(journal))
        self._save(MANIFEST_FILE, manifest(journal.checksums))
        self._finish()

    def _open_journal(self) -> _Journal:
        """This conversion's journal, begun or taken up. Refuses to touch a directory that isn't this conversion's."""
        infos = self.source.tensors.values()
        files = sorted({info.file for info in infos} | {self.source.directory / "config.json"})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        journal = _Journal(stats, self.dtype, self.max_shard_bytes)
        file = self.unfinished / JOURNAL_FILE
        if all(path == _partial(file) for path in self.unfinished.iterdir()):
            self._save(JOURNAL_FILE, msgspec.json.encode(journal))
            return journal
        try:
            found = msgspec.json.decode(file.read_bytes(), type=_Journal)
        except (FileNotFoundError, msgspec.DecodeError):
            raise ConversionError(f"{self.unfinished}: is in the way and no unfinished conversion; delete it") from None
        journal.finished, journal.checksums = found.finished, found.checksums
        if found != journal:
            raise ConversionError(
                f"{self.unfinished}: holds an unfinished conversion of another source or with other options; "
                "repeat the command that began it, or delete it"
            )
        return journal

    def _check_room(self, todo: list[_Shard]) -> None:
        for shard in todo:
            (self.unfinished / shard.file_name).unlink(missing_ok=True)
            _partial(self.unfinished / shard.file_name).unlink(missing_ok=True)
        needed, free = sum(shard.num_bytes for shard in todo), shutil.disk_usage(self.unfinished).free
        if needed > free:
            raise ConversionError(
                f"{self.unfinished}: the disk is too full: {needed:,} bytes are still to be written, {free:,} are free"
            )

    def _finish(self) -> None:
        """Add the small files, read all back, and let the destination appear."""
        weight_map = {t.source.stored_name: shard.file_name for shard in self.shards for t in shard.targets}
        total_size = sum(target.num_bytes for shard in self.shards for target in shard.targets)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        for name in COPIED_FILES:
            if (file := self.source.directory / name).is_file():
                self._save(name, file.read_bytes())
        if len(self.shards) > 1:
            self._save(INDEX_FILE, json.dumps(index, indent=2).encode())
        self._save("config.json", json.dumps(self._config(), indent=2).encode())
        written = {i.stored_name: (i.shape, i.dtype) for i in Checkpoint.open(self.unfinished).tensors.values()}
        if written != {t.source.stored_name: (t.source.shape, t.dtype) for shard in self.shards for t in shard.targets}:
            raise ConversionError(f"{self.unfinished}: reads back with other tensors than were written")
        os.rename(self.unfinished, self.destination)
        (self.destination / JOURNAL_FILE).unlink()
        _sync(self.destination)
        _sync(self.destination.parent)

    def _config(self) -> dict[str, Any]:
        """The source's config.json, with the dtype that the embedding now has."""
        config: dict[str, Any] = json.loads((self.source.directory / "config.json").read_text(encoding="utf-8"))
        targets = (target for shard in self.shards for target in shard.targets)
        wte = self.source.tensors["wte.weight"].stored_name
        config["dtype"] = next(_TORCH_NAMES[t.dtype] for t in targets if t.source.stored_name == wte)
        if "torch_dtype" in config:  # its name before transformers 5
            config["torch_dtype"] = config["dtype"]
        return config

    def _save(self, name: str, content: bytes) -> None:
        """A small file, there whole or not at all."""
        file = self.unfinished / name
        with open(_partial(file), "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(_partial(file), file)


def open_any(directory: Path) -> Checkpoint:
    """As `Checkpoint.open`, but where there are no safetensors it reads PyTorch's pickles, without running them."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    config = GPTJConfig.from_file(directory / "config.json")
    if weight_files(directory, SINGLE_FILE, INDEX_FILE):
        return Checkpoint.open(directory)
    files = weight_files(directory, PICKLE_FILE, PICKLE_INDEX_FILE)
    if not files:
        names = [SINGLE_FILE, INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE]
        raise CheckpointError(f"{directory}: has no weights; looked for {', '.join(names)}")
    return Checkpoint.checked(directory, config, (info for file in files for info in pickle_header(file)))


def _targets(checkpoint: Checkpoint, dtype: str | None) -> list[_Target]:
    names = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}
    if dtype is not None and dtype not in names:
        raise ConversionError(f"dtype={dtype!r}: must be one of {', '.join(names)}")
    return [
        _Target(info, info.dtype if dtype is None else names[dtype])
        for name, info in checkpoint.tensors.items()
        if not (name == "lm_head.weight" and checkpoint.config.tie_word_embeddings)  # the embedding stands for it
    ]


def _shards(targets: list[_Target], max_bytes: int) -> tuple[_Shard, ...]:
    """Filled in the source's order; a tensor larger than `max_bytes` gets a shard of its own."""
    groups: list[list[_Target]] = [[]]
    size = 0
    for target in targets:
        if groups[-1] and size + target.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.num_bytes
    if len(groups) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    widest_first = [sorted(group, key=lambda target: -DTYPES[target.dtype].itemsize) for group in groups]  # aligned
    return tuple(_Shard(name, tuple(group)) for name, group in zip(names, widest_first, strict=True))


def _write_shard(shard: _Shard, file: Path, checksums: dict[str, str], progress: Callable[[int], object]) -> str:
    """Write it under a temporary name, read it back from the disk, and rename it; returns its SHA-256.

    Those of its tensors are added to `checksums`.
    """
    digest = hashlib.sha256()
    partial = _partial(file)
    try:
        with open(partial, "wb") as handle:
            for content in _contents(shard, checksums):
                digest.update(content)
                handle.write(content)
                progress(len(content))
            handle.flush()
            os.fsync(handle.fileno())
            if hasattr(os, "posix_fadvise"):  # so that reading it back shows what is on the disk
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not _is_intact(partial, shard.num_bytes, digest.hexdigest()):
            raise ConversionError(f"{partial}: reads back otherwise than it was written; is the disk sound?")
    except OSError as error:
        partial.unlink(missing_ok=True)  # on a full disk the room is needed
        error.filename = error.filename or str(partial)
        raise
    os.replace(partial, file)
    return digest.hexdigest()


class _RangeError(ConversionError):
    """The chosen dtype can't hold the source's values."""


def _contents(shard: _Shard, checksums: dict[str, str]) -> Iterator[memoryview]:
    yield memoryview(shard.header)
    for target in shard.targets:
        digest = hashlib.sha256()
        for _, piece in pieces(target.source):
            content = raw_bytes(_cast(piece, target))
            digest.update(content)
            yield content
        checksums[target.source.stored_name] = digest.hexdigest()


def _cast(piece: Tensor, target: _Target) -> Tensor:
    """The piece in the target's dtype. A finite value that would become infinite there is refused."""
    dtype = DTYPES[target.dtype]
    cast = piece.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(piece.dtype).max and not torch.equal(cast.isfinite(), piece.isfinite()):
        largest = piece[piece.isfinite()].abs().max().item()
        raise _RangeError(
            f"{target.source.file}: tensor {target.source.stored_name!r} holds {largest:g}, beyond the range of "
            f"{_TORCH_NAMES[target.dtype]}; choose a dtype with more range, such as bfloat16 or float32"
        )
    return cast


def _is_intact(file: Path, num_bytes: int, sha256: str | None) -> bool:
    if sha256 is None or not file.is_file() or file.stat().st_size != num_bytes:
        return False
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while content := handle.read(_READ_BYTES):
            digest.update(content)
    return digest.hexdigest() == sha256


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """No two conversions write to the same place."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConversionError(f"{directory}: another conversion is at work there") from None
    finally:
        os.close(descriptor)
