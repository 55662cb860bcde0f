"""`BeamSearch` against transformers' `generate(num_beams=...)`, and what it does where that has no defined result."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, GPTJConfig, GPTJForCausalLM, LogitsProcessor, StoppingCriteria

from gptj_serve.engine.beam_search import BeamSearch
from gptj_serve.errors import RequestFailedError
from gptj_serve.types import Beam, BeamParams, EarlyStopping, FinishReason, TokenLogprob

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VOCAB_SIZE = 24
END_TOKEN_IDS, OTHER_TOKEN_IDS = [0, 1, 2], range(3, 24)
PROMPT = [3, 1, 4, 1, 5]
EARLY_STOPPING = {EarlyStopping.HEURISTIC: False, EarlyStopping.FIRST: True, EarlyStopping.NEVER: "never"}

Tokens = tuple[int, ...]
LogprobsOf = Callable[[list[list[int]]], Sequence[Tensor]]
"""The output tokens of running beams → each one's processed log-probabilities [V]."""

# ------------------------------------------------------------------------------------------------- both searches


@dataclass
class Case:
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    num_return_sequences: int
    max_new_tokens: int
    min_new_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    last_step: int | None = None  # time is up then

    def ours(self) -> BeamSearch:
        params = BeamParams(
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            num_return_sequences=self.num_return_sequences,
        )
        return BeamSearch(params, self.max_new_tokens, self.eos_token_ids, self.stop_token_ids)

    def theirs(self, **more: Any) -> GenerationConfig:
        end_token_ids = sorted(self.eos_token_ids | self.stop_token_ids)
        if end_token_ids and self.min_new_tokens:
            more["min_new_tokens"] = self.min_new_tokens
        return GenerationConfig(
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=EARLY_STOPPING[self.early_stopping],
            num_return_sequences=self.num_return_sequences,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=end_token_ids or None,
            pad_token_id=VOCAB_SIZE,
            return_dict_in_generate=True,
            output_scores=True,
            **more,
        )


class Recorder(LogitsProcessor):
    """The last processor: {output tokens: processed log-probabilities} of the beams that run, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[Tokens, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        outputs = input_ids[:, len(PROMPT) :].tolist()
        self.steps.append({tuple(tokens): row for tokens, row in zip(outputs, scores.clone(), strict=True)})
        return scores

    def replay(self) -> LogprobsOf:
        steps = iter(self.steps)

        def logprobs_of(running: list[list[int]]) -> list[Tensor]:
            step = next(steps)
            return [step[tuple(tokens)] for tokens in running]

        return logprobs_of

    @property
    def has_ties(self) -> bool:
        """Two extensions of running beams had the same score, so that either may have been taken."""
        scores: dict[Tokens, Tensor] = {(): torch.zeros(())}
        for step in self.steps:
            extended = torch.stack([scores[tokens] + row for tokens, row in step.items()])
            finite = extended[extended.isfinite()]
            if len(finite.unique()) < len(finite):
                return True
            rows = zip(step, extended, strict=True)
            scores = {(*tokens, token_id): score for tokens, row in rows for token_id, score in enumerate(row)}
        return False


class OutOfTime(StoppingCriteria):
    def __init__(self, last_step: int) -> None:
        self.last_step = last_step

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] - len(PROMPT) >= self.last_step)


class Allowed(LogitsProcessor):
    """Only some tokens may follow the last one, as a grammar would have it; `first` are those that may begin."""

    def __init__(self, first: Sequence[int] | None, after: dict[int, Sequence[int]]) -> None:
        self.first, self.after = first, after

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at_first = input_ids.shape[1] == len(PROMPT)
        for tokens, row in zip(input_ids.tolist(), scores, strict=True):
            allowed = self.first if at_first else self.after.get(tokens[-1])
            if allowed is not None:
                row[[token for token in range(len(row)) if token not in allowed]] = -torch.inf
        return scores


@lru_cache
def random_gptj(seed: int, sharpness: float, vocab_size: int = VOCAB_SIZE) -> GPTJForCausalLM:
    """`sharpness` is about the standard deviation of its logits; those of `END_TOKEN_IDS` are as much higher."""
    size = {"vocab_size": vocab_size, "n_positions": 160, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    config = GPTJConfig(**size, bos_token_id=0, eos_token_id=None)
    model = GPTJForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = sharpness / 4 if name == "lm_head.weight" else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + name.endswith("ln_f.weight"))
        model.lm_head.bias[END_TOKEN_IDS] += sharpness
    return model


def transformers_search(model: GPTJForCausalLM, case: Case, processors: list[LogitsProcessor], **more: Any) -> Any:
    prompt = torch.tensor([PROMPT])
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=case.theirs(**more),
        logits_processor=processors,
        stopping_criteria=[OutOfTime(case.last_step)] if case.last_step else [],
    )


def search(case: Case, logprobs_of: LogprobsOf) -> tuple[BeamSearch, list[list[Tokens]]]:
    """Drive our search to its end; also which beams ran in each step."""
    beams = case.ours()
    history = []
    new_beams: list[tuple[int, int]] | None = []
    while new_beams is not None:
        before = beams.running
        history.append([tuple(tokens) for tokens in before])
        candidates = [best(row, beams.num_candidates) for row in logprobs_of(before)]
        new_beams = beams.advance(candidates, out_of_time=len(history) == case.last_step)
        assert beams.running == [[*before[parent], token] for parent, token in new_beams or []]
    return beams, history


def best(logprobs: Tensor, count: int) -> list[TokenLogprob]:
    top = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(token, logprob) for token, logprob in pairs if np.isfinite(logprob)]


def assert_equal(beams: list[Beam], theirs: Any, tolerance: float = 0.0) -> None:
    rows = theirs.sequences[:, len(PROMPT) :].tolist()
    for beam, row in zip(beams, rows, strict=True):
        length = len(beam.token_ids)
        assert beam.token_ids == row[:length]
        assert set(row[length:]) <= {VOCAB_SIZE, -1}  # what transformers fills shorter rows with
    assert [beam.score for beam in beams] == pytest.approx(theirs.sequences_scores.tolist(), rel=tolerance, abs=0)


def assert_reasons(beams: list[Beam], case: Case) -> None:
    for beam in beams:
        last, length = beam.token_ids[-1], len(beam.token_ids)
        assert not (case.eos_token_ids | case.stop_token_ids).intersection(beam.token_ids[:-1])
        if beam.finish_reason is FinishReason.STOP:
            assert last in case.stop_token_ids
        elif beam.finish_reason is FinishReason.EOS:
            assert last in case.eos_token_ids - case.stop_token_ids
        else:
            assert last not in case.eos_token_ids | case.stop_token_ids
            assert length == (case.max_new_tokens if beam.finish_reason is FinishReason.LENGTH else case.last_step)


# ------------------------------------------------------------------------------------------ against transformers


def random_case(random: Random, early_stopping: Sequence[EarlyStopping] = tuple(EarlyStopping)) -> Case:
    num_beams = random.choice([2, 3, 4, random.randint(5, 8)])
    max_new_tokens = random.randint(1, 20)
    return Case(
        num_beams=num_beams,
        length_penalty=random.choice([1.0, 1.0, 0.0, 2.0, 0.6, -0.5, -1.0]),
        early_stopping=random.choice(early_stopping),
        num_return_sequences=random.randint(1, num_beams),
        max_new_tokens=max_new_tokens,
        min_new_tokens=random.choice([0, 0, random.randint(0, max_new_tokens)]),
        eos_token_ids=frozenset(random.choices(END_TOKEN_IDS, k=random.randint(0, 2))),
        stop_token_ids=frozenset(random.choices(END_TOKEN_IDS, k=random.choice([0, 0, 1]))),
        last_step=random.choice([None, None, None, None, random.randint(1, max_new_tokens)]),
    )


@pytest.mark.parametrize("seed", range(300))
def test_is_transformers(seed: int):
    """Fed with the very log-probabilities that transformers works with: the same beams run and the same bits come out.

    With a forced first token a single beam runs at first, where transformers runs copies of it.
    """
    random = Random(seed)
    case = random_case(random)
    goes_on = case.max_new_tokens > 1 and case.last_step != 1
    forced = [random.choice(OTHER_TOKEN_IDS)] if goes_on and random.random() < 0.2 else None
    recorder = Recorder()
    theirs = transformers_search(
        random_gptj(seed % 10, random.choice([1.0, 2.0, 4.0])),
        case,
        [Allowed(forced, {}), recorder],
        repetition_penalty=random.choice([1.0, 1.3]),
        no_repeat_ngram_size=random.choice([0, 0, 2]),
    )
    if recorder.has_ties:
        return
    beams, history = search(case, recorder.replay())
    assert history == [list(step) for step in recorder.steps]
    assert_equal(beams.results(), theirs)
    assert_reasons(beams.results(), case)


@pytest.mark.parametrize("seed", range(100))
def test_finds_what_transformers_finds_where_few_tokens_are_possible(seed: int):
    """transformers' fillers have scores of -1e9 / length ** penalty and below; its other results must be ours.

    FIRST is left out, where fillers count as finished hypotheses and end transformers' search too early.
    """
    random = Random(seed)
    case = random_case(random, [EarlyStopping.HEURISTIC, EarlyStopping.NEVER])
    case.num_return_sequences = case.num_beams
    allowed = [random.sample(range(VOCAB_SIZE), random.choice([0, 1, 2, 2, 3, 3])) for _ in range(VOCAB_SIZE + 1)]
    recorder = Recorder()
    processors = [Allowed(allowed[-1], dict(enumerate(allowed[:-1]))), recorder]
    theirs = transformers_search(random_gptj(seed % 10, 2.0), case, processors)
    if recorder.has_ties:
        return
    beams, _ = search(case, recorder.replay())
    is_real = theirs.sequences_scores > -1e6
    theirs.sequences, theirs.sequences_scores = theirs.sequences[is_real], theirs.sequences_scores[is_real]
    if not is_real.any():
        with pytest.raises(RequestFailedError):
            beams.results()
        return
    assert_equal(beams.results(), theirs)
    assert_reasons(beams.results(), case)


def forward(model: GPTJForCausalLM, running: list[list[int]]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *tokens] for tokens in running])).logits[:, -1]
    return logits.log_softmax(dim=-1)


@pytest.mark.parametrize("seed", range(4))
def test_is_transformers_in_the_setting_of_mlperf(seed: int):
    """4 beams, 30 to 128 tokens, early_stopping=True; each step computes its beams anew."""
    case = Case(
        num_beams=4,
        length_penalty=1.0,
        early_stopping=EarlyStopping.FIRST,
        num_return_sequences=4,
        max_new_tokens=128,
        min_new_tokens=30,
        eos_token_ids=frozenset([0]),
    )
    model = random_gptj(seed, 1.5, vocab_size=64)
    theirs = transformers_search(model, case, [])

    def logprobs_of(running: list[list[int]]) -> Tensor:
        logprobs = forward(model, running)
        if len(running[0]) < case.min_new_tokens:
            logprobs[:, 0] = -torch.inf
        return logprobs

    beams, _ = search(case, logprobs_of)
    assert_equal(beams.results(), theirs, tolerance=1e-5)
    assert all(len(beam.token_ids) > 30 for beam in beams.results())


# --------------------------------------------------------------------------------------------------- on its own


def table(**successors: dict[str, float]) -> LogprobsOf:
    """A language over letters: `start` and each letter → {letter: log-probability}; all else is impossible."""

    def logprobs_of(running: list[list[int]]) -> list[Tensor]:
        rows = torch.full((len(running), 26), -torch.inf)
        for row, tokens in zip(rows, running, strict=True):
            for letter, logprob in successors.get(chr(97 + tokens[-1]) if tokens else "start", {}).items():
                row[ord(letter) - 97] = logprob
        return list(rows)

    return logprobs_of


def text(beam: Beam) -> str:
    return "".join(chr(97 + token) for token in beam.token_ids)


def beam_case(**more: Any) -> Case:
    values = {
        "num_beams": 4,
        "length_penalty": 1.0,
        "early_stopping": EarlyStopping.FIRST,
        "num_return_sequences": 4,
        "max_new_tokens": 10,
        "eos_token_ids": frozenset([25]),
    }
    return Case(**{**values, **more})


@pytest.mark.parametrize("early_stopping", EarlyStopping)
def test_a_language_with_fewer_texts_than_beams_gives_them_all(early_stopping: EarlyStopping):
    """The choice of "az" or "bcz": no copy and no text after its end counts as a result, whatever was asked for."""
    language = table(start={"a": -1.0, "b": -2.0}, a={"z": 0.0}, b={"c": 0.0}, c={"z": 0.0})
    beams, history = search(beam_case(early_stopping=early_stopping, length_penalty=0.0), language)
    assert [(text(beam), beam.score) for beam in beams.results()] == [("az", -1.0), ("bcz", -2.0)]
    assert [len(running) for running in history] == [1, 2, 1]
    assert {beam.finish_reason for beam in beams.results()} == {FinishReason.EOS}


def test_a_beam_without_candidates_is_dropped():
    language = table(start={"a": -1.0, "b": -2.0}, b={"z": -3.0})
    beams, _ = search(beam_case(), language)
    assert [(text(beam), beam.score) for beam in beams.results()] == [("bz", -2.5)]


@pytest.mark.parametrize(("language", "num_tokens"), [(table(), 0), (table(start={"a": -1.0}, a={"b": -1.0}), 2)])
def test_no_result_at_all_is_an_error(language: LogprobsOf, num_tokens: int):
    beams, _ = search(beam_case(), language)
    with pytest.raises(RequestFailedError, match=f"follow {num_tokens} tokens"):
        beams.results()


@pytest.mark.parametrize("early_stopping", EarlyStopping)
@pytest.mark.parametrize("length_penalty", [1e300, -1e300, 1000.0, -1000.0, -5.0])
def test_extreme_penalties_give_finite_scores(early_stopping: EarlyStopping, length_penalty: float):
    language = table(start={"a": -0.5, "b": 0.0, "z": -30.0}, a={"a": -1.0, "z": -2.0}, b={"b": 0.0, "z": -9.0})
    beams, _ = search(beam_case(length_penalty=length_penalty, early_stopping=early_stopping), language)
    assert len(beams.results()) == 4
    scores = [beam.score for beam in beams.results()]
    assert np.isfinite(scores).all()
    assert scores == sorted(scores, reverse=True)


def test_a_stop_token_comes_before_an_end_token_and_both_before_length_and_time():
    language = table(start={"x": -1.0, "y": -2.0, "z": -3.0, "a": -4.0})
    case = beam_case(max_new_tokens=1, eos_token_ids=frozenset([24, 25]), stop_token_ids=frozenset([23, 24]))
    for last_step in None, 1:
        case.last_step = last_step
        beams, _ = search(case, language)
        assert [(text(beam), beam.finish_reason.value) for beam in beams.results()] == [
            ("x", "stop"),
            ("y", "stop"),
            ("z", "eos"),
            ("a", "length"),
        ]
    case.max_new_tokens = 2
    beams, _ = search(case, language)
    assert beams.results()[3].finish_reason is FinishReason.TIME


def test_candidates_may_come_in_any_order():
    """Best first is what the stages send, yet nothing rests on it."""
    candidates = [(4, -1.0), (7, -0.5), (1, -3.0), (2, -2.0), (9, -0.25)]
    for shuffled in itertools.permutations(candidates):
        assert beam_case().ours().advance([shuffled]) == [(0, 9), (0, 7), (0, 4), (0, 2)]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), length_penalty=st.sampled_from([0.0, 1.0, -1.0]))
def test_enough_beams_find_the_best_of_all_texts(seed: int, length_penalty: float):
    """An exhaustive search over texts of up to 4 of 3 tokens, one of which ends them."""
    logprobs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    scores = {}
    for length in 1, 2, 3, 4:
        for tokens in itertools.product(range(3), repeat=length):
            if 2 not in tokens[:-1] and (tokens[-1] == 2 or length == 4):
                steps = zip((3, *tokens[:-1]), tokens, strict=True)
                scores[tokens] = sum(logprobs[step].item() for step in steps) / length**length_penalty
    case = beam_case(
        num_beams=32,
        num_return_sequences=32,
        length_penalty=length_penalty,
        early_stopping=EarlyStopping.NEVER,
        max_new_tokens=4,
        eos_token_ids=frozenset([2]),
    )
    beams, _ = search(case, lambda running: [logprobs[tokens[-1] if tokens else 3] for tokens in running])
    found = {tuple(beam.token_ids): beam.score for beam in beams.results()}
    assert found == pytest.approx(scores, rel=1e-5)
