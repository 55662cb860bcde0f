"""What all request bodies are made of.

Unknown fields are refused, and so is every known one that is not supported, unless it has the value that means "off":
nothing is silently ignored. Types are strict: "20" is no number, 1 no boolean; an integer may stand for a float.
Limits that depend on the model or the configuration are checked where those are known.
"""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    Strict,
    StringConstraints,
    WithJsonSchema,
)

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKENS = 256
MAX_SEQUENCES = 64
"""Completions of one prompt, or beams."""
MAX_TOP_LOGPROBS = 20
"""Alternatives with each token; vLLM's `max_logprobs` too is 20 unless set otherwise."""
MAX_TOKEN_RULES = 1024
"""Entries in a list of biased or forbidden words."""
MAX_WORD_CHARACTERS = 256
MAX_CACHE_SALT_CHARACTERS = 1024
MAX_GUIDANCE_SCALE = 100
"""transformers takes any number but 1 for guidance, also those below 1, which lead away from the prompt. Numbers like
1e30 would take the scores out of float32."""

Count = Annotated[int, Field(ge=0, lt=2**31)]
PositiveCount = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1)]
NumTopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
NumSequences = Annotated[int, Field(ge=1, le=MAX_SEQUENCES)]

Temperature = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveProbability = Annotated[float, Field(gt=0, le=1)]
Cutoff = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
OpenAIPenalty = Annotated[float, Field(ge=-2, le=2)]
GuidanceScale = Annotated[float, Field(ge=-MAX_GUIDANCE_SCALE, le=MAX_GUIDANCE_SCALE)]

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Texts = Annotated[list[NonEmpty], Field(min_length=1)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=MAX_WORD_CHARACTERS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_STRING_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)]

JSON = Annotated[JsonValue, WithJsonSchema({})]
"""Anything, in the place of `Any`: what is in it is checked as all else is."""

JSON_TUPLE = Strict(False)
"""JSON has no tuples: a strict one would take no list."""


def off(*off_values: Any) -> AfterValidator:
    """Accept a parameter only with a value that asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in off_values:
            raise ValueError("is not supported")
        return value

    return AfterValidator(check)


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be positive, or -1 for as many as fit")
    return value


NumKeptTokens = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(_not_zero)]


class Body(BaseModel):
    """`str_min_length` has pydantic look into all text, keys too, and refuse what is no Unicode: JSON's escapes can
    write half a surrogate pair, which no UTF-8 has and nothing behind the door can send on."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_min_length=0)
