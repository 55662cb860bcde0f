"""`generate`: greedy tokens are transformers'; sampling is reproducible; what can't be followed is refused by name."""

import asyncio
from typing import Any

import pytest
import torch
from fakes import small_backend_json
from reference import TINY, pair
from tokenizers import Tokenizer as Backend
from torch import Tensor

from gptj_serve import GPTJForCausalLM
from gptj_serve.errors import InvalidRequestError
from gptj_serve.modeling.generation import _stage_of
from gptj_serve.modeling.tokenization import GPTJTokenizer

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),  # transformers' own
]

PAD = TINY["pad_token_id"]
EOS = 29  # a token that the tiny model says now and then


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return pair("GPTJForCausalLM", eos_token_id=EOS)


def ids(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    padded = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    return padded, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 12},
        {"max_length": 9},
        {"max_new_tokens": 12, "min_new_tokens": 6},
        {"max_length": 16, "min_length": 11},
        {"max_new_tokens": 15, "eos_token_id": [3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41]},
        {"max_new_tokens": 15, "eos_token_id": 7, "pad_token_id": 2},
        {"max_new_tokens": 5, "do_sample": False, "num_beams": 1, "use_cache": True, "temperature": 0.3},
    ],
    ids=str,
)
def test_greedy_tokens_equal_transformers(models: tuple[Any, Any], options: dict[str, Any]):
    theirs, ours = models
    for seed in range(4):
        prompts = [ids(1, length, seed + length)[0].tolist() for length in (5, 2, 7)]
        padded, mask = left_padded(prompts)
        for arguments in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": ids(1, 6, seed)}):
            expected = theirs.generate(**arguments, **options)
            assert torch.equal(ours.generate(**arguments, **options), expected)


def test_padding_shows_without_a_mask_if_its_token_is_no_end_token(models: tuple[Any, Any]):
    theirs, ours = models
    padded, mask = left_padded([[5, 6, 7], [8]])
    assert torch.equal(ours.generate(padded), theirs.generate(padded))
    assert torch.equal(ours.generate(padded), ours.generate(padded, mask))
    as_end = {"eos_token_id": PAD, "max_new_tokens": 4}
    assert torch.equal(ours.generate(padded, **as_end), theirs.generate(padded, **as_end))


def test_without_a_prompt_it_begins_with_the_bos_token(models: tuple[Any, Any]):
    theirs, ours = models
    assert torch.equal(ours.generate(max_new_tokens=6), theirs.generate(max_new_tokens=6))


def test_the_mask_hides_tokens_wherever_they_are(models: tuple[Any, Any]):
    _, ours = models
    alone = ours.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6)[0, 3:].tolist()
    for row, mask in [
        ([5, 6, 7, PAD, PAD], [1, 1, 1, 0, 0]),
        ([PAD, 5, 6, 7, PAD], [0, 1, 1, 1, 0]),
        ([5, 9, 6, 9, 7], [1, 0, 1, 0, 1]),
    ]:
        answer = ours.generate(torch.tensor([row]), torch.tensor([mask]), max_new_tokens=6)
        assert answer[0].tolist() == row + alone


def test_sampling_is_fixed_by_its_seed_or_torchs(models: tuple[Any, Any]):
    _, ours = models
    prompt = ids(2, 4)
    sampled = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3}
    first = ours.generate(prompt, seed=5, **sampled)
    assert first.shape[0] == 6
    assert torch.equal(first[:, :4], prompt.repeat_interleave(3, dim=0))
    assert torch.equal(ours.generate(prompt, seed=5, **sampled), first)
    assert not torch.equal(ours.generate(prompt, seed=6, **sampled)[:, :8], first[:, :8])
    assert len({tuple(row) for row in first.tolist()}) == 6
    answers = []
    for _ in range(2):
        torch.manual_seed(1)
        answers.append(ours.generate(prompt, **sampled))
    assert torch.equal(*answers)
    greedy = ours.generate(prompt, max_new_tokens=8)
    assert torch.equal(ours.generate(prompt, do_sample=True, top_k=1, max_new_tokens=8), greedy)
    assert torch.equal(ours.generate(prompt, do_sample=True, top_p=1e-6, max_new_tokens=8), greedy)


def test_sampled_frequencies_are_the_models_probabilities(models: tuple[Any, Any]):
    _, ours = models
    prompt, num_draws = ids(1, 3), 2000
    drawn = ours.generate(prompt, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=num_draws, seed=1)
    frequencies = drawn[:, -1].bincount(minlength=61) / num_draws
    expected = ours(prompt).logits[0, -1].softmax(-1)
    assert (frequencies - expected).abs().sum() < 0.2


def test_options_of_the_model_are_defaults(models: tuple[Any, Any]):
    theirs, ours = models
    prompt = ids(1, 4)
    ours.generation_config.max_new_tokens = theirs.generation_config.max_new_tokens = 3
    try:
        assert torch.equal(ours.generate(prompt), theirs.generate(prompt))
        assert ours.generate(prompt, max_new_tokens=1).shape == (1, 5)
    finally:
        ours.generation_config.max_new_tokens = theirs.generation_config.max_new_tokens = None


def test_stop_strings_end_a_row():
    tokenizer = GPTJTokenizer(Backend.from_str(small_backend_json()))
    _, model = pair("GPTJForCausalLM", vocab_size=len(tokenizer), pad_token_id=None)
    prompt = tokenizer("the dog", return_tensors="pt").input_ids
    new = model.generate(prompt, max_new_tokens=9)[0, prompt.shape[1] :].tolist()
    stop = tokenizer.decode(new[:4])[-2:]
    answer = model.generate(prompt, max_new_tokens=9, stop_strings=stop, tokenizer=tokenizer)[0, prompt.shape[1] :]
    assert stop in tokenizer.decode(answer)
    assert stop not in tokenizer.decode(answer[:-1])
    assert answer.tolist() == new[: len(answer)]
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(prompt, stop_strings=[stop])


async def test_it_works_inside_an_event_loop(models: tuple[Any, Any]):
    _, ours = models
    prompt = ids(2, 4)
    expected = await asyncio.to_thread(ours.generate, prompt, max_new_tokens=5)
    assert torch.equal(ours.generate(prompt, max_new_tokens=5), expected)


def test_it_shares_the_models_parameters_and_leaves_its_mode(models: tuple[Any, Any]):
    _, ours = models
    own = {id(parameter) for parameter in ours.parameters()}
    assert {id(parameter) for parameter in _stage_of(ours).parameters()} == own
    assert ours.get_submodule("lm_head") is _stage_of(ours).lm_head
    _, dropping = pair("GPTJForCausalLM", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    dropping.train()
    dropping.lm_head.eval()
    prompt = ids(1, 4)
    answers = [dropping.generate(prompt) for _ in range(2)]
    assert torch.equal(*answers)
    assert (dropping.training, dropping.transformer.training, dropping.lm_head.training) == (True, True, False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"streamer": "x"}, "streamer='x'"),
        ({"logits_processor": [1]}, "logits_processor"),
        ({"max_tokens": 3}, "max_tokens=3"),
        ({"output_scores": True}, "output_scores=True"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"seed": -1}, "seed"),
        ({"max_length": 4}, "max_length=4"),
        ({"attention_mask": torch.zeros(1, 4)}, "row 0"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.ones(1, 32, dtype=torch.long)}, "n_positions=32"),
        ({"inputs_embeds": torch.ones(1, 3, 16)}, "inputs_embeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_can_not_be_followed_is_refused_by_name(models: tuple[Any, Any], options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        models[1].generate(**{"input_ids": torch.ones(1, 4, dtype=torch.long), **options})


def test_ids_and_lengths_out_of_range(models: tuple[Any, Any]):
    model: GPTJForCausalLM = models[1]
    with pytest.raises(IndexError, match="vocab_size=61"):
        model.generate(torch.tensor([[61]]))
    with pytest.raises(InvalidRequestError, match="limit of 32"):
        model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=13)
