"""The parameters of a generation that all routes take alike."""

from typing import Annotated, Literal

from pydantic import Field

from gptj_serve.api.schema_types import (
    JSON_TUPLE,
    MAX_CACHE_SALT_CHARACTERS,
    MAX_TOKEN_RULES,
    Body,
    Count,
    Cutoff,
    GuidanceScale,
    NonEmpty,
    OpenAIPenalty,
    PositiveFloat,
    PositiveProbability,
    Probability,
    StopTokenIds,
    TokenId,
    TokenIds,
    Word,
    off,
)
from gptj_serve.types import MAX_DRAFT_TOKENS, MAX_PRIORITY

ExponentialDecay = Annotated[tuple[Count, PositiveFloat], JSON_TUPLE]
SequenceBias = Annotated[tuple[TokenIds, float], JSON_TUPLE]
TokenRules = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_RULES)]


class SamplingExtras(Body):
    """Names and meanings are those of transformers, where it has the parameter, else of vLLM. None is the default."""

    # what is drawn from
    min_p: Probability | None = Field(
        None, description="Only tokens at least so likely as this part of the likeliest one."
    )
    typical_p: PositiveProbability | None = Field(
        None, description="Only tokens of typical information that together have so much probability."
    )
    epsilon_cutoff: Cutoff | None = Field(None, description="Only tokens above this probability.")
    eta_cutoff: Cutoff | None = Field(
        None, description="Only tokens above a probability that depends on the distribution's entropy."
    )

    # what makes tokens less or more likely
    repetition_penalty: PositiveFloat | None = Field(
        None, description="Over 1 makes tokens of the prompt and of the text less likely; 1 is off."
    )
    presence_penalty: OpenAIPenalty | None = Field(
        None, description="Taken from the score of each token that is in the text already."
    )
    frequency_penalty: OpenAIPenalty | None = Field(
        None, description="Taken from the score of a token for each time that it is in the text already."
    )
    no_repeat_ngram_size: Count | None = Field(None, description="No sequence of so many tokens twice; 0 is off.")
    exponential_decay_length_penalty: ExponentialDecay | None = Field(
        None, description="`[start, factor]`: from `start` new tokens on, the end token's score grows by `factor`."
    )
    sequence_bias: Annotated[list[SequenceBias], Field(max_length=MAX_TOKEN_RULES)] | None = Field(
        None, description="`[[[token ids], bias], …]`: added to the score of the last id, where the others precede it."
    )
    guidance_scale: GuidanceScale | None = Field(
        None,
        description="Classifier-free guidance: over 1 leads towards the prompt and away from `negative_prompt`, below "
        "1 the other way; 1 is off.",
    )
    negative_prompt: NonEmpty | TokenIds | None = Field(
        None,
        description="What guidance leads away from: a text or token ids. Default: the prompt's last token alone.",
    )

    # what is possible at all
    bad_words: Annotated[list[Word], Field(max_length=MAX_TOKEN_RULES)] | None = Field(
        None, description="Words whose usual tokens never appear, at the beginning of a text or after a blank."
    )
    bad_words_ids: Annotated[list[TokenIds], Field(max_length=MAX_TOKEN_RULES)] | None = Field(
        None, description="The same as lists of token ids."
    )
    allowed_token_ids: TokenIds | None = Field(None, description="No other tokens than these.")
    suppress_tokens: TokenRules | None = Field(None, description="Ids of tokens that never appear.")
    begin_suppress_tokens: TokenRules | None = Field(None, description="Ids of tokens that are not the first new one.")
    forced_bos_token_id: TokenId | None = Field(
        None, description="The first new token after a prompt of a single token, as in transformers."
    )
    forced_eos_token_id: TokenId | TokenIds | None = Field(
        None, description="An id, or several, of which one is the last token if the maximum is reached."
    )

    # when it ends
    stop_token_ids: StopTokenIds | None = Field(None, description="Ids of tokens that end the text.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's end token.")
    max_time: PositiveFloat | None = Field(
        None,
        description="Seconds from the arrival at the engine; the first token after them is the last. 503 if they are "
        "over before the request's turn.",
    )

    # beam search
    length_penalty: float | None = Field(
        None, description="With beams: a beam's score is its log-probability / length ^ this. Default: 1."
    )
    early_stopping: bool | Literal["never"] | None = Field(
        None, description="With beams: when the search ends, as in transformers. Default: false."
    )

    # how it is computed
    prompt_lookup_num_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | None = Field(
        None,
        description="Draft so many tokens from what followed the same tokens before; the text stays the same, drafts "
        "that turn out right save steps. 0 is off.",
    )
    max_matching_ngram_size: Annotated[int, Field(ge=1, le=8)] | None = Field(
        None, description="With prompt_lookup_num_tokens: so many tokens at most must be the same. Default: 2."
    )
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = Field(
        None, description="Lower is served sooner; nothing waits for ever. Default: that of the HTTP request, or 0."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARACTERS)] | None = Field(
        None, description="Requests share what was computed of a common beginning only with those of the same salt."
    )

    watermark: Annotated[bool | None, off(False)] = Field(None, description="Not supported: refused unless off.")
