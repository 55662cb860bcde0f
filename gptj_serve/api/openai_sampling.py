"""What OpenAI's two generating routes take alike: OpenAI's parameters, and vLLM's names for what OpenAI lacks."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gptj_serve.api.sampling_schema import SamplingExtras
from gptj_serve.api.schema_types import (
    JSON,
    MAX_TOKEN_RULES,
    Body,
    Count,
    NonEmpty,
    NumKeptTokens,
    NumSequences,
    NumTopLogprobs,
    PositiveProbability,
    Seed,
    StopString,
    StopStrings,
    Temperature,
    Texts,
)

BiasedToken = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
JSONSchema = str | dict[str, JSON]


class StreamOptions(Body):
    include_usage: bool = Field(False, description="A last event with the usage; all others have `usage: null`.")
    continuous_usage_stats: bool = Field(
        False, description="With include_usage, vLLM's: all other events have the usage until then."
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats goes with include_usage only")
        return self


class StructuredOutputs(Body):
    """One of them."""

    json_schema: JSONSchema | None = Field(
        None, alias="json", description="A JSON schema: an object, or one written as a string."
    )
    json_object: bool | None = Field(None, description="Any JSON object.")
    regex: NonEmpty | None = Field(None, description="A regular expression.")
    choice: Texts | None = Field(None, description="One of these texts.")
    grammar: NonEmpty | None = Field(None, description="A grammar in llguidance's dialect of Lark.")


class NamedJSONSchema(Body):
    """As OpenAI's clients send it."""

    schema_: dict[str, JSON] = Field(alias="schema", description="The JSON schema.")
    name: str | None = Field(None, description="A label of the client's own; it has no effect by definition.")
    description: str | None = Field(None, description="A label of the client's own; it has no effect by definition.")
    strict: bool | None = Field(None, description="The schema is always followed, whatever this says.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = Field(description="`text` is off.")
    json_schema: NamedJSONSchema | None = Field(None, description="Goes with type json_schema, and that with it.")
    value: dict[str, JSON] | None = Field(
        None, description="A JSON schema with type json_object, which is how huggingface_hub sends one."
    )


class OpenAISampling(SamplingExtras):
    """How many tokens, and log-probabilities in which form, is for the routes to say."""

    # OpenAI
    model: str = Field(description="The served model's name, as in `GET /v1/models`.")
    temperature: Temperature | None = Field(None, description="0 is greedy. Default: 1; 0 with use_beam_search.")
    top_p: PositiveProbability | None = Field(
        None, description="Only the likeliest tokens that together have so much probability. Default: 1, all."
    )
    n: NumSequences | None = Field(None, description="So many choices for each prompt. Default: 1.")
    seed: Seed | None = Field(
        None, description="The same seed gives the same text, alone or among others. Default: a new one each time."
    )
    stop: StopString | StopStrings | None = Field(None, description="Texts before which the generated one ends.")
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=MAX_TOKEN_RULES)] | None = Field(
        None, description='`{"token id": bias}`: added to the token\'s score.'
    )
    stream: bool = Field(False, description="Answer with server-sent events, as the text comes.")
    stream_options: StreamOptions | None = Field(None, description="Goes with stream.")
    user: str | None = Field(None, description="The caller's label for its end user; it has no effect by definition.")
    response_format: ResponseFormat | None = Field(None, description="What the text must match, in OpenAI's form.")

    # vLLM
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Only so many of the likeliest tokens; 0 and -1 are off."
    )
    min_tokens: Count | None = Field(None, description="No end token and no stop token before so many tokens.")
    include_stop_str_in_output: bool = Field(False, description="Keep the stop string at the end of the text.")
    return_token_ids: bool = Field(False, description="Also return the generated tokens' ids.")
    prompt_logprobs: NumTopLogprobs | None = Field(
        None, description="Also return the log-probabilities of the prompt's tokens and of so many of the likeliest."
    )
    truncate_prompt_tokens: NumKeptTokens | None = Field(
        None, description="Keep so many of the prompt's last tokens; -1: as many as fit with the new ones."
    )
    use_beam_search: bool = Field(False, description="Beam search instead of drawing.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What the text must match, in vLLM's form.")
    guided_json: JSONSchema | None = Field(None, description="The text must match this JSON schema.")
    guided_regex: NonEmpty | None = Field(None, description="The text must match this regular expression.")
    guided_choice: Texts | None = Field(None, description="The text must be one of these.")
    guided_grammar: NonEmpty | None = Field(
        None, description="The text must match this grammar in llguidance's dialect of Lark."
    )

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Completions that are made of each prompt, or beams; `num_choices` of them are returned."""
        return self.num_choices

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """As the last event of a stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def includes_continuous_usage(self) -> bool:
        """In all its events."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats
