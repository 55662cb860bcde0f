"""Request bodies of `/v1/embeddings` and `/embed`."""

from typing import Annotated, Literal

from pydantic import Field

from gptj_serve.api.schema_types import Body, NonEmpty, NumKeptTokens, PositiveCount, Texts, TokenIdLists, TokenIds, off

Inputs = NonEmpty | Texts | TokenIds | TokenIdLists

_POOLING = "From the tokens' vectors one: their mean, or the last one."
_NORMALIZE = "Scale each vector to length 1."
_DIMENSIONS = "Refused unless it is the model's width: a GPT-J's vectors can't be cut."


class EmbeddingRequest(Body):
    """OpenAI's parameters; `pooling`, `normalize` and `truncate_prompt_tokens` are vLLM's or our own."""

    model: str = Field(description="The served model's name, as in `GET /v1/models`.")
    input: Inputs = Field(description="A text, several texts, token ids, or several lists of those.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of little-endian float32. Default: float."
    )
    dimensions: PositiveCount | None = Field(None, description=_DIMENSIONS)
    user: str | None = Field(None, description="The caller's label for its end user; it has no effect by definition.")
    pooling: Literal["mean", "last"] = Field("mean", description=_POOLING)
    normalize: bool = Field(True, description=_NORMALIZE)
    truncate_prompt_tokens: NumKeptTokens | None = Field(
        None, description="Keep so many of an input's last tokens; -1: as many as fit."
    )


class EmbedRequest(Body):
    """Text Embeddings Inference's parameters, and `pooling`, which there is set for the whole server."""

    inputs: Inputs = Field(description="A text, several texts, token ids, or several lists of those.")
    normalize: bool = Field(True, description=_NORMALIZE)
    truncate: bool = Field(False, description="Cut inputs that are longer than the model's context.")
    truncation_direction: Literal["right", "left", "Right", "Left"] = Field(
        "right", description="With truncate, the side on which tokens are cut off."
    )
    dimensions: PositiveCount | None = Field(None, description=_DIMENSIONS)
    pooling: Literal["mean", "last"] = Field("mean", description=_POOLING)
    prompt_name: Annotated[str | None, off()] = Field(None, description="Not supported: refused unless null.")
    encoding_format: Annotated[str | None, off("float")] = Field(None, description="Only `float`.")
