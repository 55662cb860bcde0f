"""What a grammar lets through, and that it lets all of it through."""

import json
import random
import re

import pytest
from fakes import ADDED_TOKEN, SPECIAL_TOKEN, small_backend_json
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import (
    COMPILERS,
    TOKENIZERS,
    accepts,
    all_outputs,
    allowed,
    is_complete,
    matcher_of,
    random_output,
    spellings,
)
from tokenizers import Tokenizer as Backend

from gptj_serve.grammar import GrammarCompiler
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import Grammar, GrammarKind

REGEXES = [
    r"[a-z]{1,8}",
    r"(the|The) (fox|dog)s?",
    r"[0-9]{1,3}(\.[0-9]{1,3}){3}",
    r"^(ab|a)c?é{0,2}$",
    r"[^a-zA-Z\n]{3}",
    r".{0,6}",
    r"(?i)paris[!?]?",
    r"a/b\\c\"\n\t\x41",
    r"(东京|столица|€|😀)+",
    "raw\nnewline/slash\\/escaped\\\nnewline",
    r"x*",
    "(?x) a # a comment\n b",
    r"#include|//|<\|",
]
CHOICES = [
    ["yes", "no"],
    ["a", "ab", "abc", "b"],
    ["Ljubljana", "Žlutý kůň", "東京", "é", "e", "😀", "👩‍👩‍👧"],
    ['"', "\\", "\n", "\x00", "\x7f", "/", " ", "a // b", "# c", "<|x|>"],
    [f"option {n}" for n in range(3000)],
    [f"{ADDED_TOKEN}!", ADDED_TOKEN, SPECIAL_TOKEN],
]
FINITE = [r"(ab|a)c?é{0,2}", r"the|them|then?", r"[a-c]{0,2}€?", r"(?:Paris|par)is?"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("regex", REGEXES)
def test_output_matches_the_regex(regex: str, tokenizer: str):
    for seed in range(15):
        matcher = matcher_of(GrammarKind.REGEX, regex, tokenizer)
        text = random_output(matcher, TOKENIZERS[tokenizer], random.Random(seed))
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: ascii(choices[:3]))
def test_output_is_one_of_the_choices_and_each_can_be_had(choices: list[str], tokenizer: str):
    grammar = json.dumps(choices)
    outputs = {
        random_output(matcher_of(GrammarKind.CHOICE, grammar, tokenizer), TOKENIZERS[tokenizer], random.Random(seed))
        for seed in range(20)
    }
    assert outputs <= set(choices)
    for choice in choices[:20]:
        if SPECIAL_TOKEN not in choice:
            assert accepts(matcher_of(GrammarKind.CHOICE, grammar, tokenizer), choice, TOKENIZERS[tokenizer])
        cut = random.Random(choice)
        assert accepts(matcher_of(GrammarKind.CHOICE, grammar, tokenizer), choice, TOKENIZERS[tokenizer], cut)


LARK = r"""
start: sum
sum: sum ("+" | "-") product | product
product: product "*" atom | atom
atom: NUMBER | "(" sum ")"  // <not a token> "stop="
NUMBER: /[0-9]{1,3}/
%ignore / /
"""


def test_output_follows_the_lark_grammar():
    for seed in range(20):
        text = random_output(matcher_of(GrammarKind.LARK, LARK), TOKENIZERS["small"], random.Random(seed), limit=2000)
        assert not set(text) - set("0123456789+-*() ")
        eval(re.sub(r"\b0+(?=\d)", "", text))


@pytest.mark.parametrize("regex", FINITE)
def test_every_spelling_of_every_text_can_be_had_and_no_other(regex: str):
    tokenizer = TOKENIZERS["small"]
    outputs = list(all_outputs(matcher_of(GrammarKind.REGEX, regex), tokenizer))
    texts = {tokenizer.decode(output) for output in outputs}
    alphabet = "".join(sorted(set(re.sub(r"\W", "", regex) + "abcé€")))
    assert texts
    assert all(re.fullmatch(regex, text) for text in texts)
    nearby = {text[:n] + char + text[n:] for text in texts for n in range(len(text) + 1) for char in ["", *alphabet]}
    nearby |= {text[:n] + text[n + 1 :] for text in nearby for n in range(len(text))}
    assert {text for text in nearby if re.fullmatch(regex, text)} == texts
    assert len(outputs) == len(set(outputs))
    assert set(outputs) == {spelling for text in texts for spelling in spellings(text.encode(), tokenizer)}


@settings(max_examples=40)
@given(
    st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True), st.randoms(use_true_random=False)
)
def test_any_choices(choices: list[str], choose: random.Random):
    tokenizer = TOKENIZERS["small"]
    grammar = json.dumps(choices)
    assert random_output(matcher_of(GrammarKind.CHOICE, grammar), tokenizer, choose) in choices
    choice = choose.choice(choices)
    assert accepts(matcher_of(GrammarKind.CHOICE, grammar), choice, tokenizer, choose)
    assert accepts(matcher_of(GrammarKind.CHOICE, grammar), choice + "a", tokenizer, choose) == (
        choice + "a" in choices
    )


def test_the_end_is_allowed_exactly_where_the_text_is_complete():
    tokenizer = TOKENIZERS["small"]
    (eos,) = tokenizer.special_token_ids
    matcher = matcher_of(GrammarKind.REGEX, "ab?")
    assert not is_complete(matcher, tokenizer)
    with pytest.raises(ValueError, match="not allowed"):
        matcher.accept(eos)
    matcher.accept(*tokenizer.encode("a"))
    assert is_complete(matcher, tokenizer)
    assert not matcher.is_finished
    ended = matcher.fork()
    ended.accept(eos)
    matcher.accept(*tokenizer.encode("b"))
    for finished in (ended, matcher):
        assert finished.is_finished
        assert allowed(finished) == [eos]
        finished.accept(eos)
        assert allowed(finished) == [eos]


def test_an_empty_text_is_finished_at_once():
    assert matcher_of(GrammarKind.REGEX, "()").is_finished


def test_a_refused_token_changes_nothing():
    tokenizer = TOKENIZERS["small"]
    matcher = matcher_of(GrammarKind.REGEX, "abc")
    for token_id in (-1, *tokenizer.encode("b"), tokenizer.num_token_ids, tokenizer.num_token_ids + 100, 10**9):
        with pytest.raises(ValueError, match=f"token {token_id} "):
            matcher.accept(token_id)
    assert accepts(matcher, "abc", tokenizer)


def test_forks_are_independent():
    tokenizer = TOKENIZERS["small"]
    matcher = matcher_of(GrammarKind.REGEX, "a(b|c)d")
    matcher.accept(*tokenizer.encode("a"))
    before = matcher.allowed_mask()
    forks = [matcher.fork() for _ in range(3)]
    assert accepts(forks[0], "bd", tokenizer)
    assert not accepts(forks[1], "dd", tokenizer)
    assert matcher.allowed_mask() == before == forks[2].allowed_mask()
    assert accepts(forks[2], "cd", tokenizer)
    assert accepts(matcher, "bd", tokenizer)


def test_only_text_has_tokens():
    tokenizer = TOKENIZERS["small"]
    anything = allowed(matcher_of(GrammarKind.REGEX, r"(?s:.*)"))
    assert set(anything) >= set(tokenizer.encode(ADDED_TOKEN)) | tokenizer.special_token_ids
    assert max(anything) < tokenizer.num_token_ids
    (special,) = tokenizer.special_token_ids
    assert special not in allowed(matcher_of(GrammarKind.REGEX, r"(?s:.+)"))
    assert special not in allowed(matcher_of(GrammarKind.CHOICE, json.dumps([SPECIAL_TOKEN])))
    not_utf8 = {token_id for token_id in range(256) if tokenizer.token_bytes(token_id) == b"\xff"}
    assert not_utf8
    assert not not_utf8 & set(anything)
    assert not not_utf8 & set(allowed(matcher_of(GrammarKind.LARK, "start: A\nA: ~/b/")))


def test_several_end_tokens_one_of_them_text_and_one_beyond_the_tokenizer():
    tokenizer = TOKENIZERS["small"]
    text_id = max(i for i in range(tokenizer.num_token_ids) if tokenizer.token_bytes(i).isalpha())
    word = tokenizer.decode([text_id])
    assert len(word) > 1
    eos_token_ids = tokenizer.special_token_ids | {text_id, tokenizer.num_token_ids + 40}
    matcher = GrammarCompiler(tokenizer, eos_token_ids).compile(Grammar(GrammarKind.REGEX, f"({word})+"))
    assert not eos_token_ids & set(allowed(matcher))
    for byte in word:
        matcher.accept(*tokenizer.encode(byte))
    assert eos_token_ids < set(allowed(matcher))
    for eos in eos_token_ids:
        fork = matcher.fork()
        fork.accept(eos)
        assert fork.is_finished
        assert set(allowed(fork)) == eos_token_ids


def test_tokens_with_the_same_text_are_allowed_together():
    backend = Backend.from_str(small_backend_json())
    backend.add_tokens([" the"])  # the blank stands for itself, unlike in the vocabulary's own token
    tokenizer = Tokenizer(backend)
    same = {token_id for token_id in range(tokenizer.num_token_ids) if tokenizer.token_bytes(token_id) == b" the"}
    assert len(same) == 2
    matcher = GrammarCompiler(tokenizer, tokenizer.special_token_ids).compile(Grammar(GrammarKind.REGEX, "(?: the)+"))
    assert same < set(allowed(matcher))
    for token_id in same:
        matcher.accept(token_id)
    assert is_complete(matcher, tokenizer)


def test_a_token_after_which_nothing_can_follow_is_an_error():
    """Deeper than the trial looks, for that would refuse the grammar."""
    tokenizer = TOKENIZERS["small"]
    matcher = matcher_of(GrammarKind.LARK, 'start: "x"{40} ("a" endless | "b")\nendless: endless "y"')
    for _ in range(40):
        matcher.accept(*tokenizer.encode("x"))
    with pytest.raises(ValueError, match="after 41 tokens nothing can follow"):
        matcher.fork().accept(*tokenizer.encode("a"))
    assert accepts(matcher, "b", tokenizer)


@pytest.mark.parametrize("name", COMPILERS)
def test_masks_cover_the_vocabulary(name: str):
    assert 8 * len(matcher_of(GrammarKind.REGEX, "a", name).allowed_mask()) >= TOKENIZERS[name].num_token_ids
