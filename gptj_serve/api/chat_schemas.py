"""The request body of `/v1/chat/completions`, and the fields with which a chat becomes a prompt."""

from typing import Annotated, Literal

from pydantic import Field

from gptj_serve.api.openai_sampling import OpenAISampling
from gptj_serve.api.schema_types import JSON, Body, NumTopLogprobs, off

MAX_MESSAGES = 512
MAX_PARTS = 64
MAX_TEMPLATE_VARIABLES = 32

NOT_SUPPORTED = "Not supported: refused unless off."

ChatTemplateVariables = Annotated[dict[str, JSON], Field(max_length=MAX_TEMPLATE_VARIABLES)]


class TextPart(Body):
    type: Literal["text"] = Field(description="Other parts, as images, are not supported.")
    text: str = Field(description="The part's text.")


class ChatMessage(Body):
    """Which roles there may be, and in which order, the chat template knows."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who says it.")
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)] = Field(
        description="What is said; of several parts each is a line."
    )
    name: str | None = Field(None, description="Who exactly says it, for templates that tell.")
    refusal: Annotated[str | None, off("")] = Field(None, description=NOT_SUPPORTED)
    audio: Annotated[JSON, off()] = Field(None, description=NOT_SUPPORTED)
    tool_calls: Annotated[JSON, off([])] = Field(None, description=NOT_SUPPORTED)
    function_call: Annotated[JSON, off()] = Field(None, description=NOT_SUPPORTED)

    @property
    def for_template(self) -> dict[str, str]:
        """As transformers hands it to a template: without what is not there; parts joined, as vLLM does."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatPrompt(Body):
    """How a chat becomes a prompt: vLLM's fields."""

    add_generation_prompt: bool | None = Field(
        None, description="End with the beginning of an answer. Default: true, unless continue_final_message."
    )
    continue_final_message: bool = Field(False, description="Go on with the last message instead of answering it.")
    chat_template_kwargs: ChatTemplateVariables | None = Field(
        None, description="Variables of the chat template's own."
    )
    chat_template: Annotated[str | None, off()] = Field(
        None, description="Not supported: the deployment has one, see `chat_template` in its configuration."
    )


class ChatCompletionRequest(OpenAISampling, ChatPrompt):
    messages: Messages = Field(description="The chat so far.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="At most so many new tokens. Default: as many as the model's context holds."
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The older name of the same.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: NumTopLogprobs | None = Field(
        None, description="With logprobs, also those of so many of the likeliest tokens."
    )

    metadata: dict[str, str] | None = Field(
        None, description="The caller's own labels; they have no effect by definition."
    )
    safety_identifier: str | None = Field(
        None, description="The caller's label for its end user; it has no effect by definition."
    )
    prompt_cache_key: str | None = Field(
        None, description="Computed beginnings are shared by their tokens, whatever this says."
    )
    modalities: Annotated[list[str] | None, off(["text"])] = Field(None, description='Only `["text"]`.')
    service_tier: Annotated[str | None, off("auto", "default")] = Field(None, description=NOT_SUPPORTED)
    store: Annotated[bool | None, off(False)] = Field(None, description=NOT_SUPPORTED)
    tools: Annotated[list[JSON] | None, off([])] = Field(None, description=NOT_SUPPORTED)
    tool_choice: Annotated[JSON, off("none", "auto")] = Field(
        None, description="Not supported: refused unless `none` or `auto`."
    )
    parallel_tool_calls: bool | None = Field(None, description="There are no tools; it has no effect by definition.")
    functions: Annotated[list[JSON] | None, off([])] = Field(None, description=NOT_SUPPORTED)
    function_call: Annotated[JSON, off("none", "auto")] = Field(
        None, description="Not supported: refused unless `none` or `auto`."
    )
    audio: Annotated[JSON, off()] = Field(None, description=NOT_SUPPORTED)
    prediction: Annotated[JSON, off()] = Field(None, description=NOT_SUPPORTED)
    reasoning_effort: Annotated[str | None, off("none")] = Field(None, description=NOT_SUPPORTED)
    verbosity: Annotated[str | None, off()] = Field(None, description=NOT_SUPPORTED)
    web_search_options: Annotated[JSON, off()] = Field(None, description=NOT_SUPPORTED)

    @property
    def new_token_limit(self) -> tuple[str, int | None]:
        """The field that says how many new tokens, and what it says; None: as many as fit."""
        if self.max_tokens is not None and self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens
