"""Digests that tell versions of a model apart."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadInfo, HeadKind, fingerprint, open_heads
from gptj_serve.model.version import (
    NUM_SAMPLES,
    SAMPLE_BYTES,
    model_version,
    require_weights,
    text_digest,
    weights_digest,
)
from gptj_serve.model.weights import verify_weights
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import ModelVersion

DEMO = Path(__file__).parents[2] / "gptj_serve" / "demo"


def version(directory: Path, dtype: str = "float32", **heads: HeadCheckpoint) -> ModelVersion:
    checkpoint = Checkpoint.open(directory)
    return model_version(text_digest(checkpoint, heads), weights_digest(checkpoint, heads), dtype)


def head(directory: Path, **info: Any) -> HeadCheckpoint:
    described = HeadInfo(kind=HeadKind.QA, name="reader", backbone=fingerprint(Checkpoint.open(DEMO)), **info)
    width = Checkpoint.open(DEMO).config.n_embd
    made = HeadCheckpoint(directory, described, np.ones((2, width), np.float32), np.zeros(2, np.float32))
    made.save()
    return made


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "copy"))


def test_a_copy_is_the_same_version(copy: Path) -> None:
    assert version(copy) == version(DEMO)


@pytest.mark.parametrize("has_checksums", [True, False])
def test_other_weights_are_other_numbers(copy: Path, has_checksums: bool) -> None:
    if not has_checksums:
        (copy / "checksums.json").unlink()
    before = version(copy)
    digest = weights_digest(Checkpoint.open(copy), {})
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.3.mlp.fc_in.weight"))
    tensors[name] = np.ascontiguousarray(-tensors[name])
    save_file(tensors, copy / "model.safetensors")
    if has_checksums:
        manifest = json.loads((copy / "checksums.json").read_text())
        manifest["sha256"][name] = "0" * 64
        (copy / "checksums.json").write_text(json.dumps(manifest))
    after = version(copy)
    assert after.text == before.text
    assert after.numbers != before.numbers
    with pytest.raises(CheckpointError, match="not those that this pipeline started with"):
        require_weights(Checkpoint.open(copy), {}, digest)
    require_weights(Checkpoint.open(copy), {}, weights_digest(Checkpoint.open(copy), {}))


@pytest.mark.parametrize("place", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_without_checksums_a_change_is_seen_wherever_it_lies(copy: Path, place: float) -> None:
    """As long as it is not smaller than the gap between two samples."""
    (copy / "checksums.json").unlink()
    checkpoint = Checkpoint.open(copy)
    digest = weights_digest(checkpoint, {})
    tensors = load_file(copy / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].nbytes)
    flat = tensors[name].reshape(-1)
    assert flat.nbytes > 16 * (NUM_SAMPLES - 1) * SAMPLE_BYTES, "too small for gaps"
    num_changed = len(flat) // (NUM_SAMPLES - 1)
    start = int((len(flat) - num_changed) * place)
    flat[start : start + num_changed] += 1
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="not those that this pipeline started with"):
        require_weights(Checkpoint.open(copy), {}, digest)


def test_another_dtype_is_other_numbers() -> None:
    assert version(DEMO, "bfloat16").numbers != version(DEMO).numbers
    assert version(DEMO, "bfloat16").text == version(DEMO).text


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_another_meaning_of_tokens_is_another_text(copy: Path, file: str) -> None:
    (copy / file).write_text((copy / file).read_text() + "\n")
    assert version(copy).text != version(DEMO).text
    assert version(copy).numbers == version(DEMO).numbers


def test_a_tokenizer_in_the_files_of_the_slow_one_has_a_version_too(copy: Path) -> None:
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    texts = {version(copy).text}
    (copy / "added_tokens.json").write_text(json.dumps({"<|extra|>": Tokenizer.from_directory(copy).num_token_ids}))
    texts.add(version(copy).text)
    (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[:-1]]))
    texts.add(version(copy).text)
    assert len(texts) == 3


def test_named_heads_are_part_of_the_text(tmp_path: Path) -> None:
    reader = head(tmp_path / "a")
    assert version(DEMO, reader=reader).text != version(DEMO).text
    assert version(DEMO, reader=reader) == version(DEMO, reader=head(tmp_path / "b", figures={"f1": 0.5}))
    assert version(DEMO, reader=reader) != version(DEMO, other=reader)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_fitted_anew_is_other_numbers(tmp_path: Path, part: str) -> None:
    """And a stage does not load it instead of the one that its pipeline started with."""
    checkpoint = Checkpoint.open(DEMO)
    before = head(tmp_path / "reader")
    digest = weights_digest(checkpoint, {"reader": before})
    replaced = HeadCheckpoint.open(tmp_path / "reader", checkpoint)
    getattr(replaced, part)[-1] += 0.5
    replaced.save(replace=True)
    after = open_heads({"reader": tmp_path / "reader"}, checkpoint)
    assert version(DEMO, **after).text == version(DEMO, reader=before).text
    assert version(DEMO, **after).numbers != version(DEMO, reader=before).numbers
    require_weights(checkpoint, {"reader": before}, digest)
    with pytest.raises(CheckpointError, match="not those that this pipeline started with"):
        require_weights(checkpoint, after, digest)


def test_weights_are_verified_as_a_whole(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    verify_weights(checkpoint.tensors.values())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor '.*' is damaged"):
        verify_weights(checkpoint.tensors.values())
