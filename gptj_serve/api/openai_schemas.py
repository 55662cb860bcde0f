"""The request body of `/v1/completions`."""

from typing import Annotated

from pydantic import Field

from gptj_serve.api.openai_sampling import OpenAISampling
from gptj_serve.api.schema_types import NonEmpty, NumSequences, NumTopLogprobs, Texts, TokenIdLists, TokenIds, off

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(OpenAISampling):
    prompt: NonEmpty | Texts | TokenIds | TokenIdLists = Field(
        description="A text, several texts, token ids, or several lists of those."
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        DEFAULT_MAX_TOKENS, description="At most so many new tokens; 0 goes with echo."
    )
    best_of: NumSequences | None = Field(
        None,
        description="Make so many completions of each prompt and return the `n` of the highest mean log-probability; "
        "with use_beam_search, so many beams. Default: `n`.",
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: NumTopLogprobs | None = Field(
        None, description="Return each token's log-probability and those of so many of the likeliest."
    )
    suffix: Annotated[str | None, off("")] = Field(None, description="Not supported: refused unless empty.")

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
    def num_candidates(self) -> int:
        return self.best_of or self.num_choices
