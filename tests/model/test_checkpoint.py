"""Reading a checkpoint directory: every layout that exists; what can't be read is refused by file and tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTJForCausalLM

from gptj_serve.errors import CheckpointError, ConfigError
from gptj_serve.model.checkpoint import INDEX_FILE, PREFIX, SINGLE_FILE, Checkpoint, backbone_shapes
from gptj_serve.model.stage import load_stage

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


@pytest.fixture
def original(tiny_gptj) -> Path:
    return tiny_gptj()


@pytest.fixture
def rewritten(original: Path, tmp_path: Path) -> Callable[[Tensors], Path]:
    """A copy of the checkpoint with other tensors."""

    def rewrite(tensors: Tensors) -> Path:
        shutil.copy(original / "config.json", tmp_path)
        save_file(tensors, tmp_path / SINGLE_FILE)
        return tmp_path

    return rewrite


def tensors_of(directory: Path) -> Tensors:
    return load_file(directory / SINGLE_FILE)


def loaded(directory: Path) -> Tensors:
    """All parameters as one stage holds them, under their canonical names."""
    checkpoint = Checkpoint.open(directory)
    return dict(load_stage(checkpoint, range(checkpoint.config.n_layer), torch.float32, CPU).named_parameters())


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], tensor), name


def canonical(tensors: Tensors) -> Tensors:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(directory)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------- what loads


def test_single_file(original: Path):
    checkpoint = Checkpoint.open(original)
    assert checkpoint.heads == ("lm_head", "score", "qa_outputs")
    assert checkpoint.stored_dtype == "F32"
    assert_same(loaded(original), canonical(tensors_of(original)))


def test_sharded_with_index(original: Path, tmp_path: Path):
    model = GPTJForCausalLM.from_pretrained(original)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert Checkpoint.open(tmp_path).heads == ("lm_head",)
    assert_same(loaded(tmp_path), canonical(dict(model.named_parameters())))


def test_base_checkpoint_without_prefix(original: Path, tmp_path: Path):
    base = GPTJForCausalLM.from_pretrained(original).transformer
    base.save_pretrained(tmp_path)
    assert "wte.weight" in tensors_of(tmp_path)
    assert Checkpoint.open(tmp_path).heads == ()
    assert_same(loaded(tmp_path), dict(base.named_parameters()))


def test_mask_buffers_of_old_checkpoints_are_skipped(original: Path, rewritten):
    tensors = tensors_of(original)
    masks: Tensors = {}
    for layer in range(6):
        masks[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        masks[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    assert_same(loaded(rewritten(tensors | masks)), canonical(tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_precision(original: Path, rewritten, dtype: torch.dtype):
    stored = {name: tensor.to(dtype) for name, tensor in tensors_of(original).items()}
    assert_same(loaded(rewritten(stored)), {name: tensor.float() for name, tensor in canonical(stored).items()})


def test_fp32_weights_load_in_half_precision(original: Path):
    stage = load_stage(Checkpoint.open(original), range(6), torch.bfloat16, CPU)
    for name, tensor in canonical(tensors_of(original)).items():
        assert torch.equal(stage.get_parameter(name), tensor.bfloat16()), name


def test_tied_embeddings(tiny_gptj, tmp_path: Path):
    directory = tiny_gptj(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(directory)
    parameters = loaded(directory)
    assert torch.equal(parameters["lm_head.weight"], parameters["wte.weight"])
    last = load_stage(Checkpoint.open(directory), range(3, 6), torch.float32, CPU)
    assert torch.equal(last.lm_head.weight, parameters["wte.weight"])


def test_tied_embeddings_that_were_saved_twice(tiny_gptj, tmp_path: Path):
    directory = tiny_gptj(tie_word_embeddings=True)
    tensors = tensors_of(directory)
    shutil.copy(directory / "config.json", tmp_path)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, tmp_path / SINGLE_FILE)
    assert torch.equal(loaded(tmp_path)["lm_head.weight"], tensors["transformer.wte.weight"])


# ------------------------------------------------------------------------------------------- only the span's share


@pytest.mark.parametrize("span", [range(2), range(2, 5), range(5, 6), range(6)], ids=str)
def test_a_stage_holds_its_span_only(original: Path, span: range):
    checkpoint = Checkpoint.open(original)
    stage = load_stage(checkpoint, span, torch.float32, CPU)
    expected = {name for name in backbone_shapes(checkpoint.config) if any(f"h.{i}." in name for i in span)}
    if span.start == 0:
        expected |= {"wte.weight"}
    if span.stop == 6:
        expected |= {"ln_f.weight", "ln_f.bias", "lm_head.weight", "lm_head.bias", "score.weight"}
        expected |= {"qa_outputs.weight", "qa_outputs.bias"}
    assert {name for name, _ in stage.named_parameters()} == expected
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in stage.parameters())


def test_a_stage_reads_its_own_files_only(original: Path, tmp_path: Path):
    GPTJForCausalLM.from_pretrained(original).save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = Checkpoint.open(tmp_path)
    own = {info.file for name, info in checkpoint.tensors.items() if name.startswith("h.1.")}
    for file in set(tmp_path.glob("model-*.safetensors")) - own:
        file.unlink()
    stage = load_stage(checkpoint, range(1, 2), torch.float32, CPU)
    assert len(list(stage.parameters())) == 10


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.3.mlp.fc_in.bias", "transformer.ln_f.bias", "lm_head.bias"]
)
def test_missing_tensor(original: Path, rewritten, name: str):
    directory = rewritten({key: tensor for key, tensor in tensors_of(original).items() if key != name})
    message = refusal(directory)
    assert str(directory) in message
    assert f"{name.removeprefix(PREFIX)!r} is missing" in message


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.6.ln_1.bias",
        "transformer.h.0.attn.q_proj.bias",
        "transformer.wpe.weight",
        "adapter",
        "score.bias",
    ],
)
def test_extra_tensor(original: Path, rewritten, name: str):
    directory = rewritten(tensors_of(original) | {name: torch.zeros(3)})
    message = refusal(directory)
    assert str(directory / SINGLE_FILE) in message
    assert f"unexpected tensor {name!r}" in message


@pytest.mark.parametrize("name", ["transformer.h.5.attn.out_proj.weight", "score.weight", "qa_outputs.bias"])
def test_misshapen_tensor(original: Path, rewritten, name: str):
    directory = rewritten(tensors_of(original) | {name: torch.zeros(7, 2)})
    message = refusal(directory)
    for part in (str(directory / SINGLE_FILE), repr(name), "[7, 2]", str(list(tensors_of(original)[name].shape))):
        assert part in message


def test_integer_tensor(original: Path, rewritten):
    name = "transformer.h.2.mlp.fc_out.bias"
    directory = rewritten(tensors_of(original) | {name: torch.zeros(32, dtype=torch.int8)})
    message = refusal(directory)
    for part in (str(directory / SINGLE_FILE), repr(name), "I8"):
        assert part in message


def test_same_tensor_with_and_without_prefix(original: Path, rewritten):
    directory = rewritten(tensors_of(original) | {"ln_f.bias": torch.zeros(32)})
    assert "'ln_f.bias'" in refusal(directory)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1])
def test_truncated_file(original: Path, tmp_path: Path, num_bytes: int):
    shutil.copy(original / "config.json", tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes((original / SINGLE_FILE).read_bytes()[:num_bytes])
    assert str(tmp_path / SINGLE_FILE) in refusal(tmp_path)


def test_garbage_file(original: Path, tmp_path: Path):
    shutil.copy(original / "config.json", tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(b"certainly not safetensors" * 100)
    assert str(tmp_path / SINGLE_FILE) in refusal(tmp_path)


def test_pickle_is_refused_unread(original: Path, tmp_path: Path):
    shutil.copy(original / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle is ever opened")
    message = refusal(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in message
    assert "pickle" in message


def test_no_weights(original: Path, tmp_path: Path):
    shutil.copy(original / "config.json", tmp_path)
    message = refusal(tmp_path)
    assert SINGLE_FILE in message
    assert INDEX_FILE in message


def test_missing_directory(tmp_path: Path):
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_missing_config(original: Path, tmp_path: Path):
    shutil.copy(original / SINGLE_FILE, tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/hostname", "..", "", "absent.safetensors", 5])
def test_index_that_names_a_file_outside_the_directory(original: Path, tmp_path: Path, name: object):
    shutil.copy(original / SINGLE_FILE, tmp_path / "stolen.safetensors")
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    shutil.copy(original / "config.json", directory)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.bias": name}}))
    message = refusal(directory)
    assert str(directory / INDEX_FILE) in message
    assert repr(name) in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'])
def test_index_that_is_none(original: Path, tmp_path: Path, content: str):
    shutil.copy(original / "config.json", tmp_path)
    (tmp_path / INDEX_FILE).write_text(content)
    assert str(tmp_path / INDEX_FILE) in refusal(tmp_path)
