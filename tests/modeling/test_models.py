"""What the random comparison does not draw: output objects, caches as people use them, errors, losses at the edges."""

import copy
import inspect
import logging
import pickle
from typing import Any

import pytest
import torch
import transformers
from reference import CLASSES, assert_same_gradients, assert_same_output, pair
from torch.utils import _pytree

from gptj_serve import DynamicCache, GPTJConfig, GPTJForQuestionAnswering
from gptj_serve.modeling import former_name, outputs
from gptj_serve.modeling.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_an_output_is_attributes_dictionary_and_tuple():
    output = CausalLMOutputWithPast(logits=torch.ones(1), attentions=(torch.zeros(2),))
    assert list(output.keys()) == ["logits", "attentions"]
    assert output.loss is None
    assert "loss" not in output
    assert output["logits"] is output.logits is output[0] is output.to_tuple()[0]
    assert len(output[:2]) == len(output) == 2
    output.loss = torch.tensor(3.0)
    output["logits"] = torch.zeros(4)
    assert (output["loss"].item(), output.logits.shape) == (3.0, (4,))
    with pytest.raises(KeyError):
        output["hidden_states"]
    for change in (lambda: output.pop("logits"), lambda: output.update(logits=1), lambda: output.__delitem__("loss")):
        with pytest.raises(TypeError, match="can't be removed"):
            change()
    copied = pickle.loads(pickle.dumps(output))
    assert set(copied) == set(output)
    leaves, spec = _pytree.tree_flatten(output)
    assert isinstance(_pytree.tree_unflatten(leaves, spec), CausalLMOutputWithPast)
    assert len(leaves) == 3


@pytest.mark.parametrize("name", CLASSES)
def test_the_config_sets_what_is_returned(name: str):
    config = {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "use_cache": True}
    theirs, ours = pair(name)
    for key, value in config.items():
        setattr(ours.config, key, value)
        if key != "return_dict":  # transformers' heads fail if their backbone returns a tuple
            setattr(theirs.config, key, value)
    assert isinstance(ours(IDS), tuple)
    assert_same_output(ours(IDS), theirs(IDS, return_dict=False))


@torch.no_grad()
def test_a_cache_as_people_use_it():
    theirs, ours = pair("GPTJForCausalLM")
    cache = DynamicCache()
    first = ours(IDS[:, :3], cache=cache)
    assert first.cache is cache
    assert (len(cache), cache.get_seq_length()) == (2, 3)
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.shape == cache[1][0].shape == (2, 2, 3, 8)
    snapshot = copy.deepcopy(cache)
    full = theirs(IDS).logits[:, 3:]
    torch.testing.assert_close(ours(IDS[:, 3:], cache=cache).logits, full, atol=1e-5, rtol=1e-5)
    assert (cache.get_seq_length(), snapshot.get_seq_length()) == (4, 3)
    cache.crop(-1)
    torch.testing.assert_close(ours(IDS[:, 3:], cache=cache).logits, full, atol=1e-5, rtol=1e-5)
    snapshot.reorder_cache(torch.tensor([1, 0]))
    again = ours(IDS.flip(0)[:, 3:], cache=snapshot).logits
    torch.testing.assert_close(again, full.flip(0), atol=1e-5, rtol=1e-5)
    snapshot.batch_select_indices(torch.tensor([0]))
    snapshot.batch_repeat_interleave(3)
    assert [keys.shape[0] for keys, _ in snapshot] == [3, 3]
    snapshot.reset()
    assert snapshot.get_seq_length() == 0
    with pytest.raises(ValueError, match="crop"):
        cache.crop(2)


def test_a_cache_of_transformers_is_taken_too():
    theirs, ours = pair("GPTJModel")
    cache = transformers.DynamicCache(config=theirs.config)
    ours(IDS[:, :2], cache=cache)
    torch.testing.assert_close(ours(IDS[:, 2:], cache=cache)[0], theirs(IDS)[0][:, 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_stand_in_the_same_places(name: str):
    theirs, ours = (list(inspect.signature(model.forward).parameters) for model in pair(name))
    assert ours[: len(theirs) - 1] == theirs[:-1]
    assert theirs[-1] == "kwargs"


@torch.no_grad()
def test_a_cache_is_extended_by_question_answering_too():
    theirs, ours = pair("GPTJForQuestionAnswering")
    caches = transformers.DynamicCache(), DynamicCache()
    for part in (IDS[:, :3], IDS[:, 3:]):
        assert_same_output(ours(part, cache=caches[1]), theirs(part, cache=caches[0]))
    assert_same_output((caches[1],), (caches[0],))


@pytest.mark.parametrize("name", CLASSES[:3])
def test_a_cache_is_taken_by_its_former_name_too(name: str):
    for model, cache_class in zip(pair(name), (transformers.DynamicCache, DynamicCache), strict=True):
        cache = cache_class()
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated.* Use `cache` instead"):
            assert model(IDS[:, :3], past_key_values=cache).cache is cache
        with pytest.warns(FutureWarning, match="Both .* Using `cache.* ignoring deprecated `past_key_values"):
            assert model(IDS[:, 3:], cache=cache, past_key_values=cache_class()).cache is cache
        assert cache.get_seq_length() == 4


@pytest.mark.parametrize("module", [transformers.modeling_outputs, outputs], ids=["theirs", "ours"])
def test_an_output_has_its_cache_under_the_former_name_too(module: Any):
    first, second, third = DynamicCache(), DynamicCache(), DynamicCache()
    output = module.CausalLMOutputWithPast(logits=torch.ones(1), past_key_values=first, attentions=(torch.zeros(2),))
    assert list(output) == ["logits", "cache", "attentions"]
    assert output.cache is output[1] is first
    assert output.past_key_values is output["past_key_values"] is output.get("past_key_values") is first
    assert "past_key_values" in output
    output.past_key_values = second
    assert output.cache is output["cache"] is second
    output["past_key_values"] = third
    assert output.cache is output["cache"] is third
    assert list(output) == list(pickle.loads(pickle.dumps(output))) == ["logits", "cache", "attentions"]
    with pytest.raises(
        ValueError, match=r"^You cannot specify both `cache` and `past_key_values`\. use `cache` only\.$"
    ):
        module.BaseModelOutputWithPast(cache=first, past_key_values=first)
    without = module.QuestionAnsweringModelOutput()
    assert (hasattr(without, "past_key_values"), "past_key_values" in without) == (False, False)


def test_the_former_name_in_an_output_is_told_of_once(caplog: pytest.LogCaptureFixture):
    former_name._log_once.cache_clear()
    output = CausalLMOutputWithPast(cache=DynamicCache())
    assert output.past_key_values is output["past_key_values"] is output.cache
    told = [record for record in caplog.records if record.name == former_name.logger.name]
    assert [(record.levelno, record.getMessage()) for record in told] == [
        (logging.WARNING, "`past_key_values` is deprecated. Use `cache` instead.")
    ]


def test_no_cache_is_made_unless_asked_for():
    _, ours = pair("GPTJModel", use_cache=False)
    assert ours(IDS).cache is None
    assert isinstance(ours(IDS, use_cache=True).cache, DynamicCache)


def test_gradients_reach_the_embeddings_that_are_passed():
    theirs, ours = pair("GPTJForSequenceClassification")
    gradients = []
    for model in (theirs, ours):
        embeds = model.get_input_embeddings()(IDS[:1]).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=torch.tensor([1])).loss.backward()
        gradients.append(embeds.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)
    assert_same_gradients(ours, theirs)


def test_a_few_steps_of_fine_tuning_end_at_the_same_loss():
    losses = []
    for model in pair("GPTJForCausalLM"):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_exactly_one_of_ids_and_embeddings(name: str):
    theirs, ours = pair(name)
    for arguments in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 4, 16)}):
        messages = []
        for model in (theirs, ours):
            with pytest.raises(ValueError, match="exactly one") as error:
                model(**arguments)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_a_batch_without_pad_token_has_transformers_error():
    messages = []
    for model in pair("GPTJForSequenceClassification", pad_token_id=None):
        assert model(IDS[:1]).logits.shape == (1, 2)
        with pytest.raises(ValueError, match="padding token") as error:
            model(IDS)
        messages.append(str(error.value))
        model.config.pad_token_id = 60
        assert model(IDS).logits.shape == (2, 2)
    assert messages[0] == messages[1] == "Cannot handle batch sizes > 1 if no padding token is defined."


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"input_ids": torch.tensor([[61]])}, IndexError, "vocab_size=61"),
        ({"input_ids": torch.tensor([[-1]])}, IndexError, "-1"),
        ({"input_ids": torch.tensor([[1]]), "token_type_ids": torch.tensor([[99]])}, IndexError, "token_type_ids"),
        ({"input_ids": torch.ones(1, 33, dtype=torch.long)}, IndexError, "33 tokens exceed n_positions=32"),
        ({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 32]])}, IndexError, "n_positions=32"),
        ({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2]])}, ValueError, "position_ids"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, ValueError, r"attention_mask has shape \[2, 3\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 4, 4).bool()}, ValueError, "floats"),
        ({"input_ids": IDS, "head_mask": None}, TypeError, "head_mask"),
    ],
    ids=str,
)
def test_arguments_that_can_not_be_followed(arguments: dict[str, Any], error: type[Exception], told: str):
    with pytest.raises(error, match=told):
        pair("GPTJModel")[1](**arguments)


def test_question_answering_needs_two_labels():
    with pytest.raises(ValueError, match="num_labels=3"):
        GPTJForQuestionAnswering(GPTJConfig(n_layer=1, n_embd=16, n_head=2, rotary_dim=4, num_labels=3))


def test_first_weights_are_drawn_as_the_config_says():
    config = GPTJConfig(vocab_size=500, n_embd=64, n_head=4, n_layer=2, rotary_dim=8, initializer_range=0.1)
    model = GPTJForQuestionAnswering(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.1), name
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_the_rotary_dimension_may_be_null_as_in_old_configs():
    _, expected = pair("GPTJModel", rotary_dim=8)
    model = type(expected)(expected.config.changed(rotary_dim=None)).eval()
    model.load_state_dict(expected.state_dict())
    output = model(IDS)
    assert isinstance(output, BaseModelOutputWithPast)
    torch.testing.assert_close(output.last_hidden_state, expected(IDS).last_hidden_state)
