from pathlib import Path

import pytest
from fakes import small_backend_json, small_tokenizer
from threads import torch_threads

from gptj_serve.config import KVCacheConfig, PipelineConfig, ServiceConfig, StageConfig
from gptj_serve.errors import ConfigError
from gptj_serve.pipeline.threads import num_usable_cores
from gptj_serve.simulation.calibration import Sizes, calibrate
from gptj_serve.simulation.step_shape import StepShape

FEW = Sizes((1, 4), (8, 40), (16,), 2, ((1, 10, 6), (3, 60, 8)), 1)


@pytest.fixture(scope="module")
def tiny(tiny_gptj, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("calibration") / "tiny"
    directory.mkdir()
    for file in tiny_gptj(vocab_size=small_tokenizer().num_token_ids).iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "tokenizer.json").write_text(small_backend_json())
    return directory


def service(checkpoint: object, num_stages: int, num_kv_tokens: int | None = None) -> ServiceConfig:
    pipeline = PipelineConfig(
        num_stages=num_stages, stage=StageConfig(num_threads=1), kv_cache=KVCacheConfig(num_tokens=num_kv_tokens)
    )
    return ServiceConfig(checkpoint=str(checkpoint), pipeline=pipeline)


def test_a_checkpoint_is_measured_with_the_stages_of_its_deployment(tiny: Path):
    """Shapes per stage: four that decode, two chunks; both together don't fit the model, and four rows of 41 tokens not
    the KV pool. Two stages, and one of all layers."""
    cost = calibrate(service(tiny, 2, num_kv_tokens=128), FEW)
    assert cost.source == "measured"
    assert (cost.model.name, cost.model.num_layers, cost.model.max_sequence_tokens) == ("tiny", 6, 96)
    assert (cost.notes["stage_times"], cost.notes["stage_times_left_out"]) == (3 * 5, 3)
    assert cost.notes["max_context_tokens"] == 64  # of the later chunk
    assert cost.notes["num_stages"] == 2
    assert float(cost.notes["tokens_per_s_of_3x48+7"]) > 0
    few, many = (sum(cost.pipeline(2).stage_times_s(StepShape(n, n, 8 * n, 8 * n, n))) for n in (1, 64))
    assert 0 < few <= many


def test_threads_are_those_of_the_service_whatever_torch_was_told_before(tiny: Path):
    config = ServiceConfig(checkpoint=str(tiny), pipeline=PipelineConfig(num_stages=1))
    with torch_threads(num_usable_cores() + 1):
        cost = calibrate(config, FEW)
    assert cost.notes["threads_per_stage"] == num_usable_cores()


def test_more_stages_than_layers_are_refused(tiny: Path):
    with pytest.raises(ConfigError, match="num_stages=7"):
        calibrate(service(tiny, 7), FEW)
