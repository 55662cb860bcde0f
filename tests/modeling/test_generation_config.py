"""`GenerationConfig`: nothing of transformers' is unknown, what can't be followed is refused, files go both ways."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import pair
from torch import Tensor

from gptj_serve import GenerationConfig
from gptj_serve.errors import ConfigError, InvalidOptionError
from gptj_serve.modeling.unsupported_options import UNSUPPORTED

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]

PROMPT = torch.tensor([[5, 6, 7, 8]])

NOT_FOLLOWED: dict[str, Any] = {
    "assistant_confidence_threshold": 0.5,
    "assistant_early_exit": 3,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 5,
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "cache": object(),
    "cache_config": {"backend": "quanto"},
    "cache_implementation": "quantized",
    "compile_config": object(),
    "constraints": [object()],
    "continuous_batching_config": object(),
    "custom_generate": "someone/something",
    "decoder_input_ids": PROMPT,
    "decoder_start_token_id": 1,
    "diversity_penalty": 0.5,
    "dola_layers": "high",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "force_words_ids": [[1]],
    "inputs_embeds": torch.ones(1, 3, 16),
    "is_assistant": True,
    "logits_processor": [abs],
    "low_memory": True,
    "max_cache_len": 20,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic_transient",
    "num_beam_groups": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "past_key_values": object(),
    "penalty_alpha": 0.6,
    "position_ids": PROMPT,
    "prefill_chunk_size": 2,
    "prefix_allowed_tokens_fn": lambda batch_id, ids: [1],
    "speculation_type": "dflash",
    "stopping_criteria": [abs],
    "synced_gpus": True,
    "target_lookbehind": 5,
    "token_healing": True,
    "token_type_ids": PROMPT,
    "top_h": 0.5,
    "trust_remote_code": True,
    "use_mtp": True,
    "watermarking_config": {"bias": 2.5},
}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return pair("GPTJForCausalLM", eos_token_id=29)


def test_everything_that_transformers_knows_is_followed_or_refused():
    known = {*GenerationConfig.model_fields, *UNSUPPORTED}
    of_files = {"transformers_version", "_from_model_config"}
    options = {n for n in vars(transformers.GenerationConfig()) if n not in of_files and not n.startswith("_original")}
    assert options - known == set()
    assert set(GenerationConfig.model_fields) - options == {
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    }
    ours = inspect.signature(pair("GPTJForCausalLM")[1].generate).parameters
    theirs = inspect.signature(transformers.GPTJForCausalLM.generate).parameters
    assert {name for name in theirs if name not in ("self", "kwargs")} - known - set(ours) == set()
    assert list(ours)[:2] == list(theirs)[1:3]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_followed_is_refused_by_name(models: tuple[Any, Any], name: str):
    _, ours = models
    with pytest.raises(InvalidOptionError, match=f"^{name}=") as caught:
        ours.generate(PROMPT, **{name: NOT_FOLLOWED[name]})
    assert caught.value.value is NOT_FOLLOWED[name]
    with pytest.raises(ValueError, match=f"{name}="):
        GenerationConfig(**{name: NOT_FOLLOWED[name]})
    for inert in (None, *UNSUPPORTED[name][0]):
        assert GenerationConfig(**{name: inert}) == GenerationConfig()
        assert isinstance(ours.generate(PROMPT, max_new_tokens=1, **{name: inert}), Tensor)


def test_transformers_defaults_ask_for_nothing(models: tuple[Any, Any]):
    theirs, ours = models
    defaults = transformers.GenerationConfig()._get_default_generation_params()
    del defaults["max_length"]
    assert torch.equal(ours.generate(PROMPT, **defaults), theirs.generate(PROMPT))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_tokens": 3}, "max_tokens=3"),
        ({"stopping": None}, "stopping=None"),
        ({"temperature": 0.0, "do_sample": True}, r"temperature=0\.0"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature=nan"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": -0.1}, r"min_p=-0\.1"),
        ({"typical_p": 0}, "typical_p=0"),
        ({"epsilon_cutoff": 1.0}, r"epsilon_cutoff=1\.0"),
        ({"eta_cutoff": -1.0}, r"eta_cutoff=-1\.0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"bad_words_ids": []}, r"bad_words_ids=\[\]"),
        ({"bad_words_ids": [[1], []]}, r"bad_words_ids\.1=\[\]"),
        ({"bad_words_ids": [[61]]}, "bad_words_ids=61"),
        ({"sequence_bias": {}}, "sequence_bias"),
        ({"sequence_bias": {(1, -2): 1.0}}, r"sequence_bias\.0\.0\.1=-2"),
        ({"sequence_bias": {(1, 2): float("inf")}}, r"sequence_bias\.0\.1=inf"),
        ({"sequence_bias": [[[1], 2.0]], "logit_bias": {1: 3.0}}, r"sequence_bias=\[1\]: has two biases"),
        ({"logit_bias": {61: 3.0}}, r"logit_bias=\{61: 3\.0\}"),
        ({"suppress_tokens": [1, -1]}, r"suppress_tokens\.1=-1"),
        ({"begin_suppress_tokens": [70]}, "begin_suppress_tokens=70"),
        ({"forced_bos_token_id": 70}, "forced_bos_token_id=70"),
        ({"forced_eos_token_id": [7, 70]}, "forced_eos_token_id=70"),
        ({"forced_eos_token_id": [7], "suppress_tokens": [7]}, r"forced_eos_token_id=\[7\]: suppress_tokens"),
        ({"forced_bos_token_id": 7, "suppress_tokens": [7]}, r"forced_bos_token_id=\[7\]: suppress_tokens"),
        ({"exponential_decay_length_penalty": (1, 0)}, r"exponential_decay_length_penalty\.1=0"),
        ({"eos_token_id": [3, -1]}, r"eos_token_id\.1=-1"),
        ({"eos_token_id": -1}, "eos_token_id=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_length": 4}, "max_length=4: the prompt's 4 tokens"),
        ({"max_time": -1}, "max_time=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"num_return_sequences": 2}, "num_return_sequences=2: greedy"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 65}, "num_beams=65"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3: a search with 2 beams"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2: does not go with do_sample"),
        ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping='sometimes'"),
        ({"num_beams": 2, "length_penalty": float("inf")}, "length_penalty=inf"),
        ({"num_beams": 2, "guidance_scale": 2.0}, r"guidance_scale=2\.0: does not go with a beam search"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3: does not go with a beam"),
        ({"num_beams": 2, "stop_strings": "a", "tokenizer": object()}, r"stop_strings=\['a'\]: a beam search knows"),
        ({"num_beams": 2, "streamer": object()}, "streamer=.*which beam is the best"),
        ({"num_beams": 2, "renormalize_logits": True}, "renormalize_logits=True"),
        ({"num_beams": 2, "output_logits": True}, "output_logits=True"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens=0"),
        ({"prompt_lookup_num_tokens": 2, "guidance_scale": 2.0}, "prompt_lookup_num_tokens=2: does not go with guid"),
        ({"negative_prompt_ids": PROMPT}, r"negative_prompt_ids=\[5, 6, 7, 8\]: has no effect unless guidance_scale"),
        ({"negative_prompt_attention_mask": PROMPT}, "negative_prompt_attention_mask=.*goes with negative_prompt_ids"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": PROMPT.repeat(2, 1)}, r"negative_prompt_ids=\[2, 4\]"),
        ({"do_sample": True, "num_return_sequences": 2, "streamer": object()}, "streamer=.*not of 2"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": "x"}, "stop_strings='x': needs generate"),
        (
            {"remove_invalid_values": True, "exponential_decay_length_penalty": (1, 1.5)},
            "remove_invalid_values=True: .*exponential_decay_length_penalty",
        ),
        (
            {"remove_invalid_values": True, "output_scores": True, "return_dict_in_generate": True},
            "remove_invalid_values=True: output_scores",
        ),
        ({"attention_mask": torch.zeros(1, 4)}, "input_ids=.*row 0"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask=\[1, 3\]"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, "input_ids="),
        ({"input_ids": torch.ones(1, 32, dtype=torch.long)}, "n_positions=32"),
        ({"inputs": PROMPT}, "inputs=.*another name of input_ids"),
        ({"generation_config": torch.ones(1, 4)}, "generation_config='Tensor'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_values_and_combinations_that_are_refused(models: tuple[Any, Any], options: dict[str, Any], told: str):
    with pytest.raises(InvalidOptionError, match=told):
        models[1].generate(**{"input_ids": PROMPT, **options})


def test_a_prompt_there_must_be():
    _, ours = pair("GPTJForCausalLM")
    ours.generation_config.bos_token_id = None
    with pytest.raises(InvalidOptionError, match="no bos_token_id"):
        ours.generate()


def test_an_option_counts_before_a_config_and_that_before_the_models(models: tuple[Any, Any]):
    theirs, ours = pair("GPTJForCausalLM", eos_token_id=29)
    for model, config_class in ((theirs, transformers.GenerationConfig), (ours, GenerationConfig)):
        model.generation_config.max_new_tokens = 3
        model.generation_config.suppress_tokens = [11]
        model.of_call = config_class(max_new_tokens=5, num_beams=2)
    for of_call, options in [
        (False, {}),
        (True, {}),
        (False, {"max_new_tokens": 6}),
        (True, {"max_new_tokens": 6, "suppress_tokens": None}),
        (True, {"eos_token_id": None, "num_beams": 1}),
        (False, {"max_length": 20}),
    ]:
        answers = [m.generate(PROMPT, m.of_call if of_call else None, **options) for m in (theirs, ours)]
        assert torch.equal(*answers), (of_call, options)


def test_none_turns_top_k_off(models: tuple[Any, Any]):
    _, ours = models
    options = {"do_sample": True, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    for more, num_possible in [({}, 50), ({"top_k": None}, 61), ({"top_k": 0}, 61), ({"top_k": 7}, 7)]:
        scores = ours.generate(PROMPT, **options, **more).scores[0]
        assert scores.isfinite().sum() == num_possible


def test_options_without_effect_are_told_of(models: tuple[Any, Any], caplog: pytest.LogCaptureFixture):
    theirs, ours = models
    idle = {"temperature": 0.3, "length_penalty": 2.0, "max_matching_ngram_size": 3}
    assert torch.equal(ours.generate(PROMPT, **idle), theirs.generate(PROMPT))
    assert [record.message for record in caplog.records if record.name.startswith("gptj_serve")] == [
        "generate: temperature=0.3 has no effect without do_sample",
        "generate: length_penalty=2.0 has no effect without num_beams",
        "generate: max_matching_ngram_size=3 has no effect without prompt_lookup_num_tokens",
    ]
    caplog.clear()
    ours.generate(PROMPT, temperature=1.0, early_stopping=False, top_k=50, max_new_tokens=2, output_scores=False)
    assert not caplog.records


def test_lengths_that_can_not_be_are_told_of(models: tuple[Any, Any], caplog: pytest.LogCaptureFixture):
    _, ours = models
    assert ours.generate(PROMPT, max_new_tokens=2, min_new_tokens=5).shape == (1, 6)
    assert "at least 5 new tokens" in caplog.text
    assert ours.generate(PROMPT, max_new_tokens=2, max_length=30).shape == (1, 6)
    assert "max_new_tokens counts" in caplog.text


OPTIONS: dict[str, Any] = {
    "max_new_tokens": 7,
    "min_length": 3,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.3,
    "eos_token_id": [3, 4],
    "pad_token_id": 60,
    "bad_words_ids": [[1, 2], [3]],
    "sequence_bias": [[[1, 2], 1.5]],
    "suppress_tokens": [8],
    "exponential_decay_length_penalty": [3, 1.5],
    "stop_strings": ["a", "b"],
    "num_return_sequences": 2,
    "forced_eos_token_id": 5,
}


def test_files_go_both_ways(tmp_path: Path):
    ours, theirs = GenerationConfig(**OPTIONS), transformers.GenerationConfig(**OPTIONS)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read = [GenerationConfig.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    assert read == [ours, ours]
    reference = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert reference == theirs
    for name, value in OPTIONS.items():
        if name not in ("sequence_bias", "exponential_decay_length_penalty"):  # lists there, tuples here
            assert getattr(ours, name) == getattr(theirs, name) == value
    assert GenerationConfig.from_pretrained(tmp_path / "theirs", top_p=0.5).top_p == 0.5
    assert ours.to_dict() == OPTIONS


def test_a_bias_as_a_dictionary_is_saved_as_a_list(tmp_path: Path):
    config = GenerationConfig(sequence_bias={(1, 2): 1.5, (3,): -1.0}, logit_bias={4: 2.0})
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert transformers.GenerationConfig.from_pretrained(tmp_path).sequence_bias == [[[1, 2], 1.5], [[3], -1.0]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting"),
        ("[1]", "generation_config.json"),
        ('{"top_p": 2}', "top_p=2"),
        ('{"num_beam_groups": 3}', "num_beam_groups=3"),
        ('{"temprature": 3}', "temprature=3"),
    ],
)
def test_files_that_can_not_be_used(tmp_path: Path, text: str, told: str):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        GenerationConfig.from_pretrained(tmp_path.parent)


def test_assignments_are_checked():
    config = GenerationConfig()
    config.eos_token_id = 3
    assert (config.eos_token_id, config.end_token_ids) == (3, [3])
    config.suppress_tokens = torch.tensor([1, 2])
    assert config.suppress_tokens == [1, 2]
    for name, value in (("top_p", 2), ("num_beam_groups", 2), ("temperatur", 0.5)):
        with pytest.raises(ValueError, match=name):
            setattr(config, name, value)
