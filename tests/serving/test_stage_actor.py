"""What a stage refuses to load, and the cores that it takes; no cluster."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from gptj_serve.config import PipelineConfig, StageConfig
from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadInfo, HeadKind, fingerprint
from gptj_serve.pipeline.core_claims import pin_process
from gptj_serve.serving.pipeline_deployment import stage_settings
from gptj_serve.serving.stage_actor import GPTJStage


def test_a_stage_that_loads_again_refuses_another_head(tmp_path: Path, demo: Path) -> None:
    checkpoint = Checkpoint.open(demo)
    info = HeadInfo(kind=HeadKind.QA, name="reader", backbone=fingerprint(checkpoint))
    weight = np.ones((2, checkpoint.config.n_embd), np.float32)
    head = HeadCheckpoint(tmp_path / "reader", info, weight, np.zeros(2, np.float32))
    head.save()
    settings = stage_settings(PipelineConfig(num_stages=2), checkpoint, 10, {"reader": head})
    assert settings[1].heads == {"reader": str(tmp_path / "reader")}
    HeadCheckpoint(head.directory, info, 2 * weight, head.bias).save(replace=True)
    with pytest.raises(CheckpointError, match="reader: the weights are not those that this pipeline started with"):
        GPTJStage(settings[1]).load("float32")


def test_a_stage_is_pinned_to_cores_that_no_other_stage_takes(demo: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """Its load ends early, by a digest that is another's: it has its cores by then."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.sched_getaffinity(0)
    config = PipelineConfig(stage=StageConfig(num_threads=len(before), pin_cores=True))
    (settings,) = stage_settings(config, Checkpoint.open(demo), 10, {})
    first, second = (GPTJStage(settings._replace(weights_digest="other", num_threads=n)) for n in (1, len(before)))
    try:
        for stage in (first, second):
            with pytest.raises(CheckpointError):
                stage.load("float32")
            assert os.sched_getaffinity(0) == {min(before)}
    finally:
        pin_process(before)
    printed = capfd.readouterr().err
    assert f"layers 0 to 5: on cores {min(before)}\n" in printed
    assert f"layers 0 to 5: on any core: pin_cores needs {len(before)}" in printed
