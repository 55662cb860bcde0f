"""Compiling: what is refused, what is kept, and what a grammar may cost."""

import asyncio
import gc
import json
import random
import threading
from pathlib import Path

import llguidance
import pytest
from outputs import TOKENIZERS, accepts, matcher_of, random_output

from gptj_serve.errors import InvalidRequestError
from gptj_serve.grammar import GrammarCompiler, TokenMatcher, library
from gptj_serve.grammar.matcher import CompiledGrammar
from gptj_serve.types import Grammar, GrammarKind

TOKENIZER = TOKENIZERS["small"]
WORDS = Grammar(GrammarKind.REGEX, "[a-z]{5}")


def new_compiler(**options: int) -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, TOKENIZER.special_token_ids, **options)


def compiled(matcher: TokenMatcher) -> object:
    return matcher._grammar


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (GrammarKind.REGEX, "", "empty"),
        (GrammarKind.REGEX, "a(b", "unclosed group"),
        (GrammarKind.REGEX, "ab\\", "backslash at the end"),
        (GrammarKind.REGEX, "(a)\\1", "backreferences are not supported"),
        (GrammarKind.REGEX, "a(?=b)", "look-around"),
        (GrammarKind.REGEX, r"\bword", "not supported"),
        (GrammarKind.REGEX, r"[^\s\S]", "no text matches it"),
        (GrammarKind.REGEX, r"(?-u:\xff)", "invalid UTF-8"),
        (GrammarKind.REGEX, "a/ | /b", None),
        (GrammarKind.CHOICE, "yes", "not JSON"),
        (GrammarKind.CHOICE, '"yes"', "not a JSON array of strings"),
        (GrammarKind.CHOICE, '["yes", 1]', "not a JSON array of strings"),
        (GrammarKind.CHOICE, "[]", "no choice"),
        (GrammarKind.CHOICE, '["yes", ""]', "is empty"),
        (GrammarKind.CHOICE, '["yes", "no", "yes"]', "'yes' is there 2 times"),
        (GrammarKind.CHOICE, '["\\ud800"]', "surrogates not allowed"),
        (GrammarKind.LARK, "", "no start rule"),
        (GrammarKind.LARK, "start: word", "1(8): unknown name"),
        (GrammarKind.LARK, 'start: "a', "lexer error"),
        (GrammarKind.LARK, '{"grammars": [{"json_schema": {}}], "max_tokens": 1}', "expecting rule"),
        (GrammarKind.LARK, "start: a\na: a", "no text matches it"),
        (GrammarKind.LARK, 'start: "a" <|endoftext|>', "<|endoftext|>"),
        (GrammarKind.LARK, 'start: "\\"<a>" /<b>\\// <[1-9]> // <c>', "<[1-9]>"),
        (GrammarKind.LARK, "start: a\na[lazy, max_tokens=3]: /x+/", "max_tokens"),
        (GrammarKind.LARK, 'start: a "b"\na[stop="c"]: /x+/', "stop"),
        (GrammarKind.LARK, "start: a\na[temperature=0.5]: /x+/", "temperature"),
        (GrammarKind.LARK, 'start: %json {"x-guidance": {"lenient": true}, "not": {}}', '"not"'),
    ],
)
def test_refused_with_the_reason(kind: GrammarKind, text: str, reason: str | None):
    if reason is None:
        matcher_of(kind, text)
        return
    with pytest.raises(InvalidRequestError, match="grammar=") as refusal:
        matcher_of(kind, text)
    assert reason in refusal.value.reason
    assert "\n" not in refusal.value.reason


def test_too_long():
    with pytest.raises(InvalidRequestError, match="65537 characters") as refusal:
        matcher_of(GrammarKind.REGEX, "a" * 65537)
    assert refusal.value.value == "a" * 99 + "…"


def test_a_model_without_end_tokens_follows_no_grammar():
    with pytest.raises(InvalidRequestError, match="no token that ends a text"):
        GrammarCompiler(TOKENIZER, frozenset()).compile(WORDS)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            GrammarKind.JSON_SCHEMA,
            '{"type": "integer", "multipleOf": 9999991}',
        ),  # one that llguidance spends minutes on
        (GrammarKind.LARK, "start: T0\n" + "".join(f"T{n}: T{n + 1}\n" for n in range(5000)) + 'T5000: "a"'),
    ],
    ids=["time", "stack"],
)
def test_what_takes_too_much_is_refused_and_harms_nobody(kind: GrammarKind, text: str):
    with pytest.raises(InvalidRequestError, match="too deep or too large"):
        matcher_of(kind, text)
    assert accepts(matcher_of(GrammarKind.REGEX, "abc"), "abc", TOKENIZER)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (GrammarKind.REGEX, r"(\w{1,50} ?){1,50}", "too many expressions"),
        (GrammarKind.LARK, "start: " + "/[a-z]/? " * 3000, "Too many items"),
        (
            GrammarKind.JSON_SCHEMA,
            json.dumps({"type": "object", "properties": {f"p{n}": {} for n in range(1000)}}),
            "max is 2000",
        ),
    ],
    ids=["lexer", "parser", "row"],
)
def test_what_compiles_but_is_too_complex_to_follow_is_refused(kind: GrammarKind, text: str, reason: str):
    with pytest.raises(InvalidRequestError, match=reason):
        matcher_of(kind, text, "demo")


def test_kept_grammars_are_bounded_by_number():
    compiler = new_compiler(max_cached=2)
    first, second, third = (Grammar(GrammarKind.REGEX, text) for text in "abc")
    of_first, of_second = compiled(compiler.compile(first)), compiled(compiler.compile(second))
    assert compiled(compiler.compile(first)) is of_first
    compiler.compile(third)  # the second one is the one not used for longest
    assert compiled(compiler.compile(first)) is of_first
    assert compiled(compiler.compile(second)) is not of_second


def test_kept_grammars_are_bounded_by_size():
    compiler = new_compiler(max_cached_chars=10)
    of_first = compiled(compiler.compile(WORDS))
    assert compiled(compiler.compile(WORDS)) is of_first
    compiler.compile(Grammar(GrammarKind.REGEX, "abc"))
    assert compiled(compiler.compile(WORDS)) is not of_first
    huge = Grammar(GrammarKind.REGEX, "a" * 11)
    assert accepts(compiler.compile(huge), "a" * 11, TOKENIZER)


def test_equal_grammars_asked_for_at_once_are_compiled_once():
    compiler = new_compiler(max_cached=0)  # so that nothing else can make them the same
    others = threading.Barrier(9)
    found: list[object] = []

    def ask() -> None:
        others.wait()
        found.append(compiled(compiler.compile(WORDS)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    others.wait()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert (
        len(set(map(id, found))) < 8
    )  # the process needs a while to start; then all that asked meanwhile are answered


async def test_the_event_loop_goes_on_and_a_cancelled_request_takes_nothing_along():
    compiler = new_compiler()
    tasks = [asyncio.create_task(compiler.compile_async(WORDS)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    turns = 0
    while not tasks[1].done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 1
    assert tasks[0].cancelled()
    assert compiled(await tasks[1]) is compiled(await tasks[2])
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        await compiler.compile_async(Grammar(GrammarKind.REGEX, "("))


async def test_a_grammar_that_all_have_left_before_its_turn_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    """Else a client could queue up seconds of work for everybody, one abandoned request after the other."""
    compiler = new_compiler()
    begun: list[str] = []
    goes_on = threading.Event()
    tried = compiler._tried

    def slowly(grammar: Grammar) -> CompiledGrammar:
        begun.append(grammar.text)
        assert goes_on.wait(10)
        return tried(grammar)

    monkeypatch.setattr(compiler, "_tried", slowly)

    def ask(text: str) -> asyncio.Task[TokenMatcher]:
        return asyncio.create_task(compiler.compile_async(Grammar(GrammarKind.REGEX, text)))

    running, left, half_left, stays = (ask(text) for text in ("running", "left", "shared", "shared"))
    while not begun:
        await asyncio.sleep(0.001)
    for task in (running, left, half_left):
        task.cancel()
    await asyncio.gather(running, left, half_left, return_exceptions=True)
    later = ask("left, and asked for again")
    goes_on.set()
    assert accepts(await stays, "shared", TOKENIZER)
    await later
    assert begun == ["running", "shared", "left, and asked for again"]
    assert (compiler._pending, compiler._num_waiting) == ({}, {})


def test_matchers_of_one_grammar_outlive_the_lexer_they_share(monkeypatch: pytest.MonkeyPatch):
    """All states that their texts need are kept, so at last a limit is hit; each goes on with a new lexer."""
    limits = llguidance.LLParserLimits(max_lexer_states=700, verbose_errors=False)
    monkeypatch.setattr(library, "LIMITS", limits)
    compiler = new_compiler()
    grammar = Grammar(GrammarKind.REGEX, "(a|b)*a(a|b){60}")
    in_midst = compiler.compile(grammar)
    first = in_midst._grammar.origin
    in_midst.accept(*TOKENIZER.encode("a"))
    for seed in range(12):
        text = random_output(compiler.compile(grammar), TOKENIZER, random.Random(seed))
        assert text[-61] == "a"
    assert in_midst._grammar.origin is not first
    assert accepts(in_midst, "b" * 60, TOKENIZER)


def test_nothing_is_left_running():
    compiler = new_compiler()
    compiler.compile(WORDS)
    process = compiler._trial._process._process
    assert process.poll() is None
    assert Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[2].endswith(b"library.py")
    del compiler
    gc.collect()
    assert process.poll() is not None
