"""The request body of `/v1/completions`: OpenAI's parameters, and vLLM's names for what OpenAI lacks."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gptj_serve.api.sampling_schema import SamplingExtras
from gptj_serve.api.schema_types import (
    MAX_TOKEN_RULES,
    Body,
    Count,
    NonEmpty,
    NumSequences,
    NumTopLogprobs,
    PositiveProbability,
    Seed,
    StopString,
    StopStrings,
    Temperature,
    TokenIdLists,
    TokenIds,
    off,
)

DEFAULT_MAX_TOKENS = 16  # OpenAI's

BiasedToken = Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Choices = Annotated[list[NonEmpty], Field(min_length=1)]
JSONSchema = str | dict[str, Any]


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be positive, or -1 for as many as fit")
    return value


NumKeptTokens = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(_not_zero)]


class StreamOptions(Body):
    include_usage: bool = False


class StructuredOutputs(Body):
    """One of them. `grammar` is Lark in llguidance's dialect."""

    json_schema: JSONSchema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: NonEmpty | None = None
    choice: Choices | None = None
    grammar: NonEmpty | None = None


class NamedJSONSchema(Body):
    """As OpenAI's clients send it. The schema is always followed, whatever `strict` says."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedJSONSchema | None = None


class CompletionRequest(SamplingExtras):
    # OpenAI
    model: str
    prompt: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | TokenIds | TokenIdLists
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_MAX_TOKENS  # 0 goes with echo
    temperature: Temperature | None = None
    top_p: PositiveProbability | None = None
    n: NumSequences | None = None
    best_of: NumSequences | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    echo: bool | None = None
    logprobs: NumTopLogprobs | None = None
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=MAX_TOKEN_RULES)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # the caller's own label for its end user; it has no effect by definition
    suffix: Annotated[str | None, off("")] = None
    response_format: ResponseFormat | None = None

    # vLLM
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_tokens: Count | None = None
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    prompt_logprobs: NumTopLogprobs | None = None
    truncate_prompt_tokens: NumKeptTokens | None = None  # keep so many of the last; -1: as many as fit
    use_beam_search: bool = False
    structured_outputs: StructuredOutputs | None = None
    guided_json: JSONSchema | None = None
    guided_regex: NonEmpty | None = None
    guided_choice: Choices | None = None
    guided_grammar: NonEmpty | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompt as a list of prompts, whichever of its four shapes it came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def num_new_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Completions that are made of each prompt, or beams; `n` of them are returned."""
        return self.best_of or self.num_choices

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []
