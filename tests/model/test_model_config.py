import json
from pathlib import Path
from typing import Any

import pytest

from gptj_serve.errors import ConfigError
from gptj_serve.model.config import GPTJConfig


@pytest.fixture
def config_file(tmp_path: Path):
    def write(**values: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "gptj", **values}))
        return path

    return write


def test_unset_keys_have_transformers_defaults(config_file):
    from transformers import GPTJConfig as ReferenceConfig

    ours, theirs = GPTJConfig.from_file(config_file()), ReferenceConfig()
    for key in [*GPTJConfig.model_fields.keys() - {"problem_type"}, "num_labels"]:
        assert getattr(ours, key) == getattr(theirs, key), key


def test_reads_what_transformers_writes(tiny_gptj):
    config = GPTJConfig.from_file(tiny_gptj(n_inner=50) / "config.json")
    assert (config.vocab_size, config.n_layer, config.head_dim, config.inner_dim) == (97, 6, 8, 50)
    assert config.id2label == {0: "greeting", 1: "question", 2: "farewell"}
    assert config.num_labels == 3


def test_keys_without_meaning_are_dropped(config_file):
    config = GPTJConfig.from_file(config_file(rotary=True, n_ctx=2048, summary_type="cls_index", n_layer=3))
    assert config == GPTJConfig(n_layer=3)


def test_derived_sizes():
    config = GPTJConfig(n_embd=32, n_head=4, rotary_dim=None)
    assert (config.head_dim, config.rotated_dim, config.inner_dim) == (8, 8, 128)


@pytest.mark.parametrize(("value", "ids"), [(None, set()), (5, {5}), ([5, 7], {5, 7})])
def test_eos_token_id_may_be_none_one_or_several(value: Any, ids: set[int]):
    assert GPTJConfig(eos_token_id=value).eos_token_ids == ids


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"n_embd": 30, "n_head": 4}, ["n_embd=30", "n_head=4"]),
        ({"n_embd": 32, "n_head": 4, "rotary_dim": 5}, ["rotary_dim=5"]),
        ({"n_embd": 32, "n_head": 4, "rotary_dim": 10}, ["rotary_dim=10", "head_dim=8"]),
        ({"rotary_dim": 0}, ["rotary_dim=0"]),
        ({"activation_function": "gelu_ancient"}, ["activation_function='gelu_ancient'", "gelu_new"]),
        ({"n_layer": "many"}, ["n_layer='many'"]),
        ({"n_layer": 0}, ["n_layer=0"]),
        ({"vocab_size": -1}, ["vocab_size=-1"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon=0"]),
        ({"id2label": {"0": "a", "2": "b"}}, ["id2label", "[0, 2]"]),
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "gptj"]),
        ({"model_type": None}, ["model_type=None"]),
    ],
    ids=str,
)
def test_bad_value_is_named_with_its_file(config_file, values: dict[str, Any], told: list[str]):
    path = config_file(**values)
    with pytest.raises(ConfigError) as raised:
        GPTJConfig.from_file(path)
    for part in [str(path), *told]:
        assert part in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"null"])
def test_config_that_is_no_json_object(tmp_path: Path, content: bytes):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="JSON") as raised:
        GPTJConfig.from_file(path)
    assert str(path) in str(raised.value)


def test_missing_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        GPTJConfig.from_file(tmp_path / "config.json")


def test_parameters_set_by_hand():
    config = GPTJConfig(hidden_size=64, num_attention_heads=4, rotary_dim=8, num_labels=3)
    assert (config.n_embd, config.num_hidden_layers, config.max_position_embeddings) == (64, 28, 2048)
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config.num_labels = 1
    config.hidden_size = 32
    assert (config.id2label, config.n_embd) == ({0: "LABEL_0"}, 32)
    assert GPTJConfig(label2id={"yes": 0, "no": 1}).id2label == {0: "yes", 1: "no"}
    assert config.changed(num_labels=4, pad_token_id=7).to_dict() == {
        **config.to_dict(),
        "pad_token_id": 7,
        **GPTJConfig(num_labels=4).model_dump(include={"id2label", "label2id"}),
    }


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"n_layers": 3}, "n_layers"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"chunk_size_feed_forward": 8}, "chunk_size_feed_forward=8"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"num_labels": 2, "id2label": {0: "a"}}, "num_labels=2"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "num_labels > 1"),
        ({"attn_pdrop": 1.5}, "attn_pdrop"),
    ],
    ids=str,
)
def test_parameter_set_by_hand_is_refused_by_name(values: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        GPTJConfig(**values)


def test_refused_assignment_leaves_the_config_as_it_was():
    config = GPTJConfig()
    with pytest.raises(ValueError, match="n_head=5"):
        config.n_head = 5
    assert config == GPTJConfig()
