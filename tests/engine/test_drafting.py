"""`Drafter`: every draft continues the longest match, whichever way the sequence came about."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from gptj_serve.engine.drafting import Drafter

few_tokens = st.lists(st.integers(0, 3), max_size=40)
prompts = st.lists(st.integers(0, 3), min_size=1, max_size=40)
ngram_sizes = st.integers(1, 8)


def longest_matches(token_ids: list[int], max_ngram: int) -> list[int]:
    """Where what followed an earlier occurrence of the last n tokens begins, for the largest n that has one."""
    end = len(token_ids)
    for n in range(min(max_ngram, end), 0, -1):
        if matches := [at for at in range(n, end) if token_ids[at - n : at] == token_ids[end - n :]]:
            return matches
    return []


def continued(token_ids: list[int], source: int, num_tokens: int) -> list[int]:
    """`num_tokens` copied from `source` on, and so from the copy itself once the sequence is at its end."""
    copy = list(token_ids)
    for i in range(num_tokens):
        copy.append(copy[source + i])
    return copy[len(token_ids) :]


def drafts(prompt: str, output: str, max_ngram: int = 2, num_tokens: int = 4) -> list[str]:
    """The draft after the prompt and after each token of the output; tokens are letters."""
    drafter = Drafter([ord(letter) for letter in prompt], max_ngram)
    texts = [prompt + output[:i] for i in range(len(output) + 1)]
    return ["".join(map(chr, drafter.propose([ord(letter) for letter in text], num_tokens))) for text in texts]


@given(prompt=prompts, output=few_tokens, max_ngram=ngram_sizes, num_tokens=st.integers(1, 12))
def test_a_draft_continues_one_of_the_longest_matches(
    prompt: list[int], output: list[int], max_ngram: int, num_tokens: int
):
    """And so there is one whenever the last token occurred before, and never a longer one than asked for."""
    drafter = Drafter(prompt, max_ngram)
    for num_output in range(len(output) + 1):
        token_ids = prompt + output[:num_output]
        draft = drafter.propose(token_ids, num_tokens)
        matches = longest_matches(token_ids, max_ngram)
        if matches:
            assert draft in [continued(token_ids, source, num_tokens) for source in matches]
        else:
            assert draft == []
        assert bool(matches) == (token_ids[-1] in token_ids[:-1])


@given(prompt=prompts, output=few_tokens, max_ngram=ngram_sizes, asked=st.sets(st.integers(0, 40)))
def test_a_draft_depends_on_prompt_and_output_alone(
    prompt: list[int], output: list[int], max_ngram: int, asked: set[int]
):
    """However often one was asked for on the way: several tokens come at once when a draft was accepted."""
    drafter = Drafter(prompt, max_ngram)
    for num_output in sorted(asked):
        token_ids = prompt + output[:num_output]
        assert drafter.propose(token_ids, 5) == Drafter(prompt, max_ngram).propose(token_ids, 5)


@given(prompt=prompts, output=few_tokens, max_ngram=ngram_sizes, num_tokens=st.integers(1, 12))
def test_where_nothing_is_to_be_chosen_it_is_the_draft_of_transformers(
    prompt: list[int], output: list[int], max_ngram: int, num_tokens: int
):
    token_ids = prompt + output
    generator = PromptLookupCandidateGenerator(None, num_tokens, max_ngram, max_length=1000)
    candidates, _ = generator.get_candidates(torch.tensor([token_ids]))
    theirs = candidates[0, len(token_ids) :].tolist()
    ours = Drafter(prompt, max_ngram).propose(token_ids, num_tokens)
    assert bool(ours) == bool(theirs)
    if len(longest_matches(token_ids, max_ngram)) == 1:
        assert ours[: len(theirs)] == theirs  # theirs ends with the sequence


def test_in_the_prompt_the_first_occurrence_is_taken():
    assert drafts("abcd abef ab", "") == ["cd a"]


def test_in_the_output_the_latest_occurrence_is_taken_before_any_in_the_prompt():
    assert drafts("ab12 ", "ab34 ab56 ab")[-1] == "56 a"


def test_a_source_is_kept_while_it_predicts():
    """What follows "yz" first is "1", yet the text that is being copied goes on with "2"."""
    assert drafts("yz1 abyz2 ", "abyz") == ["abyz", "byz2", "yz2 ", "z2 a", "2 ab"]


def test_a_source_is_left_when_it_fails():
    assert drafts("abc12 bx34 ", "abx")[-2:] == ["c12 ", "34 a"]


def test_the_longest_match_is_taken():
    """After "q" alone "1" is the guess, and after "pq" it is "2"."""
    assert drafts("q1 pq2 xq", "") == ["1 pq"]
    assert drafts("q1 pq2 pq", "") == ["2 pq"]
    assert drafts("q1 pq2 pq", "", max_ngram=1) == ["1 pq"]


@pytest.mark.parametrize(("text", "draft"), [("a", ""), ("aa", "aaaaaa"), ("xab ab", " ab ab"), ("abc", "")])
def test_a_loop_goes_round(text: str, draft: str):
    assert drafts(text, "", num_tokens=6) == [draft]
    assert drafts(text[0], text[1:], num_tokens=6)[-1] == draft


def test_nothing_is_drafted_if_nothing_is_asked_for():
    assert drafts("aaaa", "a", num_tokens=0) == ["", ""]
