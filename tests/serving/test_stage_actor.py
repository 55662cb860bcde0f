"""What a stage refuses to load; no cluster."""

from pathlib import Path

import numpy as np
import pytest

from gptj_serve.config import PipelineConfig
from gptj_serve.errors import CheckpointError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadInfo, HeadKind, fingerprint
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
