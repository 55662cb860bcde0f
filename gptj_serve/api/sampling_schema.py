"""The parameters of a generation that both surfaces take alike."""

from typing import Annotated, Literal

from pydantic import Field

from gptj_serve.api.schema_types import (
    JSON_TUPLE,
    MAX_CACHE_SALT_CHARACTERS,
    MAX_TOKEN_RULES,
    Body,
    Count,
    Cutoff,
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


class SamplingExtras(Body):
    """Names and meanings are those of transformers, where it has the parameter, else of vLLM. None is the default."""

    # what is drawn from
    min_p: Probability | None = None
    typical_p: PositiveProbability | None = None
    epsilon_cutoff: Cutoff | None = None
    eta_cutoff: Cutoff | None = None

    # what makes tokens less or more likely
    repetition_penalty: PositiveFloat | None = None
    presence_penalty: OpenAIPenalty | None = None
    frequency_penalty: OpenAIPenalty | None = None
    no_repeat_ngram_size: Count | None = None
    exponential_decay_length_penalty: ExponentialDecay | None = None
    sequence_bias: Annotated[list[SequenceBias], Field(max_length=MAX_TOKEN_RULES)] | None = None
    guidance_scale: float | None = None
    negative_prompt: NonEmpty | TokenIds | None = None

    # what is possible at all
    bad_words: Annotated[list[Word], Field(max_length=MAX_TOKEN_RULES)] | None = None
    bad_words_ids: Annotated[list[TokenIds], Field(max_length=MAX_TOKEN_RULES)] | None = None
    allowed_token_ids: TokenIds | None = None
    suppress_tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_RULES)] | None = None
    begin_suppress_tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_RULES)] | None = None
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: TokenId | TokenIds | None = None

    # when it ends
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    max_time: PositiveFloat | None = None  # seconds

    # beam search
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    # how it is computed
    prompt_lookup_num_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | None = None
    max_matching_ngram_size: Annotated[int, Field(ge=1, le=8)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None  # lower is sooner
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARACTERS)] | None = None

    watermark: Annotated[bool | None, off(False)] = None
