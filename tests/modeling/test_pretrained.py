"""Loading and saving, to and from transformers; heads that a checkpoint lacks; what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import CLASSES, assert_same_output, pair

import gptj_serve
from gptj_serve.errors import CheckpointError, ConfigError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.modeling.saving import shard_size_bytes

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 60, 60]])


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("sharded", "tied"), [(False, True), (True, False)])
def test_round_trip_both_ways(tmp_path: Path, name: str, sharded: bool, tied: bool):
    theirs, _ = pair(name, tie_word_embeddings=tied, n_inner=20, id2label={0: "no", 1: "yes"})
    size = {"max_shard_size": "8KB"} if sharded else {}
    theirs.save_pretrained(tmp_path / "theirs", **size)
    ours = getattr(gptj_serve, name).from_pretrained(tmp_path / "theirs")
    assert not ours.training
    assert ours.config.id2label == {0: "no", 1: "yes"}
    assert_same_output(ours(IDS), theirs(IDS))
    ours.save_pretrained(tmp_path / "ours", **size)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == sharded
    again, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.to_diff_dict().keys() >= {"n_inner", "architectures"}
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert torch.equal(getattr(gptj_serve, name).from_pretrained(tmp_path / "ours").state_dict()[key], value)
    Checkpoint.open(tmp_path / "ours")  # so the service takes it too


def test_saving_again_leaves_no_file_of_before(tmp_path: Path):
    _, model = pair("GPTJForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "checksums.json").write_text('{"sha256": {}}')
    model.save_pretrained(tmp_path)
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    model.save_pretrained(tmp_path, max_shard_size=4000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_output(gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path)(IDS), model(IDS))


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, model = pair("GPTJForCausalLM")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("gptj_serve.modeling.saving.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (77, 77), ("200kb", 200000)]
)
def test_shard_size(size: int | str, expected: int):
    assert shard_size_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5 elephants", 0, -3])
def test_shard_size_that_is_none(size: int | str):
    with pytest.raises(ValueError, match="max_shard_size"):
        shard_size_bytes(size)


def test_a_head_that_is_missing_is_new_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pair("GPTJModel")[0].save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = gptj_serve.GPTJForSequenceClassification.from_pretrained(
            tmp_path, num_labels=5, initializer_range=0.5, problem_type="multi_label_classification"
        )
    (record,) = caplog.records
    assert "score.weight" in record.getMessage()
    assert model.score.weight.shape == (5, 16)
    assert 0.3 < model.score.weight.std() < 0.7
    assert (model.config.num_labels, model.config.problem_type) == (5, "multi_label_classification")
    caplog.clear()
    lm = gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path)
    assert "lm_head.weight, lm_head.bias" in caplog.text
    assert lm.lm_head.bias.tolist() == [0.0] * 61


def test_a_head_of_another_size_is_refused_or_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pair("GPTJForSequenceClassification")[0].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight.*\[2, 16\].*\[4, 16\].*ignore_mismatched_sizes"):
        gptj_serve.GPTJForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    model = gptj_serve.GPTJForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, ignore_mismatched_sizes=True
    )
    assert model.score.weight.shape == (4, 16)
    assert "score.weight" in caplog.text
    with pytest.raises(CheckpointError, match=r"wte\.weight.*\[61, 16\].*\[70, 16\]"):
        gptj_serve.GPTJModel.from_pretrained(tmp_path, vocab_size=70)


def test_every_class_loads_a_checkpoint_with_all_heads(tiny_gptj):
    directory = tiny_gptj()
    for name in CLASSES[:3]:
        theirs = getattr(transformers, name).from_pretrained(directory).eval()
        assert_same_output(getattr(gptj_serve, name).from_pretrained(directory)(IDS), theirs(IDS), 1e-4)
    with pytest.raises(ValueError, match="num_labels=3"):
        gptj_serve.GPTJForQuestionAnswering.from_pretrained(directory)
    theirs = transformers.GPTJForQuestionAnswering.from_pretrained(directory, num_labels=2).eval()
    ours = gptj_serve.GPTJForQuestionAnswering.from_pretrained(directory, num_labels=2)
    assert_same_output(ours(IDS), theirs(IDS), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "torch.float64"])
def test_dtype(tmp_path: Path, dtype: Any):
    pair("GPTJForCausalLM")[0].save_pretrained(tmp_path)
    model = gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cpu")
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert model.transformer.rotary.sin.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path / "saved").dtype == model.dtype
    assert gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32").dtype == torch.float32


def test_half_precision_is_close_to_transformers(tmp_path: Path):
    pair("GPTJForCausalLM")[0].save_pretrained(tmp_path)
    theirs = transformers.GPTJForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    ours = gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert_same_output(ours(IDS, use_cache=False), theirs(IDS, use_cache=False), 3e-2)
    assert ours.generate(IDS[:1]).shape == (1, 24)


def test_the_rotary_table_follows_the_device_and_not_the_dtype():
    _, model = pair("GPTJForCausalLM")
    half = model.half()
    assert half.transformer.rotary.sin.dtype == torch.float32
    assert half.to("meta").transformer.rotary.sin.device.type == "meta"


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}])
def test_one_device(tmp_path: Path, device_map: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pair("GPTJModel")[0].save_pretrained(tmp_path)
    model = gptj_serve.GPTJModel.from_pretrained(str(tmp_path), device_map=device_map)
    assert model.device == model.rotary.sin.device == torch.device("cpu")
    assert next(model.parameters()).requires_grad


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device_map": {"wte": 0, "h": 1}}, "one device"),
        ({"device_map": "balanced"}, "balanced"),
        ({"device_map": "toaster"}, "toaster"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": torch.long}, "int64"),
        ({"quantization_config": 4}, "quantization_config"),
        ({"n_layer": 0}, "n_layer"),
    ],
    ids=str,
)
def test_options_that_can_not_be_followed(tmp_path: Path, options: dict[str, Any], told: str):
    pair("GPTJModel")[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        gptj_serve.GPTJModel.from_pretrained(tmp_path, **options)


def test_directories_that_are_none(tmp_path: Path):
    for name in ("./nowhere", str(tmp_path / "nowhere"), tmp_path / "nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such directory"):
            gptj_serve.GPTJModel.from_pretrained(name)
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        gptj_serve.GPTJModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        gptj_serve.GPTJModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="gpt2"):
        gptj_serve.GPTJModel.from_pretrained(tmp_path)


def test_a_hub_name_is_fetched_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs, _ = pair("GPTJForCausalLM")
    theirs.save_pretrained(tmp_path)
    asked: list[tuple[str, str | None]] = []

    def snapshot(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = gptj_serve.GPTJForCausalLM.from_pretrained("EleutherAI/gpt-j-6b", revision="float16")
    assert asked == [("EleutherAI/gpt-j-6b", "float16")]
    assert_same_output(model(IDS), theirs(IDS))


def test_a_hub_that_can_not_be_reached(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"EleutherAI/gpt-j-6b.*hub \(revision float16\)"):
        gptj_serve.GPTJForCausalLM.from_pretrained(
            "EleutherAI/gpt-j-6b", revision="float16", local_files_only=True, cache_dir=tmp_path
        )


def test_generation_config_of_the_checkpoint(tmp_path: Path):
    theirs, _ = pair("GPTJForCausalLM")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 2, "eos_token_id": [1, 2], "transformers_version": "5"}))
    model = gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path)
    reference = transformers.GPTJForCausalLM.from_pretrained(tmp_path).generation_config
    for name in ("max_new_tokens", "eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(model.generation_config, name) == getattr(reference, name)
    assert model.generate(IDS[:1]).shape == (1, 6)
    path.write_text(json.dumps({"penalty_alpha": 0.6}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: .*penalty_alpha=0\.6"):
        gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path)


def test_a_models_generation_config_is_saved_with_it(tmp_path: Path):
    _, ours = pair("GPTJForCausalLM")
    ours.generation_config.num_beams = 3
    ours.generation_config.eos_token_id = None
    ours.save_pretrained(tmp_path)
    assert gptj_serve.GPTJForCausalLM.from_pretrained(tmp_path).generation_config == ours.generation_config
    reference = transformers.GPTJForCausalLM.from_pretrained(tmp_path).generation_config
    assert (reference.num_beams, reference.eos_token_id, reference.bos_token_id) == (3, None, 0)


def test_config_from_a_directory(tmp_path: Path):
    pair("GPTJModel")[0].save_pretrained(tmp_path)
    config = gptj_serve.GPTJConfig.from_pretrained(tmp_path, n_layer=5)
    assert (config.n_layer, config.n_embd) == (5, 16)
    config.save_pretrained(tmp_path / "copy")
    assert gptj_serve.GPTJConfig.from_pretrained(tmp_path / "copy") == config
    assert transformers.GPTJConfig.from_pretrained(tmp_path / "copy").n_layer == 5


def test_the_former_name_of_dtype_is_followed(tiny_gptj):
    directory = tiny_gptj()
    model = gptj_serve.GPTJForCausalLM.from_pretrained(directory, torch_dtype=torch.float64, low_cpu_mem_usage=True)
    assert model.dtype is torch.float64
    with pytest.raises(ValueError, match="use_safetensors=False"):
        gptj_serve.GPTJForCausalLM.from_pretrained(directory, use_safetensors=False)
