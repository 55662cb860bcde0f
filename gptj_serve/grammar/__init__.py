"""Output that follows a grammar: which tokens may come next, worked out by llguidance.

    GrammarCompiler ── source ── json_schema     what was asked for, in llguidance's own language, or a refusal
           │       └── trial ··· library         the grammar is compiled and walked in a process of its own first
           └── matcher ───────── library         one output's way through a compiled grammar

The text of a grammar comes from anybody. llguidance counts most of its effort and ends what takes too much, but not
all of it (long chains of references overflow its stack, some regexes and divisors keep it busy for minutes), so
what a grammar may cost is limited by the operating system, in the process that tries it out.
"""

from gptj_serve.grammar.compiler import GrammarCompiler
from gptj_serve.grammar.matcher import TokenMatcher

__all__ = ["GrammarCompiler", "TokenMatcher"]
