"""Heads on disk: a round trip, and the refusal of all that doesn't belong to this backbone or isn't whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import INFO_FILE, WEIGHTS_FILE, HeadCheckpoint, HeadInfo, HeadKind, fingerprint, open_heads

WIDTH = 32


@pytest.fixture
def checkpoint(tiny_gptj) -> Checkpoint:
    return Checkpoint.open(tiny_gptj())


def make_head(checkpoint: Checkpoint, directory: Path, kind: HeadKind = HeadKind.CLASSIFIER) -> HeadCheckpoint:
    is_classifier = kind is HeadKind.CLASSIFIER
    info = HeadInfo(
        kind=kind,
        name="tone",
        labels=["angry", "calm", "sad"] if is_classifier else [],
        problem_type="single_label_classification" if is_classifier else None,
        backbone=fingerprint(checkpoint),
    )
    weight = np.random.default_rng(0).normal(size=(3 if is_classifier else 2, WIDTH)).astype(np.float32)
    return HeadCheckpoint(directory, info, weight, None if is_classifier else np.array([1, 2], np.float32))


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    make_head(checkpoint, tmp_path / "tone").save()
    return tmp_path / "tone"


@pytest.mark.parametrize("kind", HeadKind)
def test_what_is_saved_is_opened(checkpoint: Checkpoint, tmp_path: Path, kind: HeadKind):
    head = make_head(checkpoint, tmp_path / "a" / "tone", kind)
    head.save()
    opened = HeadCheckpoint.open(head.directory, checkpoint)
    assert opened.info == head.info
    np.testing.assert_array_equal(opened.weight, head.weight)
    np.testing.assert_equal(opened.bias, head.bias)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tone"]


def test_a_directory_is_replaced_only_when_asked(checkpoint: Checkpoint, saved: Path):
    head = make_head(checkpoint, saved)
    head.weight[:] = 7
    with pytest.raises(CheckpointError, match="tone: exists already"):
        head.save()
    assert HeadCheckpoint.open(saved, checkpoint).weight[0, 0] != 7
    head.save(replace=True)
    assert HeadCheckpoint.open(saved, checkpoint).weight[0, 0] == 7


def test_a_failed_write_leaves_what_was_there(checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = HeadCheckpoint.open(saved, checkpoint).weight
    monkeypatch.setattr("gptj_serve.model.heads.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make_head(checkpoint, saved).save(replace=True)
    np.testing.assert_array_equal(HeadCheckpoint.open(saved, checkpoint).weight, before)
    assert [path.name for path in saved.parent.iterdir()] == ["tone"]


def test_the_fingerprint_is_the_backbone_s(checkpoint: Checkpoint, tiny_gptj, tmp_path: Path):
    def copy_with(change: str, dtype: torch.dtype = torch.float32) -> str:
        directory = tmp_path / f"{change}-{dtype}"
        shutil.copytree(checkpoint.directory, directory)
        tensors = load_file(directory / "model.safetensors")
        for name in tensors:
            if name.endswith(change):
                tensors[name] += 1
        save_torch({name: tensor.to(dtype) for name, tensor in tensors.items()}, directory / "model.safetensors")
        return fingerprint(Checkpoint.open(directory))

    assert copy_with("nothing") == copy_with("score.weight") == copy_with("lm_head.bias") == fingerprint(checkpoint)
    others = [copy_with("h.5.mlp.fc_out.weight"), copy_with("ln_f.bias"), copy_with("h.0.attn.q_proj.weight")]
    others.append(copy_with("bf16", torch.bfloat16))
    others.append(fingerprint(Checkpoint.open(tiny_gptj(layer_norm_epsilon=0.01))))
    assert len({*others, fingerprint(checkpoint)}) == 6
    assert fingerprint(Checkpoint.open(tiny_gptj(id2label={0: "a", 1: "b", 2: "c"}))) == fingerprint(checkpoint)


def test_a_head_of_another_backbone_is_refused_by_name(saved: Path, tiny_gptj):
    with pytest.raises(CheckpointError, match=r"heads\.mood: .*tone: the head 'tone' was fitted on another backbone"):
        open_heads({"mood": saved}, Checkpoint.open(tiny_gptj(n_head=2)))


INFO_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "regressor"}, "kind: "),
    ({"labels": []}, "a classifier needs labels"),
    ({"labels": ["a", "a", "b"]}, "labels must differ"),
    ({"labels": ["a", "b"]}, r"shape \[3, 32\], expected \[2, 32\]"),
    ({"kind": "qa"}, r"has the tensors \['score.weight'\], expected \['qa_outputs.bias', 'qa_outputs.weight'\]"),
    ({"format": 2}, "format: "),
    ({"extra": 1}, "extra: "),
]


@pytest.mark.parametrize(("change", "message"), INFO_ERRORS)
def test_a_wrong_head_json_is_refused(checkpoint: Checkpoint, saved: Path, change: dict[str, Any], message: str):
    info = json.loads((saved / INFO_FILE).read_text())
    (saved / INFO_FILE).write_text(json.dumps(info | change))
    with pytest.raises(CheckpointError, match=message):
        HeadCheckpoint.open(saved, checkpoint)


def test_missing_and_damaged_files_are_named(checkpoint: Checkpoint, saved: Path):
    def refuse(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            HeadCheckpoint.open(saved, checkpoint)

    weights = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(weights[:-4])
    refuse(f"{WEIGHTS_FILE}: damaged")
    for tensor in (np.ones((3, 31), np.float32), np.ones((3, 32), np.float64), np.full((3, 32), np.nan, np.float32)):
        save_file({"score.weight": tensor}, saved / WEIGHTS_FILE)
        refuse("score.weight")
    (saved / WEIGHTS_FILE).unlink()
    refuse(f"{WEIGHTS_FILE}: no such file")
    (saved / INFO_FILE).write_bytes(b"\xff{")
    refuse(f"{INFO_FILE}: ")
    (saved / INFO_FILE).unlink()
    refuse(f"{INFO_FILE}: no such file")
    shutil.rmtree(saved)
    refuse(f"{INFO_FILE}: no such file")
