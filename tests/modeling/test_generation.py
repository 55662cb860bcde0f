"""`generate`, option by option: sampling, texts that end, streams, outputs, prompts in all their shapes."""

import asyncio
import random
from threading import Thread
from typing import Any

import pytest
import torch
from fakes import small_backend_json
from reference import TINY, pair
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from gptj_serve.errors import InvalidOptionError, RequestFailedError
from gptj_serve.modeling import generation_run
from gptj_serve.modeling.generation_run import WholeModel
from gptj_serve.modeling.stop_strings import StopStrings
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


def test_padding_shows_without_a_mask_if_its_token_is_no_end_token(models: tuple[Any, Any]):
    theirs, ours = models
    padded, mask = left_padded([[5, 6, 7], [8]])
    assert torch.equal(ours.generate(padded), theirs.generate(padded))
    assert torch.equal(ours.generate(padded), ours.generate(padded, attention_mask=mask))
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
        answer = ours.generate(torch.tensor([row]), attention_mask=torch.tensor([mask]), max_new_tokens=6)
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
    assert {id(parameter) for parameter in WholeModel(ours).parameters()} == own
    assert ours.get_submodule("lm_head") is WholeModel(ours).lm_head
    _, dropping = pair("GPTJForCausalLM", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    dropping.train()
    dropping.lm_head.eval()
    prompt = ids(1, 4)
    answers = [dropping.generate(prompt) for _ in range(2)]
    assert torch.equal(*answers)
    assert (dropping.training, dropping.transformer.training, dropping.lm_head.training) == (True, True, False)


WARPERS = [
    {"top_k": 0},
    {"temperature": 0.6, "top_k": 12},
    {"top_p": 0.7, "top_k": None},
    {"min_p": 0.1, "temperature": 1.4},
    {"typical_p": 0.6, "top_k": 0},
    {"epsilon_cutoff": 0.02, "top_k": 0},
    {"eta_cutoff": 0.05, "top_k": 40},
    {"top_p": 0.0},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "eta_cutoff": 0.01},
]


@pytest.mark.parametrize("warpers", WARPERS, ids=str)
def test_what_is_drawn_is_what_transformers_draws_from(models: tuple[Any, Any], warpers: dict[str, Any]):
    theirs, ours = models
    prompt, num_draws = ids(1, 5, 3), 600
    options = {"do_sample": True, "max_new_tokens": 1, **warpers}
    outputs = {"return_dict_in_generate": True, "output_scores": True}
    (expected,) = theirs.generate(prompt, **options, **outputs).scores
    (scores,) = ours.generate(prompt, **options, **outputs).scores
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    drawn = ours.generate(prompt, num_return_sequences=num_draws, seed=4, **options)
    probabilities = expected[0].softmax(-1)
    frequencies = drawn[:, -1].bincount(minlength=len(probabilities)) / num_draws
    assert not frequencies[probabilities == 0].any()
    spread = (probabilities * (1 - probabilities) / num_draws).sqrt()
    assert ((frequencies - probabilities).abs() <= 5 * spread + 1e-6).all()


def test_scores_of_a_sampled_text_are_those_of_each_step_in_transformers(models: tuple[Any, Any]):
    theirs, ours = models
    options = {"top_p": 0.8, "temperature": 1.3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    options |= {"sequence_bias": {(7,): 2.0, (7, 8): -3.0}, "bad_words_ids": [[9], [1, 2]], "suppress_tokens": [11]}
    options |= {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"eos_token_id": None, "renormalize_logits": True}
    output = ours.generate(ids(2, 4), max_new_tokens=6, seed=3, **options)
    for step in range(6):
        for row in range(2):
            text = output.sequences[row : row + 1, : 4 + step]
            reference = theirs.generate(text, max_new_tokens=1, attention_mask=torch.ones_like(text), **options)
            torch.testing.assert_close(output.scores[step][row], reference.scores[0][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(output.logits[step][row], reference.logits[0][0], atol=1e-4, rtol=1e-4)
            assert output.scores[step][row, output.sequences[row, 4 + step]] > -torch.inf


def test_outputs_are_named_as_in_transformers(models: tuple[Any, Any]):
    theirs, ours = models
    cases = [
        ({}, {"cache"}),
        ({"num_beams": 3, "num_return_sequences": 2}, {"beam_indices", "cache"}),
    ]
    cases += [({**case, "output_scores": True}, {*missing, "scores"} if case else missing) for case, missing in cases]
    for case, missing in cases:
        options = {"max_new_tokens": 4, "return_dict_in_generate": True, **case}
        output, reference = (model.generate(ids(2, 3), **options) for model in (ours, theirs))
        assert type(output).__name__ == type(reference).__name__
        assert set(vars(reference)) == set(vars(output))
        assert list(output) == [key for key in reference if key not in missing]
        assert torch.equal(output.sequences, reference.sequences)
        assert torch.equal(output[0], output["sequences"])


def test_output_flags_need_an_output(models: tuple[Any, Any], caplog: pytest.LogCaptureFixture):
    _, ours = models
    assert isinstance(ours.generate(ids(1, 3), max_new_tokens=2, output_scores=True), Tensor)
    assert "output_scores=True has no effect without return_dict_in_generate" in caplog.text


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.puts: list[list[Any]] = []
        self.num_ends = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.num_ends += 1


def test_a_streamer_gets_the_prompt_and_each_token(models: tuple[Any, Any]):
    theirs, ours = models
    for options in ({}, {"prompt_lookup_num_tokens": 4}, {"do_sample": True, "seed": 1}):
        recorder = Recorder()
        output = ours.generate(ids(1, 4), max_new_tokens=9, streamer=recorder, **options)
        prompt, *tokens = recorder.puts
        assert (prompt, tokens) == (output[:, :4].tolist(), output[0, 4:, None].tolist())
        assert recorder.num_ends == 1
    of_theirs, of_ours = Recorder(), Recorder()
    theirs.generate(ids(1, 4), max_new_tokens=9, streamer=of_theirs)
    ours.generate(ids(1, 4), max_new_tokens=9, streamer=of_ours)
    assert (of_ours.puts, of_ours.num_ends) == (of_theirs.puts, of_theirs.num_ends)


def test_transformers_streamers_print_the_text(models: tuple[Any, Any], capsys: pytest.CaptureFixture[str]):
    tokenizer = GPTJTokenizer(Backend.from_str(small_backend_json()))
    _, model = pair("GPTJForCausalLM", vocab_size=len(tokenizer), pad_token_id=None)
    prompt = tokenizer("the dog", return_tensors="pt").input_ids
    output = model.generate(prompt, max_new_tokens=9, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(output[0, prompt.shape[1] :]) + "\n"
    iterated = TextIteratorStreamer(tokenizer)
    thread = Thread(target=model.generate, args=(prompt,), kwargs={"max_new_tokens": 9, "streamer": iterated})
    thread.start()
    assert "".join(iterated) == tokenizer.decode(output[0])
    thread.join()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_stop_strings_end_rows_where_they_do_in_transformers(num_rows: int):
    backend = Backend.from_str(small_backend_json())
    tokenizer = GPTJTokenizer(backend)
    reference = PreTrainedTokenizerFast(tokenizer_object=backend)
    theirs, ours = pair("GPTJForCausalLM", vocab_size=len(tokenizer), pad_token_id=None, n_positions=64)
    prompts = tokenizer(["the dog sleeps", "Paris is the", "Москва —"][:num_rows]).input_ids
    length = min(map(len, prompts))
    prompt = torch.tensor([ids[:length] for ids in prompts])
    free = theirs.generate(prompt, max_new_tokens=16, eos_token_id=1)
    chance = random.Random(num_rows)
    num_stopped = 0
    for _ in range(12):
        texts = [tokenizer.decode(row[chance.randrange(length - 1, length + 8) :]) for row in free]
        stops = [
            text[start : start + chance.randint(1, 4)] for text in texts if (start := chance.randint(0, 4)) < len(text)
        ]
        stops = [stop for stop in stops if "\ufffd" not in stop] or ["the"]
        options = {"max_new_tokens": 16, "stop_strings": stops, "eos_token_id": 1}
        expected = theirs.generate(prompt, tokenizer=reference, **options)
        assert torch.equal(ours.generate(prompt, tokenizer=tokenizer, **options), expected), stops
        assert torch.equal(ours.generate(prompt, tokenizer=reference, **options), expected), stops
        num_stopped += not torch.equal(expected, free)
    assert num_stopped >= 4


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there():
    class Letters:
        def decode(self, token_ids: list[int]) -> str:
            return bytes(token_ids).decode("utf-8", "replace")

    stop = StopStrings(["stop", "é"], Letters())
    for text, is_end in [
        (b"stop", True),
        (b"stop!", False),
        (b"unstop", True),
        (b"sto", False),
        ("caf\u00e9".encode(), True),
        ("caf\u00e9".encode()[:-1], False),
        ("\u00e9\u00e8".encode(), False),
        (b"p", False),
    ]:
        assert stop.are_completed_by_last(list(text)) == is_end, text


def test_max_time_ends_all_rows_with_the_token_at_hand(models: tuple[Any, Any]):
    theirs, ours = models
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        assert ours.generate(ids(2, 4), max_time=0.0, max_new_tokens=20, **options).shape == (2, 5)
    assert torch.equal(ours.generate(ids(2, 4), max_time=60.0), theirs.generate(ids(2, 4)))


def test_penalties_of_vllm_count_the_output_alone(models: tuple[Any, Any]):
    _, ours = models
    prompt = ids(1, 4)
    options = {"max_new_tokens": 12, "eos_token_id": None}
    plain = ours.generate(prompt, **options)[0, 4:].tolist()
    assert len(set(plain)) < 12
    assert len(set(ours.generate(prompt, presence_penalty=1e4, **options)[0, 4:].tolist())) == 12
    assert len(set(ours.generate(prompt, frequency_penalty=1e4, **options)[0, 4:].tolist())) == 12
    favourite = ours.generate(prompt, logit_bias={5: 1e4}, **options)[0, 4:].tolist()
    assert favourite == [5] * 12
    assert ours.generate(prompt, sequence_bias={(5,): 1e4}, **options)[0, 4:].tolist() == favourite


def test_rows_with_guidance_come_out_as_alone(models: tuple[Any, Any]):
    theirs, ours = models
    prompts, negatives = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]]
    padded, mask = left_padded(prompts)
    options = {"guidance_scale": 2.0, "max_new_tokens": 7, "eos_token_id": None}
    negative_padded, negative_mask = left_padded(negatives)
    batch = ours.generate(
        padded,
        attention_mask=mask,
        negative_prompt_ids=negative_padded,
        negative_prompt_attention_mask=negative_mask,
        **options,
    )
    unmasked = ours.generate(padded, negative_prompt_ids=negative_padded, **options)
    assert torch.equal(batch, unmasked)
    for row, prompt, negative in zip(batch, prompts, negatives, strict=True):
        alone = theirs.generate(torch.tensor([prompt]), negative_prompt_ids=torch.tensor([negative]), **options)
        assert row[-7:].tolist() == alone[0, -7:].tolist()
    sampled = ours.generate(
        padded, negative_prompt_ids=negative_padded, do_sample=True, num_return_sequences=2, seed=1, **options
    )
    assert sampled.shape == (6, 10)


def test_beams_that_the_constraints_don_t_allow_are_empty(models: tuple[Any, Any]):
    theirs, ours = models
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 1, "forced_eos_token_id": EOS}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    output, reference = (model.generate(ids(1, 3), **options) for model in (ours, theirs))
    assert output.sequences[:, 3].tolist() == [EOS, PAD, PAD]
    torch.testing.assert_close(output.sequences_scores, reference.sequences_scores)
    assert output.sequences_scores.tolist() == [0.0, -1e9, -1e9]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_where_nothing_is_possible_it_says_so(models: tuple[Any, Any], options: dict[str, Any]):
    _, ours = models
    with pytest.raises(RequestFailedError, match="no "):
        ours.generate(ids(1, 3), suppress_tokens=list(range(61)), **options)


def test_logits_that_are_no_numbers_end_it(models: tuple[Any, Any]):
    _, broken = pair("GPTJForCausalLM")
    broken.lm_head.bias.data[3] = torch.nan
    with pytest.raises(RequestFailedError, match="NaN"):
        broken.generate(ids(1, 3), remove_invalid_values=True)


def test_prompts_that_can_not_be_read(models: tuple[Any, Any]):
    _, ours = models
    with pytest.raises(IndexError, match="vocab_size=61"):
        ours.generate(torch.tensor([[61]]))
    with pytest.raises(IndexError, match="negative_prompt_ids"):
        ours.generate(torch.tensor([[1]]), guidance_scale=2.0, negative_prompt_ids=torch.tensor([[-1]]))
    with pytest.raises(InvalidOptionError, match="limit of 32"):
        ours.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=13)
    long = torch.ones(1, 20, dtype=torch.long)
    with pytest.raises(InvalidOptionError, match=r"negative_prompt_ids=20: .*limit of 32"):
        ours.generate(torch.tensor([[1]]), max_new_tokens=13, guidance_scale=2.0, negative_prompt_ids=long)


def test_more_rows_than_a_microbatch_has_tokens_come_out_as_alone(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    _, ours = models
    expected = ours.generate(ids(5, 6), num_beams=3, max_new_tokens=5)
    monkeypatch.setattr(generation_run, "_MAX_MICROBATCH_TOKENS", 4)
    assert torch.equal(ours.generate(ids(5, 6), num_beams=3, max_new_tokens=5), expected)
