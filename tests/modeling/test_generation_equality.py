"""Random calls of `generate`, against transformers' for each row alone and, without padding, for the whole batch.

Greedy and beam search, with the same keyword arguments for both. `pytest -m large` makes thousands of calls.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import TINY, pair
from torch import Tensor
from transformers.utils import logging as transformers_logging

from gptj_serve import GPTJForCausalLM

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default", "ignore:Unfeasible length constraints"),
]

PAD = TINY["pad_token_id"]
MAX_NEW = 10
FILLED_UP = -1e8
"""Beams with scores below are transformers' copies of others, where constraints leave too few."""


@dataclass
class Models:
    """Both sides' model, and the token ids that come up often enough to be worth forbidding."""

    theirs: Any
    ours: GPTJForCausalLM
    frequent: list[int]

    @property
    def eos(self) -> list[int]:
        return self.frequent[3:6]


@dataclass(frozen=True)
class Call:
    """`rows` are without padding; negative prompts go with guidance."""

    rows: list[list[int]]
    padded_length: int
    is_left: bool
    negative_rows: list[list[int]] | None
    options: dict[str, Any]
    ours_only: dict[str, Any]

    @property
    def is_unpadded(self) -> bool:
        return all(len(row) == self.padded_length for row in self.rows) and self.negative_rows is None

    @property
    def arguments(self) -> dict[str, Any]:
        input_ids, attention_mask = padded(self.rows, self.padded_length, self.is_left)
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.negative_rows is not None:
            longest = max(map(len, self.negative_rows))
            ids, mask = padded(self.negative_rows, longest, True)
            tensors |= {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}
        return tensors | self.options

    def alone(self, index: int) -> dict[str, Any]:
        """The arguments for one row without padding. Lengths count padding, so they become smaller by it."""
        row = self.rows[index]
        num_padding = self.padded_length - len(row)
        lengths = {n: max(self.options[n] - num_padding, 0) for n in ("max_length", "min_length") if n in self.options}
        arguments = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()}
        if self.negative_rows is not None:
            arguments["negative_prompt_ids"] = torch.tensor([self.negative_rows[index]])
        if "num_beams" in self.options:
            arguments |= {"return_dict_in_generate": True, "output_scores": True}
        return {**self.options, **lengths, **arguments}


def padded(rows: list[list[int]], length: int, is_left: bool) -> tuple[Tensor, Tensor]:
    def fill(row: list[int], value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return padding + row if is_left else row + padding

    return torch.tensor([fill(row, PAD) for row in rows]), torch.tensor([fill([1] * len(row), 0) for row in rows])


@pytest.fixture(scope="module")
def models() -> list[Models]:
    transformers_logging.set_verbosity_error()
    shapes = [
        {},
        {"n_layer": 3, "n_embd": 24, "n_head": 3, "rotary_dim": 8, "vocab_size": 97, "layer_norm_epsilon": 1e-3},
    ]
    return [load(seed, {"n_positions": 40, "eos_token_id": None, **shape}) for seed, shape in enumerate(shapes)]


def load(seed: int, config: dict[str, Any]) -> Models:
    theirs, ours = pair("GPTJForCausalLM", seed, **config)
    counts: Counter[int] = Counter()
    prompts = torch.randint(1, 50, (24, 5), generator=torch.Generator().manual_seed(seed))
    counts.update(theirs.generate(prompts, max_new_tokens=10)[:, 5:].flatten().tolist())
    del counts[PAD]
    return Models(theirs, ours, [token for token, _ in counts.most_common(12)])


class Draw:
    """Chance, and the shapes that it gives to a call."""

    def __init__(self, models: Models, chance: random.Random) -> None:
        self.models = models
        self.chance = chance

    def maybe(self, probability: float) -> bool:
        return self.chance.random() < probability

    def token(self) -> int:
        """Not the padding: in a prompt, that is hidden."""
        if self.maybe(0.6):
            return self.chance.choice(self.models.frequent)
        return self.chance.randrange(1, PAD)

    def tokens(self, least: int, most: int) -> list[int]:
        return [self.token() for _ in range(self.chance.randint(least, most))]

    def call(self) -> Call:
        rows = [self.tokens(1, 8) for _ in range(self.chance.choice([1, 1, 2, 3]))]
        if self.maybe(0.4):
            rows = [(row * 8)[: len(rows[0])] for row in rows]
        longest = max(map(len, rows))
        length = longest + self.chance.choice([0, 0, 0, 4])
        options = {"pad_token_id": PAD, "do_sample": False, **self.lengths(length), **self.processors()}
        negative_rows = None
        ours_only: dict[str, Any] = {}
        if self.maybe(0.4) and not isinstance(options.get("forced_eos_token_id"), list):  # those are all as good
            options |= self.beams()
        elif self.maybe(0.2):
            options["guidance_scale"] = self.chance.choice([0.0, 0.5, 1.5, 3.0])
            negative_rows = [self.tokens(1, 9) for _ in rows] if self.maybe(0.6) else None
        elif self.maybe(0.4):
            ours_only["prompt_lookup_num_tokens"] = self.chance.randint(1, 6)  # may not change anything
        if self.maybe(0.25):
            options |= {"return_dict_in_generate": True, "output_scores": self.maybe(0.8)}
            options["output_logits"] = "num_beams" not in options and self.maybe(0.5)
        return Call(rows, length, self.maybe(0.7), negative_rows, options, ours_only)

    def lengths(self, num_prompt: int) -> dict[str, Any]:
        most = self.chance.randint(1, MAX_NEW)
        options: dict[str, Any] = {"max_new_tokens": most} if self.maybe(0.7) else {"max_length": num_prompt + most}
        if self.maybe(0.2):
            options["min_new_tokens"] = self.chance.randint(0, most + 1)
        elif self.maybe(0.2):
            options["min_length"] = self.chance.randint(0, num_prompt + most)
        eos = self.models.eos[: self.chance.randint(1, 3)]
        options["eos_token_id"] = eos[0] if len(eos) == 1 else eos
        return options

    def processors(self) -> dict[str, Any]:
        made: dict[str, Callable[[], Any]] = {
            "repetition_penalty": lambda: self.chance.choice([0.7, 1.2, 1.8, 3.0]),
            "no_repeat_ngram_size": lambda: self.chance.randint(1, 4),
            "bad_words_ids": lambda: [self.tokens(1, 3) for _ in range(self.chance.randint(1, 4))],
            "sequence_bias": self.sequence_bias,
            "suppress_tokens": lambda: self.tokens(1, 5),
            "begin_suppress_tokens": lambda: self.tokens(1, 5),
            "exponential_decay_length_penalty": lambda: (self.chance.randint(0, 5), self.chance.choice([1.1, 1.7])),
        }
        options = {name: make() for name, make in made.items() if self.maybe(0.2)}
        suppressed = options.get("suppress_tokens", [])  # both sides refuse to force these
        if self.maybe(0.15) and (forced := self.token()) not in suppressed:
            options["forced_bos_token_id"] = forced
        if self.maybe(0.15) and (eos := self.models.eos[0]) not in suppressed:
            options["forced_eos_token_id"] = self.chance.choice([eos, [eos, self.models.eos[1]]])
        return options

    def sequence_bias(self) -> Any:
        biases = {tuple(self.tokens(1, 3)): self.chance.choice([-4.0, -0.5, 1.0, 6.0]) for _ in range(3)}
        return biases if self.maybe(0.5) else [[list(ids), bias] for ids, bias in biases.items()]

    def beams(self) -> dict[str, Any]:
        num_beams = self.chance.randint(2, 6)
        return {
            "num_beams": num_beams,
            "num_return_sequences": self.chance.randint(1, num_beams),
            "early_stopping": self.chance.choice([False, True, "never"]),
            "length_penalty": self.chance.choice([1.0, 1.0, 0.0, 2.0, -1.0]),
        }


def mismatch(models: Models, call: Call) -> str | None:
    """What is wrong with ours, if anything."""
    ours = models.ours.generate(**call.arguments, **call.ours_only)
    has_beams = "num_beams" in call.options
    if call.is_unpadded and not has_beams:
        return mismatch_of_outputs(ours, models.theirs.generate(**call.arguments))
    num_each = call.options.get("num_return_sequences", 1)
    for index in range(len(call.rows)):
        theirs = models.theirs.generate(**call.alone(index))
        part = torch.arange(index * num_each, (index + 1) * num_each)
        if has_beams:
            is_real = theirs.sequences_scores > FILLED_UP
            part = part[is_real]
            theirs.sequences, theirs.sequences_scores = theirs.sequences[is_real], theirs.sequences_scores[is_real]
        wrong = mismatch_of_tokens(call, index, sequences(ours)[part], sequences(theirs))
        if wrong := wrong or mismatch_of_scores(ours, part, theirs):
            return f"row {index}: {wrong}"
    return None


def mismatch_of_outputs(ours: Any, theirs: Any) -> str | None:
    """Of the whole batch at once."""
    if not torch.equal(sequences(ours), sequences(theirs)):
        return f"ours {sequences(ours).tolist()}, theirs {sequences(theirs).tolist()}"
    return mismatch_of_scores(ours, torch.arange(len(sequences(ours))), theirs)


def mismatch_of_tokens(call: Call, index: int, answers: Tensor, theirs: Tensor) -> str | None:
    prompt = call.arguments["input_ids"][index]
    expected = torch.cat([prompt.expand(len(theirs), -1), theirs[:, len(call.rows[index]) :]], dim=1)
    common = min(expected.shape[1], answers.shape[1])
    beyond = torch.cat([expected[:, common:], answers[:, common:]], dim=1)
    if not torch.equal(answers[:, :common], expected[:, :common]) or (beyond != PAD).any():
        return f"ours {answers.tolist()}, theirs {expected.tolist()}"
    return None


def mismatch_of_scores(ours: Any, part: Tensor, theirs: Any) -> str | None:
    """Of beams, ours has the scores of whole sequences only."""
    if isinstance(ours, Tensor):
        return None
    if hasattr(ours, "sequences_scores"):
        pairs = [("sequences_scores", ours.sequences_scores, theirs.sequences_scores)]
        pairs = pairs if ours.sequences_scores is not None else []
    else:
        if (ours.scores is None, ours.logits is None) != (theirs.scores is None, theirs.logits is None):
            return f"ours has {list(ours)}, theirs has {list(theirs)}"
        pairs = [
            (name, *steps)
            for name in ("scores", "logits")
            for steps in zip(getattr(ours, name) or (), getattr(theirs, name) or (), strict=False)
        ]
    for name, mine, reference in pairs:
        if not torch.allclose(mine[part], reference, atol=1e-4, rtol=1e-4):
            return f"{name}: ours {mine[part]}, theirs {reference}"
    return None


def sequences(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sequences


def mismatches(models: list[Models], seed: int, num_calls: int) -> Iterator[str]:
    chance = random.Random(seed)
    for _ in range(num_calls):
        drawn = chance.choice(models)
        call = Draw(drawn, chance).call()
        if wrong := mismatch(drawn, call):
            yield f"{call}\n  {wrong}"


def test_random_calls_return_what_transformers_returns(models: list[Models]):
    found = list(mismatches(models, 1, 200))
    assert not found, "\n".join(found)


@pytest.mark.large
@pytest.mark.parametrize("seed", range(10, 20))
def test_thousands_of_calls(models: list[Models], seed: int):
    found = list(mismatches(models, seed, 300))
    assert not found, "\n".join(found)
